"""A network as one file that runs without this package: StableHLO, written by `jax.export`, or ONNX."""

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
from jax.export import export as lower
from jax.export import symbolic_shape
from jaxtyping import Array, Num, PyTree

from fzoo.files import replacing
from fzoo.inference.batches import run, taps
from fzoo.inference.onnx.model import onnx_model
from fzoo.layers.classifier import Classifier
from fzoo.layers.options import is_count
from fzoo.ops.platforms import traced_for
from fzoo.ops.shapes import Side
from fzoo.types import Variables
from fzoo.zoo import preprocess_input, preprocessing_mode

#: What a file can be for, as JAX calls them; "gpu" is "cuda" (NVIDIA) or "rocm" (AMD).
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


#: The ends of files' names.
STABLEHLO, ONNX = ".stablehlo", ".onnx"


#: Those that a file of StableHLO is for, unless it is said.
USUAL = ("cpu", "cuda", "tpu")


#: Bytes that either format holds.
MOST = 2**31


def export(
    module: nn.Module,
    variables: Variables,
    path: str | os.PathLike,
    *,
    platforms: str | Sequence[str] | None = None,
    preprocess: str | None = None,
    batch_size: int | None = None,
    image_shape: tuple[int | None, int | None, int] | None = None,
    layers: str | Sequence[str] = (),
) -> Any:
    """Write a network and its weights as one file, which takes images and needs no fzoo: StableHLO or ONNX.

    The end of the file's name says which. "resnet50.onnx" is ONNX (operators of version 18), for ONNX Runtime,
    OpenVINO and what else reads it. Its input is called "images" and is NHWC, as everywhere here, of float32 or, with
    `preprocess`, uint8; its output "probabilities", "logits" or "features", or the layers' names. Convolutions and
    dense layers, with their arrays, have the names of the Keras layers. What is computed is float32. It takes `onnx`.

    "resnet50.stablehlo" is StableHLO as `jax.export` keeps it, for all platforms together, and JAX promises to read it
    for six months at least. It needs JAX alone (and `flatbuffers`). Whoever has it does

        exported = jax.export.deserialize(bytearray(open("resnet50.stablehlo", "rb").read()))
        options = {"xla_cpu_experimental_ynn_fusion_type": ""}  # on a CPU; None elsewhere
        probabilities = jax.jit(exported.call, compiler_options=options)(images)

    Compiler options are no part of such a file. `exported.call(images)` is compiled with JAX's own, which on CPU, in
    jaxlib 0.10.2, sum wrongly in some fused reductions (see `fzoo.inference.compiler`). The networks' forward passes
    have none of these in any family that was measured: with both, results are within 1e-5 of `predict`'s. The options
    above keep it so whatever the images are put through in the same `jax.jit`, and are often the faster.

    On CPU, the form of a convolution is chosen as for one image where the batch is left open. A batch is computed as a
    whole, not in micro-batches as `predict` does: a few images at once are the fastest there. For other platforms
    than CPU, and for ONNX, give `optimize_for_inference` one that counts: `platform="cuda"`.

    The file appears under its name when it is whole: a kill or a full disk leaves what was there before.

    Args:
        module: from `fzoo.create`, `fzoo.load` or `fzoo.optimize_for_inference`, or a Flax module of your own.
        variables: its variables, which become constants of the program, in their own dtype.
        path: ends in ".stablehlo" or ".onnx".
        platforms: of StableHLO, one or more of "cpu", "cuda", "rocm", "tpu"; None for all but "rocm".
        preprocess: the model ("ResNet50") or the mode ("unit") whose `preprocess_input` is to be part of the program.
            It takes pixels of uint8 then, and otherwise preprocessed float32.
        batch_size: of the calls. None leaves it open: StableHLO is compiled for each that it meets.
        image_shape: (height, width, channels); by default what the network was created for. In StableHLO, a height or
            a width of None is left open, from the smallest that the network takes; the program is compiled for each
            that it meets, and a CPU runs XLA's own convolutions where the best form goes by the size. NASNet, which
            pads by whether a side is even, leaves multiples of 32 open. A network of `optimize_for_inference` is one
            for `platform="cuda"`.
        layers: one Keras layer, or several, whose outputs are wanted instead of the network's: in StableHLO a
            dictionary, in ONNX outputs of these names.

    Returns:
        What was written: a `jax.export.Exported`, whose `mlir_module_serialized` is the StableHLO alone as portable
        bytecode, or an `onnx.ModelProto`.

    Raises:
        ValueError: an argument that can't be honoured, variables that are not the module's, more than 2 GiB of them, or
            a step of a module of your own for which this has no form in ONNX.
        OSError: the file can't be written.
        ModuleNotFoundError: what writes the file (flatbuffers for JAX, or onnx) is not installed.
    """
    names = check_target(path, platforms)
    if batch_size is not None and not is_count(batch_size):
        raise ValueError(f"batch_size={batch_size!r} given, a positive number expected, or None to leave it open")
    if preprocess is not None:
        preprocessing_mode(preprocess)  # says what is wrong with it
    shape = module.example_shape if image_shape is None and isinstance(module, Classifier) else image_shape
    if not isinstance(shape, tuple) or len(shape) != 3 or not all(map(is_count, (s for s in shape if s is not None))):
        raise ValueError(f"image_shape={shape!r} given, (height, width, channels) expected")
    if shape[2] is None:
        raise ValueError(f"image_shape={shape!r} given: the height and the width may be None, not the channels")
    if None in shape and Path(path).suffix == ONNX:
        raise ValueError(f"image_shape={shape!r} given with {path}: only {STABLEHLO} can leave a size open")
    if (size := sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(variables))) >= MOST:
        raise ValueError(f"variables of {size / 2**30:.1f} GiB given, less than 2 expected: the format holds no more")
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    if layers and not isinstance(module, Classifier):
        raise ValueError(f"layers={layers!r} given with a {type(module).__name__}: a network of fzoo has layers")
    if isinstance(module, Classifier) and any(
        side is None and own is not None for side, own in zip(shape, module.image_shape, strict=True)
    ):
        height, width, channels = module.image_shape
        raise ValueError(
            f"image_shape={shape!r} given, this network was created for {height} x {width}: "
            f"one of any size has input_shape=(None, None, {channels})"
        )
    if None in shape and isinstance(module, Classifier) and module.prepared and module.prepared.tiles:
        raise ValueError(
            f"image_shape={shape!r} given with kernels prepared for tiles of a known size: "
            'optimize_for_inference(..., platform="cuda") prepares for any'
        )
    images = jax.ShapeDtypeStruct(
        open_shape(module, batch_size, shape), jnp.float32 if preprocess is None else jnp.uint8
    )
    constants = jax.tree.map(np.asarray, variables)  # of no device

    @traced_for(names[0] if len(names) == 1 else None)
    def network(images: Num[Array, "n h w c"]) -> PyTree:
        images = images if preprocess is None else preprocess_input(images, preprocess)
        arrays = jax.tree.map(jnp.asarray, constants)
        if layers and isinstance(module, Classifier):
            return taps((module, layers), arrays, images)
        return run(module, arrays, images)

    with replacing(path) as temporary:  # which says first whether there is a place for it
        try:
            if Path(path).suffix == ONNX:
                written = onnx_model(module, constants, images, preprocess, layers)
                data = written.SerializeToString()
            else:
                serializer()
                written = lower(jax.jit(network), platforms=names)(images)
                data = written.serialize()
        except flax.errors.FlaxError as e:
            raise ValueError(f"these are not the variables of this {type(module).__name__}: {e}") from e
        except (TypeError, jax.errors.InconclusiveDimensionOperation) as e:
            if None not in shape:
                raise
            reason = str(e).partition("\n")[0]
            raise ValueError(
                f"image_shape={shape!r} given, this network needs a fixed height and width: {reason}"
            ) from e
        temporary.write_bytes(data)
    return written


