"""What fzoo's programs are compiled with: XLA's options, by what this jaxlib knows of them.

Options come and go with jaxlib, which aborts a process for an unknown flag in XLA_FLAGS and fails to compile with an
unknown option. So every option is asked for here first.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fzoo.layers.record import FUSIONS
from fzoo.ops.processor import has_wide_vectors
from fzoo.types import DTypeLike

#: The value of one of XLA's options.
Setting = bool | int | float | str

#: Which operations XLA:CPU hands to YNNPACK.
YNN_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"

_PRODUCTS, _CONVOLUTIONS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"

#: What it may be handed: XLA's words for each of `FUSIONS`. Its sums are what jax issue 39103 is about.
FUSION_TYPES: dict[str, str] = dict(zip(FUSIONS, ("", _PRODUCTS, f"{_PRODUCTS},{_CONVOLUTIONS}"), strict=True))

#: Vectors of 512 bits, where XLA would take 256: EfficientNetB0 is 1.08 times as fast, none of those tried is slower.
VECTORS = {"xla_cpu_prefer_vector_width": 512}

#: What keeps the barriers of `jax.checkpoint` up to the end.
BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def known_options(options: Mapping[str, Setting]) -> dict[str, Setting]:
    """Return those of XLA's options that this jaxlib knows, for `jax.jit(..., compiler_options=...)`."""
    return {name: value for name, value in options.items() if is_known(name, value)}


@functools.cache
def is_known(name: str, value: Setting) -> bool:
    """Tell whether this jaxlib compiles with an option, by compiling next to nothing for the CPU."""
    try:
        jax.jit(lambda x: x + 1, compiler_options={name: value})(on_cpu(np.float32(0)))
    except jax.errors.JaxRuntimeError as e:
        if "No such compile option" not in str(e):
            raise
        return False
    return True


@functools.cache
def compiler_options(
    platform: str, dtype: DTypeLike = jnp.float32, remat: bool = False, fusions: str | None = None
) -> dict[str, Setting] | None:
    """Return what to compile with on a platform, for `jax.jit(..., compiler_options=...)`; None for JAX's own.

    JAX takes them at an outermost jit only. On CPU, jaxlib from 0.10.2 on hands convolutions and products to YNNPACK,
    which is the slower way for most shapes here, and some of the reductions that 0.10.2 fuses are wrong (jax issue
    39103); without it, XLA's own are used. Products of bfloat16 stay with it: XLA's would be computed in float32. With
    `remat`, XLA:CPU is kept from merging what is computed again with what was computed first. `fusions` are what
    `tune` found for a network; what this jaxlib can't be told is as usual.

    Raises:
        ImportError: this jaxlib sums wrongly, and does not know the option that would prevent it.
    """
    if platform != "cpu":
        return None
    if fusions not in fusion_choices():  # another jaxlib's, too
        fusions = usual_fusions(dtype)
    options = known_options({YNN_FUSIONS: FUSION_TYPES[fusions]})
    if not options:
        sum_protection()
    if has_wide_vectors():
        options |= known_options(VECTORS)
    if remat:
        options |= known_options(BARRIERS)
    return options or None


def usual_fusions(dtype: DTypeLike) -> str:
    """Return what YNNPACK is handed of a computation of a dtype, where nothing was timed."""
    return "products" if jnp.dtype(dtype) == jnp.bfloat16 else "nothing"


@functools.cache
def fusion_choices() -> tuple[str, ...]:
    """Return what this jaxlib can be told to hand to YNNPACK: names of `FUSION_TYPES`, at least one."""
    return tuple(name for name, types in FUSION_TYPES.items() if not types or is_known(YNN_FUSIONS, types))


@functools.cache
def sum_protection() -> str:
    """Say what keeps this jaxlib from the wrong sums of jax issue 39103 on a CPU.

    Returns:
        "not needed" where JAX's own options sum rightly, "in force" where `compiler_options` are what makes them.

    Raises:
        ImportError: it sums wrongly either way.
    """
    if sums_rightly(None):
        return "not needed"
    if sums_rightly(known_options({YNN_FUSIONS: ""})):
        return "in force"
    version = importlib.metadata.version("jaxlib")
    raise ImportError(
        f"jaxlib {version} sums wrongly on a CPU (jax issue 39103), and without the option that prevented it: another "
        "version expected"
    )


def sums_rightly(options: Mapping[str, Setting] | None) -> bool:
    """Compute the sum of jax issue 39103, exact in float32, and tell whether it is right."""
    side = 1 << 12  # whose square is exact
    rows = np.zeros((32769, 3), np.float32)
    rows[:, 0] = np.arange(len(rows)) % side

    def squares(rows: jax.Array) -> jax.Array:
        return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(rows)

    sums = jax.jit(squares, compiler_options=dict(options or {}))(on_cpu(rows))
    return np.array_equal(sums, rows[:, 0] ** 2)


def on_cpu(x: np.ndarray | np.generic) -> jax.Array:
    """Put an array on this process's CPU, which every JAX has."""
    return jax.device_put(x, jax.local_devices(backend="cpu")[0])
