"""A network made ready for inference alone: folded, and where that is asked for, tuned to this machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from fzoo.inference.batches import check_images, for_devices, images_together, micro_batch, run
from fzoo.inference.compiler import on_cpu, usual_fusions
from fzoo.inference.devices import beside, device_of
from fzoo.inference.folding import folded_for_inference, winograd_tiles
from fzoo.inference.tuning import TimesFile, Tuning, fastest, key_of, time_in_turns, times_path, tune_convolutions
from fzoo.layers.abstract import Trace
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.layers.record import Prepared
from fzoo.ops.processor import has_bfloat16
from fzoo.types import DTypeLike, MutableVariables, Variables
from fzoo.weights.mapping import check_variables

#: Seconds for each of the ways between which the time of the whole network decides.
SECONDS = 1.5

#: What the way is called that is taken where nothing was timed.
UNTUNED = "untuned"


def optimize_for_inference(
    module: Classifier,
    variables: Variables,
    *,
    dtype: DTypeLike = jnp.float32,
    platform: str | None = None,
    tune: bool = False,
) -> tuple[Classifier, MutableVariables]:
    """Make an equivalent network that is faster, and can't be trained.

    Every BN that follows a convolution, with nothing between that isn't linear, is folded into its kernel (through
    concatenation and average pooling, too), and so is ConvNeXt's LayerScale; other BNs, those after the concatenations
    of a DenseNet and those that are called more than once, become a factor and a term. On CPU, kernels of 3x3, 5x5, 1x7
    and 7x1 are kept as Winograd's algorithm wants them where that is faster (1.4 to 4 times their memory). On one with
    AVX512_BF16, `predict` and `features` have oneDNN, where this jaxlib has it, compute what it is faster at: all of
    bfloat16, with the bias, the sum and the activation behind it. Such a program is compiled by each process, since
    JAX's cache can't keep it. The pair goes through `predict`, `features` and `module.apply` as any other.

    Args:
        module: from `fzoo.create` or `fzoo.load`.
        variables: its variables.
        dtype: of the computation and the kernels: float32, or bfloat16 with sums in float32, which on a CPU without
            units for it (AVX512_BF16, AMX) saves memory and not time.
        platform: where it will run ("cpu", "cuda", ...); by default where the variables are.
        tune: whether the forms of its convolutions are timed on this machine's CPU, as by `tune`, for images of the
            network's own size.

    Returns:
        (module, variables); these lie where the plain network's do, and are committed to a device only if those are. In
        float32, outputs are within 1e-4 of the largest magnitude of the plain network's.

    Raises:
        ValueError: this is no plain network of this package, the variables are not its own, the dtype is none to
            compute in, or there is nothing to tune: on other platforms than a CPU, the libraries choose.

    Warns:
        UserWarning: bfloat16 for a CPU that has no units for it.
    """
    is_on_cpu = (platform or device_of(variables).platform) == "cpu"
    if is_on_cpu:
        warn_without_units(dtype)
    if tune:
        images = jax.ShapeDtypeStruct(
            (micro_batch(module.clone(dtype=dtype, prepared=Prepared())), *module.example_shape), jnp.float32
        )
        return tune_network(module, variables, images, dtype, platform).network
    traced = trace(module)
    check_variables(module, variables)
    tiles = winograd_tiles(traced.nodes, dtype) if is_on_cpu and not module.plain_convolutions else {}
    return folded_for_inference(module, traced, variables, dtype, tiles)


def tune(
    module: Classifier,
    variables: Variables,
    images: Any,
    *,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Classifier, MutableVariables]:
    """Make the network of `optimize_for_inference` whose convolutions take the forms that are the fastest here.

    Each distinct convolution is timed in every form that computes it, with what this jaxlib can be told to hand to
    YNNPACK, and then the whole network as it would be untuned and as it was found: it is never the slower one. That
    takes from 10 s to some minutes, most of it for compiling; the times of convolutions are kept in the user's cache
    (~/.cache/fzoo/forms on Linux), by processor, jaxlib, dtype and shape, so that the next time takes seconds. What was
    chosen is in `module.prepared`, goes with the weights into a file, and holds in `predict`, `features` and the
    commands; in a `jax.jit` of one's own, the forms do.

    Args:
        module: from `fzoo.create` or `fzoo.load`.
        variables: its variables, on a CPU.
        images: as the network will get them, (N, H, W, C), or anything with such a shape: their size and number count,
            not their values. As `predict` does, it computes some images of a batch together.
        dtype: of the computation, as for `optimize_for_inference`.
        progress: is called with a line now and then.

    Returns:
        (module, variables). Outputs are within 1e-4 of the largest magnitude of the plain network's, in float32.

    Raises:
        ValueError: this is no plain network of this package, the variables are not its own or not on a CPU, or these
            are no images of its size.

    Warns:
        UserWarning: bfloat16 for a CPU that has no units for it.
    """
    warn_without_units(dtype)
    return tune_network(module, variables, images, dtype, progress=progress).network


def warn_without_units(dtype: DTypeLike) -> None:
    """Tell the caller of a function here that this CPU has no units for bfloat16, where that is asked for."""
    if jnp.dtype(dtype) == jnp.bfloat16 and sys.platform == "linux" and not has_bfloat16():
        warnings.warn(
            "bfloat16 asked for on a processor without units for it (AVX512_BF16, AMX): it saves memory, and is slower "
            "than float32",
            stacklevel=3,
        )


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A network that was tuned.

    Attributes:
        network: (module, variables), the fastest of what was tried.
        images: how many go through it together.
        tuning: what was found for its convolutions, with the choice of YNNPACK's share that the network has.
        seconds: of a call: "untuned", and with each choice that was tried.
        chosen: which of these it is.
    """

    network: tuple[Classifier, MutableVariables]
    images: int
    tuning: Tuning
    seconds: dict[str, float]
    chosen: str


