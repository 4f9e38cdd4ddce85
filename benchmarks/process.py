"""What the whole process costs: memory of `predict`, and the start of `fzoo classify`.

    python benchmarks/process.py ResNet50

Memory is the growth of the process while 1,000 images of uint8 go through `predict`, beside the size of the weights
plus that of all layers' outputs for one micro-batch. The start is that of the command line with a warm compilation
cache, beside a process that only imports JAX and Flax; random weights, one image, medians of five.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import fzoo
from fzoo.bench import worker
from fzoo.inference import MICRO_BATCH
from fzoo.layers import trace


def memory(name: str, count: int) -> None:
    """Print the growth of the peak, and what it is compared with."""
    module, variables = fzoo.load(name, weights=None)
    images = np.zeros((count, *module.example_shape), np.uint8)
    images[:] = 127  # so that its pages are there
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables)) / 2**20
    outputs = 4 * MICRO_BATCH * sum(int(np.prod(node.shape)) for node in trace(module).nodes) / 2**20
    before = worker.memory()["peak_mib"]
    fzoo.predict(module, variables, images, preprocess=name)
    grown = worker.memory()["peak_mib"] - before
    print(
        f"{name}, predict on {count} images: {grown:.0f} MiB more; weights {weights:.0f} MiB, all outputs for "
        f"{MICRO_BATCH} images {outputs:.0f} MiB; (weights + growth) / (weights + outputs) = "
        f"{(weights + grown) / (weights + outputs):.2f}"
    )


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
    options = parser.parse_args()
    for name in options.models:
        start(name)
        memory(name, options.images)


if __name__ == "__main__":
    main()
