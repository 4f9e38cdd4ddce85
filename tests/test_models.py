"""Every model against Keras's own, with the same random arrays in both: layers, outputs, files in and out.

By default small versions of each family, against what Keras gave for them (`stored.py`), and the layers of every
model; at full depth, and beside the Keras that is installed, in the slow tests.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
import pytest
from hurry import COMPILER_OPTIONS
from keras.src.applications.convnext import ConvNeXt
from keras.src.applications.nasnet import NASNet
from keras.src.legacy.saving import legacy_h5_format
from networks import SMALL, assert_alive, images_for, random_variables, small_options
from reference import (
    CASES,
    FAMILIES,
    assert_close,
    assert_equal,
    assert_same_computation,
    build,
    by_model,
    outputs,
    randomise,
    save_weights_only,
    set_variables,
    small_keras_model,
    variables_of,
)
from stored import (
    assert_summaries_close,
    describe_layers,
    measure_small,
    small_network,
    stored_layers,
    stored_values,
    summarise,
)
from tiers import slow

import fzoo
import fzoo.weights.mapping
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace

#: Families that stand for all where Keras itself is asked: with nested layers, with arrays that are never trained, and
#: with neither. The tests of the others are slow.
QUICK = ("ConvNeXtTiny", "EfficientNetB0", "ResNet50V2")


class Pair(NamedTuple):
    """A network in Keras and in fzoo."""

    name: str
    options: dict[str, Any]
    keras: Any
    module: Classifier
    variables: dict[str, Any]


@functools.lru_cache(maxsize=1)
def small_pair(name: str) -> Pair:
    """The small version of a family."""
    module, variables = small_network(name)
    return Pair(name, small_options(name), set_variables(small_keras_model(name), variables), module, variables)


def small_without_top(name: str, **options: Any) -> Pair:
    """The small version of a family as a backbone, with other options."""
    options = {**small_options(name), "include_top": False, **options}
    del options["classes"]
    module = fzoo.create(name, **options)
    variables = random_variables(module)
    model = set_variables(small_keras_model(name, options), variables)
    return Pair(name, options, model, module, variables)


@pytest.fixture(params=by_model((*QUICK, "InceptionV3", "VGG16", "Xception"), quick=("ConvNeXtTiny",)))
def family(request) -> Pair:
    return small_pair(request.param)


# -- what Keras gave ---------------------------------------------------------------------------------------------------


def test_every_model_has_a_case():
    families = {type(fzoo.create(name)) for name in CASES}
    assert {type(fzoo.create(name)) for name in FAMILIES} == families


@pytest.mark.parametrize("name", by_model(CASES))
def test_layers(name):
    """Keras's layers and their order, shapes and parameters at full depth and the size of the published weights."""
    module, spec, layers = fzoo.create(name), fzoo.spec(name), stored_layers()[name]
    found = trace(module)
    assert module.example_shape == (spec.input_size,) * 2 + (3,)
    ours = [[node.name, node.kind, list(node.shape), found.parameters[node.name]] for node in found.layers]
    if not module.known_size:  # Keras built it for any
        layers = [[*layer, shape if None in theirs else theirs, count] for (*layer, theirs, count), (*_, shape, _) in
                  zip(layers, ours, strict=True)]  # fmt: skip
    assert ours == layers
    assert fzoo.layer_names(module) == [layer for layer, *_ in layers]
    assert sum(leaf.size for leaf in jax.tree.leaves(found.variables)) == spec.parameters
    with_weights = [layer for layer, *_, count in layers if count]
    assert list(fzoo.weights.mapping.slots(module)) == with_weights and spec.depth == len(with_weights)


