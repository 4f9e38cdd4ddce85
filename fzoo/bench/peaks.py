"""What the makers of accelerators publish: how many operations a second a chip does at best, on dense matrices."""

from __future__ import annotations

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """A chip's published peaks, in TFLOP/s without sparsity.

    Attributes:
        chip: what JAX's `device_kind` matches, a regular expression; the first that fits counts.
        float32: products of float32 in float32; None where the chip has no units for it.
        default: products of float32 as JAX computes them by default: TF32 on GPUs, bfloat16 on TPUs.
        bfloat16: products of bfloat16, summed in float32.
        source: where that is published.
    """

    chip: str
    float32: float | None
    default: float | None
    bfloat16: float | None
    source: str


#: The chips that are known. Data sheets of NVIDIA's give figures with sparsity, which are halved here.
PEAKS = (
    Peak(r"H100 (80GB HBM3|SXM)", 66.9, 494.7, 989.4, "NVIDIA H100 Tensor Core GPU Architecture, table 1 (SXM5)"),
    Peak(r"H100 PCIe", 51.2, 378, 756, "NVIDIA H100 Tensor Core GPU Architecture, table 1 (PCIe)"),
    Peak(r"H100 NVL", 60, 417.5, 835.5, "NVIDIA H100 data sheet (NVL)"),
    Peak(r"H200", 66.9, 494.7, 989.4, "NVIDIA H200 data sheet (SXM)"),
    Peak(r"A100", 19.5, 156, 312, "NVIDIA A100 data sheet"),
    Peak(r"\bL40S", 91.6, 183, 362, "NVIDIA L40S data sheet"),
    Peak(r"\bL4\b", 30.3, 60, 121, "NVIDIA L4 data sheet"),
    Peak(r"\bA10G?\b", 31.2, 62.5, 125, "NVIDIA A10 data sheet"),
    Peak(r"\bT4\b", 8.1, 8.1, None, "NVIDIA T4 data sheet: no TF32, no bfloat16"),
    Peak(r"V100", 15.7, 15.7, None, "NVIDIA V100 data sheet (SXM2): no TF32, no bfloat16"),
    Peak(r"TPU v4", None, 275, 275, "Google Cloud, TPU v4"),
    Peak(r"TPU v5 ?(lite|e)", None, 197, 197, "Google Cloud, TPU v5e"),
    Peak(r"TPU v5", None, 459, 459, "Google Cloud, TPU v5p"),
    Peak(r"TPU v6", None, 918, 918, "Google Cloud, TPU v6e"),
)


def published_peak(device_kind: str, dtype: str, precision: str) -> float | None:
    """Return a chip's published peak in TFLOP/s, or None where it is not known.

    Args:
        device_kind: JAX's name of the device.
        dtype: "float32" or "bfloat16".
        precision: of `engines.PRECISIONS`, for float32.
    """
    for peak in PEAKS:
        if re.search(peak.chip, device_kind):
            if dtype == "bfloat16":
                return peak.bfloat16
            return peak.float32 if precision == "highest" else peak.default
    return None
