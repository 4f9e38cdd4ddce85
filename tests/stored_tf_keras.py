"""What tf-keras says of the networks that Keras 3 has no more, stored, so that tests need no TensorFlow.

`python tests/stored_tf_keras.py` writes `tests/stored/tf_keras/` anew; it wants tf_keras and tensorflow. The slow tests
compare it with the tf-keras that is installed. `layers.json.xz`: each layer of each model. `values.npz`: what each
layer of small versions gives. `regnet.h5.xz`: a whole model as tf-keras saved it, the second of its session, with the
`random_variables` of `FILE`.
"""

from __future__ import annotations

import functools
import importlib
import json
import lzma
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from networks import images_for, measured_statistics, random_variables
from stored import pack_statistics, summarise, unpack_statistics

import fzoo
from fzoo.layers.classifier import Classifier

FOLDER = Path(__file__).parent / "stored" / "tf_keras"
LAYERS, VALUES, SAVED = FOLDER / "layers.json.xz", FOLDER / "values.npz", FOLDER / "regnet.h5.xz"

#: Every model that tf-keras has and Keras 3 has not.
MODELS = (
    *(f"RegNet{kind}{size}" for kind in "XY" for size in ("002", "004", "006", "008", "016", "032")),
    *(f"RegNet{kind}{size}" for kind in "XY" for size in ("040", "064", "080", "120", "160", "320")),
    *(f"ResNetRS{depth}" for depth in (50, 101, 152, 200, 270, 350, 420)),
)

#: Small versions: the side of their images, and their options. X080 has the first stage narrower than a group.
SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "RegNetX080": (65, {"depths": (2, 1, 1, 1), "widths": (8, 12, 24, 36), "group_width": 12}),
    "RegNetY002": (64, {"depths": (1, 2, 1, 1), "widths": (16, 24, 32, 40)}),
    "ResNetRS200": (65, {"blocks": (1, 2, 1, 1)}),
}

#: The network whose file is stored.
FILE: tuple[str, dict[str, Any]] = (
    "RegNetY002",
    {"depths": (1, 1, 1, 1), "widths": (8, 8, 8, 8), "classes": 5, "input_shape": (32, 32, 3)},
)


@functools.cache
def stored_layers() -> dict[str, list[list[Any]]]:
    """{model: [name, class, shape of the output, number of parameters] of each layer, in Keras's order}."""
    return json.loads(lzma.decompress(LAYERS.read_bytes()))


@functools.cache
def stored_values() -> dict[str, np.ndarray]:
    """{"NAME values": (layers, images, ...), "NAME output": (images, classes), "NAME statistics": int8}."""
    with np.load(VALUES) as arrays:
        return dict(arrays)


def create_small(name: str, **options: Any) -> Classifier:
    """Make fzoo's small version."""
    side, sizes = SMALL[name]
    return fzoo.create(name, **{**sizes, "input_shape": (side, side, 3), "classes": 7, **options})


@functools.cache
def small_network(name: str) -> tuple[Classifier, dict[str, Any]]:
    """A small version, with the variables that the stored values are of."""
    module = create_small(name)
    statistics = unpack_statistics(module, stored_values()[f"{name} statistics"])
    return module, random_variables(module, statistics=statistics)


def build_small(name: str, options: Mapping[str, Any]) -> Any:
    """Build tf-keras's network with fzoo's options."""
    module: Any = fzoo.create(name, **options)
    common = {"weights": None, "classes": module.classes, "input_shape": module.input_shape}
    if name.startswith("RegNet"):
        constructor = importlib.import_module("tf_keras.src.applications.regnet").RegNet
        sizes = ("depths", "widths", "group_width", "block_type", "default_size")
        own = {key: getattr(module, key) for key in sizes} | {"model_name": module.prefix}
    else:
        constructor = importlib.import_module("tf_keras.src.applications.resnet_rs").ResNetRS
        blocks = [{"input_filters": 64 << i, "num_repeats": count} for i, count in enumerate(module.blocks)]
        rates = {key: getattr(module, key) for key in ("dropout_rate", "drop_connect_rate")}
        own = {"depth": 50, "block_args": blocks, **rates}
    return constructor(**common, **own)


