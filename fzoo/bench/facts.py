"""What a benchmark ran on, and with which versions."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fzoo.bench.engines import ENGINES
from fzoo.ops.processor import instruction_sets, processor_name
from fzoo.types import Json

#: What was measured of an engine; `results.schema.json` says it of each field.
Row = dict[str, Json]


def versions(name: str) -> dict[str, str]:
    """List the versions of an engine's packages."""
    own = () if ENGINES[name].packages else ("fzoo", "flax")
    on_jax = ("jax", "jaxlib") if own or ENGINES[name].env.get("KERAS_BACKEND") == "jax" else ()
    packages = {
        package: distributions().get(package, [package])[0] for package in (*own, *ENGINES[name].packages, *on_jax)
    }
    return {package: version(package, distribution) for package, distribution in packages.items()}


def version(package: str, distribution: str) -> str:
    """Return a package's version; one that was not installed but lies on the path says it itself."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))


@functools.cache
def distributions() -> Mapping[str, list[str]]:
    """Map each package that can be imported to what was installed for it: tensorflow may be tensorflow-cpu."""
    return importlib.metadata.packages_distributions()


@functools.cache
def accelerator() -> str:
    """Ask NVIDIA's tool for the GPUs, their driver and power limit; nothing where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def machine(rows: Sequence[Row]) -> dict[str, Json]:
    """Describe what it ran on, and how. The instruction sets decide which way of computing is the fastest."""
    meminfo = Path("/proc/meminfo")
    numbers = {key: value for row in rows for key, value in versions(row["engine"]).items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["fzoo", *sys.argv[1:]]),
        "processor": processor_name(),
        "instruction_sets": list(instruction_sets()),
        "cores": os.cpu_count(),
        "accelerator": accelerator(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "memory_gib": round(int(meminfo.read_text().split()[1]) / 2**20) if meminfo.exists() else None,
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, **numbers},
    }