@pytest.mark.parametrize("name", by_model(FAMILIES, quick=set(FAMILIES) - {"InceptionV3", "NASNetMobile"}))
def test_every_layer_of_a_small_version(name):
    """Those of the network, and those that are left in its form for inference."""
    module, variables = small_network(name)
    images, names = images_for(module, 2), fzoo.layer_names(module)
    theirs = dict(zip(names, stored_values()[f"{name} values"], strict=True))
    for form in ("plain", "optimized"):
        if form == "optimized":
            module, variables = fzoo.optimize_for_inference(module, variables)
            assert module.prepared
            assert len(module.prepared.folded) + len(module.prepared.scaled) == bn_like(module)
            assert dict(module.prepared.gone).keys() == theirs.keys() - set(fzoo.layer_names(module))
        found = tapped(module, variables, images, fzoo.layer_names(module))
        assert_alive(found[names[-1]])
        for layer, output in found.items():
            assert_summaries_close(summarise(layer, output), theirs[layer], f"{name} {layer}, {form}")
        assert_close(found[names[-1]], stored_values()[f"{name} output"], f"{name}, {form}")
    assert module.prepared
    for layer, instead in module.prepared.gone:
        with pytest.raises(ValueError, match=f"{layer!r} is gone: .* {instead!r}"):
            module.apply(variables, images, [layer], method="endpoints")


def tapped(module: Classifier, variables: Any, images: np.ndarray, layers: list[str]) -> dict[str, Any]:
    return taps(module, layers)(variables, images)


def taps(module: Classifier, layers: list[str]) -> Any:
    """(variables, images) to the outputs of layers."""

    def endpoints(variables, images):
        return module.apply(variables, images, layers, method="endpoints")

    return jax.jit(endpoints, compiler_options=COMPILER_OPTIONS)


def known_to(call: Any, variables: Any, images: np.ndarray, outputs: dict[str, Any]) -> dict[str, float]:
    """How closely a deep network's outputs are known, over the largest magnitude: what rounding may move them by.

    That is several times what they move by where each pixel goes to the next number; and 1e-4 at the least.
    """
    moved = call(variables, np.nextafter(images, np.float32(np.inf)))
    known = {}
    for layer, output in outputs.items():
        change = float(np.abs(np.asarray(moved[layer]) - np.asarray(output)).max() / np.abs(output).max())
        assert change < 2e-3, f"{layer} moves by {change:.1e} for an ulp of the images: this would test nothing"
        known[layer] = max(1e-4, 10 * change)
    return known


def bn_like(module: Classifier) -> int:
    return sum(node.kind in ("BatchNormalization", "LayerScale") for node in trace(module).layers)


AS_USERS = """
import sys
sys.path.insert(0, {tests!r})
import fzoo
from networks import images_for
from reference import assert_close
from stored import small_network, stored_values
for name in {names!r}:
    module, variables = small_network(name)
    images, theirs = images_for(module, 2), stored_values()[f"{{name}} output"]
    assert_close(fzoo.predict(module, variables, images), theirs, f"{{name}}, plain")
    assert_close(fzoo.predict(*fzoo.optimize_for_inference(module, variables), images), theirs, f"{{name}}, optimized")
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, len(FAMILIES), 4))
def test_as_users_compile(start):
    """In a process without the tests' flags: with all of XLA's optimisations, and fzoo's own options."""
    code = AS_USERS.format(tests=str(Path(__file__).parent), names=FAMILIES[start : start + 4])
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", by_model(FAMILIES, quick=("MobileNet",)))
def test_stored_values_are_keras(name):
    """Of the Keras that is installed, as it computes here."""
    found = measure_small(name, stored_values()[f"{name} statistics"])
    layers = fzoo.layer_names(small_network(name)[0])
    for layer, ours, theirs in zip(layers, found[f"{name} values"], stored_values()[f"{name} values"], strict=True):
        assert_summaries_close(ours, theirs, f"{name} {layer}")
    assert_close(found[f"{name} output"], stored_values()[f"{name} output"], name)


