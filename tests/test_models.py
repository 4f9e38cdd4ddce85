"""Every model against Keras's own, with the same random arrays in both: layers, outputs, files in and out."""

import contextlib
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
import pytest
from keras.src.applications.nasnet import NASNet
from keras.src.legacy.saving import legacy_h5_format
from reference import (
    CASES,
    COMPILER_OPTIONS,
    FAMILIES,
    assert_close,
    assert_equal,
    build,
    by_model,
    keras_model,
    outputs,
    random_images,
    randomise,
    save_weights_only,
    variables_of,
)

import fzoo
from fzoo.layers import Classifier, trace


class Pair(NamedTuple):
    """A network in Keras and in fzoo."""

    name: str
    options: dict[str, Any]
    keras: Any
    module: Classifier
    variables: dict[str, Any]


def pair(name: str, model: Any, options: dict[str, Any]) -> Pair:
    return Pair(name, options, model, fzoo.create(name, **options), variables_of(model))


@pytest.fixture(scope="module", params=by_model(CASES))
def smallest(request) -> Pair:
    """A model with its top at its least size."""
    size = CASES[request.param].least
    options = {"input_shape": (size, size, 3), "classes": 7}
    return pair(request.param, keras_model(request.param, **options), options)


def test_every_model_has_a_case():
    assert set(CASES) == set(fzoo.list_models())
    families = {type(fzoo.create(name)) for name in fzoo.list_models()}
    assert {type(fzoo.create(name)) for name in FAMILIES} == families


def compare(pair: Pair, every: int = 1) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Names and order of all layers of both networks, and the outputs of every n-th and of the last."""
    images = random_images((2, *(n or 47 for n in pair.keras.input_shape[1:])))
    names = [layer.name for layer in pair.keras.layers]
    assert fzoo.layer_names(pair.module) == names
    theirs = outputs(pair.keras, images, sorted({*names[::every], *names[-6:]}, key=names.index))

    def endpoints(variables, images):
        return pair.module.apply(variables, images, list(theirs), method="endpoints")

    ours = jax.jit(endpoints, compiler_options=COMPILER_OPTIONS)(pair.variables, images)
    for layer, output in theirs.items():
        assert_close(ours[layer], output, f"{pair.name} {layer}")
    return images, theirs


def test_every_layer(smallest):
    """Those of the network, and those that are left in its form for inference."""
    images, theirs = compare(smallest)
    module, variables = fzoo.optimize_for_inference(smallest.module, smallest.variables)
    assert module.prepared
    left = fzoo.layer_names(module)
    gone = dict(module.prepared.gone)
    assert gone.keys() == theirs.keys() - set(left)
    assert "batch_stats" not in variables
    assert len(module.prepared.folded) + len(module.prepared.scaled) == sum("var" in s for s in stats(smallest))

    def endpoints(variables, images):
        return module.apply(variables, images, left, method="endpoints")

    ours = jax.jit(endpoints, compiler_options=COMPILER_OPTIONS)(variables, images)
    for layer in left:
        assert_close(ours[layer], theirs[layer], f"{smallest.name} {layer}, optimized")
    for layer, instead in gone.items():
        with pytest.raises(ValueError, match=f"{layer!r} is gone: .* {instead!r}"):
            module.apply(variables, images, [layer], method="endpoints")


def stats(pair: Pair) -> list[dict[str, Any]]:
    return list(pair.variables.get("batch_stats", {}).values())


def test_predict(smallest):
    images = random_images((3, *smallest.module.example_shape))
    (theirs,) = outputs(smallest.keras, images, ["predictions"]).values()
    assert_close(fzoo.predict(smallest.module, smallest.variables, images), theirs, smallest.name)


def test_every_file_format(smallest, tmp_path, monkeypatch):
    """What Keras writes gives its arrays, bit for bit."""
    model, module = smallest.keras, smallest.module
    model.save_weights(tmp_path / "keras3.weights.h5")
    model.save(tmp_path / "archive.keras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("absl.logging.warning", lambda *args: None)  # that this is a legacy format
        model.save(tmp_path / "whole_model.h5")
    save_weights_only(model, tmp_path / "weights_only.h5")
    monkeypatch.setattr(legacy_h5_format, "HDF5_OBJECT_HEADER_LIMIT", 512)
    save_weights_only(model, tmp_path / "chunked.h5")

    for path in sorted(tmp_path.iterdir()):
        assert_equal(fzoo.load_keras_weights(module, path), smallest.variables)
        path.unlink()


def test_file_with_top_fits_model_without(smallest, tmp_path):
    options = {"include_top": False, "input_shape": smallest.options["input_shape"]}
    smallest.keras.save_weights(tmp_path / "keras3.weights.h5")
    save_weights_only(smallest.keras, tmp_path / "weights_only.h5")
    for path in tmp_path.iterdir():
        module, variables = fzoo.load(smallest.name, weights=path, **options)
        wanted = trace(module).variables
        assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, wanted)
        for collection, layers in variables.items():
            assert_equal(layers, {name: smallest.variables[collection][name] for name in layers})
        with pytest.raises(fzoo.weights.WeightsMismatch, match="7 classes, the model 5"):
            fzoo.load(smallest.name, weights=path, classes=5, input_shape=smallest.options["input_shape"])


def test_keras_reads_what_fzoo_writes(smallest, tmp_path):
    path = tmp_path / "fzoo.h5"
    fzoo.save_keras_weights(smallest.module, smallest.variables, path)
    assert_equal(fzoo.load_keras_weights(smallest.module, path), smallest.variables)
    saved = [np.asarray(w) for w in smallest.keras.weights]
    randomise(smallest.keras, seed=1)
    smallest.keras.load_weights(path)
    for before, after in zip(saved, smallest.keras.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(after), before, err_msg=after.path)


@pytest.mark.parametrize("name", by_model(CASES))
def test_without_top_at_an_odd_size(name, tmp_path):
    options = {"input_shape": (*CASES[name].odd, 3), "include_top": False, "pooling": "avg"}
    found = pair(name, keras_model(name, **options), options)
    compare(found, every=7)
    path = save_weights_only(found.keras, tmp_path / "no_top.h5")
    assert_equal(fzoo.load_keras_weights(found.module, path), found.variables)
    with pytest.raises(fzoo.weights.WeightsMismatch, match="has no top"):
        fzoo.load(name, weights=path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MobileNet", {"alpha": 0.5, "depth_multiplier": 2, "dropout": 0.5, "input_shape": (40, 33, 3), "classes": 3}),
        ("MobileNet", {"classifier_activation": None, "alpha": 0.25, "input_shape": (32, 32, 1), "classes": 3}),
        ("MobileNetV2", {"alpha": 0.35, "include_top": False, "pooling": "max", "input_shape": (33, 50, 4)}),
        ("MobileNetV2", {"alpha": 1.4, "classifier_activation": "sigmoid", "input_shape": (64, 64, 3)}),
        ("MobileNetV2", {"include_top": False}),  # Keras builds it for an unknown size
        ("ResNet50", {"include_top": False, "pooling": "max", "input_shape": (32, 32, 3)}),
        ("Xception", {"include_top": False, "pooling": "max", "input_shape": (71, 71, 3)}),
    ],
)
def test_options(name, options):
    four_channels = options.get("input_shape", (3,))[-1] == 4
    with pytest.warns(match="1 or 3 input channels") if four_channels else contextlib.nullcontext():
        model = keras_model(name, **options)
    compare(pair(name, model, options))


def test_nasnet_options():
    """Keras's own arguments of the family."""
    options = {
        "penultimate_filters": 96,
        "num_blocks": 2,
        "stem_block_filters": 8,
        "skip_reduction": True,
        "filter_multiplier": 2,
        "input_shape": (45, 45, 3),
        "classes": 5,
    }
    compare(pair("NASNetMobile", randomise(build(NASNet, **options)), options))


