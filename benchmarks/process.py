"""What the whole process costs: memory of `predict`, and the start of `fzoo classify`.

    python benchmarks/process.py ResNet50

Memory is the growth of the process's peak while 1,000 images of uint8 go through `predict`, beside the size of the
weights plus the buffers that XLA plans for one micro-batch; once while it compiles, once with the program from the
compilation cache. The start is that of the command line with a warm compilation cache, beside a process that only
imports JAX and Flax; random weights, one image, medians of five.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import fzoo
from fzoo.bench import worker
from fzoo.inference.batches import BATCH_SIZE, compiled, run


def memory(name: str, count: int) -> None:
    """Print the growth of the peak, and what it is compared with, for a process that compiles and one that need not."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, name, "--images", str(count), "--cache", folder]
        for what in ("compiling", "with the program cached"):
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            needed = found["weights"] + found["micro_batch"]
            print(
                f"{name}, predict on {count} images, {what}: {found['grown']:.0f} MiB more; weights "
                f"{found['weights']:.0f} MiB, buffers for a micro-batch {found['micro_batch']:.0f} MiB; (weights + "
                f"growth) / (weights + buffers) = {(found['weights'] + found['grown']) / needed:.2f}",
                flush=True,
            )


def grown(name: str, count: int, cache: Path) -> None:
    """Run the process that is measured."""
    fzoo.enable_compilation_cache(cache)
    module, variables = fzoo.load(name, weights=None)
    images = np.zeros((count, *module.example_shape), np.uint8)
    images[:] = 127  # so that its pages are there
    before = worker.memory()["peak_mib"]
    fzoo.predict(module, variables, images, preprocess=name)
    peak = worker.memory()["peak_mib"]
    call: Any = compiled(run, jax.default_backend(), np.dtype(np.float32))
    buffers = call.lower(module, name, variables, images[:BATCH_SIZE]).compile().memory_analysis()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    found = {"grown": peak - before, "weights": weights / 2**20, "micro_batch": buffers.temp_size_in_bytes / 2**20}
    print(json.dumps(found))


def start(name: str) -> None:
    """Print how long the command line takes to answer, and the imports alone."""
    with tempfile.TemporaryDirectory() as folder:
        module, variables = fzoo.load(name, weights=None, classes=10)
        fzoo.save_keras_weights(module, variables, Path(folder, "weights.h5"))
        Image.fromarray(np.full((300, 400, 3), 127, np.uint8)).save(Path(folder, "image.png"))
        command = [sys.executable, "-m", "fzoo.cli", "classify", "image.png", "-m", name, "-w", "weights.h5"]
        commands = {
            "import jax, flax": [sys.executable, "-c", "import jax, flax"],
            "fzoo classify": [*command, "--classes", "10"],
            "fzoo classify --no-cache": [*command, "--classes", "10", "--no-cache"],
        }
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        times: dict[str, list[float]] = {what: [] for what in commands}
        for _ in range(6):
            for what, each in commands.items():
                begin = time.perf_counter()
                subprocess.run(each, cwd=folder, env=environment, check=True, capture_output=True)
                times[what].append(time.perf_counter() - begin)
    for what, found in times.items():
        print(f"{name}, {what}: {statistics.median(found[1:]):.2f} s (the first time {found[0]:.2f} s)")


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["ResNet50"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cache:
        grown(options.models[0], options.images, options.cache)
        return
    for name in options.models:
        start(name)
        memory(name, options.images)


if __name__ == "__main__":
    main()
