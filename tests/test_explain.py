"""Grad-CAM and feature sheets: against Keras, on a photograph, and as pictures."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from networks import random_variables
from PIL import Image
from reference import (
    COMPILER_OPTIONS,
    assert_close,
    keras_model,
    outputs,
    random_images,
    save_weights_only,
    variables_of,
)
from tiers import slow

import fzoo
from fzoo.inference.explain import HEAT, map_layer

SIZE = {"input_shape": (64, 64, 3), "classes": 7}
CLASSES = np.array([[6, 0], [2, 5]])


def keras_grad_cam(model, images, layer):
    """By the paper, through Keras's own layers: the network cut in two."""
    middle = model.get_layer(layer).output
    activation = outputs(model, images, [layer])[layer]
    assert float(jnp.ptp(activation, axis=0).max()) > 0.1
    rest = keras.Model(middle, model.output)
    trainable, fixed = ([v.value for v in each] for each in (rest.trainable_variables, rest.non_trainable_variables))

    def score(activation, i):
        (logits,) = jax.tree.leaves(rest.stateless_call(trainable, fixed, activation, training=False)[0])
        return jnp.take_along_axis(logits, i[:, None], 1).sum()

    maps, gradient = [], jax.jit(jax.grad(score), compiler_options=COMPILER_OPTIONS)
    for i in CLASSES.T:
        weights = gradient(activation, i).mean((1, 2))
        maps.append(jnp.maximum((activation * weights[:, None, None]).sum(-1), 0))
    return np.stack(maps, 1)


@pytest.mark.parametrize(
    ("name", "alpha", "last", "inner"),
    [
        slow("MobileNetV2", 0.35, "out_relu", "block_12_add"),
        ("MobileNet", 0.25, "conv_pw_13_relu", "conv_pw_6_relu"),
    ],
)
def test_against_keras(name, alpha, last, inner):
    model = keras_model(name, alpha=alpha, classifier_activation=None, **SIZE)
    module, variables = fzoo.create(name, alpha=alpha, **SIZE), variables_of(model)  # which has a softmax
    images = random_images((2, 64, 64, 3))
    for layer in (inner, last):
        theirs = keras_grad_cam(model, images, layer)
        cam = jax.jit(lambda v, x, c, layer=layer: fzoo.grad_cam(module, v, x, c, layer=layer))
        assert_close(cam(variables, images, CLASSES), theirs, layer)
        assert (theirs.max((2, 3)) > 0).any(1).all()

    found = fzoo.explain(module, variables, images, classes=[6, 2])
    one = jax.vmap(lambda x: fzoo.grad_cam(module, variables, x[None], jnp.array([6, 2]))[0])
    assert_close(jax.jit(one)(images), np.asarray(found.heat), "under vmap")
    top = fzoo.explain(module, variables, images, top=2)
    p = np.asarray(fzoo.predict(module, variables, images))
    np.testing.assert_array_equal(top.classes, np.argsort(-p, 1)[:, :2])
    np.testing.assert_allclose(top.probabilities, -np.sort(-p, 1)[:, :2], rtol=1e-5)
    assert map_layer(module, None).name == last
    assert_close(top.heat, np.asarray(cam(variables, images, top.classes)), "of the likeliest")


def test_the_layer_by_default():
    assert map_layer(fzoo.create("VGG16"), None).name == "block5_pool"
    assert map_layer(fzoo.create("VGG16", head=fzoo.Head(hidden=8)), None).name == "block5_pool"
    assert map_layer(fzoo.create("MobileNetV3Small"), None).name == "activation_17"  # not a squeeze's


@pytest.mark.wrong_types
def test_what_can_not_be_explained():
    options = {"alpha": 0.25, "input_shape": (32, 32, 3), "classes": 7}
    module = fzoo.create("MobileNet", **options)
    variables = random_variables(module, statistics={})
    images = random_images((2, 32, 32, 3))

    def message(function=fzoo.grad_cam, module=module, variables=variables, classes=(1,), **keywords):
        with pytest.raises(ValueError) as raised:
            function(module, variables, images, classes=classes, **keywords)
        return str(raised.value)

    assert message(layer="conv_pw_31_relu").startswith("unknown layer 'conv_pw_31_relu': did you mean conv_pw_3_relu")
    assert "'reshape_2' has an output of shape (7,)" in message(layer="reshape_2")
    assert "classes=(7,) given, 0 to 6 expected" in message(classes=(7,))
    assert "whole numbers expected" in message(classes=(0.5,))
    assert "(3, 1) given for 2 images" in message(classes=np.ones((3, 1), int))
    assert "top=8 given, 1 to 7 expected" in message(fzoo.explain, classes=None, top=8)
    assert "without its top" in message(module=fzoo.create("MobileNet", alpha=0.25, include_top=False))
    fast, folded = fzoo.optimize_for_inference(module, variables)
    assert "give the plain one" in message(module=fast, variables=folded)


def test_overlay():
    image = np.full((40, 60, 3), 128, np.uint8)
    heat = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    laid = np.asarray(fzoo.overlay(image, heat, strength=1.0))
    assert laid.shape == image.shape and laid.dtype == np.uint8
    np.testing.assert_array_equal(laid[-1, -1], HEAT[-1])
    np.testing.assert_array_equal(laid[0, 0], np.round(0.75 * 128 + 0.25 * np.array(HEAT[0])))
    np.testing.assert_array_equal(fzoo.overlay(image, heat, strength=0.0), image)
    np.testing.assert_array_equal(jax.jit(fzoo.overlay)(image, 0 * heat), fzoo.overlay(image, 0 * heat))


