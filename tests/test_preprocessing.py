"""Pixels and labels, against Keras's own functions."""

import json
import pathlib
import re
import typing
import warnings

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from PIL import Image
from reference import CASES

import fzoo
from fzoo.cli.options import Network
from fzoo.images.preprocessing import MODES, MODES_IN_WORDS, RANGES

KERAS_FILE = {"caffe": "resnet", "tf": "xception", "torch": "densenet"}
MODEL = {"caffe": "ResNet50", "tf": "Xception", "torch": "DenseNet121"}


@pytest.mark.parametrize("mode", KERAS_FILE)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("one", [False, True])
def test_every_mode_is_keras(mode, dtype, data_format, one):
    shape = (2, 5, 4, 3) if data_format == "channels_last" else (2, 3, 5, 4)
    pixels = np.random.default_rng(0).integers(0, 256, shape[one:]).astype(dtype)
    before = pixels.copy()
    keras_function = getattr(keras.applications, KERAS_FILE[mode]).preprocess_input
    expected = keras_function(pixels.astype(np.float32), data_format=data_format)

    ours = fzoo.preprocess_input(pixels, MODEL[mode], data_format=data_format)
    assert type(ours) is np.ndarray and ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pixels, before)
    assert not np.shares_memory(ours, pixels)

    jitted = jax.jit(lambda x: fzoo.preprocess_input(x, MODEL[mode], data_format=data_format))(pixels)
    assert isinstance(jitted, jax.Array)
    np.testing.assert_allclose(jitted, expected, rtol=1e-5, atol=1e-5)


def test_every_model_has_kerass_mode():
    """The module that defines a constructor defines its preprocessing."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3)).astype(np.float32)
    for name in CASES:
        module = keras.applications.__dict__[name].__module__.rsplit(".", 1)[1]
        expected = getattr(keras.applications, module).preprocess_input(pixels.copy())
        np.testing.assert_allclose(fzoo.preprocess_input(pixels, name), expected, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_from_0_to_1(dtype, channels):
    """As Keras's Rescaling(1 / 255), of any channels."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, channels)).astype(dtype)
    expected = keras.layers.Rescaling(1 / 255)(pixels)
    for found in (fzoo.preprocess_input(pixels, "unit"), jax.jit(lambda x: fzoo.preprocess_input(x, "unit"))(pixels)):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_statistics_of_clip():
    """By Keras's layer, whose numbers they are given."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)).astype(np.uint8)
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    layer = keras.layers.Normalization(mean=mean, variance=np.square(deviation))
    np.testing.assert_allclose(fzoo.preprocess_input(pixels, "clip"), layer(pixels / np.float32(255)), 1e-5, 1e-5)
    for mode, extreme in (("torch", (0, 255)), ("clip", (0, 255))):
        black, white = (fzoo.preprocess_input(np.full((1, 1, 3), value, np.uint8), mode) for value in extreme)
        assert RANGES[mode] == pytest.approx((black.min(), white.max()), abs=1e-3)


def test_every_mode_is_named_where_one_is_asked_for():
    docs = pathlib.Path(__file__).parents[1] / "docs" / "guides" / "command-line.md"
    help_text = typing.get_type_hints(Network, include_extras=True)["preprocess"].__metadata__[0].help
    for text in (MODES_IN_WORDS, help_text, docs.read_text(), fzoo.preprocess_input.__doc__):
        assert [mode for mode in MODES if not re.search(rf"\b{mode}\b", text)] == []


def test_float_dtypes_stay():
    for dtype in (np.float16, np.float64):
        assert fzoo.preprocess_input(np.ones((1, 2, 2, 3), dtype), "VGG16").dtype == dtype
    assert fzoo.preprocess_input(jnp.ones((1, 2, 2, 3), jnp.bfloat16), "ResNet50").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 4), {}, "three RGB channels"),
        ((1, 3, 4, 4), {}, "channels_last"),
        ((1, 4, 4, 3), {"data_format": "channels_first"}, "channels_first"),
        ((1, 4, 4, 3), {"data_format": "NHWC"}, "'channels_last' or 'channels_first' expected"),
    ],
)
def test_bad_pixels(shape, options, message):
    with pytest.raises(ValueError, match="images of complex64"):
        fzoo.preprocess_input(np.zeros((1, 2, 2, 3), np.complex64), "Xception")
    with pytest.raises(ValueError, match=message):
        fzoo.preprocess_input(np.zeros(shape, np.uint8), "ResNet50", **options)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_load_image_is_keras(tmp_path, mode, interpolation):
    """To the bit, where it is asked to be: neither turned, nor over a background, nor scaled from 16 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 4), np.uint8)
    image = (
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 99)
        if mode == "I;16"
        else Image.fromarray(pixels).convert(mode)
    )
    keras_pixels = {"exif": False, "background": None, "clip": True}
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    for size in (None, (20, 30), (64, 64)):
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of transparent palettes
            expected = np.asarray(keras.utils.load_img(path, target_size=size, interpolation=interpolation))
        ours = fzoo.load_image(path, size, interpolation, **keras_pixels)
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(fzoo.load_image(path, 64, interpolation, **keras_pixels), ours)


