"""Pictures as people see them: upright, with what is transparent over white, in the range that they were saved in."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from networks import assert_alive, network
from PIL import Image
from tiers import slow

import fzoo
from fzoo.images.recipe import Recipe

#: What a camera writes for each way that it is held, and how the picture is seen then.
TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("ending", [".png", ".tif", ".webp"])
def test_upright(tmp_path, orientation, ending):
    pixels, exif = random_pixels(20, 30, 3), Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{ending}"
    Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if ending == ".webp" else {}))
    np.testing.assert_array_equal(fzoo.load_image(path), TURNED[orientation](pixels))
    if ending != ".tif":  # Pillow turns a TIFF by itself
        np.testing.assert_array_equal(fzoo.load_image(path, exif=False), pixels)


@pytest.mark.parametrize(
    "data", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0no such thing", b"Exif\0\0", b"Exif\0\0MM\0*"]
)
def test_damaged_exif_says_nothing(tmp_path, data):
    pixels = random_pixels(20, 30, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=data)
    np.testing.assert_array_equal(fzoo.load_image(tmp_path / "a.png"), pixels)


def test_16_bits_are_scaled(tmp_path):
    grey = random_pixels(20, 30)
    expected = np.repeat(grey[..., None], 3, axis=2)
    wide = grey.astype(np.uint16) * 257
    for ending in (".png", ".tif"):
        Image.fromarray(wide).save(tmp_path / f"grey{ending}")
    (tmp_path / "grey.pgm").write_bytes(b"P5 30 20 65535\n" + wide.astype(">u2").tobytes())
    for ending in (".png", ".tif", ".pgm"):
        np.testing.assert_array_equal(fzoo.load_image(tmp_path / f"grey{ending}"), expected, err_msg=ending)
    cut_off = np.minimum(np.repeat(grey[..., None].astype(np.uint16) * 257, 3, axis=2), 255)
    np.testing.assert_array_equal(fzoo.load_image(tmp_path / "grey.png", clip=True), cut_off)


def test_white_is_zero(tmp_path):
    """A TIFF of 16 bits whose 0 is white, as scanners write them: Pillow leaves it a negative."""
    grey = random_pixels(20, 30)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(fzoo.load_image(tmp_path / "a.tif")[..., 0], 255 - grey)


@pytest.mark.parametrize(("dtype", "message"), [(np.float32, "floats"), (np.int32, "integers of 32 bits")])
def test_no_agreed_range(tmp_path, dtype, message):
    path = tmp_path / "a.tif"
    Image.fromarray(random_pixels(20, 30).astype(dtype)).save(path)
    with pytest.raises(ValueError, match=rf"a\.tif: grey values that are {message}.* save it with 8 or 16 bits"):
        fzoo.load_image(path)
    assert fzoo.load_image(path, clip=True).shape == (20, 30, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_over_a_background(tmp_path, mode):
    """An icon: a black disc, with black that is hidden around it."""
    y, x = np.mgrid[:32, :32]
    disc = (y - 16) ** 2 + (x - 16) ** 2 < 100
    path = tmp_path / "icon.png"
    if mode in ("RGBA", "LA"):
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[disc, 3] = 255
        Image.fromarray(pixels).convert(mode).save(path)
    else:  # one colour, or one entry of the palette, is the transparent one
        hidden = Image.fromarray(np.where(disc, 0, 7).astype(np.uint8))
        if mode == "P":
            hidden.putpalette([0] * 768)
        hidden = hidden if mode == "P" else hidden.convert(mode)
        hidden.save(path, transparency=(7, 7, 7) if mode == "RGB" else 7)
    white = fzoo.load_image(path)
    np.testing.assert_array_equal(white, np.where(disc[..., None], 0, 255) * np.ones(3, np.uint8))
    red = fzoo.load_image(path, background="red")
    np.testing.assert_array_equal(red[~disc], [[255, 0, 0]] * int((~disc).sum()))
    np.testing.assert_array_equal(red, fzoo.load_image(path, background=(255, 0, 0)))
    assert fzoo.load_image(path, background=None).max() < 8  # all black, as Keras sees it


def test_half_transparent(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 0, 128)).save(tmp_path / "a.png")
    expected = [round((c * 128 + 255 * 127) / 255) for c in (200, 100, 0)]
    np.testing.assert_allclose(fzoo.load_image(tmp_path / "a.png")[0, 0], expected, atol=1)


@pytest.mark.parametrize("background", ["whit", (255, 255), (256, 0, 0), 7, (0.5, 0.5, 0.5)])
@pytest.mark.wrong_types
def test_a_background_that_is_no_color(tmp_path, background):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"background=.* given, a colour"):
        fzoo.load_image(tmp_path / "a.png", background=background)
    with pytest.raises(ValueError, match=r"background=.* given, a colour"):
        Recipe((4, 4), background=background)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError, KeyError, SyntaxError, EOFError])
def test_whatever_a_decoder_raises(tmp_path, monkeypatch, error):
    def broken(self):
        raise error("the decoder's words")

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
    with pytest.raises(ValueError, match=r"cannot read the image .*a\.png: .*the decoder's words"):
        fzoo.load_image(tmp_path / "a.png")


def test_damaged_avif(tmp_path):
    path = tmp_path / "a.avif"
    try:
        Image.fromarray(random_pixels(64, 64, 3)).save(path)
    except (KeyError, OSError, ValueError):
        pytest.skip("this Pillow writes no AVIF")
    data = bytearray(path.read_bytes())
    data[-200:] = bytes(200)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot read the image .*a\.avif"):
        fzoo.load_image(path)


def test_a_pipe_is_no_image(tmp_path):
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: not a file, but a pipe"):
        fzoo.load_image(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(FileNotFoundError, match=r"b\.jpg is a link to a file that is not there"):
        fzoo.load_image(tmp_path / "b.jpg")


@pytest.mark.parametrize("shape", [(1, 30000, 3), slow((30000, 1, 3))])
def test_a_thin_image_takes_little_memory(tmp_path, shape):
    """In a process of its own, whose memory is counted; the whole, resized, would take gigabytes."""
    path = tmp_path / "thin.png"
    Image.fromarray(random_pixels(*shape)).save(path)
    program = (
        "import resource, sys, fzoo\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "x = fzoo.load_image(sys.argv[1], 224, 'bicubic', crop=0.875)\n"
        "print(x.shape, x.std() > 1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "(224, 224, 3) True True"


@pytest.mark.parametrize("side", [17, 40])
def test_cut_first_is_the_same_picture(tmp_path, side):
    """An image just above and one below the limit of what is cut before it is resized."""
    smooth = np.clip(np.cumsum(random_pixels(side * 20, side, 3) // 32, axis=0) % 400, 0, 255).astype(np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(smooth).save(path)
    factor = 32 / side
    whole = Image.fromarray(smooth).resize((32, round(side * 20 * factor)), Image.Resampling.BICUBIC)
    top = (whole.height - 28) // 2
    expected = np.asarray(whole.crop((2, top, 30, top + 28))).astype(int)
    difference = abs(fzoo.load_image(path, 28, "bicubic", crop=0.875).astype(int) - expected)
    assert difference.mean() < 0.5 and difference.max() < 24


def test_a_recipe(tmp_path):
    Image.fromarray(random_pixels(40, 60, 4)).save(tmp_path / "a.png")
    options = {"exif": False, "background": "red", "clip": True}
    recipe = Recipe((28, 30), "lanczos", 0.9, **options)
    expected = fzoo.load_image(tmp_path / "a.png", (28, 30), "lanczos", crop=0.9, **options)
    np.testing.assert_array_equal(recipe.load(tmp_path / "a.png"), expected)
    assert Recipe((28, 28), background="#ffffff") == Recipe((28, 28)) != Recipe((28, 28), background="red")
    assert (
        str(Recipe.keras(28)) == "squeezed to 28 x 28 by nearest, not turned upright, alpha dropped, cut off at 8 bits"
    )
    with pytest.raises(ValueError, match="crop=0 given"):
        Recipe((28, 28), crop=0)


def test_as_a_models_weights_want_it(tmp_path):
    Image.fromarray(random_pixels(300, 400, 3)).save(tmp_path / "a.png")
    expected = fzoo.load_image(tmp_path / "a.png", 299, "bicubic", crop=0.875)
    np.testing.assert_array_equal(fzoo.load_image_for(tmp_path / "a.png", "Xception"), expected)
    squeezed = fzoo.load_image_for(tmp_path / "a.png", "Xception", (100, 80), crop=None)
    np.testing.assert_array_equal(squeezed, fzoo.load_image(tmp_path / "a.png", (100, 80), "bicubic"))
    with pytest.raises(ValueError, match="unknown part of a recipe 'interpolate': did you mean interpolation"):
        fzoo.load_image_for(tmp_path / "a.png", "Xception", interpolate="nearest")
    with pytest.raises(ValueError, match="did you mean Xception"):
        fzoo.load_image_for(tmp_path / "a.png", "Xseption")


def test_a_recipe_survives_json():
    recipe = Recipe((28, 30), "lanczos", 0.9, background="red")
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    before = Recipe.from_json({"size": [28, 28], "interpolation": "bicubic", "crop": 0.875, "augment": False})
    assert (before.exif, before.background, before.clip) == (False, None, True)  # it was trained so


@pytest.mark.slow
def test_every_command_sees_the_same_picture(tmp_path, monkeypatch, command_line):
    """A photograph on its side, with something transparent in it: one label, whatever the command."""
    module, variables = network("MobileNet", alpha=0.25, input_shape=(32, 32, 3), classes=4)
    fzoo.save_variables(module, variables, tmp_path / "w.h5")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for i in range(4):
        exif = Image.Exif()
        exif[0x0112] = (1, 6, 8, 3)[i]
        (tmp_path / "d" / str(i)).mkdir()
        pixels = np.random.default_rng(i).integers(0, 256, (5, 7, 4), np.uint8)
        Image.fromarray(pixels).resize((70, 50)).save(tmp_path / "d" / str(i) / "a.png", exif=exif)
    options = ["-m", "MobileNet", "-o", "alpha=0.25", "--size", "32", "--classes", "4", "-w", "w.h5"]
    files = [f"d/{i}/a.png" for i in range(4)]
    keras_pixels = {"interpolation": "nearest", "crop": None, "exif": False, "background": None, "clip": True}
    ways = ([], {}), (["--keras-pixels"], keras_pixels), (["--background", "#102030"], {"background": "#102030"})
    for extra, changes in ways:
        pixels = np.stack([fzoo.load_image_for(file, "MobileNet", 32, **changes) for file in files])
        expected = np.asarray(fzoo.predict(module, variables, pixels, preprocess="MobileNet"))
        assert_alive(expected)
        code, output, _ = command_line("classify", *files, *options, "--json", "--top", "4", *extra)
        found = [{p["label"]: p["probability"] for p in row["predictions"]} for row in json.loads("\n".join(output))]
        assert code == 0
        np.testing.assert_allclose([[row[str(i)] for i in range(4)] for row in found], expected, atol=1e-5)
        code, _, _ = command_line("features", *files, *options, "--layer", "predictions", "--out", "x.npz", *extra)
        with np.load("x.npz") as arrays:
            np.testing.assert_allclose(arrays["predictions"], expected, atol=1e-5)
        os.unlink("x.npz")
        for file, row in zip(files, expected, strict=True):
            code, output, _ = command_line("explain", file, *options, "--top", "1", "--out", "x.png", *extra)
            assert [float(output[0].split("\t")[3])] == pytest.approx([row.max()], abs=1e-5)
        code, output, _ = command_line("evaluate", "d", *options, *extra)
        right = (expected.argmax(1) == np.arange(4)).mean()
        assert f"top-1\t{right:.2%}" in output


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ResNet50", Recipe((224, 224), "bicubic", 0.875)),
        ("EfficientNetB7", Recipe((600, 600), "bicubic", 0.949)),
        ("EfficientNetV2S", Recipe((384, 384), "bicubic", 1.0)),
        ("EfficientNetV2L", Recipe((480, 480), "bicubic", None)),
    ],
)
def test_the_recipe_is_the_models(name, expected):
    assert fzoo.recipe(name) == expected
    assert fzoo.recipe(name, (64, 96)) == dataclasses.replace(expected, size=(64, 96))


def test_efficientnets_lose_16_pixels_at_each_side():
    """As their authors measure them (CROP_PADDING of the reference code)."""
    for name in fzoo.list_models("EfficientNetB*", tagged=False):
        spec = fzoo.spec(name)
        assert spec.crop == pytest.approx(spec.input_size / (spec.input_size + 32), abs=6e-4)