def tune_network(
    module: Classifier,
    variables: Variables,
    images: Any,
    dtype: DTypeLike,
    platform: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Tune a network; arguments as for `tune` and `optimize_for_inference`."""
    traced, together = check_tuning(module, variables, images, dtype, platform)
    check_variables(module, variables)
    tunings = tune_convolutions(traced.nodes, together, dtype, progress=progress)[:2]
    choices = {UNTUNED: None, **{tuning.fusions: tuning for tuning in tunings}}
    shape = (together, *images.shape[1:])
    file, key = TimesFile(times_path()), network_key(module, tunings[0], shape, dtype)
    make = functools.partial(apply_tuning, module, traced, variables, dtype)
    seconds, made = file.read().get(key, {}), {}
    if set(seconds) != set(choices):
        progress("the network as a whole")
        made = {name: make(tuning) for name, tuning in choices.items()}
        seconds = time_networks(made, shape)
        file.add({key: seconds})
    chosen = fastest(seconds, UNTUNED)
    network = made.get(chosen) or make(choices[chosen])
    shown = choices[chosen] or choices.get(usual_fusions(dtype)) or tunings[0]
    return Tuned(network, together, shown, seconds, chosen)


def network_key(module: Classifier, tuning: Tuning, shape: tuple[int, ...], dtype: DTypeLike) -> str:
    """Return what the file of times calls a network: one with the same convolutions takes the same time."""
    convolutions = [(choice.layers, key_of(choice.convolution, "")) for choice in tuning.convolutions]
    digest = hashlib.blake2b(repr((convolutions, shape)).encode(), digest_size=8).hexdigest()
    return f"network {type(module).__name__} {'x'.join(map(str, shape))} {jnp.dtype(dtype).name} {digest}"


def check_tuning(
    module: Classifier, variables: Variables, images: Any, dtype: DTypeLike, platform: str | None
) -> tuple[Trace, int]:
    """Check what is to be tuned.

    Returns:
        (the record of the network for images of this size, how many of them go through it together).

    Raises:
        ValueError: as for `tune`.
    """
    if not isinstance(module, Classifier):
        raise ValueError(f"a module from fzoo.create expected, {type(module).__name__} given")
    where = platform or device_of(variables).platform
    if where != "cpu":
        raise ValueError(f"a network on {where!r} given to be tuned, one on a CPU expected: elsewhere, XLA itself does")
    if module.plain_convolutions:
        raise ValueError("plain_convolutions=True given, which leaves nothing to tune")
    if isinstance(module.example_inputs, tuple):
        raise ValueError("a network of several inputs given to be tuned, one from images expected")
    check_images(images, pixels=True)
    module.check_images(tuple(images.shape))
    if not images.shape[0]:
        raise ValueError(f"images of shape {tuple(images.shape)} given, one at the least expected")
    return trace(module, tuple(images.shape[1:])), images_together(
        images.shape[0], micro_batch(module.clone(dtype=dtype, prepared=Prepared()))
    )


def apply_tuning(
    module: Classifier, traced: Trace, variables: Variables, dtype: DTypeLike, tuning: Tuning | None
) -> tuple[Classifier, MutableVariables]:
    """Make the network with the forms that were found; with None, as it is untuned."""
    if tuning is None:
        return folded_for_inference(module, traced, variables, dtype, winograd_tiles(traced.nodes, dtype))
    tuned, left = folded_for_inference(module, traced, variables, dtype, tuning.tiles())
    assert tuned.prepared is not None
    prepared = dataclasses.replace(tuned.prepared, forms=tuple(tuning.forms().items()), fusions=tuning.fusions)
    return tuned.clone(prepared=prepared), left


def time_networks(ways: Mapping[str, tuple[Classifier, MutableVariables]], shape: tuple[int, ...]) -> dict[str, float]:
    """Run networks in turns as `predict` does, and return the least seconds of a call of each."""
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    calls = {}
    for name, (module, variables) in ways.items():
        if device_of(variables).platform != "cpu":  # what is tuned for a CPU need not lie there
            variables = jax.tree.map(on_cpu, variables)
        placed = beside(images, variables)
        call, _, variables, _ = for_devices(run, module, variables, placed, None)
        calls[name] = functools.partial(run_again, call, module, variables, placed)
        jax.block_until_ready(calls[name](0))
    return time_in_turns(calls, SECONDS)


def run_again(
    call: Callable[..., PyTree], module: Classifier, variables: Variables, images: PyTree, turn: int
) -> PyTree:
    """Run a network; every turn is the same."""
    return call(module, None, variables, images)
