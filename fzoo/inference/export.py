"""A network as one file that runs without this package: StableHLO with the weights inside, written by `jax.export`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.export import Exported, symbolic_shape
from jax.export import export as lower
from jaxtyping import Array, Num

from fzoo.files import replacing
from fzoo.inference.batches import run
from fzoo.layers.classifier import Classifier
from fzoo.layers.options import is_count
from fzoo.zoo import preprocess_input, preprocessing_mode

#: What a file can be for, as JAX calls them; "gpu" is "cuda" (NVIDIA) or "rocm" (AMD).
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


#: The end of a file's name.
ENDING = ".stablehlo"


#: Bytes that JAX's format holds.
MOST = 2**31


def export(
    module: nn.Module,
    variables: Any,
    path: str | os.PathLike,
    *,
    platforms: str | Sequence[str] = ("cpu", "cuda", "tpu"),
    preprocess: str | None = None,
    batch_size: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> Exported:
    """Write a network and its weights as one file, which takes images and needs JAX alone (and `flatbuffers`).

    The file is StableHLO as `jax.export` keeps it, for all platforms together, and JAX promises to read it for six
    months at least. Whoever has it does

        exported = jax.export.deserialize(bytearray(open("resnet50.stablehlo", "rb").read()))
        options = {"xla_cpu_experimental_ynn_fusion_type": ""}  # on a CPU; None elsewhere
        probabilities = jax.jit(exported.call, compiler_options=options)(images)

    Compiler options are no part of such a file. `exported.call(images)` is compiled with JAX's own, which on CPU, in
    jaxlib 0.10.2, sum wrongly in some fused reductions (see `fzoo.inference.compiler`). The networks' forward passes
    have none of these in any family that was measured: with both, results are within 1e-5 of `predict`'s. The options
    above keep it so whatever the images are put through in the same `jax.jit`, and are often the faster.

    On CPU, the form of a convolution is chosen as for one image where the batch is left open. A batch is computed as a
    whole, not in micro-batches as `predict` does: a few images at once are the fastest there. For other platforms
    than CPU, give `optimize_for_inference` the one that counts: `platform="cuda"`.

    The file appears under its name when it is whole: a kill or a full disk leaves what was there before.

    Args:
        module: from `fzoo.create`, `fzoo.load` or `fzoo.optimize_for_inference`, or a Flax module of your own.
        variables: its variables, which become constants of the program, in their own dtype.
        path: ends in ".stablehlo".
        platforms: one or more of "cpu", "cuda", "rocm", "tpu".
        preprocess: the model ("ResNet50") or the mode ("unit") whose `preprocess_input` is to be part of the program.
            It takes pixels of uint8 then, and otherwise preprocessed float32.
        batch_size: of the calls. None leaves it open: the program is compiled for each that it meets.
        image_shape: (height, width, channels); by default what the network was created for.

    Returns:
        What was written. `mlir_module_serialized` of it is the StableHLO alone, as portable bytecode.

    Raises:
        ValueError: an argument that can't be honoured, variables that are not the module's, or more than 2 GiB of them.
        OSError: the file can't be written.
        ModuleNotFoundError: flatbuffers, which JAX writes with, is not installed.
    """
    names = check_target(path, platforms)
    if batch_size is not None and not is_count(batch_size):
        raise ValueError(f"batch_size={batch_size!r} given, a positive number expected, or None to leave it open")
    if preprocess is not None:
        preprocessing_mode(preprocess)  # says what is wrong with it
    shape = module.example_shape if image_shape is None and isinstance(module, Classifier) else image_shape
    if not isinstance(shape, tuple) or len(shape) != 3 or not all(map(is_count, shape)):
        raise ValueError(f"image_shape={shape!r} given, (height, width, channels) expected")
    if (size := sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(variables))) >= MOST:
        raise ValueError(f"variables of {size / 2**30:.1f} GiB given, less than 2 expected: the format holds no more")
    count = symbolic_shape("batch")[0] if batch_size is None else int(batch_size)
    images = jax.ShapeDtypeStruct((count, *shape), jnp.float32 if preprocess is None else jnp.uint8)
    constants = jax.tree.map(np.asarray, variables)  # of no device

    def network(images: Num[Array, "n h w c"]) -> Any:
        images = images if preprocess is None else preprocess_input(images, preprocess)
        return run(module, jax.tree.map(jnp.asarray, constants), images)

    with replacing(path) as temporary:  # which says first whether there is a place for it
        serializer()
        try:
            exported = lower(jax.jit(network), platforms=names)(images)
        except flax.errors.FlaxError as e:
            raise ValueError(f"these are not the variables of this {type(module).__name__}: {e}") from e
        temporary.write_bytes(exported.serialize())
    return exported


def check_target(path: str | os.PathLike, platforms: str | Sequence[str]) -> tuple[str, ...]:
    """List the platforms, each once; ValueError for one that JAX has not, or a file that is not called as these are."""
    names = (platforms,) if isinstance(platforms, str) else tuple(dict.fromkeys(platforms))
    if not names:
        raise ValueError(f"no platforms given: at least one of {', '.join(PLATFORMS)} expected")
    for name in names:
        if name not in PLATFORMS:
            raise ValueError(f"unknown platform {name!r}: {', '.join(PLATFORMS)} expected")
    if Path(path).suffix != ENDING:
        raise ValueError(f"{path}: a name that ends in {ENDING} expected")
    return names


def serializer() -> None:
    """Raise ModuleNotFoundError unless JAX can write files; the message says what to install."""
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore
    except ModuleNotFoundError:
        raise ModuleNotFoundError("flatbuffers is not installed: pip install 'fzoo[export]'") from None