@pytest.mark.parametrize("name", by_model(CASES, quick=()))
def test_all_forty_are_keras(name):
    """At full depth: the layers that are stored, and what each of them computes."""
    model, module = build(getattr(keras.applications, name)), fzoo.create(name)
    assert describe_layers(model) == stored_layers()[name]
    assert_same_computation(module, model)
    assert model.count_params() == fzoo.spec(name).parameters
    assert model.input_shape[1:] == (module.example_shape if module.known_size else (None, None, 3))


# -- beside Keras ------------------------------------------------------------------------------------------------------


def compare(pair: Pair) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Names and order of all layers of both networks, and their outputs.

    Returns Keras's outputs, and how closely each is known.
    """
    images = images_for(pair.module, 2)
    names = [layer.name for layer in pair.keras.layers]
    assert fzoo.layer_names(pair.module) == names
    theirs = outputs(pair.keras, images, names)
    assert_alive(theirs[names[-1]], least=0.005)  # beside 1e-4
    call = taps(pair.module, list(theirs))
    ours = call(pair.variables, images)
    known = known_to(call, pair.variables, images, ours)
    for layer, output in theirs.items():
        assert_close(ours[layer], output, f"{pair.name} {layer}", known[layer])
    return theirs, known


@pytest.mark.parametrize("name", by_model(("DenseNet169", "InceptionV3", "MobileNetV2"), quick=()))
def test_full_depth(name, tmp_path):
    """Keras reads the arrays that fzoo wrote; then every layer of the network, and those of its form for inference."""
    size = CASES[name].least
    options = {"input_shape": (size, size, 3), "classes": 7}
    model, module = build(getattr(keras.applications, name), **options), fzoo.create(name, **options)
    variables = random_variables(module)
    path = tmp_path / "fzoo.weights.h5"
    fzoo.save_keras_weights(module, variables, path)
    assert_equal(fzoo.load_keras_weights(module, path), variables)
    model.load_weights(path)
    path.unlink()
    assert_equal(variables_of(model), variables)

    theirs, known = compare(Pair(name, options, model, module, variables))
    optimized, prepared = fzoo.optimize_for_inference(module, variables)
    assert optimized.prepared
    left, gone = fzoo.layer_names(optimized), dict(optimized.prepared.gone)
    assert gone.keys() == theirs.keys() - set(left)
    assert all(name.startswith("normalization") for name in prepared.get("batch_stats", {}))
    assert len(optimized.prepared.folded) + len(optimized.prepared.scaled) == bn_like(module)
    ours = tapped(optimized, prepared, images_for(module, 2), left)
    for layer in left:
        assert_close(ours[layer], theirs[layer], f"{name} {layer}, optimized", known[layer])


@pytest.mark.parametrize("name", by_model((*QUICK, "Xception"), quick=QUICK[:1]))
def test_keras_predicts_the_same_from_a_file_that_fzoo_wrote(name, tmp_path):
    _, _, model, module, variables = small_pair(name)
    saved = [np.asarray(w) for w in model.weights]
    for ending in (".h5", ".keras", ".weights.h5"):
        path = tmp_path / f"fzoo{ending}"
        fzoo.save_keras_weights(module, variables, path)
        assert_equal(fzoo.load_keras_weights(module, path), variables)
        for weight in model.weights:
            weight.assign(np.zeros(weight.shape))
        model.load_weights(path)
        path.unlink()
        for before, after in zip(saved, model.weights, strict=True):
            np.testing.assert_array_equal(np.asarray(after), before, err_msg=after.path)
    images = images_for(module, 3)
    (theirs,) = outputs(model, images, [model.layers[-1].name]).values()
    assert_alive(theirs, least=0.005)
    assert_close(fzoo.predict(module, variables, images), theirs, name)


def test_every_file_format(family, tmp_path, monkeypatch):
    """What Keras writes gives its arrays, bit for bit."""
    model, module = family.keras, family.module
    model.save_weights(tmp_path / "keras3.weights.h5")
    model.save(tmp_path / "archive.keras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("absl.logging.warning", lambda *args: None)  # that this is a legacy format
        model.save(tmp_path / "whole_model.h5")
    save_weights_only(model, tmp_path / "weights_only.h5")
    monkeypatch.setattr(legacy_h5_format, "HDF5_OBJECT_HEADER_LIMIT", 512)
    save_weights_only(model, tmp_path / "chunked.h5")

    for path in sorted(tmp_path.iterdir()):
        assert_equal(fzoo.load_keras_weights(module, path), family.variables)
        path.unlink()


def test_file_with_top_fits_model_without(family, tmp_path):
    options = {key: value for key, value in family.options.items() if key != "classes"} | {"include_top": False}
    family.keras.save_weights(tmp_path / "keras3.weights.h5")
    save_weights_only(family.keras, tmp_path / "weights_only.h5")
    for path in tmp_path.iterdir():
        module, variables = fzoo.load(family.name, weights=path, **options)
        wanted = trace(module).variables
        assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, wanted)
        head = {"layer_normalization": f"{family.keras.name}_head_layernorm"}  # ConvNeXt's last, without and with top
        for collection, layers in variables.items():
            assert_equal(layers, {name: family.variables[collection][head.get(name, name)] for name in layers})
        with pytest.raises(fzoo.weights.WeightsMismatch, match="7 classes, the model 5"):
            fzoo.load(family.name, weights=path, **{**family.options, "classes": 5})


@pytest.mark.slow
@pytest.mark.parametrize("name", by_model((*QUICK, "MobileNetV3Small", "NASNetMobile"), quick=("MobileNetV3Small",)))
def test_transfer_learning_file(name, tmp_path):
    """The backbone is a layer of another model and half frozen; its numbered layers don't start from the first."""
    size = CASES[name].least
    options = {"include_top": False, "input_shape": (size, size, 3), "pooling": "avg"}
    images = keras.Input((size, size, 3))
    keras.layers.Conv2D(3, 1)(keras.layers.BatchNormalization()(images))
    backbone = randomise(build(getattr(keras.applications, name), fresh=False, **options))
    for layer in backbone.layers[: len(backbone.layers) // 2]:
        layer.trainable = False
    head = keras.layers.Dense(4, name="head")(keras.layers.Dropout(0.1)(backbone(images)))
    functional = keras.Model(images, head)
    sequential = keras.Sequential([images, backbone, keras.layers.Dense(4, name="head")])
    module = fzoo.create(name, **options)
    wanted = variables_of(backbone)
    kept = [np.asarray(leaf) for leaf in jax.tree.leaves(in_layers_order(wanted, backbone, module))]
    for model, endings in ((functional, (".weights.h5", ".keras")), (sequential, (".keras", ".h5"))):
        for ending in endings:
            path = tmp_path / f"model{ending}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("absl.logging.warning", lambda *args: None)  # that h5 is a legacy format
                model.save_weights(path) if ending == ".weights.h5" else model.save(path)
            with pytest.warns(UserWarning, match=r"was loaded; left out: .*head.* \(\d+, 4\)"):
                found = fzoo.load_keras_weights(module, path)
            for ours, theirs in zip(jax.tree.leaves(found), kept, strict=True):
                np.testing.assert_array_equal(ours, theirs)
            path.unlink()


def in_layers_order(variables: dict[str, Any], model: Any, module: Classifier) -> dict[str, Any]:
    """A Keras model's variables under the names that its layers have in a fresh session."""
    names = dict(zip([layer.name for layer in model.layers], fzoo.layer_names(module), strict=True))
    return {kind: {names[layer]: arrays for layer, arrays in tree.items()} for kind, tree in variables.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", by_model(FAMILIES, quick=QUICK[:1]))
def test_without_top_at_an_odd_size(name):
    """At full depth: how a family pads shows where the sides differ in parity."""
    options = {"input_shape": (*CASES[name].odd, 3), "include_top": False, "pooling": "avg"}
    model, module = build(getattr(keras.applications, name), **options), fzoo.create(name, **options)
    found = trace(module)
    ours = [[node.name, node.kind, list(node.shape), found.parameters[node.name]] for node in found.layers]
    assert ours == describe_layers(model)
    assert_same_computation(module, model)


@pytest.mark.parametrize("name", by_model(QUICK, quick=()))
def test_a_file_without_top(name, tmp_path):
    """And the numbers of such a network."""
    found = small_without_top(name, input_shape=(*CASES[name].odd, 3), pooling="avg")
    compare(found)
    path = save_weights_only(found.keras, tmp_path / "no_top.h5")
    assert_equal(fzoo.load_keras_weights(found.module, path), found.variables)
    with pytest.raises(fzoo.weights.WeightsMismatch, match="has no top"):
        fzoo.load(name, weights=path, **small_options(name))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        slow(
            "MobileNet", {"alpha": 0.5, "depth_multiplier": 2, "dropout": 0.5, "input_shape": (40, 33, 3), "classes": 3}
        ),
        ("MobileNet", {"classifier_activation": None, "alpha": 0.25, "input_shape": (32, 32, 1), "classes": 3}),
        slow("MobileNetV2", {"alpha": 0.35, "include_top": False, "pooling": "max", "input_shape": (33, 50, 4)}),
        slow("MobileNetV2", {"alpha": 1.4, "classifier_activation": "sigmoid", "input_shape": (64, 64, 3)}),
        slow("MobileNetV2", {"include_top": False}),  # Keras builds it for an unknown size
        slow("MobileNetV3Small", {"minimalistic": True, "dropout_rate": 0.0, "input_shape": (33, 50, 3), "classes": 3}),
        # Of an unknown size, too.
        slow("MobileNetV3Small", {"alpha": 1.5, "include_preprocessing": False, "classes": 3}),
        slow("MobileNetV3Large", {"alpha": 0.75, "include_top": False, "pooling": "max", "input_shape": (40, 40, 4)}),
        slow("MobileNetV3Large", {"minimalistic": True, "classifier_activation": None, "input_shape": (33, 33, 3)}),
        slow("EfficientNetB0", {"include_top": False, "pooling": "max"}),
        slow("EfficientNetV2B0", {"include_preprocessing": False, "input_shape": (33, 33, 3), "classes": 3}),
        slow("EfficientNetV2B0", {"include_top": False, "input_shape": (32, 40, 4)}),
        slow("ConvNeXtTiny", {"include_preprocessing": False, "input_shape": (33, 70, 3), "classes": 3}),
        slow("ConvNeXtTiny", {"include_top": False, "pooling": "max", "input_shape": (32, 32, 1)}),
        slow("ResNet50", {"include_top": False, "pooling": "max", "input_shape": (32, 32, 3)}),
        slow("Xception", {"include_top": False, "pooling": "max", "input_shape": (71, 71, 3)}),
    ],
)
def test_options(name, options):
    warned = options.get("input_shape", (3,))[-1] == 4 and not name.startswith("MobileNetV3")
    with pytest.warns(match="1 or 3 input channels") if warned else contextlib.nullcontext():
        model = build(getattr(keras.applications, name), **options)
    assert_same_computation(fzoo.create(name, **options), model)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2])
