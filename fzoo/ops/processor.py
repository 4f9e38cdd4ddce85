"""What is known of this machine's processor, which decides what is the fastest way to compute."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from pathlib import Path

#: Instruction sets that decide how fast a CPU multiplies, by the kernel's names of them in /proc/cpuinfo.
_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "avx_vnni": "AVX VNNI",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "NEON BF16",
}


def processor_name(cpuinfo: str | os.PathLike = "/proc/cpuinfo") -> str:
    """Name the processor as its maker does, on Linux; elsewhere as Python's `platform` knows it.

    Args:
        cpuinfo: what Linux says of the processor.
    """
    with contextlib.suppress(OSError):
        for line in Path(cpuinfo).read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def instruction_sets(cpuinfo: str | os.PathLike = "/proc/cpuinfo") -> tuple[str, ...]:
    """Name the processor's vector and matrix instructions, on Linux; none elsewhere.

    Which way of computing is the fastest depends on these: numbers that were measured hold for such a processor.

    Args:
        cpuinfo: what Linux says of the processor.
    """
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        return ()
    flags = next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return tuple(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags)


@functools.cache
def has_wide_vectors() -> bool:
    """Tell whether it computes in vectors of 512 bits without slowing down for it: all that have AVX512_BF16, too."""
    return "AVX-512 BF16" in instruction_sets()


def has_bfloat16() -> bool:
    """Tell whether it multiplies numbers of bfloat16; False as well where that can't be known."""
    return any("BF16" in name for name in instruction_sets())