def test_feature_sheet():
    activation = np.zeros((4, 6, 5), np.float32)
    activation[0, 0] = [0, 1, 5, 2, 3]
    sheet = np.asarray(jax.jit(lambda a: fzoo.feature_sheet(a, columns=2, tile=8, gap=1))(activation))
    assert sheet.shape == (3 * 8 + 2, 2 * 12 + 1) and sheet.dtype == np.uint8
    for channel in range(4):  # each to its own white
        y, x = channel // 2 * 9, channel % 2 * 13
        assert (sheet[y : y + 2, x : x + 2] == 255).all() and (sheet[y + 2 : y + 8, x : x + 12] == 0).all()
    assert (sheet[18:, :12] == 0).all() and (sheet[18:, 12:] == 255).all()  # the dead one is last
    one = np.asarray(fzoo.feature_sheet(activation[..., 1:3], channels=1, tile=4))
    np.testing.assert_array_equal(one, 255 * activation[..., 2] / 5)


@pytest.mark.wrong_types
def test_a_feature_sheet_of_one_map():
    with pytest.raises(ValueError, match=r"\(1, 4, 6, 5\) given"):
        fzoo.feature_sheet(np.zeros((1, 4, 6, 5), np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    save_weights_only(keras_model("MobileNet", alpha=0.25, **SIZE), folder / "weights.h5")
    (pixels,) = random_images((1, 90, 120, 3), pixels=True)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "a.png")
    (folder / "labels.txt").write_text("ant\nbee\ncat\ndog\neel\nfox\ngnu\n")
    return folder


OPTIONS = ["-m", "MobileNet", "-o", "alpha=0.25", "--size", "64", "--classes", "7", "-w", "weights.h5", "--no-cache"]


@pytest.mark.slow
@pytest.mark.parametrize("squeezed", [False, True])
def test_command(folder, monkeypatch, command_line, squeezed):
    """The picture shows the part of the image that the network sees: its centre, or all of it."""
    monkeypatch.chdir(folder)
    options = [*OPTIONS, "--labels", "labels.txt", "--layer", "conv_pw_6_relu", *(["--crop", "0"] * squeezed)]
    options += ["--class", "Eel", "--class", "2", "--out", "cam.png", "--sheet", "s.png"]
    code, output, errors = command_line("explain", "a.png", *options)
    assert (code, errors) == (0, [])
    rows = [line.split("\t") for line in output]
    assert [row[:3] for row in rows] == [
        ["cam.png", "-", "eel"],
        ["cam.png", "-", "cat"],
        ["s.png", "-", "conv_pw_6_relu"],
    ]
    cam = np.asarray(Image.open("cam.png"))
    part = np.asarray(Image.open("a.png"))
    part = part if squeezed else part[6:84, 21:99]
    height, width, _ = part.shape
    panels = [cam[8 : 8 + height, 8 + (width + 8) * i : (width + 8) * (i + 1)] for i in range(3)]
    np.testing.assert_array_equal(panels[0], part)
    module, variables = fzoo.load("MobileNet", weights="weights.h5", alpha=0.25, **SIZE)
    pixels = fzoo.load_image_for("a.png", "MobileNet", 64, **({"crop": None} if squeezed else {}))[None]
    found = fzoo.explain(module, variables, pixels, classes=[4, 2], layer="conv_pw_6_relu", preprocess="MobileNet")
    for panel, heat in zip(panels[1:], found.heat[0], strict=True):
        assert np.abs(panel - np.asarray(fzoo.overlay(panels[0], heat), int)).max() <= 1
    assert [float(row[3]) for row in rows[:2]] == pytest.approx(found.probabilities[0].tolist(), abs=1e-5)
    maps = fzoo.features(module, variables, pixels, "conv_pw_6_relu", preprocess="MobileNet")["conv_pw_6_relu"][0]
    sheet = np.asarray(Image.open("s.png"), int)
    assert sheet.shape == (8 * 58 - 2, 8 * 58 - 2)
    assert np.abs(sheet - np.asarray(fzoo.feature_sheet(maps), int)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png"], "--out FILE.png or --sheet FILE.png expected"),
        (["a.png", "--out", "x.jpg"], "x.jpg: a name that ends in .png expected"),
        (["a.png", "--out", "x.png", "--sheet", "no/x.png"], "no such directory: no"),
        (["missing.png", "--out", "x.png"], "no such image: missing.png"),
        (["weights.h5", "--out", "x.png"], "cannot read the image weights.h5"),
        (["a.png", "--out", "x.png", "--class", "emu"], "unknown class 'emu'"),
        (["a.png", "--out", "x.png", "--class", "7"], "unknown class '7'"),
        (["a.png", "--out", "x.png", "--layer", "conf1"], "unknown layer 'conf1': did you mean conv1"),
        (["a.png", "--sheet", "x.png", "--layer", "reshape_2"], "no map over the image"),
    ],
)
def test_bad_input_is_one_line(folder, monkeypatch, command_line, arguments, message):
    monkeypatch.chdir(folder)
    code, output, (error,) = command_line("explain", *arguments, *OPTIONS, "--labels", "labels.txt")
    assert (code, output) == (2, []) and error.startswith("fzoo: error: ") and message in error
    assert not list(folder.glob("*x.png*"))


def test_on_a_photograph(real):
    """The cat is where its face is."""
    module, variables = fzoo.load("MobileNetV2", weights=real / "mobilenet_v2_imagenet.h5")
    pixels = fzoo.load_image(real / "photos/chelsea.png", 224)[None]
    found = fzoo.explain(module, variables, pixels, top=1, preprocess="MobileNetV2")
    heat = np.asarray(found.heat[0, 0])
    assert heat.shape == (7, 7)
    inside = heat[1:6, 1:5]
    assert inside.sum() / heat.sum() > 1.3 * inside.size / heat.size
