"""Which form each convolution of a network takes on this machine's CPU, found by timing the candidates.

A form that is the fastest on one processor is not on the next: it depends on the instruction sets, on the sizes of the
caches, on what this jaxlib's products reach. Times are kept in the user's cache, a file for each kind of processor,
number of cores and jaxlib, so that a shape is timed once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
from jax import lax
from jaxtyping import Array, PyTree

from fzoo import ops
from fzoo._version import __version__
from fzoo.files import hold_lock, replacing
from fzoo.inference.compiler import compiler_options, fusion_choices, on_cpu
from fzoo.inference.epilogues import with_epilogues
from fzoo.inference.folding import prepared_tile
from fzoo.layers.record import Node
from fzoo.ops.onednn import Uncached
from fzoo.ops.platforms import traced_for
from fzoo.ops.processor import instruction_sets, processor_name
from fzoo.types import DTypeLike

#: Which form of the file of times this is: one of another form is not read.
FORMAT = 2

#: Seconds of calls for each candidate, and the least number of calls of whatever is timed.
SECONDS, CALLS = 0.03, 4

#: Copies of a kernel that calls take in turn have so many bytes together: in a network, a kernel is not in the cache.
KERNELS = 1 << 25

#: Windows that are written out take so many bytes at most.
WINDOWS = 1 << 26

#: What a candidate must save to be taken in the place of the form that is taken untimed: less is noise.
GAIN = 0.03

#: How a candidate is called whose kernel is kept transformed, with its tile after it.
PREPARED = "winograd prepared, tile "

#: {form: seconds of a call}
Times = Mapping[str, float]

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class TunedConvolution:
    """How long a convolution takes on this machine.

    Attributes:
        layers: the convolutions of the network that are such a one, by name.
        convolution: its shape, for as many images as go through the network together.
        untimed: the form that is taken where nothing is timed.
        form: the one that was found.
        seconds: of a call in each form that can be.
    """

    layers: tuple[str, ...]
    convolution: ops.Convolution
    untimed: str
    form: str
    seconds: Times

    @property
    def layers_in_short(self) -> str:
        """The layers in a cell of a table."""
        more = len(self.layers) - 1
        return f"{self.layers[0]} and {more} more" if more else self.layers[0]

    def gflops(self, form: str) -> float:
        """Return 10^9 operations of the plain sum a second, whatever a form does for it."""
        return self.convolution.flops / self.seconds[form] / 1e9


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was found for a network.

    Attributes:
        fusions: which operations XLA:CPU hands to YNNPACK, as `Prepared.fusions`.
        convolutions: each distinct one, in the order of the network.
    """

    fusions: str
    convolutions: tuple[TunedConvolution, ...]

    @property
    def seconds(self) -> float:
        """Of all convolutions together, in the forms that were found."""
        return sum(len(choice.layers) * choice.seconds[choice.form] for choice in self.convolutions)

    def forms(self) -> dict[str, str]:
        """Return {convolution: form} of those whose kernels stay as they are."""
        pairs = [(layer, choice.form) for choice in self.convolutions for layer in choice.layers]
        return {layer: form for layer, form in pairs if not form.startswith(PREPARED)}

    def tiles(self) -> dict[str, int]:
        """Return {convolution: tile} of those whose kernels are kept transformed."""
        pairs = [(layer, choice.form) for choice in self.convolutions for layer in choice.layers]
        return {layer: int(form.removeprefix(PREPARED)) for layer, form in pairs if form.startswith(PREPARED)}


def tune_convolutions(
    nodes: Iterable[Node],
    images: int,
    dtype: DTypeLike,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Tuning]:
    """Time the forms of each distinct convolution of a network, with each choice of what YNNPACK gets.

    Args:
        nodes: of the network's record.
        images: how many go through it together.
        dtype: of the computation.
        progress: is called with a line for each convolution that is timed.

    Returns:
        What was found with each choice, the fastest first.
    """
    calls = convolutions_of(nodes, images, dtype)
    file = TimesFile(times_path())
    known = file.read()
    kernels = {conv: any(kept for _, kept in layers) for conv, layers in calls.items()}
    for number, conv in enumerate(calls):
        names = [key_of(conv, fusions) for fusions in fusion_choices()]
        candidates = candidates_of(conv, kernels[conv])
        if all(set(candidates) <= set(known.get(name, ())) for name in names):
            continue
        progress(f"{number + 1} of {len(calls)} convolutions: {in_words(conv)}")
        known = file.add(dict(zip(names, time_forms(conv, candidates), strict=True)))
    tunings = []
    for fusions in fusion_choices():
        tuned = []
        for conv, layers in calls.items():
            seconds = {form: known[key_of(conv, fusions)][form] for form in candidates_of(conv, kernels[conv])}
            for kept in sorted({kept for _, kept in layers}, reverse=True):
                names = tuple(name for name, keeps in layers if keeps == kept)
                times = {form: s for form, s in seconds.items() if kept or not form.startswith(PREPARED)}
                untimed = untimed_form(conv, kept)
                tuned.append(TunedConvolution(names, conv, untimed, fastest(times, untimed), times))
        tunings.append(Tuning(fusions, tuple(tuned)))
    return sorted(tunings, key=lambda tuning: tuning.seconds)


