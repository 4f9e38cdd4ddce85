"""A network with what a job wants of it: rows of results, and what it is known by."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fzoo.inference.devices import replicate
from fzoo.inference.predict import features, output_shapes, predict
from fzoo.layers.classifier import Classifier

#: Outputs of one batch: name -> (N, ...), on their way from the device.
Outputs = Mapping[str, Any]


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
        variables: Any,
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

    def __call__(self, pixels: Any) -> Outputs:
        """Start with a batch (N, H, W, C) of a fixed size; the results are on their way."""
        options = {**self.options, "batch_size": pixels.shape[0]}
        if self.layers is None:
            return {"probabilities": predict(self.module, self.variables, pixels, **options)}
        return features(self.module, self.variables, pixels, self.layers, **options)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """What `rows` gives for an image of a batch of this shape, by name; nothing is computed.

        Raises:
            ValueError: an unknown layer, a size that the network does not take, or one that gives no classes.
        """
        pixels = jax.ShapeDtypeStruct(shape, np.uint8)
        avals = output_shapes(self.module, self.variables, pixels, self.layers, **self.options)
        avals = {"probabilities": avals} if self.layers is None else avals
        found = {name: jax.ShapeDtypeStruct(aval.shape[1:], on_disk(aval.dtype)) for name, aval in avals.items()}
        if self.layers is not None:
            return found
        (classes,) = found.values()
        if len(classes.shape) != 1:
            raise ValueError(f"a network with outputs of shape {classes.shape} given, a classifier expected; or layers")
        top = (min(self.top, classes.shape[0]),)
        return {"classes": jax.ShapeDtypeStruct(top, np.int32), "probabilities": jax.ShapeDtypeStruct(top, np.float32)}

    def rows(self, outputs: Outputs, good: Sequence[int]) -> dict[str, np.ndarray]:
        """The results of some images of a batch, on the host; waits for them."""
        arrays = {name: np.asarray(array)[good] for name, array in outputs.items()}
        arrays = {name: array.astype(on_disk(array.dtype), copy=False) for name, array in arrays.items()}
        if self.layers is not None:
            return arrays
        p = arrays["probabilities"].astype(np.float32, copy=False)
        classes = np.argsort(-p, axis=1, kind="stable")[:, : self.top].astype(np.int32)
        return {"classes": classes, "probabilities": np.take_along_axis(p, classes, axis=1)}


def on_disk(dtype: Any) -> np.dtype:
    """The dtype that files have; NumPy's has no bfloat16."""
    return np.dtype(np.float32) if dtype == jnp.bfloat16 else np.dtype(dtype)


def class_labels(labels: Sequence[tuple[str, str]] | None, network: Network) -> Sequence[tuple[str, str]]:
    """(WordNet ID, label) of each class."""
    from fzoo.images.labels import class_index

    classes = network.module.classes
    if labels is None:
        labels = class_index() if classes == 1000 else [("-", str(i)) for i in range(classes)]
    if len(labels) != classes:
        raise ValueError(f"{len(labels)} labels given, {classes} expected: one for each class")
    return labels


def fingerprint(module: Classifier, variables: Any) -> str:
    """A hash of a network and the values of its variables, the same in each process."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(described(module)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def described(value: Any) -> Any:
    """A module's fields, sets in order: their own is another in each process."""
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name")]
        return type(value).__name__, [(name, described(getattr(value, name))) for name in fields]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return str(value)