def fresh() -> None:
    """Begin a session, whose names count from the first."""
    import tf_keras

    tf_keras.backend.clear_session()
    tf_keras.backend.reset_uids()


def own_layers(model: Any) -> list[Any]:
    """The layers of a model but for its operators, which are layers in Keras 2."""
    return [layer for layer in model.layers if type(layer).__name__ != "TFOpLambda"]


def describe_layers(model: Any) -> list[list[Any]]:
    """Each layer of a model, as stored; the first is called as in Keras 3."""
    first, *layers = [
        [layer.name, type(layer).__name__, list(layer.output.shape[1:]), int(layer.count_params())]
        for layer in own_layers(model)
    ]
    return [["input_layer", *first[1:]], *layers]


def build(name: str) -> Any:
    """Build a model at full depth in a fresh session; its arrays are zero."""
    import tensorflow as tf
    from tf_keras import applications
    from tf_keras.src.initializers import initializers

    def zeros(self: Any, shape: Any, dtype: Any = None, **_: Any) -> Any:
        return tf.zeros(shape, dtype or tf.float32)

    fresh()
    with mock.patch.object(initializers.VarianceScaling, "__call__", zeros):
        return getattr(applications, name)(weights=None)


def set_variables(model: Any, variables: Mapping[str, Any]) -> Any:
    """Give a model of tf-keras fzoo's variables."""
    places = {
        "gamma": ("params", "scale"),
        "beta": ("params", "bias"),
        "moving_mean": ("batch_stats", "mean"),
        "moving_variance": ("batch_stats", "var"),
    }
    for layer in model.layers:
        names = [weight.name.rpartition("/")[2].partition(":")[0] for weight in layer.weights]
        keys = [places.get(name, ("params", name)) for name in names]
        own = layer.name.replace("2head_dense", "1head_dense")
        layer.set_weights([variables[collection][own][array] for collection, array in keys])
    return model


def measure_small(name: str, packed: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What tf-keras computes for a small version; RegNet's output is its logits."""
    import tf_keras

    module = create_small(name)
    if packed is None:
        statistics = measured_statistics(module, random_variables(module, statistics={}))
    else:
        statistics = unpack_statistics(module, packed)
    fresh()
    model = set_variables(build_small(name, create_options(module)), random_variables(module, statistics=statistics))
    layers = own_layers(model)
    assert [layer.name for layer in layers[1:]] == fzoo.layer_names(module)[1:]
    whole = tf_keras.Model(model.inputs, [layer.output for layer in layers])
    found = [np.asarray(array) for array in whole(images_for(module, 2), training=False)]
    names = fzoo.layer_names(module)
    values = [summarise(layer, output) for layer, output in zip(names, found, strict=True)]
    return {
        f"{name} values": np.stack(values).astype(np.float32),
        f"{name} output": found[-1],
        f"{name} statistics": pack_statistics(module, statistics),
    }


def create_options(module: Classifier) -> dict[str, Any]:
    """The options of a network of a family, for another of it."""
    left_out = ("parent", "name", "prepared")
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in left_out}


def save_file(path: Path) -> None:
    """Save the network of `FILE`, whole, as the second of its session."""
    name, options = FILE
    module = fzoo.create(name, **options)
    fresh()
    build_small(name, options)
    model = set_variables(build_small(name, options), random_variables(module, statistics={}))
    assert model.layers[-1].name == "2head_dense"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
        model.save(path, include_optimizer=False, save_format="h5")


def write() -> None:
    """Ask the tf-keras that is installed."""
    FOLDER.mkdir(exist_ok=True)
    values: dict[str, np.ndarray] = {}
    for name in SMALL:
        values |= measure_small(name)
    np.savez_compressed(VALUES, **values)
    with tempfile.TemporaryDirectory() as folder:
        save_file(Path(folder) / "regnet.h5")
        SAVED.write_bytes(lzma.compress((Path(folder) / "regnet.h5").read_bytes()))
    layers = {name: describe_layers(build(name)) for name in MODELS}
    LAYERS.write_bytes(lzma.compress(json.dumps(layers).encode()))


if __name__ == "__main__":
    write()
