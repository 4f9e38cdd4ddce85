"""Models as older versions of Keras wrote them, what is refused, custom classes, and damaged configurations."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from networks import assert_alive, random_images
from reference import assert_close, outputs
from test_keras_model import BRIGHTNESS, randomise

import fzoo

L = keras.layers
pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")


def saved(folder: Path, *layers: Any, version: str = "2.4.0") -> tuple[Path, np.ndarray, np.ndarray]:
    """A Sequential as h5, said to be of an older Keras; the images that it takes, and what Keras gives for them."""
    keras.utils.clear_session(free_memory=False)
    model = randomise(keras.Sequential([L.Input((8, 8, 4)), *layers, L.Flatten(), L.Dense(3, name="classes")]))
    path = folder / "model.h5"
    model.save(path)
    with h5py.File(path, "r+") as file:
        file.attrs["keras_version"] = version
    images = random_images((3, 8, 8, 4)) * BRIGHTNESS
    expected = np.asarray(model(images, training=False))
    assert_alive(expected)
    return path, images, expected


def configuration(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return json.loads(file.attrs["model_config"])


def rewritten(path: Path, config: Any) -> Path:
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = config if isinstance(config, str) else json.dumps(config)
    return path


def edited(path: Path, edit: Callable[[list[dict[str, Any]]], Any]) -> Path:
    """The file with the list of its layers changed."""
    config = configuration(path)
    edit(config["config"]["layers"])
    return rewritten(path, config)


def check(path: Path, images: np.ndarray, expected: np.ndarray, **options: Any) -> None:
    assert_close(fzoo.predict(*fzoo.load_model(path, **options), images), expected, "the output")


def test_keras_1(tmp_path):
    """Names of classes and options as Keras 1 wrote them, in a list of layers without connections."""
    layers = [
        L.Conv2D(4, (3, 2), strides=2, padding="same", activation="relu", name="first"),
        L.SeparableConv2D(4, 2, name="second"),
        L.LeakyReLU(0.2, name="third"),
        L.MaxPooling2D(2, 1, name="fourth"),
        L.Dropout(0.25, name="fifth"),
    ]
    path, images, expected = saved(tmp_path, *layers, version="1.2.2")
    old = [
        ("Convolution2D", {"nb_filter": 4, "nb_row": 3, "nb_col": 2, "subsample": [2, 2], "border_mode": "same"}),
        ("SeparableConvolution2D", {"nb_filter": 4, "nb_row": 2, "nb_col": 2, "depthwise_regularizer": None}),
        ("LeakyReLU", {"alpha": {"type": "ndarray", "value": 0.2}}),
        ("MaxPooling2D", {"pool_size": [2, 2], "strides": [1, 1], "border_mode": "valid", "dim_ordering": "tf"}),
        ("Dropout", {"p": 0.25}),
        ("Flatten", {}),
        ("Dense", {"output_dim": 3, "bias": True, "input_dim": None, "init": "glorot_uniform", "W_constraint": None}),
    ]
    names = ["first", "second", "third", "fourth", "fifth", "flatten", "classes"]
    entries = [
        {"class_name": kind, "config": {"name": name, "trainable": True, **options}}
        for name, (kind, options) in zip(names, old, strict=True)
    ]
    entries[0]["config"] |= {"batch_input_shape": [None, 8, 8, 4], "activation": "relu", "dim_ordering": "tf"}
    check(rewritten(path, {"class_name": "Sequential", "config": entries}), images, expected)


@pytest.mark.parametrize(("mode", "layer"), [("sum", L.Add), ("ave", L.Average), ("concat", L.Concatenate)])
def test_merge_of_keras_1(tmp_path, mode, layer):
    image = L.Input((6, 6, 3), name="image")
    x = layer(name="merged")([L.Conv2D(3, 3, name="a")(image), L.Conv2D(3, 3, name="b")(image)])
    model = randomise(keras.Model(image, L.Dense(3, name="classes")(L.Flatten(name="flat")(x))))
    path, images = tmp_path / "model.h5", random_images((3, 6, 6, 3)) * BRIGHTNESS
    model.save(path)

    def node(*names: str) -> list[Any]:
        return [[[name, 0, 0] for name in names]]

    config = configuration(path)
    for entry in config["config"]["layers"]:
        sources = {"a": ["image"], "b": ["image"], "merged": ["a", "b"], "flat": ["merged"], "classes": ["flat"]}
        entry["inbound_nodes"] = node(*sources[entry["name"]]) if entry["name"] in sources else []
        if entry["name"] == "merged":
            entry |= {"class_name": "Merge", "config": {"name": "merged", "mode": mode, "concat_axis": -1}}
    check(rewritten(path, config), images, np.asarray(model(images)))


@pytest.mark.parametrize(("version", "slope"), [("2.15.0", 0.2), ("1.2.0", 0.2), ("3.5.0", 1 / 6)])
def test_hard_sigmoid_is_that_of_its_version(tmp_path, version, slope):
    path, images, _ = saved(tmp_path, L.Conv2D(3, 3, name="conv"), L.Activation("linear", name="act"), version=version)

    def edit(layers):
        (layer,) = (layer for layer in layers if layer["config"]["name"] == "act")
        layer["config"]["activation"] = "hard_sigmoid"

    module, variables = fzoo.load_model(edited(path, edit))
    found = fzoo.features(module, variables, images, ["conv", "act"])
    assert_close(found["act"], np.clip(np.asarray(found["conv"]) * slope + 0.5, 0, 1), "hard_sigmoid", 1e-5)


def test_half_precision(tmp_path):
    """A model saved under mixed precision is computed in float32."""
    keras.utils.clear_session(free_memory=False)
    policy = keras.dtype_policies.DTypePolicy("mixed_float16")
    model = randomise(keras.Sequential([L.Input((8, 8, 3)), L.Conv2D(4, 3, dtype=policy), L.Flatten(), L.Dense(3)]))
    model.save(tmp_path / "model.keras")
    module, variables = fzoo.load_model(tmp_path / "model.keras")
    images = random_images((3, 8, 8, 3)) * BRIGHTNESS
    found = fzoo.predict(module, variables, images)
    assert found.dtype == np.float32
    assert_close(found, np.asarray(model(images), np.float32), "half precision", 5e-3)


# -- refusals and custom classes --------------------------------------------------------------------------------------


def replaced(kind: str, **config: Any) -> Callable[[list[dict[str, Any]]], None]:
    """An edit that makes the layer "middle" one of another class."""

    def edit(layers):
        for layer in layers:
            if layer["config"].get("name") == "middle":
                layer.update(class_name=kind, config={"name": "middle", **config})

    return edit


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("Lambda", {"function": ["4wEAAAA=", None, None]}, r"middle \(Lambda\).*no code of a file is run"),
        ("MultiHeadAttention", {"num_heads": 2}, r"middle \(MultiHeadAttention\): attention"),
        ("LSTM", {"units": 3}, r"middle \(LSTM\): recurrent"),
        ("QuantizeWrapperV2", {"layer": {}}, r"middle \(QuantizeWrapperV2\).*quantised"),
        ("MyBlock", {"size": 3}, r"middle \(MyBlock\).*custom_objects=\{'MyBlock': function\}"),
        ("BatchNormalization", {"mode": 1}, r"middle \(BatchNormalization\): mode=1 given, 0"),
        ("BatchNormalization", {"axis": 1}, r"middle \(BatchNormalization\).*axis=1 given, of a tensor of 4 axes"),
        ("Conv2D", {"filters": 10**9, "kernel_size": 3}, r"middle \(Conv2D\): filters=1000000000 given"),
        ("Reshape", {"target_shape": [10**6, 10**6]}, r"middle \(Reshape\).*256 values"),
        ("UpSampling2D", {"size": [1000, 1000]}, r"middle|classes"),
        ("Activation", {"activation": "my_relu"}, r"middle \(Activation\): activation='my_relu' given"),
        ("Conv2D", {"filters": 3, "kernel_size": 3, "novelty": 7}, r"middle \(Conv2D\): novelty=7, which is not known"),
        ("TFOpLambda", {"function": "map_fn"}, r"middle \(TFOpLambda\): unknown function of TensorFlow 'map_fn'"),
        ("TensorFlowOpLayer", {"node_def": "\n\x03mul"}, r"middle \(TensorFlowOpLayer\): its node_def is not JSON"),
    ],
)
def test_refused_in_one_line(tmp_path, kind, config, message):
    path, _, _ = saved(tmp_path, L.Activation("linear", name="middle"))
    with pytest.raises(ValueError, match=message) as caught:
        fzoo.load_model(edited(path, replaced(kind, **config)))
    assert "\n" not in str(caught.value)


def test_a_subclassed_model(tmp_path):
    path, _, _ = saved(tmp_path)
    with pytest.raises(ValueError, match="holds a MyModel, a Functional or Sequential model expected"):
        fzoo.load_model(rewritten(path, {"class_name": "MyModel", "config": {"name": "mine"}}))


def test_custom_classes(tmp_path):
    """A function for a class of one's own: of values alone, and of layers with the file's weights."""
    path, images, expected = saved(tmp_path, L.Dense(5, name="middle"), L.ReLU(6.0, name="last"))

    def edit(layers):
        replaced("Package>Wide", units=5)(layers)
        for layer in layers:
            if layer["config"].get("name") == "last":
                layer.update(class_name="Cut", config={"name": "last", "most": 6.0})

    edited(path, edit)
    with pytest.raises(ValueError, match=r"middle \(Package>Wide\).*custom_objects"):
        fzoo.load_model(path)
    objects = {
        "Wide": lambda k, x, config: k.dense(x, config["units"], name=config["name"]),
        "Cut": lambda k, x, config: jnp.clip(x, 0, config["most"]),
    }
    check(path, images, expected, custom_objects=objects)
    module, _ = fzoo.load_model(path, custom_objects=objects)
    assert [name for name in fzoo.layer_names(module) if name in ("middle", "last")] == ["middle", "last"]
    assert module == fzoo.load_model(path, custom_objects=objects)[0]
    assert module != fzoo.load_model(path, custom_objects={**objects, "Cut": lambda k, x, config: x})[0]


# -- damaged configurations -------------------------------------------------------------------------------------------

VALUES = (None, True, -1, 0, 1, 2, 3, 10**9, 10**400, 1.5, -2.5, float("nan"), "", "same", "relu", [], [1, 2], {}, [[]])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a configuration."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in items for place in places(item, (*path, key))]


def mutate(config: Any, rng: np.random.Generator) -> Any:
    """A configuration with a few values changed, moved, doubled or gone."""
    config = copy.deepcopy(config)
    for _ in range(int(rng.integers(1, 3))):
        known = places(config)
        *above, key = known[int(rng.integers(len(known)))]
        at = config
        for step in above:
            at = at[step]
        other: Any = config
        for step in known[int(rng.integers(len(known)))]:
            other = other[step]
        change = int(rng.integers(4))
        if change == 0:
            at[key] = VALUES[int(rng.integers(len(VALUES)))]
        elif change == 1:
            at[key] = copy.deepcopy(other)
        elif change == 2:
            del at[key]
        elif isinstance(at, list):
            at.insert(key, copy.deepcopy(at[key]))
    return config


def check_mutations(folder: Path, count: int, seed: int) -> None:
    """Damaged configurations end in numbers of the right shape, or in one line that names the file."""
    rng = np.random.default_rng(seed)
    sequential = L.Conv2D(3, 3, name="conv"), L.BatchNormalization(name="bn"), L.MaxPooling2D(name="pool")
    image = L.Input((8, 8, 4), name="image")
    x = L.Add(name="sum")([L.Conv2D(4, 1, name="a")(image), L.Activation("tanh", name="b")(image[..., ::-1] * 0.5)])
    functional = keras.Model(image, L.Dense(2, name="classes")(L.Flatten(name="flat")(x)))
    (folder / "functional").mkdir()
    functional.save(folder / "functional" / "model.h5")
    paths = saved(folder, *sequential)[0], folder / "functional" / "model.h5"
    originals, contents = [configuration(path) for path in paths], [path.read_bytes() for path in paths]
    outcomes = {"loaded": 0, "refused": 0}
    for number in range(count):
        path = paths[number % 2]
        config = mutate(originals[number % 2], rng)
        path.write_bytes(contents[number % 2])  # HDF5 would keep what was there before
        rewritten(path, config)
        try:
            module, _ = fzoo.load_model(path)
            outcomes["loaded"] += 1
            assert fzoo.layer_names(module)
        except ValueError as e:
            outcomes["refused"] += 1
            assert str(path) in str(e) and "\n" not in str(e) and len(str(e)) < 3000, (seed, number, config)
        except Exception as e:
            raise AssertionError(f"seed {seed}, number {number}: {type(e).__name__}: {e}") from e
    assert min(outcomes.values()) > count // 50


@pytest.mark.slow
def test_mutated_configurations(tmp_path):
    check_mutations(tmp_path, 300, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_mutated_configurations(tmp_path, seed):
    check_mutations(tmp_path, 500, seed)


def nested(depth: int) -> Any:
    """A Sequential in a Sequential in a Sequential."""
    text = '{"class_name": "Sequential", "config": {"name": "s", "layers": ['
    return text * depth + '{"class_name": "Flatten", "config": {"name": "f"}}' + "]}}" * depth


@pytest.mark.parametrize("depth", [12, 300, 10_000])
def test_deep_nesting(tmp_path, depth):
    path, _, _ = saved(tmp_path)
    with pytest.raises(ValueError, match=r"nested deeper|can be read|shape"):
        fzoo.load_model(rewritten(path, nested(depth)))


def test_absurd_configurations(tmp_path):
    path, _, _ = saved(tmp_path)
    layer = {"class_name": "Activation", "config": {"name": "a", "activation": "relu"}, "inbound_nodes": []}
    image = {"class_name": "InputLayer", "config": {"name": "i", "batch_shape": [None, 4, 4, 3]}, "inbound_nodes": []}

    def functional(*layers: dict[str, Any]) -> dict[str, Any]:
        ends = {"input_layers": [["i", 0, 0]], "output_layers": [["c", 0, 0]]}
        return {"class_name": "Functional", "config": {"name": "m", "layers": [image, *layers], **ends}}

    ring = [
        {**layer, "name": name, "inbound_nodes": [[[before, 0, 0, {}]]]} for name, before in (("b", "c"), ("c", "b"))
    ]
    long = [{**layer, "name": f"a{n}"} for n in range(20_000)]
    huge = copy.deepcopy(image)
    huge["config"]["batch_shape"] = [None, 10**9, 10**9, 3]
    for config, message in [
        (functional(*ring), "circle"),
        (functional({**ring[0], "name": "c"}, {**ring[1], "name": "c"}), "two layers that are called c"),
        (functional(*long), "no list of layers"),
        (functional({**layer, "name": "c", "config": {"name": "c", "junk": ["x" * 10_000_000]}}), "not known"),
        ({**functional(), "config": {**functional()["config"], "layers": [huge], "output_layers": [["i", 0, 0]]}}, "i"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            fzoo.load_model(rewritten(path, config))
        assert len(str(caught.value)) < 3000


# -- TensorFlow's operations ------------------------------------------------------------------------------------------

K = keras.ops


def lambda_of(function: str, *nodes: Any, **arguments: Any) -> tuple[str, dict[str, Any], Any]:
    """An operation as TensorFlow 2.4 and later write it: class, configuration, connections."""
    kind = "SlicingOpLambda" if function == "__operators__.getitem" else "TFOpLambda"
    written = [[*(node if isinstance(node, list) else [node, 0, 0]), arguments] for node in nodes]
    return kind, {"function": function}, [written] if len(written) > 1 else written


def node_of(op: str, *names: str, constants: dict[str, Any] | None = None, **attributes: Any) -> Any:
    """An operation as TensorFlow 2.3 writes it."""
    attributes = {key: {"b" if isinstance(value, bool) else "f": value} for key, value in attributes.items()}
    definition = {"name": op, "op": op, "input": ["x"], "attr": {"T": {"type": "DT_FLOAT"}, **attributes}}
    config = {"node_def": json.dumps(definition), "constants": constants or {}}
    return "TensorFlowOpLayer", config, [[[name, 0, 0, {}] for name in names]]


WRITTEN = [
    (lambda a, b: a + b, lambda_of("__operators__.add", "a", y=["b", 0, 0], name=None)),
    (lambda a, b: 1.0 - a, lambda_of("math.subtract", ["_CONSTANT_VALUE", -1, 1.0], y=["a", 0, 0], name=None)),
    (lambda a, b: a / 255, lambda_of("math.truediv", "a", y=255, name=None)),
    (lambda a, b: a - np.array([1, 2, 3], np.float32), lambda_of("math.subtract", "a", y=[1.0, 2.0, 3.0])),
    (
        lambda a, b: a[..., ::-1],
        lambda_of(
            "__operators__.getitem",
            "a",
            slice_spec=[{"class_name": "__ellipsis__"}, {"start": None, "stop": None, "step": -1}],
        ),
    ),
    (
        lambda a, b: a[:, 1:, 0],
        lambda_of(
            "__operators__.getitem",
            "a",
            slice_spec=[{"start": None, "stop": None, "step": None}, {"start": 1, "stop": None, "step": None}, 0],
        ),
    ),
    (lambda a, b: K.mean(a, (1, 2), keepdims=True), lambda_of("math.reduce_mean", "a", axis=[1, 2], keepdims=True)),
    (lambda a, b: K.concatenate([a, b], 1), lambda_of("concat", "a", "b", axis=1)),
    (lambda a, b: K.reshape(a, (-1, 48)), lambda_of("reshape", "a", shape=[-1, 48])),
    (lambda a, b: K.leaky_relu(a, 0.1), lambda_of("nn.leaky_relu", "a", alpha=0.1, name=None)),
    (lambda a, b: K.silu(a), lambda_of("nn.silu", "a", beta=1.0)),
    (lambda a, b: K.gelu(a, approximate=False), lambda_of("nn.gelu", "a")),
    (lambda a, b: K.clip(a, -1, 0.5), lambda_of("clip_by_value", "a", clip_value_min=-1, clip_value_max=0.5)),
    (lambda a, b: K.image.resize(a, (3, 7)), lambda_of("image.resize", "a", size=[3, 7])),
    (
        lambda a, b: K.transpose(a, (0, 3, 1, 2)),
        lambda_of("compat.v1.transpose", "a", perm=[0, 3, 1, 2], conjugate=False),
    ),
    (lambda a, b: K.normalize(a), lambda_of("math.l2_normalize", "a", axis=-1)),
    (lambda a, b: a * b, node_of("Mul", "a", "b")),
    (lambda a, b: a * 0.5, node_of("Mul", "a", constants={"1": 0.5})),
    (lambda a, b: 2.0 - a, node_of("Sub", "a", constants={"0": 2.0})),
    (lambda a, b: K.mean(a, (1, 2)), node_of("Mean", "a", constants={"1": [1, 2]}, keep_dims=False)),
    (lambda a, b: K.relu6(a), node_of("Relu6", "a")),
    (lambda a, b: K.leaky_relu(a, 0.2), node_of("LeakyRelu", "a", alpha=0.2)),
    (lambda a, b: K.reshape(a, (-1, 16, 3)), node_of("Reshape", "a", constants={"1": [-1, 16, 3]})),
]


def test_operations_of_tensorflow(tmp_path):
    """Keras 3's operations, written down as TensorFlow's."""
    keras.utils.clear_session(free_memory=False)
    image = L.Input((4, 4, 2), name="image")
    a, b = L.Conv2D(3, 1, name="a")(image), L.Conv2D(3, 1, name="b")(image)
    made = [compute(a, b) for compute, _ in WRITTEN]
    flat = [L.Flatten(name=f"flat{n}")(tensor) for n, tensor in enumerate(made)]
    model = keras.Model(image, L.Dense(3, name="classes")(L.Concatenate(name="all")(flat)))
    model = randomise(model)
    path, images = tmp_path / "model.h5", random_images((3, 4, 4, 2)) * BRIGHTNESS
    model.save(path)
    config = configuration(path)
    entries = {entry["name"]: entry for entry in config["config"]["layers"]}
    for tensor, (_, (kind, options, nodes)) in zip(made, WRITTEN, strict=True):
        name = tensor._keras_history.operation.name
        entries[name] |= {"class_name": kind, "config": {"name": name, **options}, "inbound_nodes": nodes}
    taps = [layer.name for layer in model.layers]
    module, variables = fzoo.load_model(rewritten(path, config))
    found = fzoo.features(module, variables, images, taps)
    for name, expected in outputs(model, images, taps).items():
        assert_close(found[name], expected, name)


# -- channels first ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_channels_first(tmp_path, ending):
    """A network whose images have the channels first takes them last; a Flatten keeps its order."""
    keras.utils.clear_session(free_memory=False)
    first = {"data_format": "channels_first"}
    image = L.Input((3, 9, 8))
    x = L.Conv2D(6, (3, 2), strides=(2, 1), padding="same", use_bias=False, **first)(image)
    x = L.LeakyReLU(0.1)(L.BatchNormalization(axis=1)(x))
    y = L.DepthwiseConv2D(2, padding="same", **first)(x)
    y = L.Multiply()([y, L.GlobalAveragePooling2D(keepdims=True, **first)(y)])
    x = L.Concatenate(axis=1)([x, y, L.MaxPooling2D(3, 1, "same", **first)(x)])
    x = L.Concatenate(axis=3)([L.ZeroPadding2D((0, 1), **first)(x), x])
    x = L.UpSampling2D((1, 2), **first)(L.Softmax(axis=1)(x))
    x = L.Concatenate()([L.Flatten(data_format="channels_last")(x), L.Flatten(**first)(x)])
    model = randomise(keras.Model(image, L.Dense(3)(L.BatchNormalization()(x))))
    images = random_images((3, 9, 8, 3)) * BRIGHTNESS
    path = tmp_path / f"model{ending}"
    model.save(path)
    expected = np.asarray(model(images.transpose(0, 3, 1, 2), training=False))
    assert_alive(expected)
    check(path, images, expected)
    module, variables = fzoo.load_model(path)
    assert module.input_shape == (9, 8, 3)
    assert_close(fzoo.predict(*fzoo.optimize_for_inference(module, variables), images), expected, "optimised")


def test_a_sequence_with_channels_first(tmp_path):
    keras.utils.clear_session(free_memory=False)
    layers = [L.Input((8, 8, 3)), L.Reshape((8, 24)), L.Conv1D(4, 3, data_format="channels_first"), L.Flatten()]
    keras.Sequential(layers).save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"\(Conv1D\): data_format='channels_first' given"):
        fzoo.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: L.Permute((2, 3, 1)), r"\(Permute\).*not turned"),
        (lambda: L.Dense(3), r"\(Dense\).*not turned"),
        (lambda: L.PReLU(), r"\(PReLU\).*not turned"),
        (lambda: L.BatchNormalization(), r"\(BatchNormalization\).*axis=2 given"),
        (lambda: L.MaxPooling2D(2, data_format="channels_last"), r"\(MaxPooling2D\).*channels_last"),
        (lambda: L.Reshape((2, 6, 12)), r"\(Reshape\).*not taken"),
    ],
)
def test_what_is_not_turned(tmp_path, layer, message):
    keras.utils.clear_session(free_memory=False)
    convolution = L.Conv2D(4, 3, data_format="channels_first")
    keras.Sequential([L.Input((3, 8, 8)), convolution, layer(), L.Flatten()]).save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=message):
        fzoo.load_model(tmp_path / "model.keras")
