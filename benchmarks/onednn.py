"""What oneDNN is worth: an optimized network with it and without, in turns in one process.

    python benchmarks/onednn.py ResNet50 ConvNeXtTiny
    python benchmarks/onednn.py ResNet50 MobileNetV2 --dtype bfloat16

Images a second of `predict` for 1 and for 16 images that lie on the device, the best of some seconds of turns: there
are moments in which a virtual machine runs at half its speed.
"""

from __future__ import annotations

import argparse
import functools
from unittest import mock

import jax
import numpy as np

import fzoo
from fzoo.inference import batches
from fzoo.inference.batches import compiled, for_devices, run
from fzoo.inference.optimize import run_again
from fzoo.inference.tuning import time_in_turns

BATCHES, SECONDS = (1, 16), 3  # for each of the four


def speeds(name: str, dtype: str) -> dict[tuple[bool, int], float]:
    """Return images a second, by whether oneDNN is called and the number of images."""
    module, variables = fzoo.load(name, weights=None)
    module, variables = fzoo.optimize_for_inference(module, variables, dtype=dtype)
    rng, calls = np.random.default_rng(0), {}
    for called in (False, True):
        compiled.cache_clear()
        with mock.patch.object(batches, "has_onednn", lambda called=called: called):
            for count in BATCHES:
                images = jax.device_put(rng.uniform(-1, 1, (count, *module.example_shape)).astype(np.float32))
                call, _, placed, _ = for_devices(run, module, variables, images, None)
                calls[called, count] = functools.partial(run_again, call, module, placed, images)
                jax.block_until_ready(calls[called, count](0))
    return {way: way[1] / seconds for way, seconds in time_in_turns(calls, SECONDS).items()}


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    fzoo.reuse_memory()
    print(f"| {arguments.dtype}, images/s, batch 1 / 16 | without oneDNN | with it | ratio |\n|-|-|-|-|")
    for name in arguments.models:
        found = speeds(name, arguments.dtype)
        without, there = ([found[called, count] for count in BATCHES] for called in (False, True))
        cells = [" / ".join(f"{speed:.3g}" for speed in each) for each in (without, there)]
        ratios = " / ".join(f"{b / a:.2f}" for a, b in zip(without, there, strict=True))
        print(f"| {name} | {cells[0]} | {cells[1]} | {ratios} |", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
