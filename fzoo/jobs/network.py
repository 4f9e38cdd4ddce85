"""A network with what a job wants of it: rows of results, and what it is known by."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from fzoo.inference.batches import output_shapes
from fzoo.inference.devices import replicate
from fzoo.inference.predict import features, predict
from fzoo.layers.classifier import Classifier
from fzoo.types import DTypeLike, Variables

#: Outputs of one batch: name -> (N, ...), on their way from the device.
Outputs = Mapping[str, Array | np.ndarray]


class Network:
    """A network with what is wanted of it: pixels in, rows of results out.

    Args:
        module, variables, preprocess, mesh: as for `predict`; the variables are on the mesh.
        layers: whose outputs are wanted; None for the likeliest classes.
        top: how many of these.
    """

    def __init__(
        self,
        module: Classifier,
        variables: Variables,
        layers: str | Sequence[str] | None,
        top: int,
        preprocess: str | None,
        mesh: Mesh,
    ):
        if top < 1:
            raise ValueError(f"top={top} given, a positive number expected")
        self.module, self.variables, self.top = module, replicate(variables, mesh), top
        self.layers = (layers,) if isinstance(layers, str) else None if layers is None else tuple(layers)
        self.devices, self.platform = mesh.size, mesh.devices.flat[0].platform
        self.options: dict[str, Any] = {"preprocess": preprocess, "mesh": mesh}

    def __call__(self, pixels: np.ndarray) -> Outputs:
        """Start with a batch (N, H, W, C) of a fixed size; the results are on their way."""
        options = {**self.options, "batch_size": pixels.shape[0]}
        if self.layers is None:
            return {"probabilities": predict(self.module, self.variables, pixels, **options)}
        return features(self.module, self.variables, pixels, self.layers, **options)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return what `rows` gives for an image of a batch of this shape, by name; nothing is computed.

        Raises:
            ValueError: an unknown layer, a size that the network does not take, or one that gives no classes.
        """
        pixels = jax.ShapeDtypeStruct(shape, np.uint8)
        avals = output_shapes(self.module, self.variables, pixels, self.layers, **self.options)
        if isinstance(avals, tuple):
            raise ValueError(f"a network of {len(avals)} outputs given, one of classes expected; or layers")
        avals = {"probabilities": avals} if self.layers is None else avals
        shapes = {name: jax.ShapeDtypeStruct(aval.shape[1:], on_disk(aval.dtype)) for name, aval in avals.items()}
        if self.layers is not None:
            return shapes
        (classes,) = shapes.values()
        if len(classes.shape) != 1:
            raise ValueError(f"a network with outputs of shape {classes.shape} given, a classifier expected; or layers")
        top = (min(self.top, classes.shape[0]),)
        return {"classes": jax.ShapeDtypeStruct(top, np.int32), "probabilities": jax.ShapeDtypeStruct(top, np.float32)}

    def rows(self, outputs: Outputs, good: Sequence[int], names: Sequence[str]) -> dict[str, np.ndarray]:
        """Wait for the results of a batch, and return those of some of its images, on the host.

        Args:
            outputs: of the batch.
            good: the places in the batch of the images that could be read.
            names: of these images.

        Raises:
            ValueError: the network gives NaN or infinity for one of them.
        """
        arrays = {name: np.asarray(array)[good] for name, array in outputs.items()}
        arrays = {name: array.astype(on_disk(array.dtype), copy=False) for name, array in arrays.items()}
        check_finite(arrays, names, self.layers is not None)
        if self.layers is not None:
            return arrays
        p = arrays["probabilities"].astype(np.float32, copy=False)
        classes = np.argsort(-p, axis=1, kind="stable")[:, : self.top].astype(np.int32)
        return {"classes": classes, "probabilities": np.take_along_axis(p, classes, axis=1)}


def check_finite(arrays: Mapping[str, np.ndarray], names: Sequence[str], tapped: bool) -> None:
    """Raise ValueError that names the first image for which a number is NaN or infinite, and the layer.

    Args:
        arrays: (len(names), ...) for each output.
        names: of the images.
        tapped: whether the outputs are those of layers, whose names they have.
    """
    wrong: list[tuple[int, str, float]] = []
    for layer, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            flat = array.reshape(len(array), -1)
            row = int(np.argmin(np.isfinite(flat).all(1)))
            wrong.append((row, layer, float(flat[row][~np.isfinite(flat[row])][0])))
    if wrong:
        row, layer, number = min(wrong, key=lambda entry: entry[0])
        giver = f"the layer {layer} of the network" if tapped else "the network"
        raise ValueError(
            f"{giver} gives {number} for the image {names[row]}, finite numbers expected: look at its weights, its "
            "dtype and the preprocessing"
        )


def on_disk(dtype: DTypeLike) -> np.dtype:
    """Return the dtype that files have; NumPy's has no bfloat16."""
    return np.dtype(np.float32) if dtype == jnp.bfloat16 else np.dtype(dtype)


def class_labels(labels: Sequence[tuple[str, str]] | None, network: Network) -> Sequence[tuple[str, str]]:
    """Return (WordNet ID, label) of each class."""
    from fzoo.images.labels import class_index

    classes = network.module.classes
    if labels is None:
        labels = class_index() if classes == 1000 else [("-", str(i)) for i in range(classes)]
    if len(labels) != classes:
        raise ValueError(f"{len(labels)} labels given, {classes} expected: one for each class")
    return labels


def fingerprint(module: Classifier, variables: Variables) -> str:
    """Return a hash of a network and the values of its variables, the same in each process.

    Raises:
        ValueError: a field of the module holds what another process can't know again, such as a lambda.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(describe_value(module)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def describe_value(value: Any, name: str = "") -> Any:
    """Return a module's field, or what it holds, as text, numbers and lists that are the same in each process.

    Args:
        value: a module, or what one of its fields holds.
        name: the field's, for the error.

    Raises:
        ValueError: it has no name by which another process knows it: a lambda, a function inside of another.
    """
    if isinstance(value, (str, int, float, complex, bytes, type(None), enum.Enum, np.dtype, np.generic)):
        return repr(value)
    if isinstance(value, functools.partial):
        return (
            "partial",
            describe_value(value.func, name),
            describe_value(value.args, name),
            describe_value(value.keywords, name),
        )
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        if is_importable(value):
            return f"{value.__module__}.{value.__qualname__}"
    elif dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name")]
        return describe_value(type(value), name), [
            (field, describe_value(getattr(value, field), field)) for field in fields
        ]
    elif isinstance(value, Mapping):
        return "mapping", sorted((repr(describe_value(k, name)), describe_value(v, name)) for k, v in value.items())
    elif isinstance(value, (set, frozenset)):  # the order of a set is another in each process
        return "set", sorted(repr(describe_value(item, name)) for item in value)
    elif isinstance(value, (tuple, list)):
        return "sequence", [describe_value(item, name) for item in value]
    elif type(value).__repr__ is not object.__repr__ and f"{id(value):x}" not in repr(value):
        return repr(value)
    raise ValueError(
        f"{name}={value!r} can't be known again in another process: a function or class at the top of a module expected"
    )


def is_importable(value: Any) -> bool:
    """Tell whether a function or class is what its module has under its name."""
    attribute: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in value.__qualname__.split("."):
        attribute = getattr(attribute, part, None)
    return attribute is value
