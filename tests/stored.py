"""What Keras says of its networks, stored, so that most tests need not build these: `tests/stored/`.

`KERAS_BACKEND=jax python tests/stored.py` writes it anew, in three minutes; the slow tests compare it with the Keras
that is installed. `layers.json.gz`: each layer of each model. `values.npz`: what each layer of each family's small
version gives.
"""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from networks import SMALL, images_for, measured_statistics, random_variables, small_options

import fzoo
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace

FOLDER = Path(__file__).parent / "stored"
LAYERS, VALUES = FOLDER / "layers.json.gz", FOLDER / "values.npz"

#: Numbers that stand for a layer's output for an image: its norm, and projections on so many random directions.
PROJECTIONS = 6


@functools.cache
def stored_layers() -> dict[str, list[list[Any]]]:
    """{model: [name, class, shape of the output, number of parameters] of each layer, in Keras's order}."""
    return json.loads(gzip.decompress(LAYERS.read_bytes()))


@functools.cache
def small_statistics(name: str) -> dict[str, np.ndarray]:
    """What `measured_statistics` gave for a family's small version."""
    return unpack_statistics(fzoo.create(name, **small_options(name)), stored_values()[f"{name} statistics"])


@functools.cache
def small_network(name: str) -> tuple[Classifier, dict[str, Any]]:
    """A family's small version, with the variables that the stored values are of."""
    module = fzoo.create(name, **small_options(name))
    return module, random_variables(module, statistics=small_statistics(name))


@functools.cache
def stored_values() -> dict[str, np.ndarray]:
    """{"NAME values": (layers, images, 1 + PROJECTIONS), "NAME output": (images, classes), "NAME statistics": int8}."""
    with np.load(VALUES) as arrays:
        return dict(arrays)


def pack_statistics(module: Classifier, statistics: dict[str, np.ndarray]) -> np.ndarray:
    """`measured_statistics` in a row, in the order of the layers."""
    names = [node.name for node in trace(module).layers if node.name in statistics]
    return np.concatenate([np.zeros(0, np.int8), *(statistics[name].ravel() for name in names)])


def unpack_statistics(module: Classifier, packed: np.ndarray) -> dict[str, np.ndarray]:
    statistics, start, layers = {}, 0, trace(module).layers
    for node in layers:
        if node.kind == "BatchNormalization":
            shape: tuple[int, ...] = (2, node.shape[-1])
        elif node is layers[-1] and node.kind == "Dense":
            shape = ()
        else:
            continue
        end = start + int(np.prod(shape))
        statistics[node.name] = packed[start:end].reshape(shape)
        start = end
    assert start == len(packed)
    return statistics


def summarise(layer: str, output: Any) -> np.ndarray:
    """The norm of a layer's output for each image, and its projections: (images, 1 + PROJECTIONS).

    A projection adds up all that differs, with random signs, so that an error in a few elements shows as well.
    """
    rows = np.asarray(output, np.float32).reshape(len(output), -1)
    size = rows.shape[1]
    bits = np.random.default_rng(zlib.crc32(layer.encode())).bytes(-(-size * PROJECTIONS // 8))
    signs = np.unpackbits(np.frombuffer(bits, np.uint8))[: size * PROJECTIONS].reshape(size, PROJECTIONS)
    return np.hstack([np.linalg.norm(rows, axis=1, keepdims=True), rows @ (2 * signs.astype(np.float32) - 1)])


def assert_summaries_close(ours: np.ndarray, theirs: np.ndarray, what: str, tolerance: float = 5e-4) -> None:
    """Differences over the norm: that of a projection is the norm of what differs, give or take."""
    assert (theirs[:, 0] > 0).all(), f"{what}: the reference is zero, which tests nothing"
    error = float((np.abs(ours - theirs) / theirs[:, :1]).max())
    assert error <= tolerance, f"{what}: off by {error:.2e} of the norm"


def describe_layers(model: Any) -> list[list[Any]]:
    """Each layer of a Keras model, as stored."""
    return [
        [layer.name, type(layer).__name__, list(layer.output.shape[1:]), int(layer.count_params())]
        for layer in model.layers
    ]


def measure_small(name: str, packed: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What Keras computes for the small version of a family, with the statistics that are stored or with new ones."""
    from reference import outputs, set_variables, small_keras_model

    module = fzoo.create(name, **small_options(name))
    if packed is None:
        statistics = measured_statistics(module, random_variables(module, statistics={}))
    else:
        statistics = unpack_statistics(module, packed)
    model = set_variables(small_keras_model(name), random_variables(module, statistics=statistics))
    found = outputs(model, images_for(module, 2), [layer.name for layer in model.layers])
    return {
        f"{name} values": np.stack([summarise(layer, output) for layer, output in found.items()]).astype(np.float32),
        f"{name} output": found[model.layers[-1].name],
        f"{name} statistics": pack_statistics(module, statistics),
    }


def write_values() -> None:
    """Ask the Keras that is installed what small versions give."""
    arrays: dict[str, np.ndarray] = {}
    for name in SMALL:
        arrays |= measure_small(name)
    np.savez_compressed(VALUES, **arrays)


def write_layers() -> None:
    """Ask it for the layers of its models."""
    import keras
    from reference import CASES, build

    layers = {name: describe_layers(build(getattr(keras.applications, name))) for name in CASES}
    LAYERS.write_bytes(gzip.compress(json.dumps(layers).encode(), mtime=0))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    write_values()
    write_layers()
