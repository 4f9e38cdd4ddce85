"""oneDNN's convolutions, which jaxlib for Linux on x86 has in it: a library of a CPU, as cuDNN is one of a GPU.

No option makes XLA:CPU take them for a convolution, so they are asked for by the name of XLA's own call of them, which
has in it what they do behind the sum: a bias, another image added, an activation. Images stay NHWC.

XLA does not promise this call to anybody: `has_onednn` says where it is known to be there, and what is exported or
lowered for several platforms must not have it. JAX's compilation cache can't keep a program that has it: `Uncached`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import json
import math
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fzoo.ops.processor import has_bfloat16
from fzoo.ops.shapes import Convolution

#: XLA's name of the call.
TARGET = "__onednn$convolution"

#: Releases of jaxlib in which it is called. It is read in words that have changed before, and aborts the process over
#: one that it can't place, so that no other is tried. 0.12 reads the same words, but dies where JAX's cache writes such
#: a program, be it a caller's own.
RELEASES = ("0.10",)

#: What may come behind the sum: oneDNN's words. The first two take an operand: a number for each channel, an image.
BIAS, SUM, RELU, RELU6, SILU = "BIAS", "BINARY_ADD", "RELU", "RELU6", "SWISH"


@functools.cache
def has_onednn() -> bool:
    """Tell whether this jaxlib's oneDNN can be called, on this machine."""
    release = ".".join(importlib.metadata.version("jaxlib").split(".")[:2])
    if sys.platform != "linux" or platform.machine() != "x86_64" or release not in RELEASES:
        return False
    with jax.ensure_compile_time_eval():
        return convolves_rightly()


def convolves_rightly() -> bool:
    """Compute a convolution whose two axes differ in all there is, of integers, and tell whether the sums are right."""
    images, kernel = np.arange(2 * 7 * 9 * 4) % 7 - 3, np.arange(3 * 2 * 2 * 6) % 5 - 2
    images, kernel = images.reshape(2, 7, 9, 4).astype(np.float32), kernel.reshape(3, 2, 2, 6).astype(np.float32)
    bias = np.arange(6, dtype=np.float32)
    conv = Convolution.of(images.shape, kernel.shape, (1, 2), ((1, 2), (0, 1)), groups=2, dilation=(2, 1))
    expected = np.zeros((2, *conv.size, 6), np.float32) + bias
    wide = np.pad(images, ((0, 0), *conv.pads, (0, 0)))
    for i, j in np.ndindex(conv.kernel):
        (ho, wo), (down, along) = conv.size, (i * conv.dilation[0], j * conv.dilation[1])
        window = wide[:, down : down + ho, along : along + 2 * wo : 2][:, :, :wo]
        for group in range(2):
            channels, outputs = slice(2 * group, 2 * group + 2), slice(3 * group, 3 * group + 3)
            expected[..., outputs] += window[..., channels] @ kernel[i, j][:, outputs]
    cpu = jax.local_devices(backend="cpu")[0]
    arrays = jax.device_put((images, kernel, bias), cpu)
    try:
        sums = Uncached(functools.partial(convolve, conv, behind=(BIAS, RELU)))(*arrays)
    except jax.errors.JaxRuntimeError:  # a jaxlib without oneDNN has no such call
        return False
    return np.array_equal(sums, np.maximum(expected, 0))


def computes(conv: Convolution) -> bool:
    """Tell whether oneDNN computes such a convolution on this processor."""
    if conv.is_open or not (conv.dtype == jnp.float32 or (conv.dtype == jnp.bfloat16 and has_bfloat16())):
        return False
    sides = zip(conv.pads, conv.kernel, conv.dilation, strict=True)
    within = all(0 <= side <= (k - 1) * by for pads, k, by in sides for side in pads)  # of a crop, it knows nothing
    return within and min(conv.images, conv.inputs, conv.outputs, *conv.size) > 0


