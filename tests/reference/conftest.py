"""What nvidia-modelopt exports. Run by `make test-reference`, which makes its environment."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
TREE = HERE.parents[1]


@pytest.fixture(scope="session")
def reference(request, tmp_path_factory) -> Path:
    """The folder of run_reference.py with every case that this session's tests ask for."""
    python = os.environ.get("MODELQ_REFERENCE_PYTHON") or str(TREE / ".venv-reference" / "bin" / "python")
    if not Path(python).exists():
        pytest.skip("no environment .venv-reference: make test-reference makes it")
    folder = tmp_path_factory.mktemp("reference")
    wanted = ["/".join(item.callspec.params[key] for key in ("family", "format")) for item in request.session.items
              if "reference" in item.fixturenames and hasattr(item, "callspec")]
    with open(folder / "log", "w") as log:
        done = subprocess.run([python, str(HERE / "run_reference.py"), str(folder), *wanted], stdout=log, stderr=log, cwd=folder,
                              timeout=1800, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""})
    assert done.returncode == 0, (folder / "log").read_text()[-2000:]
    return folder