def open_shape(module: nn.Module, batch_size: int | None, shape: tuple[int | None, ...]) -> tuple[Side, ...]:
    """Make the shape of images, with a symbol for each side that is None."""
    least, step = (module.min_size, module.open_step) if isinstance(module, Classifier) else (1, 1)
    symbols = [name if step == 1 else f"{step}*{name}" for name in ("height", "width")]
    given = [symbol if side is None else str(side) for symbol, side in zip(symbols, shape[:2], strict=True)]
    constraints = [f"{symbol} >= {least}" for symbol, side in zip(symbols, shape[:2], strict=True) if side is None]
    batch = "batch" if batch_size is None else str(int(batch_size))
    return tuple(symbolic_shape(", ".join((batch, *given, str(shape[2]))), constraints=constraints))


def check_target(path: str | os.PathLike, platforms: str | Sequence[str] | None) -> tuple[str, ...]:
    """List a file's platforms, each once; ValueError for one that JAX has not, or a name that says no format.

    ONNX has none.
    """
    if Path(path).suffix not in (STABLEHLO, ONNX):
        raise ValueError(f"{path}: a name that ends in {STABLEHLO} or {ONNX} expected")
    if Path(path).suffix == ONNX:
        if platforms is not None:
            raise ValueError(f"platforms={platforms!r} given with {path}: ONNX is for all, {STABLEHLO} for some")
        return ()
    platforms = USUAL if platforms is None else platforms
    names = (platforms,) if isinstance(platforms, str) else tuple(dict.fromkeys(platforms))
    if not names:
        raise ValueError(f"no platforms given: at least one of {', '.join(PLATFORMS)} expected")
    for name in names:
        if name not in PLATFORMS:
            raise ValueError(f"unknown platform {name!r}: {', '.join(PLATFORMS)} expected")
    return names


def serializer() -> None:
    """Raise ModuleNotFoundError unless JAX can write files; the message says what to install."""
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore
    except ModuleNotFoundError:
        raise ModuleNotFoundError("flatbuffers is not installed: pip install 'fzoo[export]'") from None