@pytest.mark.parametrize("name", by_model(CASES))
def test_default_size(name):
    """Parameters, batch statistics included, and Keras's order of layers at the size of the published weights."""
    model = build(getattr(keras.applications, name))
    module = fzoo.create(name)
    count = sum(leaf.size for leaf in jax.tree.leaves(trace(module).variables))
    assert count == fzoo.spec(name).parameters == model.count_params()
    assert model.input_shape[1:] == module.example_shape == (fzoo.spec(name).input_size,) * 2 + (3,)
    assert fzoo.layer_names(module) == [layer.name for layer in model.layers]
    with_weights = [layer.name for layer in model.layers if layer.weights]
    assert list(fzoo.weights.mapping.slots(module)) == with_weights


@pytest.mark.parametrize("name", by_model(FAMILIES))
def test_training_moves_batch_statistics_as_keras(name):
    """One call with train=True: the output, and the moving averages after it."""
    size = 2 * CASES[name].least  # BN over the last feature map's few values would amplify rounding
    options = {"input_shape": (size, size, 3), "include_top": False}
    found = pair(name, keras_model(name, **options), options)
    images = random_images((4, size, size, 3))

    def keras_step(trainable, rest, images):
        return found.keras.stateless_call(trainable, rest, images, training=True)

    trainable = [v.value for v in found.keras.trainable_variables]
    rest = [v.value for v in found.keras.non_trainable_variables]
    output, moved = jax.jit(keras_step, compiler_options=COMPILER_OPTIONS)(trainable, rest, images)

    def step(variables, images):
        return found.module.apply(variables, images, train=True, mutable=["batch_stats"])

    ours, updates = jax.jit(step, compiler_options=COMPILER_OPTIONS)(found.variables, images)
    assert_close(ours, np.asarray(output), name, tolerance=1e-3)
    for variable, value in zip(found.keras.non_trainable_variables, moved, strict=True):
        layer, array = variable.path.split("/")[-2:]
        array = {"moving_mean": "mean", "moving_variance": "var"}[array]
        assert_close(updates["batch_stats"][layer][array], np.asarray(value), variable.path)
        assert not np.array_equal(value, found.variables["batch_stats"][layer][array]), "did not move"
    assert len(moved) == len(jax.tree.leaves(found.variables.get("batch_stats", {})))