def convolve(
    conv: Convolution,
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw c_group o"],
    *operands: Array,
    behind: Sequence[str] = (),
) -> Float[Array, "n ho wo o"]:
    """Convolve by oneDNN.

    Args:
        conv: as `computes` allows it.
        x, kernel: the images and the kernel, of one dtype.
        operands: of what comes behind the sum, in its order.
        behind: what comes there, `BIAS` before all else.
    """
    image = {"dims": 4, "data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    weights = {"input_feature_dim": 2, "output_feature_dim": 3, "spatial_dims": [0, 1]}
    before, after = zip(*conv.pads, strict=True)
    config = {
        "dims": 4,
        "input": image,
        "kernel": {"dims": 4, "filter": weights},
        "output": image,
        "window": {
            "size": conv.kernel,
            "pad_left": before,
            "pad_right": after,
            "strides": conv.strides,
            "window_dilations": conv.dilation,
        },
        "feature_groups": conv.groups,
    }
    output = jax.ShapeDtypeStruct((x.shape[0], *conv.size, conv.outputs), x.dtype)
    return call_with(config, output, (x, kernel, *operands), behind)


def call_with(
    config: Mapping[str, Any], output: jax.ShapeDtypeStruct, operands: Sequence[Array], behind: Sequence[str]
) -> Array:
    """Make the call."""
    note_call()
    asked = {"onednn_conv_config": {**config, "fusions": {"ops": list(behind)}}}
    call = jax.ffi.ffi_call(TARGET, output, custom_call_api_version=3, legacy_backend_config=json.dumps(asked))
    return call(*operands)


def is_call(primitive: str, params: Mapping[str, Any]) -> bool:
    """Tell whether an equation is such a call, by its primitive and parameters."""
    return primitive == "ffi_call" and params["target_name"] == TARGET


def add_behind(
    params: Mapping[str, Any], operands: Sequence[Array], added: Sequence[Array], behind: Sequence[str]
) -> Array:
    """Make the call of an equation again, with something behind its sum, where it has nothing yet.

    Args:
        params: of the equation.
        operands: that it has.
        added: for what comes behind.
        behind: as for `convolve`.
    """
    config = json.loads(params["legacy_backend_config"])["onednn_conv_config"]
    (aval,) = params["result_avals"]
    return call_with(config, jax.ShapeDtypeStruct(aval.shape, aval.dtype), (*operands, *added), behind)


#: What is told that a call is traced.
_watching: contextvars.ContextVar[Uncached | None] = contextvars.ContextVar("watching", default=None)


class Uncached:
    """A jitted function that may call oneDNN; if it does, it is compiled past JAX's compilation cache.

    JAX would try to write the program, which jaxlib 0.10 fails at, with a warning, and 0.12 dies of. Whatever traces
    the function, be it for its shapes alone, tells whether it calls oneDNN: what is compiled later may need no trace.

    Args:
        function: to be jitted.
        options: for `jax.jit`.

    Attributes:
        jitted: the jitted function, for lowering it.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        @functools.wraps(function)
        def watched(*arguments: Any) -> Any:
            token = _watching.set(self)
            try:
                return function(*arguments)
            finally:
                _watching.reset(token)

        self.jitted: Any = jax.jit(watched, **options)
        self._calls = False
        self._entered = threading.local()

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        with contextlib.ExitStack() as self._entered.stack:
            if self._calls:
                self._entered.stack.enter_context(uncached())
            return self.jitted(*arguments)

    def eval_shape(self, *arguments: Any) -> Any:
        """Return the shapes of what it gives."""
        return self.jitted.eval_shape(*arguments)

    def note_call(self) -> None:
        """Note that what is traced calls oneDNN, before JAX asks whether to keep the program."""
        stack = getattr(self._entered, "stack", None)
        if not self._calls and stack is not None:
            stack.enter_context(uncached())
        self._calls = True


def note_call() -> None:
    """Tell the `Uncached` whose function is traced, if there is one, that it calls oneDNN.

    For a call that was traced before, and is met in a function of a layer that JAX does not trace again.
    """
    if (watching := _watching.get()) is not None:
        watching.note_call()


#: JAX's option: the least seconds of compiling for which a program is kept.
LEAST = "jax_persistent_cache_min_compile_time_secs"

#: How many threads are in `uncached`, and what the option was before the first.
_uncached = threading.Lock()
_inside: list[float] = []


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Let JAX's compilation cache keep nothing, in no thread, while this is entered by one."""
    with _uncached:
        _inside.append(_inside[0] if _inside else getattr(jax.config, LEAST))
        jax.config.update(LEAST, math.inf)
    try:
        yield
    finally:
        with _uncached:
            before = _inside.pop()
            if not _inside:
                jax.config.update(LEAST, before)