def test_nasnet_options(blocks):
    """Keras's own arguments of the family."""
    options = {
        "penultimate_filters": 96,
        "num_blocks": blocks,
        "stem_block_filters": 8,
        "skip_reduction": True,
        "filter_multiplier": 2,
        "input_shape": (45, 45, 3),
        "classes": 5,
    }
    assert_same_computation(fzoo.create("NASNetMobile", **options), build(NASNet, **options))


@pytest.mark.slow
def test_convnext_options():
    """Keras's own arguments of the family."""
    options = {"depths": (1, 2, 1, 1), "projection_dims": (8, 16, 24, 32), "drop_path_rate": 0.3}
    options |= {"layer_scale_init_value": None, "input_shape": (64, 64, 3), "classes": 5}
    model = build(ConvNeXt, **options, name="mine")
    assert_same_computation(fzoo.create("ConvNeXtTiny", **options, prefix="mine"), model)


@pytest.mark.slow
@pytest.mark.parametrize("include_top", [True, False])
def test_efficientnets_published_files_are_divided_by_the_deviation(include_top, tmp_path, monkeypatch):
    """What Keras makes of `weights="imagenet"`: the file is found in its cache, with a hash that is right."""
    options = {"include_top": True} if include_top else {"include_top": False, "input_shape": (32, 32, 3)}
    small = {**options, "input_shape": (32, 32, 3)}  # what keeps it alive is quick to measure there
    divided = random_variables(fzoo.create("EfficientNetB0", divide_by_std=True, **small))
    plain = set_variables(build(keras.applications.EfficientNetB0, **options), divided)
    path = save_weights_only(plain, tmp_path / "efficientnetb0.h5")
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", lambda *args, **kwargs: path)
    theirs = build(keras.applications.EfficientNetB0, weights="imagenet", **options)
    published = fzoo.spec("EfficientNetB0").weight_files
    files = [dataclasses.replace(file, hash=f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}") for file in published]
    object.__setattr__(fzoo.spec("EfficientNetB0"), "weight_files", tuple(files))
    try:
        module, variables = fzoo.load("EfficientNetB0", weights=path, **options)
        assert module.divide_by_std
        assert len(fzoo.layer_names(module)) == len(theirs.layers)
        images = images_for(module, 2)
        (expected,) = outputs(theirs, images, [theirs.layers[-1].name]).values()
        ours = jax.jit(module.apply, compiler_options=COMPILER_OPTIONS)(variables, images)
        assert_close(ours, expected, "divided")
        assert not fzoo.load("EfficientNetB0", weights=path, divide_by_std=False, **options)[0].divide_by_std
    finally:
        object.__setattr__(fzoo.spec("EfficientNetB0"), "weight_files", published)
    assert not fzoo.load("EfficientNetB0", weights=path, **options)[0].divide_by_std


@pytest.mark.parametrize(
    "name", by_model(("DenseNet121", "EfficientNetB0", "InceptionResNetV2", "MobileNetV3Small", "Xception"), quick=())
)
def test_training_moves_batch_statistics_as_keras(name):
    """One call with train=True: the output, and the moving averages after it."""
    size = 2 * SMALL[name][0]  # BN over the last feature map's few values would amplify rounding
    undropped = {"drop_connect_rate": 0.0} if name.startswith("Efficient") else {}  # blocks are, at random
    found = small_without_top(name, input_shape=(size, size, 3), **undropped)
    images = images_for(found.module)

    def keras_step(trainable, rest, images):
        return found.keras.stateless_call(trainable, rest, images, training=True)

    trainable = [v.value for v in found.keras.trainable_variables]
    rest = [v.value for v in found.keras.non_trainable_variables]
    output, moved = jax.jit(keras_step, compiler_options=COMPILER_OPTIONS)(trainable, rest, images)

    def step(variables, images):
        return found.module.apply(variables, images, train=True, mutable=["batch_stats"])

    ours, updates = jax.jit(step, compiler_options=COMPILER_OPTIONS)(found.variables, images)
    assert_close(ours, np.asarray(output), name, tolerance=1e-3)
    arrays = {"moving_mean": "mean", "moving_variance": "var", "mean": "mean", "variance": "var", "count": "count"}
    for variable, value in zip(found.keras.non_trainable_variables, moved, strict=True):
        layer, array = variable.path.split("/")[-2:]
        assert_close(updates["batch_stats"][layer][arrays[array]], np.asarray(value), variable.path)
        before = found.variables["batch_stats"][layer][arrays[array]]
        assert array.startswith("moving") != np.array_equal(value, before), variable.path
    assert len(moved) == len(jax.tree.leaves(found.variables.get("batch_stats", {})))
