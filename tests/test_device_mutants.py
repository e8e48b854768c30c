"""Without a wait between streams, or the record that it waits for, the device runtime fails its tests (which are not tried is in the script).
MODELQ_EVERY_WAIT=1 tries every one, else a sample."""
import os
import re
import shutil
import subprocess
import sys

import pytest

from cuda_library import ROOT, SANITIZED, library_to_test

SAMPLE = "1" if os.environ.get("MODELQ_EVERY_WAIT") == "1" else "12"


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.skipif(shutil.which("g++") is None or SANITIZED, reason="needs g++, and processes without sanitizers")
def test_no_wait_is_missed():
    environment = {**os.environ, "MODELQ_CUDA_EMULATED": str(library_to_test())}
    done = subprocess.run([sys.executable, str(ROOT / "scripts/wait_mutants.py"), "--sample", SAMPLE], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r" noticed$", done.stdout, re.M)) >= 2, done.stdout
