"""How many images a CPU computes together at best: what `fzoo.inference.MICRO_BATCH` is chosen by.

    python benchmarks/micro_batches.py MobileNetV2 ResNet50

Images a second of `predict` on 16 images, for each size of the micro-batches, which take turns; the best of six.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

import fzoo
from fzoo import inference

SIZES, TURNS = (1, 2, 4, 8), 6


def speeds(name: str) -> dict[int, float]:
    """Images a second for each size."""
    module, variables = fzoo.optimize_for_inference(*fzoo.load(name, weights=None))
    images = jax.device_put(np.random.default_rng(0).random((16, *module.example_shape), np.float32))
    programs = {}
    for size in SIZES:
        inference.MICRO_BATCH = size
        inference.compiled.cache_clear()
        programs[size] = inference.compiled(inference.run, jax.default_backend(), np.dtype(np.float32))
        programs[size](module, None, variables, images).block_until_ready()
    best = dict.fromkeys(SIZES, float("inf"))
    for _ in range(TURNS):
        for size, program in programs.items():
            start = time.perf_counter()
            program(module, None, variables, images).block_until_ready()
            best[size] = min(best[size], time.perf_counter() - start)
    return {size: 16 / seconds for size, seconds in best.items()}


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    models = parser.parse_args().models
    fzoo.reuse_memory()
    print(f"| images/s, micro-batches of | {' | '.join(map(str, SIZES))} |\n|-|{'-|' * len(SIZES)}")
    for name in models:
        print(f"| {name} | {' | '.join(f'{speed:.3g}' for speed in speeds(name).values())} |", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