def fastest(seconds: Times, untimed: str) -> str:
    """Name the fastest form, or the one that is taken untimed where that is as fast."""
    form = min(seconds, key=lambda name: seconds[name])
    return untimed if seconds[untimed] <= seconds[form] * (1 + GAIN) else form


def convolutions_of(
    nodes: Iterable[Node], images: int, dtype: DTypeLike
) -> dict[ops.Convolution, list[tuple[str, bool]]]:
    """Return the layers that each distinct convolution is of, and whether their kernels can be kept transformed.

    A layer that is called with several shapes is left out: its form is one for all of them.
    """
    shapes: dict[str, set[ops.Convolution]] = {}
    kept: dict[str, bool] = {}
    for node in itertools.chain.from_iterable((node, *node.parts) for node in nodes):
        layer = node.variables or node.name
        parts = {f"{layer}/{part}": node.config.get(part) for part in ("depthwise", "pointwise")}
        for name, conv in {layer: node.config.get("convolution"), **parts}.items():
            if conv is not None:
                conv = dataclasses.replace(conv, images=images, dtype=jnp.dtype(dtype))
                shapes.setdefault(name, set()).add(conv)
                kept[name] = node.kind == "Conv2D"
    calls: dict[ops.Convolution, list[tuple[str, bool]]] = {}
    for name, convs in shapes.items():
        if len(convs) == 1:
            calls.setdefault(next(iter(convs)), []).append((name, kept[name]))
    return calls


def candidates_of(conv: ops.Convolution, kept: bool) -> dict[str, Callable[[Array, Array], Array]]:
    """Return the ways to compute a convolution: a function of images and kernel for each.

    Args:
        conv: its shape.
        kept: whether its kernel can be kept transformed.
    """
    candidates: dict[str, Callable[[Array, Array], Array]] = {
        ops.LIBRARY: functools.partial(ops.plain, conv, feature_group_count=conv.groups)
    }
    written = conv.pixels * math.prod(conv.kernel) * conv.inputs * conv.dtype.itemsize
    with alone_on_cpu():
        forms = [form for form in ops.CPU_FORMS if form.takes(conv)]
    for form in forms:
        if form.run not in (ops.columns, ops.row_columns) or written <= WINDOWS:
            candidates[form.name] = functools.partial(form.run, conv)
    if ops.is_pointwise(conv):  # whose columns are the product, and whose products are one
        candidates = {
            form: run for form, run in candidates.items() if "columns" not in form and form != "shifted products"
        }
    if kept and ops.is_filtered(dataclasses.replace(conv, dtype=jnp.dtype(jnp.float32))):
        for tile in (2, 4):
            candidates[f"{PREPARED}{tile}"] = functools.partial(winograd_in_float32, conv)
    return candidates


def winograd_in_float32(conv: ops.Convolution, images: Array, kernel: Array) -> Array:
    """Convolve as `layers.modules.WinogradConv` does."""
    return ops.winograd_transformed(conv, images.astype(jnp.float32), kernel).astype(images.dtype)


def alone_on_cpu() -> contextlib.AbstractContextManager[None]:
    """Trace as `predict` does on a CPU."""
    return traced_for("cpu", alone=True)


def untimed_form(conv: ops.Convolution, kept: bool) -> str:
    """Name the form that an optimized network takes where nothing is timed."""
    one = dataclasses.replace(conv, dtype=jnp.dtype(jnp.float32), images=1)  # what the choice is made for
    if kept and (tile := prepared_tile(one, conv.dtype)):
        return f"{PREPARED}{tile}"
    with alone_on_cpu():
        run = ops.cpu_form(conv)
    return next((form.name for form in ops.CPU_FORMS if form.run is run), ops.LIBRARY)


