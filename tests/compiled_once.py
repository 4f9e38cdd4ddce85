"""One compilation cache for the processes of a session: what one of them has compiled, the others read."""

from pathlib import Path


def shared_cache(folder: str | Path) -> dict[str, str]:
    """Return the environment in which JAX keeps every program in a folder; it reads it when it is imported."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
