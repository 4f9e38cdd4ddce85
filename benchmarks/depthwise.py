"""Ways to lower a depthwise convolution, GFLOP/s each, on the default device: why `fzoo.ops` does what it does.

python benchmarks/depthwise.py
"""

from __future__ import annotations

import functools
import statistics
import time

import jax
import numpy as np
from jax import lax

from fzoo.ops import NHWC, depthwise_shifted

#: (height and width, channels, kernel, stride), from MobileNet, Xception and NASNet.
SHAPES = (
    (112, 32, 3, 1),
    (56, 128, 3, 1),
    (28, 256, 3, 1),
    (14, 512, 3, 1),
    (19, 728, 3, 1),
    (28, 88, 5, 1),
    (56, 64, 7, 2),
)


def main() -> None:
    """Print a Markdown table."""
    print("| input | kernel | stride | `lax.conv_general_dilated` | shifted multiply-adds |\n|-|-|-|-|-|")
    rng = np.random.default_rng(0)
    for size, channels, kernel, stride in SHAPES:
        x = rng.normal(size=(1, size, size, channels)).astype(np.float32)
        w = rng.normal(size=(kernel, kernel, 1, channels)).astype(np.float32)
        library = functools.partial(
            lax.conv_general_dilated,
            window_strides=(stride, stride),
            padding="SAME",
            dimension_numbers=NHWC,
            feature_group_count=channels,
        )
        forms = [jax.jit(library), functools.partial(depthwise_shifted, strides=(stride, stride), padding="SAME")]
        flops = 2 * kernel**2 * channels * (-(-size // stride)) ** 2
        speeds = []
        for form in forms:
            jax.block_until_ready(form(x, w))
            times = []
            for _ in range(20):
                start = time.perf_counter()
                jax.block_until_ready(form(x, w))
                times.append(time.perf_counter() - start)
            speeds.append(f"{flops / statistics.median(times) / 1e9:.1f}")
        print(f"| {size} x {size} x {channels} | {kernel} x {kernel} | {stride} | {' | '.join(speeds)} |", flush=True)


if __name__ == "__main__":
    main()
