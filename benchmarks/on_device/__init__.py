"""The parts of `accelerator.py`: the cases, what runs on the device, its processes, and the tables."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests have the small networks, which are alive

#: The platforms that were asked for; the parent itself keeps off the device, which one process at a time may hold. This
#: is said here, before any other part of the package, since JAX reads the variable when it is imported.
PLATFORMS = os.environ.get("JAX_PLATFORMS")
if "--phase" not in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"
