"""The tests catch mistakes: those of `mutants.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mutant_is_caught():
    """In processes of their own, as a user starts them."""
    command = [sys.executable, str(Path(__file__).with_name("mutants.py"))]
    ours = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "XDG_CACHE_HOME")  # of this session
    env = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