@pytest.mark.wrong_types
def test_bad_image_files(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.jpg", "truncated.jpg", "empty.png"):
        with pytest.raises(ValueError, match=f"cannot read the image .*{name}"):
            fzoo.load_image(tmp_path / name, 32)
    with pytest.raises(FileNotFoundError, match="no such image"):
        fzoo.load_image(tmp_path / "missing.jpg")
    with pytest.raises(IsADirectoryError, match="directory"):
        fzoo.load_image(tmp_path)
    with pytest.raises(ValueError, match="did you mean bicubic"):
        fzoo.load_image(tmp_path / "whole.jpg", 32, "bicubik")
    for size in (0, -3, 32.0, "32", (1, 2, 3), 10**6, (32.0, 32.0)):
        with pytest.raises(ValueError, match="size="):
            fzoo.load_image(tmp_path / "whole.jpg", size)
    assert fzoo.load_image(tmp_path / "whole.jpg", np.int64(32)).shape == (32, 32, 3)


@pytest.fixture
def class_index(offline):
    """A class index as Keras's, in the cache."""
    index = {str(i): [f"n{i:08d}", f"label_{i}"] for i in range(1000)}
    path = offline / "imagenet_class_index.json"
    path.write_text(json.dumps(index))
    return path


def test_decode_predictions(class_index, monkeypatch):
    p = np.random.default_rng(0).dirichlet(np.ones(1000), size=3).astype(np.float32)
    monkeypatch.setattr(keras.src.applications.imagenet_utils, "CLASS_INDEX", json.loads(class_index.read_text()))
    expected = keras.applications.imagenet_utils.decode_predictions(p, top=4)
    assert fzoo.decode_predictions(jnp.asarray(p), top=4) == [[tuple(each) for each in row] for row in expected]
    assert [len(row) for row in fzoo.decode_predictions(p)] == [5, 5, 5]


@pytest.mark.parametrize(
    ("shape", "top", "message"), [((1000,), 5, "shape"), ((2, 10), 5, "1000"), ((1, 1000), 0, "top=0")]
)
@pytest.mark.wrong_types
def test_bad_predictions(class_index, shape, top, message):
    with pytest.raises(ValueError, match=message):
        fzoo.decode_predictions(np.zeros(shape), top=top)


def test_one_hot_integers_and_nan(class_index):
    assert fzoo.decode_predictions(np.eye(1, 1000, 7, dtype=np.uint8), top=1) == [[("n00000007", "label_7", 1.0)]]
    with pytest.raises(ValueError, match="not finite"):
        fzoo.decode_predictions(np.full((1, 1000), np.nan))


def test_damaged_class_index(class_index):
    class_index.write_text(class_index.read_text()[:200])
    with pytest.raises(ValueError, match="not Keras's class index"):
        fzoo.decode_predictions(np.zeros((1, 1000)))


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (64, 64)])
def test_centre_crop(tmp_path, shape):
    """The shorter side resized by bicubic, the centre cut out: as the accuracies of ImageNet are measured."""
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)).save(path)
    whole = Image.open(path)
    scale = 32 / min(shape)
    resized = whole.resize((round(shape[1] * scale), round(shape[0] * scale)), Image.Resampling.BICUBIC)
    top, left = (resized.height - 28) // 2, (resized.width - 28) // 2
    expected = np.asarray(resized)[top : top + 28, left : left + 28]
    np.testing.assert_array_equal(fzoo.load_image(path, 28, "bicubic", crop=0.875), expected)
    with path.open("rb") as file:
        np.testing.assert_array_equal(fzoo.load_image(file, 28, "bicubic", crop=0.875), expected)


@pytest.mark.parametrize("options", [{"crop": 0.875}, {"size": 28, "crop": 0}, {"size": 28, "crop": 2}])
def test_crop_that_cannot_be(tmp_path, options):
    with pytest.raises(ValueError, match="crop="):
        fzoo.load_image(tmp_path / "none.png", **options)
