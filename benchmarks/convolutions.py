"""Ways to lower a convolution, GFLOP/s each, on the default device: why `fzoo.ops` chooses as it does.

    python benchmarks/convolutions.py

Each way is a program of its own; calls alternate, and the median counts. "XLA" is `lax.conv_general_dilated` with what
fzoo compiles with on CPU, "XLA + YNNPACK" with JAX's defaults. The way that `fzoo.ops` takes is marked by a star.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from jax import lax

from fzoo import ops
from fzoo.inference.compiler import compiler_options
from fzoo.ops.convolution import FILTERED
from fzoo.ops.processor import instruction_sets
from fzoo.ops.shapes import NHWC

#: (height and width, channels in, channels out, kernel, stride, groups), from the networks.
SHAPES = (
    (112, 32, 32, (3, 3), 1, 32),
    (56, 128, 128, (3, 3), 2, 128),
    (28, 256, 256, (3, 3), 1, 256),
    (14, 512, 512, (3, 3), 1, 512),
    (19, 728, 728, (3, 3), 1, 728),
    (28, 88, 88, (5, 5), 1, 88),
    (56, 64, 256, (1, 1), 1, 1),
    (28, 512, 128, (1, 1), 1, 1),
    (14, 1024, 256, (1, 1), 1, 1),
    (7, 2048, 512, (1, 1), 1, 1),
    (224, 3, 32, (3, 3), 2, 1),
    (224, 3, 64, (3, 3), 1, 1),
    (224, 3, 64, (7, 7), 2, 1),
    (224, 64, 64, (3, 3), 1, 1),
    (112, 128, 128, (3, 3), 1, 1),
    (56, 256, 256, (3, 3), 1, 1),
    (28, 512, 512, (3, 3), 1, 1),
    (14, 512, 512, (3, 3), 1, 1),
    (56, 64, 64, (3, 3), 1, 1),
    (28, 128, 128, (3, 3), 1, 1),
    (14, 256, 256, (3, 3), 1, 1),
    (7, 512, 512, (3, 3), 1, 1),
    (56, 128, 32, (3, 3), 1, 1),
    (35, 96, 96, (3, 3), 1, 1),
    (28, 256, 256, (3, 3), 2, 1),
    (17, 192, 192, (7, 1), 1, 1),
    (35, 48, 64, (5, 5), 1, 1),
    (56, 128, 128, (3, 3), 1, 32),
    (28, 256, 256, (3, 3), 1, 32),
    (14, 512, 512, (3, 3), 1, 32),
    (7, 1024, 1024, (3, 3), 1, 32),
    (14, 152, 152, (3, 3), 1, 19),
    (14, 336, 336, (3, 3), 1, 14),
    (28, 240, 240, (3, 3), 1, 6),
    (14, 432, 432, (3, 3), 1, 9),
)

WAYS = (
    "XLA",
    "XLA + YNNPACK",
    "shifted",
    "by groups",
    "product",
    "columns",
    "columns by rows",
    "Winograd",
    "Winograd, prepared",
)


def ways(conv: ops.Convolution) -> dict[str, tuple[Callable, bool]]:
    """Return for each way that can be: the function of images and kernel, and whether YNNPACK is on."""

    def library(x, w):
        return lax.conv_general_dilated(
            x, w, conv.strides, conv.pads, dimension_numbers=NHWC, feature_group_count=conv.groups
        )

    found = {"XLA": (library, False), "XLA + YNNPACK": (library, True)}
    if ops.is_depthwise(conv):
        found["shifted"] = (lambda x, w: ops.depthwise_shifted(conv, x, w), False)
    if 1 < conv.groups < conv.inputs:
        found["by groups"] = (lambda x, w: ops.by_groups(conv, x, w), False)
    if conv.groups == 1:
        found["columns"] = (lambda x, w: ops.columns(conv, x, w), False)
    if ops.is_pointwise(conv):
        found["product"] = (lambda x, w: ops.pointwise(conv, x, w), False)
        del found["columns"]
    if ops.is_small_stem(conv):
        found["columns by rows"] = (lambda x, w: ops.row_columns(conv, x, w), False)
    if conv.kernel in FILTERED and conv.groups == 1 and conv.strides == (1, 1) and conv.inputs > 3:
        found["Winograd"] = (lambda x, w: ops.winograd(conv, x, w), False)
        found["Winograd, prepared"] = (lambda x, w: ops.winograd_transformed(conv, x, w), False)
    return found


def chosen(conv: ops.Convolution) -> str:
    """Name the way that a plain network takes on CPU."""
    form = ops.cpu_form(conv)
    names = {
        ops.depthwise_shifted: "shifted",
        ops.by_groups: "by groups",
        ops.pointwise: "product",
        ops.columns: "columns",
        ops.row_columns: "columns by rows",
        ops.winograd: "Winograd",
    }
    return names[form] if form else "XLA"


def measure(conv: ops.Convolution, seconds: float) -> dict[str, float]:
    """Measure GFLOP/s of each way; the operations are the plain sum's, whatever a way does."""
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.normal(size=(conv.images, conv.height, conv.width, conv.inputs)).astype(np.float32))
    shape = (*conv.kernel, conv.inputs // conv.groups, conv.outputs)
    kernel = jax.device_put(rng.normal(size=shape).astype(np.float32))
    calls = {}
    for name, (function, ynnpack) in ways(conv).items():
        options = None if ynnpack else compiler_options(jax.default_backend())
        w = ops.winograd_kernel(kernel, ops.winograd_tile(conv)) if "prepared" in name else kernel
        calls[name] = (jax.jit(function, compiler_options=options), w)
        jax.block_until_ready(calls[name][0](x, w))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["XLA"]) < 5:
        for name, (call, w) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(x, w))
            times[name].append(time.perf_counter() - start)
    return {name: conv.flops / statistics.median(t) / 1e9 for name, t in times.items()}


def main() -> None:
    """Print a Markdown table, under a line that names the kind of processor."""
    print(f"Processor: {', '.join(instruction_sets())}; jaxlib {importlib.metadata.version('jaxlib')}\n")
    print("| images | input | kernel | stride | groups | " + " | ".join(WAYS) + " |")
    print("|" + "-|" * (5 + len(WAYS)))
    for height, inputs, outputs, kernel, stride, groups in SHAPES:
        for images in (1, 4):
            conv = ops.Convolution.of(
                (images, height, height, inputs),
                (*kernel, inputs // groups, outputs),
                (stride, stride),
                "SAME",
                groups,
            )
            found = measure(conv, 1.0)
            cells = [f"{found[w]:.1f}" + ("*" if w == chosen(conv) else "") if w in found else "" for w in WAYS]
            about = f"{images} | {height} x {height} x {inputs} | {kernel[0]} x {kernel[1]} x {outputs} | {stride}"
            print(f"| {about} | {groups} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
