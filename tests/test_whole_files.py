"""Whole models of users': at the command line, what is said of them, and what files are that are none."""

import shutil
import zipfile

import keras
import numpy as np
import pytest
from networks import assert_alive
from PIL import Image
from test_keras_model import randomise

import fzoo
from fzoo.images.preprocessing import preprocess
from fzoo.images.recipe import Recipe
from fzoo.recognition import LANDMARKS, recognize_backbone, recognize_preprocessing

layers = keras.layers


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three images, 40 x 50."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8).repeat(10, 1).repeat(10, 2)
    for name, image in zip(("a.png", "b.png", "c.png"), pixels, strict=True):
        Image.fromarray(image).save(folder / name)
    return folder


def users_network(*first, channels: int = 3, **last) -> keras.Model:
    """A network that a user made: layers at its beginning, and the options of its last."""
    x = image = layers.Input((16, 16, channels))
    for layer in first:
        x = layer(x)
    x = layers.Conv2D(8, 3, activation="relu")(x)
    x = layers.Dense(3, **{"activation": "softmax", **last})(layers.Flatten()(x))
    return randomise(keras.Model(image, x))


def rows_of(output: list[str]) -> dict[str, dict[str, float]]:
    """{image: {label: probability}} of the lines in a pipe."""
    found: dict[str, dict[str, float]] = {}
    for line in output:
        name, _, label, p = line.split("\t")
        found.setdefault(name.rpartition("/")[2], {})[label] = float(p)
    return found


def assert_rows(output: list[str], expected: np.ndarray, labels: list[str]) -> None:
    assert_alive(expected)
    found = rows_of(output)
    assert list(found) == ["a.png", "b.png", "c.png"]
    for row, p in zip(found.values(), expected, strict=True):
        assert row == pytest.approx(dict(zip(labels, p.tolist(), strict=True)), abs=2e-6)


def read(photos, recipe: Recipe) -> np.ndarray:
    return np.stack([recipe.load(path) for path in sorted(photos.iterdir())])


@pytest.mark.parametrize("mode", ["tf", "torch", "caffe", "none", "ResNet50"])
def test_classify_with_a_users_file(photos, tmp_path, command_line, mode):
    model = users_network()
    if mode not in ("tf", "torch"):  # whose numbers are large
        model.layers[1].kernel.assign(model.layers[1].kernel / 64)
    model.save(tmp_path / "m.keras")
    (tmp_path / "labels.txt").write_text("ant\nbee\ncat\n")
    arguments = ["classify", photos, "-w", tmp_path / "m.keras", "--labels", tmp_path / "labels.txt"]
    code, output, errors = command_line(*arguments, "--preprocess", mode)
    pixels = read(photos, Recipe((16, 16), "bilinear", crop=None))
    expected = model(preprocess(pixels, "caffe" if mode == "ResNet50" else mode))
    assert code == 0 and len(errors) == 1 and "as --preprocess says; squeezed to 16 x 16 by bilinear" in errors[0]
    assert_rows(output, np.asarray(expected), ["ant", "bee", "cat"])
    code, output, errors = command_line(*arguments)
    assert (code, output) == (2, []) and "does not show what it wants of its pixels: --preprocess tf" in errors[-1]
    code, output, errors = command_line(*arguments, "--preprocess", "half")
    assert (code, output, len(errors)) == (2, [], 1) and "--preprocess half given, caffe, tf, torch, none" in errors[0]


def test_a_graph_tells_how_its_pixels_are_scaled(photos, tmp_path, command_line):
    """And is told apart from one whose pixels were scaled before."""
    operations = keras.Input((16, 16, 3))
    flat = layers.Flatten()(operations[..., ::-1] / 127.5 - 1.0)
    told = {
        "rescaling": users_network(layers.RandomFlip(), layers.Resizing(12, 12), layers.Rescaling(1 / 127.5, -1)),
        "normalization": users_network(layers.Normalization(mean=[120, 110, 100], variance=[4e3, 3e3, 5e3])),
        "operations": randomise(keras.Model(operations, layers.Dense(3, activation="softmax")(flat))),
    }
    untold = {
        "none": users_network(),
        "scaled before": users_network(layers.Rescaling(2.0, -1.0)),
        "normalised before": users_network(layers.Normalization(mean=[0.5, 0.4, 0.3], variance=[0.1, 0.2, 0.1])),
        "later": users_network(layers.Conv2D(3, 3), layers.Rescaling(1 / 255)),
    }
    pixels = read(photos, Recipe((16, 16), "bilinear", crop=None))
    for name, model in told.items():
        model.save(tmp_path / f"{name}.keras")
        code, output, errors = command_line("classify", photos, "-w", tmp_path / f"{name}.keras")
        assert (
            code == 0 and f"preprocess none, its layer {'true_divide' if name == 'operations' else name}" in errors[0]
        )
        assert_rows(output, np.asarray(model(pixels.astype(np.float32), training=False)), ["0", "1", "2"])
    for name, model in untold.items():
        model.save(tmp_path / f"{name}.keras")
        assert recognize_preprocessing(*fzoo.load_model(tmp_path / f"{name}.keras")) is None, name


