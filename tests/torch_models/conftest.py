"""Tests with torch and transformers, in an environment that has them: make test-torch."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
torch = pytest.importorskip("torch", reason="needs torch: make test-torch")
pytest.importorskip("transformers", reason="needs transformers: make test-torch")


@pytest.fixture(autouse=True)
def one_thread():
    """As the golden set was made."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
