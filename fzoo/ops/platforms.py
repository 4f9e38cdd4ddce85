"""Which platform's form of an operation is traced: each one's, or that of the platform where it is known."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import TypeVar

from jax import lax
from jaxtyping import Array

Result = TypeVar("Result")

_KNOWN: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)

_ALONE: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def traced_for(platform: str | None, *, alone: bool = False) -> Iterator[None]:
    """Have networks trace the forms of one platform alone: a gradient's trace takes some 0.6 of its time.

        @jax.jit
        def step(params, images):
            with fzoo.devices.traced_for("cpu"):
                return jax.grad(loss_of)(params, images)

    A program that is run on another platform all the same is right, and slow. `fzoo.predict`, `fzoo.features`,
    `fzoo.finetune` and the commands do so themselves.

    Args:
        platform: as JAX calls it ("cpu", "gpu", "tpu"); None for all, which is JAX's way.
        alone: that the program runs as it is traced, on one device of this machine: it is neither exported nor split
            over several by XLA, and nobody derives it. Then it may call a CPU's library itself (`fzoo.ops.onednn`).
    """
    tokens = _KNOWN.set(platform), _ALONE.set(alone)
    try:
        yield
    finally:
        _KNOWN.reset(tokens[0])
        _ALONE.reset(tokens[1])


def known_platform() -> str | None:
    """Return the platform that is traced for; None where it may be any. What caches a trace has it in its key."""
    return _KNOWN.get()


def may_call_library() -> bool:
    """Tell whether what is traced may call a library of this machine's CPU, past XLA."""
    return _KNOWN.get() == "cpu" and _ALONE.get()


def by_platform(
    platform: str | None, *arrays: Array, cpu: Callable[..., Result], default: Callable[..., Result]
) -> Result:
    """Run a CPU's form of an operation, or that of all others; where the platform is not known, as it is lowered."""
    if platform is None:
        return lax.platform_dependent(*arrays, cpu=cpu, default=default)
    return (cpu if platform == "cpu" else default)(*arrays)
