"""How many images a CPU computes together at best: what `micro_batch` of a family is chosen by.

    python benchmarks/micro_batches.py MobileNetV2 ResNet50

Images a second of `predict` on 16 images, for each size of the micro-batches, which take turns: the median
and the best of a quarter of a minute.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import numpy as np

import fzoo
from fzoo.inference.batches import compiled, run

SIZES, SECONDS = (1, 2, 4, 8), 15


def speeds(name: str) -> dict[int, list[float]]:
    """Measure images a second of each call, for each size."""
    module, variables = fzoo.optimize_for_inference(*fzoo.load(name, weights=None))
    images = jax.device_put(np.random.default_rng(0).random((16, *module.example_shape), np.float32))
    programs, chosen = {}, type(module).micro_batch
    for size in SIZES:
        type(module).micro_batch = size
        compiled.cache_clear()
        programs[size] = compiled(run, jax.default_backend(), np.dtype(np.float32))
        programs[size](module, None, variables, images).block_until_ready()
    type(module).micro_batch = chosen
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        for size, program in programs.items():
            start = time.perf_counter()
            program(module, None, variables, images).block_until_ready()
            found[size].append(len(images) / (time.perf_counter() - start))
    return found


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    models = parser.parse_args().models
    fzoo.reuse_memory()
    print(f"| images/s, micro-batches of | {' | '.join(map(str, SIZES))} |\n|-|{'-|' * len(SIZES)}")
    for name in models:
        cells = [f"{statistics.median(each):.3g} ({max(each):.3g})" for each in speeds(name).values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
