"""Settings of the whole process. The library calls none of them; the command line does."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import jax
import platformdirs

#: glibc's mallopt parameters (malloc.h), and the values: memory up to 1 GiB comes from the heap, which keeps 2 GiB.
_MALLOPT = {-3: 1 << 30, -1: (1 << 31) - 1}


def enable_compilation_cache(folder: str | os.PathLike | None = None) -> Path:
    """Keep compiled programs on disk, so that the next process reads what this one compiled.

    This is JAX's persistent cache, told to keep everything; JAX makes the keys, of the program, the versions, the
    device and the options. Call it before anything is compiled. Programs of optimized networks that call oneDNN, on a
    CPU with AVX512_BF16, can't be kept.

    Args:
        folder: where; by default fzoo's part of the user's cache (~/.cache/fzoo/xla on Linux).

    Returns:
        The folder, which is made if it is not there.

    Raises:
        OSError: it can't be made or written to.
    """
    if folder is None:
        folder = platformdirs.user_cache_path("fzoo") / "xla"
    folder = Path(folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} can't be written to")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def reuse_memory() -> bool:
    """Keep freed memory for the next allocation, instead of giving it back to the system (Linux with glibc).

    XLA:CPU allocates a program's buffers at each call. Those over 32 MiB are fresh pages from the system each time,
    which costs time in large networks and batches; in exchange, the process stays at its largest size.

    Returns:
        Whether the C library took it; elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return sum(mallopt(parameter, value) for parameter, value in _MALLOPT.items()) == len(_MALLOPT)