def test_landmarks_tell_families_apart():
    """Each family that does not preprocess inside is known by its layers, and none by another's."""
    for name in fzoo.list_models():
        record = fzoo.spec(name)
        if record.preprocessing == "none":
            continue
        if record.parameters > 30e6 and not name.startswith("VGG"):
            continue  # its blocks are those of the smaller ones
        names = set(fzoo.layer_names(fzoo.create(name, include_top=False)))
        fitting = {fzoo.spec(other).family for other, marks in LANDMARKS.items() if names.issuperset(marks)}
        assert fitting == {record.family} or (name.startswith("VGG") and len(fitting) == 1), name


@pytest.mark.parametrize("nested", [True, False])
def test_a_backbone_is_recognised(photos, tmp_path, command_line, nested):
    """Nested, and laid flat as in Keras's own guide."""
    base = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(32, 32, 3), alpha=0.35)
    image = layers.Input((32, 32, 3)) if nested else base.input
    x = layers.Flatten()(base(image) if nested else base.get_layer("block_3_expand_relu").output)
    model = randomise(keras.Model(image, layers.Dense(3, activation="softmax")(x)))
    model.save(tmp_path / "m.keras")
    code, output, errors = command_line("classify", photos, "-w", tmp_path / "m.keras")
    assert code == 0 and "preprocess tf, its layers are named as those of MobileNetV2" in errors[0]
    pixels = read(photos, Recipe((32, 32), "bilinear", crop=None))
    found = rows_of(output)
    for row, p in zip(found.values(), np.asarray(model(preprocess(pixels, "tf"))), strict=True):
        assert row == pytest.approx(dict(zip("012", p.tolist(), strict=True)), abs=1e-4)


def test_keras_of_all_classes_reads_images_as_by_name(photos, tmp_path, command_line):
    """A published network that Keras saved whole gives what the same by its name gives."""
    model = keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3))
    randomise(model).save(tmp_path / "m.keras")
    (tmp_path / "labels.txt").write_text("".join(f"c{i}\n" for i in range(1000)))
    common = ["classify", photos, "-w", tmp_path / "m.keras", "--labels", tmp_path / "labels.txt"]
    _, output, errors = command_line(*common)
    _, by_name, _ = command_line(*common, "-m", "MobileNet", "-o", "alpha=0.25", "--size", "32")
    assert "shorter side to 37 by bicubic, centre crop" in errors[0]
    found, expected = rows_of(output), rows_of(by_name)
    for name, row in expected.items():
        assert found[name] == pytest.approx(row, abs=1e-5)


def test_grey_networks(photos, tmp_path, command_line):
    """Images are made grey for them, as Keras makes them: in classes, layers, maps and measures."""
    model = users_network(channels=1)
    model.save(tmp_path / "m.keras")
    common = ["-w", tmp_path / "m.keras", "--preprocess", "tf", "--keras-pixels"]
    grey = [keras.utils.load_img(p, color_mode="grayscale", target_size=(16, 16)) for p in sorted(photos.iterdir())]
    images = np.stack(grey)[..., None].astype(np.float32) / 127.5 - 1
    code, output, errors = command_line("classify", photos, *common)
    assert code == 0 and "in grey" in errors[0]
    assert_rows(output, np.asarray(model(images)), ["0", "1", "2"])
    out = tmp_path / "f.npz"
    assert command_line("features", photos, *common, "--layer", model.layers[1].name, "--out", out)[0] == 0
    taps = keras.Model(model.input, model.layers[1].output)(images)
    np.testing.assert_allclose(np.load(out)[model.layers[1].name], np.asarray(taps), atol=1e-5)
    for image in photos.iterdir():
        (tmp_path / "data" / image.stem).mkdir(parents=True)
        shutil.copy(image, tmp_path / "data" / image.stem)
    (tmp_path / "labels.txt").write_text("0 a\n1 b\n2 c\n")
    labels = ["--labels", tmp_path / "labels.txt"]
    code, output, _ = command_line("evaluate", tmp_path / "data", *common, *labels)
    right = (np.asarray(model(images)).argmax(1) == [0, 1, 2]).mean()
    assert code == 0 and dict(line.split("\t")[:2] for line in output)["top-1"] == f"{right:.2%}"
    code, _, errors = command_line("explain", photos / "a.png", *common, *labels, "--out", tmp_path / "map.png")
    assert code == 0 and (tmp_path / "map.png").exists()
    code, output, errors = command_line("classify", photos, "-w", tmp_path / "m.keras", "--preprocess", "caffe")
    assert (code, output) == (2, []) and "--preprocess caffe is for RGB" in errors[0]


