"""Whole models as Keras saved them: the same outputs and layers, whatever is in them."""

import json

import keras
import numpy as np
import pytest
from networks import assert_alive
from reference import assert_close, outputs, random_images

import fzoo

#: Of three images of noise, whose means over the pixels would else be alike.
BRIGHTNESS = np.array([0.1, 0.5, 1.5], np.float32).reshape(3, 1, 1, 1)


def randomise(model: keras.Model, seed: int = 0) -> keras.Model:
    """Give every array of a Keras model random values that keep its outputs alive."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        name, shape = weight.path.rpartition("/")[2], weight.shape
        if "variance" in name:
            value = rng.uniform(0.5, 1.5, shape)
        elif name in ("kernel", "depthwise_kernel", "pointwise_kernel"):
            fan = np.prod(shape[:-2] if name == "depthwise_kernel" else shape[:-1])
            value = rng.normal(0, 1.2 / np.sqrt(fan), shape)
        elif "gamma" in name:
            value = rng.uniform(0.7, 1.4, shape)
        elif weight.dtype.startswith("float"):
            value = rng.normal(0, 0.3, shape)
        else:
            continue
        weight.assign(value)
    return model


def compare(model: keras.Model, path, images: np.ndarray) -> None:
    """Save a model, load it, and compare its output, every layer that both have, and its optimised form."""
    model.save(path)
    module, variables = fzoo.load_model(path)
    expected = outputs(model, images, [layer.name for layer in model.layers])
    final = np.asarray(model(images))
    assert_alive(final)
    assert_close(np.asarray(fzoo.predict(module, variables, images)), final, "the output")
    names = [name for name in fzoo.layer_names(module) if "/" not in name and ":" not in name]
    assert names == [layer.name for layer in model.layers]
    found = fzoo.features(module, variables, images, list(expected))
    for name, array in expected.items():
        assert_close(np.asarray(found[name]), array, name)
    optimised = fzoo.optimize_for_inference(module, variables)
    assert_close(np.asarray(fzoo.predict(*optimised, images)), final, "the optimised output")


def small_network() -> keras.Model:
    """Branches, a layer that is called twice, a model inside of the model, and a head as users make them."""
    layers = keras.layers
    inside = keras.Sequential(
        [layers.Conv2D(6, 3, padding="same", use_bias=False), layers.BatchNormalization(), layers.ReLU(6.0)],
        name="inside",
    )
    x = image = layers.Input((16, 16, 3), name="image")
    x = layers.Conv2D(6, 3, strides=2, padding="same", activation="tanh", name="stem")(x)
    shared = layers.Conv2D(6, 1, name="shared")
    x = layers.Add(name="sum")([shared(x), inside(x), shared(layers.ReLU(name="positive")(x))])
    x = layers.Concatenate(name="both")([x, layers.MaxPooling2D(3, 1, "same", name="pool")(x)])
    x = layers.GlobalAveragePooling2D(name="vector")(x)
    x = layers.Dense(8, activation="tanh", name="hidden")(layers.Dropout(0.5, name="dropped")(x))
    return keras.Model(image, layers.Dense(4, activation="softmax", name="classes")(x))


@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_users_network(tmp_path, ending):
    compare(randomise(small_network()), tmp_path / f"model{ending}", random_images((3, 16, 16, 3)) * BRIGHTNESS)


def test_strangers_files(real):
    """Networks of Keras 2.0 to 2.4 that people published, to what Keras 2 says of them."""
    expected = json.loads((real / "keras_files" / "expected.json").read_text())
    for name, example in expected.items():
        module, variables = fzoo.load_model(real / "keras_files" / name)
        images = np.random.default_rng(0).uniform(-1, 1, (3, *example["input_shape"])).astype("float32")
        found = np.asarray(fzoo.predict(module, variables, images))
        np.testing.assert_allclose(found, example["outputs"], atol=1e-5, err_msg=name)
        optimised = np.asarray(fzoo.predict(*fzoo.optimize_for_inference(module, variables), images))
        np.testing.assert_allclose(optimised, example["outputs"], atol=1e-5, err_msg=name)
