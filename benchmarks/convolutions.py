"""Ways to lower a convolution, GFLOP/s each, on this machine's CPU: why `fzoo.ops` chooses as it does.

    python benchmarks/convolutions.py [bfloat16]

Each way is a program of its own; calls take turns, and the least time counts, with a bias and a ReLU behind it and a
kernel that is not in the cache, as in a network (`fzoo.inference.tuning` times the convolutions of one). "YNNPACK" is
XLA's own convolution where it is handed to that. The way that an optimized network takes untimed is marked by a star.
"""

from __future__ import annotations

import importlib.metadata
import sys

from fzoo import ops
from fzoo.inference.compiler import fusion_choices, usual_fusions
from fzoo.inference.tuning import candidates_of, time_forms, untimed_form
from fzoo.ops.processor import instruction_sets

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

#: Columns: ways as `candidates_of` names them, and what YNNPACK makes of XLA's own.
YNNPACK = "YNNPACK"
WAYS = (
    ops.LIBRARY,
    YNNPACK,
    *(form.name for form in ops.CPU_FORMS),
    "winograd prepared, tile 2",
    "winograd prepared, tile 4",
)


def measure(conv: ops.Convolution) -> dict[str, float]:
    """Measure GFLOP/s of each way; the operations are the plain sum's, whatever a way does."""
    found = dict(zip(fusion_choices(), time_forms(conv, candidates_of(conv, kept=True)), strict=True))
    seconds = found[usual_fusions(conv.dtype)]
    if "products and convolutions" in found:
        seconds = seconds | {YNNPACK: found["products and convolutions"][ops.LIBRARY]}
    return {way: conv.flops / each / 1e9 for way, each in seconds.items()}


def main(dtype: str = "float32") -> None:
    """Print a Markdown table, under a line that names the kind of processor."""
    print(f"Processor: {', '.join(instruction_sets())}; jaxlib {importlib.metadata.version('jaxlib')}; {dtype}\n")
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
                dtype,
            )
            found, star = measure(conv), untimed_form(conv, kept=True)
            cells = [f"{found[way]:.0f}" + "*" * (way == star) if way in found else "" for way in WAYS]
            about = f"{images} | {height} x {height} x {inputs} | {kernel[0]} x {kernel[1]} x {outputs} | {stride}"
            print(f"| {about} | {groups} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