def test_options_that_a_whole_model_does_not_have(photos, tmp_path, command_line):
    users_network().save(tmp_path / "m.keras")
    users_network().save_weights(tmp_path / "alone.weights.h5")
    for arguments, message in (
        (["-w", "m.keras", "--size", "20"], "--size 20 given, {} takes 16 x 16"),
        (["-w", "m.keras", "--classes", "4"], "--classes 4 given, {} has 3"),
        (["-w", "m.keras", "-o", "alpha=1"], "--option alpha=1 goes with --model NAME"),
        (["-w", "alone.weights.h5"], "has weights alone, and does not tell whose: --model NAME expected"),
        (["--preprocess", "caffe", "-m", "MobileNet", "-w", "missing.h5"], "no such weights file"),
    ):
        arguments = [tmp_path / part if str(part).endswith((".keras", ".h5")) else part for part in arguments]
        code, output, errors = command_line("classify", photos, *arguments)
        assert (code, output) == (2, []) and message.format(tmp_path / "m.keras") in errors[-1], errors


def test_preprocess_of_a_model_by_name(photos, tmp_path, command_line):
    module, variables = fzoo.load("MobileNet", weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=3)
    fzoo.save_keras_weights(module, variables, tmp_path / "w.h5")
    _, output, errors = command_line("classify", photos, "-w", tmp_path / "w.h5")  # which tells its model
    assert len(output) == 9 and errors == []
    assert command_line("classify", photos, "-w", tmp_path / "w.h5", "--preprocess", "tf")[1] == output
    code, output, errors = command_line("classify", photos, "-w", tmp_path / "w.h5", "--preprocess", "VGG16")
    assert (code, output) == (2, []) and errors == [
        "fzoo: error: --preprocess VGG16 given, MobileNet wants tf: leave it out"
    ]


def test_logits_are_said_to_be_none(photos, tmp_path, command_line):
    users_network(activation=None).save(tmp_path / "m.keras")
    _, _, errors = command_line("classify", photos, "-w", tmp_path / "m.keras", "--preprocess", "tf")
    assert "it ends without softmax or sigmoid" in errors[0]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0 Cat\n1 Dog\n2 Big fish\n", ["Cat", "Dog", "Big fish"]),
        ("\ufeff0 Cat\r\n1 Dog\r\n2 Fish\r\n", ["Cat", "Dog", "Fish"]),
        ("Cat\nDog\nFish\n", ["Cat", "Dog", "Fish"]),
        ("0 Cat\n2 Dog\n1 Fish\n", ["0 Cat", "2 Dog", "1 Fish"]),
        ("1 Cat\n2 Dog\n3 Fish\n", ["1 Cat", "2 Dog", "3 Fish"]),
        ("0\n1\n2\n", ["0", "1", "2"]),
        ("0 Cat\n1\n2 Fish\n", ["0 Cat", "1", "2 Fish"]),
    ],
)
def test_labels_with_numbers(tmp_path, text, names):
    from fzoo.cli.loading import class_names

    (tmp_path / "labels.txt").write_text(text, encoding="utf-8")
    assert class_names(tmp_path / "labels.txt", 3) == [("-", name) for name in names]


def test_teachable_machines_zip(real, tmp_path, command_line):
    """As Teachable Machine's own example reads images: the centre by Lanczos, x / 127.5 - 1."""
    photo, file = real / "photos" / "coffee.png", real / "keras_files" / "tm_waste.h5"
    with zipfile.ZipFile(tmp_path / "converted_keras.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, "keras_model.h5")
        archive.writestr("labels.txt", "0 Cardboard\n1 Glass\n2 Metal\n3 Plastic\n")
    (tmp_path / "labels.txt").write_text("0 A\n1 B\n2 C\n3 D\n")
    module, variables = fzoo.load_model(file)
    image = Image.open(photo).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    image = image.resize((224, 224), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    expected = np.asarray(fzoo.predict(module, variables, np.asarray(image, np.float32)[None] / 127.5 - 1))[0]
    for arguments, names in (
        ([tmp_path / "converted_keras.zip"], ["Cardboard", "Glass", "Metal", "Plastic"]),
        ([tmp_path / "converted_keras.zip", "--labels", tmp_path / "labels.txt"], "ABCD"),
        ([file, "--labels", tmp_path / "labels.txt"], "ABCD"),
    ):
        code, output, errors = command_line("classify", photo, "-w", *arguments)
        assert code == 0 and "preprocess tf, it is Teachable Machine's" in errors[0]
        (row,) = rows_of(output).values()
        assert row == pytest.approx(dict(zip(names, expected.tolist(), strict=True)), abs=0.02)
    assert recognize_backbone(module) == "MobileNetV2"
    (tmp_path / "bad.zip").write_bytes((tmp_path / "converted_keras.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("keras_model.h5", b"nothing")
    code, output, errors = command_line("classify", photo, "-w", tmp_path / "bad.zip")
    assert (code, output, len(errors)) == (2, [], 1) and "bad.zip: keras_model.h5 has no configuration" in errors[0]