def time_forms(
    conv: ops.Convolution, candidates: Mapping[str, Callable[[Array, Array], Array]]
) -> list[dict[str, float]]:
    """Time a call in each form with each choice of what YNNPACK gets, in turns: the least of them.

    With a bias and a ReLU behind it, as in a network, and a kernel that was not used just before.

    Returns:
        {form: seconds} for each of `fusion_choices`.
    """
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Array:
        return on_cpu(rng.standard_normal(shape, np.float32).astype(conv.dtype))

    images = draw(conv.images, conv.height, conv.width, conv.inputs)
    kernel = draw(*conv.kernel, conv.inputs // conv.groups, conv.outputs)
    bias = draw(1, 1, 1, conv.outputs)
    calls: dict[tuple[int, str], Callable[[int], PyTree]] = {}
    for form, function in candidates.items():
        own = kernel
        if form.startswith(PREPARED):
            own = ops.winograd_kernel(kernel.astype(jnp.float32), int(form.removeprefix(PREPARED)))
        copies = [own, *(jnp.copy(own) for _ in range(min(8, KERNELS // own.nbytes)))]

        def layer(images: Array, kernel: Array, bias: Array, function: Any = function) -> Array:
            with alone_on_cpu():
                y = function(images, kernel)
            return jnp.maximum(y + lax.broadcast_to_rank(bias, y.ndim), 0)

        for number, fusions in enumerate(fusion_choices()):
            options = compiler_options("cpu", conv.dtype, fusions=fusions)
            run = Uncached(with_epilogues(layer), compiler_options=options)
            jax.block_until_ready(run(images, own, bias))

            calls[number, form] = functools.partial(run_with_copy, run, images, copies, bias)
    least = time_in_turns(calls, SECONDS)
    return [
        {form: seconds for (of, form), seconds in least.items() if of == number}
        for number in range(len(fusion_choices()))
    ]


def time_in_turns(calls: Mapping[Key, Callable[[int], PyTree]], seconds: float) -> dict[Key, float]:
    """Run calls in turns, each with the number of its turn and until its result is there; the least seconds of each.

    Args:
        calls: by any names.
        seconds: for each of them together, of `CALLS` turns at the least.
    """
    least = dict.fromkeys(calls, math.inf)
    end, turn = time.perf_counter() + seconds * len(calls), 0
    while turn < CALLS or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(turn))
            least[name] = min(least[name], time.perf_counter() - start)
        turn += 1
    return least


def run_with_copy(run: Callable[..., Array], images: Array, kernels: Sequence[Array], bias: Array, turn: int) -> Array:
    """Run a layer with the next copy of its kernel."""
    return run(images, kernels[turn % len(kernels)], bias)


def in_words(conv: ops.Convolution) -> str:
    """Say what a convolution is, the same for equal ones: "4x56x56x64, 3x3 to 64"."""
    text = (
        f"{conv.images}x{conv.height}x{conv.width}x{conv.inputs}, {conv.kernel[0]}x{conv.kernel[1]} to {conv.outputs}"
    )
    if conv.strides != (1, 1):
        text += f", stride {'x'.join(map(str, conv.strides))}"
    if conv.groups > 1:
        text += f", {conv.groups} groups"
    if ops.is_dilated(conv):
        text += f", dilation {'x'.join(map(str, conv.dilation))}"
    return text


def key_of(conv: ops.Convolution, fusions: str) -> str:
    """Return what the file of times calls a convolution."""
    pads = ",".join(f"{before}+{after}" for before, after in conv.pads)
    return f"{in_words(conv)}, padding {pads}, {conv.dtype.name}, YNNPACK: {fusions}"


def times_path() -> Path:
    """Return where the times of this kind of processor and this jaxlib are kept."""
    words = [processor_name(), *instruction_sets(), f"{os.cpu_count()} cores"]
    words += [f"jaxlib {importlib.metadata.version('jaxlib')}", f"fzoo {__version__}"]
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in " ".join(words))
    return platformdirs.user_cache_path("fzoo") / "forms" / f"{name[:200]}.json"


class TimesFile:
    """Times that were measured on this machine, as JSON; several processes may add to it.

    Args:
        path: of the file, which need not be there.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, dict[str, float]]:
        """Return {convolution: {form: seconds}}; nothing where there is no such file, or a damaged one."""
        try:
            content = json.loads(self.path.read_text())
            if content["format"] != FORMAT:
                return {}
            return {
                str(name): {str(form): float(seconds) for form, seconds in times.items() if float(seconds) > 0}
                for name, times in content["seconds"].items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def add(self, times: Mapping[str, Times]) -> dict[str, dict[str, float]]:
        """Add times to what is there now, and return all.

        Raises:
            OSError: the file can't be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(self.path.with_name(f".{self.path.name}.lock")):
            known = self.read()
            for name, seconds in times.items():
                known[name] = {**known.get(name, {}), **seconds}
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, "seconds": known}, indent=1))
        return known
