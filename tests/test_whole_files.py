"""Whole models of users': at the command line, what is said of them, and what files are that are none."""

import io
import json
import re
import shutil
import warnings
import zipfile

import jax
import jax.export
import keras
import numpy as np
import pytest
from networks import assert_alive
from PIL import Image
from reference import keras_model, random_images
from stored import stored_layers
from test_keras_model import randomise
from tiers import slow

import fzoo
from fzoo.cli.loading import load_network
from fzoo.cli.options import Network, Reading
from fzoo.images.preprocessing import preprocess
from fzoo.images.recipe import Recipe
from fzoo.recognition import LANDMARKS, recognize_backbone, recognize_preprocessing
from fzoo.training.finetune import starting_network
from fzoo.weights.config import Configuration
from fzoo.weights.ending import classifier_ending

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


def assert_rows(output: list[str], expected: np.ndarray, labels: list[str], tolerance: float = 2e-6) -> None:
    assert_alive(expected)
    found = rows_of(output)
    assert list(found) == ["a.png", "b.png", "c.png"]
    for row, p in zip(found.values(), expected, strict=True):
        assert row == pytest.approx(dict(zip(labels, p.tolist(), strict=True)), abs=tolerance)


def read(photos, recipe: Recipe) -> np.ndarray:
    return np.stack([recipe.load(path) for path in sorted(photos.iterdir())])


@pytest.mark.parametrize("mode", ["tf", "torch", "caffe", "unit", "none", "ResNet50"])
def test_classify_with_a_users_file(photos, tmp_path, command_line, mode):
    model = users_network()
    if mode not in ("tf", "torch", "unit"):  # whose numbers are large
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
    asked = "does not show what it wants of its pixels: preprocess=... (--preprocess) expected: tf"
    assert (code, output) == (2, []) and asked in errors[-1]
    code, output, errors = command_line(*arguments, "--preprocess", "half")
    assert (code, output, len(errors)) == (2, [], 1) and "--preprocess half given: unknown model" in errors[0]


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
    stored = stored_layers()
    for name in stored:
        names = {layer[0] for layer in stored[name]}
        fitting = {model for model, marks in LANDMARKS.items() if names.issuperset(marks)}
        wanted = fzoo.spec(name).preprocessing
        assert {fzoo.spec(model).preprocessing for model in fitting} == ({wanted} - {"none"}), name


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False])
def test_a_backbone_is_recognised(photos, tmp_path, command_line, nested):
    """Nested, and laid flat as in Keras's own guide."""
    base = keras_model("MobileNetV2", include_top=False, input_shape=(32, 32, 3), alpha=0.35)
    image = layers.Input((32, 32, 3)) if nested else base.input
    x = layers.Flatten()(base(image) if nested else base.get_layer("block_3_expand_relu").output)
    model = keras.Model(image, layers.Dense(3, activation="softmax")(x))
    kernel = model.layers[-1].kernel
    kernel.assign(np.random.default_rng(1).normal(0, (5 if nested else 1) / kernel.shape[0] ** 0.5, kernel.shape))
    model.save(tmp_path / "m.keras")
    code, output, errors = command_line("classify", photos, "-w", tmp_path / "m.keras")
    assert code == 0 and "preprocess tf, its layers are named as those of MobileNetV2" in errors[0]
    pixels = read(photos, Recipe((32, 32), "bilinear", crop=None))
    assert_rows(output, np.asarray(model(preprocess(pixels, "tf"), training=False)), ["0", "1", "2"], 1e-4)


@pytest.mark.slow
def test_keras_of_all_classes_reads_images_as_by_name(photos, tmp_path, command_line):
    """A published network that Keras saved whole gives what the same by its name gives."""
    keras_model("MobileNet", alpha=0.25, input_shape=(32, 32, 3)).save(tmp_path / "m.keras")
    (tmp_path / "labels.txt").write_text("".join(f"c{i}\n" for i in range(1000)))
    common = ["classify", photos, "-w", tmp_path / "m.keras", "--labels", tmp_path / "labels.txt"]
    _, output, errors = command_line(*common)
    _, by_name, _ = command_line(*common, "-m", "MobileNet", "-o", "alpha=0.25", "--size", "32")
    assert "shorter side to 37 by bicubic, centre crop" in errors[0]
    found, expected = rows_of(output), rows_of(by_name)
    assert found.keys() == expected.keys() and len({next(iter(row.values())) for row in found.values()}) == 3
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


def run_program(path, images) -> np.ndarray:
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    return np.asarray(exported.call(images))


def test_export_of_a_whole_model(tmp_path, command_line):
    """The program gives what Keras gives: for pixels, as recognised or as --preprocess says, and for floats."""
    pixels = random_images((3, 16, 16, 3), pixels=True).astype(np.uint8)
    floats, divided = pixels.astype(np.float32), pixels / np.float32(255)
    own, bare = users_network(layers.Rescaling(1 / 255)), users_network()
    for model, options, images, expected, said in (
        (own, ["--pixels"], pixels, own(floats), "preprocess none, its layer rescaling"),
        (own, [], floats, own(floats), "takes floats; preprocess none, its layer rescaling"),
        (
            bare,
            ["--preprocess", "unit"],
            pixels,
            bare(divided),
            "preprocess unit, as --preprocess says; squeezed to 16",
        ),
        (bare, [], divided, bare(divided), "takes floats; how it wants its pixels is not known"),
    ):
        file, out = tmp_path / "m.keras", tmp_path / "m.stablehlo"
        model.save(file)
        code, (row,), (line,) = command_line("export", file, out, "--platform", "cpu", *options)
        kind = "uint8" if options else "float32"
        assert (code, row.split("\t")[1:3]) == (0, [f"{kind}[batch,16,16,3]", "float32[batch,3]"])
        assert line.startswith(f"fzoo: {file}: {said}")
        assert_alive(np.asarray(expected), 0.02)
        np.testing.assert_allclose(run_program(out, images), expected, atol=1e-5)


def test_what_export_refuses_of_a_whole_model(tmp_path, command_line):
    users_network().save(tmp_path / "m.keras")
    users_network().save_weights(tmp_path / "alone.weights.h5")
    image, facts = layers.Input((16, 16, 3)), layers.Input((5,))
    flat = layers.Dense(3)(layers.Concatenate()([layers.Flatten()(image), facts]))
    keras.Model([image, facts], flat).save(tmp_path / "two.keras")
    for name, options, message in (
        ("m.keras", ["--pixels"], "m.keras does not show what it wants of its pixels: preprocess=... (--preprocess)"),
        ("m.keras", ["--preprocess", "half"], "--preprocess half given: unknown model"),
        ("m.keras", ["-w", "other.h5"], "--weights other.h5 given, {} has its own: leave it out"),
        ("m.keras", ["-o", "alpha=1"], "--option alpha=1 goes with --model NAME"),
        ("m.keras", ["--no-top"], "--no-include-top goes with --model NAME"),
        ("m.keras", ["--classes", "4"], "--classes 4 given, {} has 3"),
        ("m.keras", ["--size", "20"], "--size 20 given, {} takes 16 x 16"),
        ("two.keras", [], "two.keras takes 2 inputs, a network of one image expected"),
        ("alone.weights.h5", [], "does not tell whose: the name of its model, with --weights FILE, expected"),
    ):
        code, output, errors = command_line("export", tmp_path / name, tmp_path / "m.stablehlo", *options)
        assert (code, output, len(errors)) == (2, [], 1) and message.format(tmp_path / name) in errors[0], errors
        assert not (tmp_path / "m.stablehlo").exists()


@pytest.mark.slow
def test_what_is_taken_from_a_file_is_said(photos, tmp_path, command_line):
    """Of one that Keras wrote, by its model's name; its size, too. Nothing of fzoo's own, or of what was given."""
    options = {"alpha": 0.25, "classes": 4, "input_shape": (32, 32, 3), "classifier_activation": "sigmoid"}
    model = keras_model("MobileNet", **options)
    file = tmp_path / "m.keras"
    model.save(file)
    code, output, errors = command_line("classify", photos, "-m", "MobileNet", "-w", file)
    said = "classes=4, classifier_activation='sigmoid', input_shape=(32, 32, 3), alpha=0.25 taken from it"
    assert (code, errors) == (0, [f"fzoo: {file}: {said}"])
    pixels = read(photos, fzoo.recipe("MobileNet", 32))
    assert_rows(output, np.asarray(model(preprocess(pixels, "tf"), training=False)), list("0123"), 1e-5)
    given = ["-o", "alpha=0.25", "--size", "32", "--classes", "4"]
    code, again, errors = command_line("classify", photos, "-m", "MobileNet", "-w", file, *given)
    assert (code, again, errors) == (0, output, [f"fzoo: {file}: classifier_activation='sigmoid' taken from it"])
    config = fzoo.FinetuneConfig(model="MobileNet", weights=str(file), size=32)
    assert starting_network(config, ("a", "b"))[2].endswith("; alpha=0.25 taken from it")
    own = tmp_path / "own.keras"
    assert command_line("convert", file, own, "-m", "MobileNet") == (0, [str(own)], [f"fzoo: {file}: {said}"])
    code, again, errors = command_line("classify", photos, "-m", "MobileNet", "-w", own)
    assert (code, again, errors) == (0, output, [])


@pytest.mark.slow
@pytest.mark.filterwarnings("default:.*left out:UserWarning")
def test_warnings_are_lines(photos, tmp_path, command_line):
    """Layers that are left out of a file's model, in one line without a place in the code."""
    base = keras_model("MobileNet", alpha=0.25, input_shape=(32, 32, 3), classes=4)
    model = keras.Sequential([layers.Input((32, 32, 3)), layers.Rescaling(1 / 127.5, -1), base])
    model.save(tmp_path / "m.keras")
    code, _, errors = command_line("classify", photos, "-m", "MobileNet", "-w", tmp_path / "m.keras")
    assert code == 0
    warned = [line for line in errors if line.startswith("fzoo: warning: ")]
    assert any("rescaling" in line for line in warned)
    assert all(line.startswith("fzoo: ") for line in errors)


def test_a_network_without_its_preprocessing_asks_for_it(photos, tmp_path, command_line):
    options = {"input_shape": (32, 32, 3), "classes": 3, "alpha": 0.5, "include_preprocessing": False}
    fzoo.save_keras_weights(*fzoo.load("MobileNetV3Small", weights=None, **options), tmp_path / "w.h5")
    code, output, errors = command_line("classify", photos, "-w", tmp_path / "w.h5")
    asked = "this MobileNetV3Small is without its own preprocessing: --preprocess expected: tf"
    assert (code, output, len(errors)) == (2, [], 1) and asked in errors[0]
    loaded = load_network(Network(weights=str(tmp_path / "w.h5"), preprocess="unit"), Reading())
    assert loaded.preprocess == "unit"


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
    class_names.cache_clear()
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


def test_a_whole_model_is_said_to_be_one(tmp_path, command_line):
    """Whatever is in it, with the call that loads it; and what keeps one from being loaded."""
    for name in ("m.keras", "m.h5"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras's, of its legacy format
            users_network().save(tmp_path / name)
        report = fzoo.inspect_weights(tmp_path / name)
        module, _ = fzoo.load_model(tmp_path / name)
        assert (report.fits, report.problem, report.whole.layers) == ((), "", len(fzoo.layer_names(module)))
        assert report.calls == (f"fzoo.load_model({str(tmp_path / name)!r})",)
        code, output, _ = command_line("convert", "--dry-run", tmp_path / name)
        said = f"a whole model of 4 layers, from 16 x 16 x 3 to 3 classes by softmax: {report.calls[0]}"
        assert code == 0 and output[-1].endswith(said)
        images = random_images((3, 16, 16, 3))
        assert command_line("convert", tmp_path / name, tmp_path / f"again-{name}") == (
            0,
            [str(tmp_path / f"again-{name}")],
            [],
        )
        before, after = (fzoo.load_model(tmp_path / file) for file in (name, f"again-{name}"))
        np.testing.assert_allclose(fzoo.predict(*after, images), fzoo.predict(*before, images), atol=1e-6)
        assert fzoo.inspect_weights(tmp_path / f"again-{name}").whole == report.whole
        with pytest.raises(ValueError, match=r"holds a model of its own: fzoo\.load_model"):
            fzoo.load(weights=tmp_path / name)
    lost = keras.Sequential(
        [
            layers.Input((16, 16, 3)),
            layers.Dense(2),
            layers.Lambda(lambda x: 2 * x, output_shape=(16, 16, 2), name="mine"),
        ]
    )
    lost.save(tmp_path / "lost.keras")
    report = fzoo.inspect_weights(tmp_path / "lost.keras")
    assert (report.whole, report.calls) == (None, ()) and "mine (Lambda)" in report.problem
    assert "its model can't be loaded: mine (Lambda)" in str(report) and "fits" not in str(report)


@pytest.mark.slow
def test_calls_that_load(tmp_path):
    """Each of the calls that a report names is one that works."""
    base = keras.applications.MobileNet(weights=None, alpha=0.25, include_top=False, input_shape=(32, 32, 3))
    pooled = layers.GlobalAveragePooling2D()(base.output)
    keras.Sequential([base, layers.Flatten(), layers.Dense(2)]).save(tmp_path / "nested.keras")
    keras.Model(base.input, layers.Dense(2, activation="softmax")(pooled)).save(tmp_path / "flat.keras")
    keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=4).save(
        tmp_path / "own.keras"
    )
    for path, count in (("nested.keras", 2), ("flat.keras", 1), ("own.keras", 2)):
        report = fzoo.inspect_weights(tmp_path / path)
        assert report.whole.backbone == "MobileNet" and len(report.calls) == count, path
        for call in report.calls:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a backbone leaves out
                module, _ = eval(call, {"fzoo": fzoo})
            assert isinstance(module, fzoo.Classifier)


def archive_of(**members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), data)
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.tflite", b"\x1c\0\0\0TFL3" + bytes(100), "a TensorFlow Lite model: .* give the Keras file"),
        ("m.onnx", b"\x08\x07\x12\x07pytorch" + bytes(100), "an ONNX model"),
        ("m.ckpt", b"\x80\x02\x8a\nl\xfc\x9cF" + bytes(100), "a Python pickle"),
        ("m.pkl", b"\x80\x04\x95" + bytes(100), "a Python pickle: pickles run code"),
        ("m.ckpt", archive_of(archive__data_dot_pkl=b""), "a PyTorch file"),
        (
            "m.h5",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "a Git LFS pointer.*`git lfs pull`",
        ),
        ("m.keras", b"\n<!DOCTYPE html>\n<html lang=en>", "a web page: .*download the file itself"),
        (
            "model.json",
            b'{"format": "layers-model", "modelTopology": {}}',
            "a TensorFlow.js model: `tensorflowjs_converter",
        ),
        ("config.json", b'{"class_name": "Functional"}', "a model's configuration without its weights"),
        ("tm.zip", archive_of(model_dot_json=b"{}", weights_dot_bin=b""), "a zip of TensorFlow.js's: .*choose Export"),
        ("tm.zip", archive_of(model_unquant_dot_tflite=b"", labels_dot_txt=b""), "a zip of TensorFlow Lite's"),
        ("tm.zip", archive_of(keras_model_dot_h5=b""), "Teachable Machine's zip"),
        ("a.zip", archive_of(folder__my_dot_h5=b""), "a zip that holds folder/my.h5: unpack it"),
        ("a.npz", archive_of(a_dot_npy=b""), "an archive of NumPy's arrays"),
        ("a.h5.gz", b"\x1f\x8b\x08" + bytes(20), "compressed by gzip: unpack it"),
        ("a.h5", b"nothing that is known", "neither an HDF5 file nor a .keras archive"),
        ("a.h5", b"", "neither an HDF5 file nor a .keras archive"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,  # an archive has the time in it
)
def test_files_that_are_not_keras(tmp_path, command_line, name, content, message):
    """Their kind and the way out, wherever a file is taken."""
    path = tmp_path / name
    path.write_bytes(content)
    for call in (fzoo.inspect_weights, fzoo.load_model, lambda path: fzoo.load("MobileNet", weights=path)):
        with pytest.raises(ValueError, match=message) as error:
            call(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    code, output, errors = command_line("convert", "--dry-run", path)
    assert (code, output, len(errors)) == (2, [], 1) and re.search(message, errors[0])


def test_folders_that_are_not_keras(tmp_path):
    for name, file, message in (
        ("saved", "saved_model.pb", "SavedModel: open it in TensorFlow"),
        ("js", "model.json", "TensorFlow.js model"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"{}")
        for call in (fzoo.inspect_weights, fzoo.load_model):
            with pytest.raises(IsADirectoryError, match=f"{name} is a directory, .*{message}"):
                call(tmp_path / name)


@pytest.mark.parametrize(
    ("activation", "ending"),
    [
        ("sigmoid", ".keras"),
        slow(None, ".h5"),
        slow("hard_sigmoid", ".keras"),
        slow("softmax", ".h5"),
    ],
)
def test_a_files_classifier_is_taken_from_it(tmp_path, activation, ending):
    """By its family's name: its classes, and the activation, which no array shows."""
    options = {"alpha": 0.25, "input_shape": (32, 32, 3), "classes": 1 if activation == "sigmoid" else 3}
    model = keras_model("MobileNet", classifier_activation=activation, **options)
    path = tmp_path / f"m{ending}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras's, of its legacy format
        model.save(path)
    images = random_images((3, 32, 32, 3))
    expected = np.asarray(model(images, training=False))
    given = {"alpha": 0.25, "input_shape": (32, 32, 3)}
    module, variables = fzoo.load("MobileNet", weights=path, **given)
    assert (module.classes, module.classifier_activation) == (options["classes"], activation)
    assert np.ptp(expected, axis=0).max() > 0.01  # over the images
    np.testing.assert_allclose(fzoo.predict(module, variables, images), expected, atol=1e-5)
    same, _ = fzoo.load("MobileNet", weights=path, classifier_activation=activation, **given)
    logits, _ = fzoo.load("MobileNet", weights=path, classifier_activation=None, **given)
    assert same == module and logits.classifier_activation is None
    message = f"ends in {activation or 'no activation'}, classifier_activation='tanh' given"
    with pytest.raises(ValueError, match=message):
        fzoo.load("MobileNet", weights=path, classifier_activation="tanh", **given)
    with pytest.raises(ValueError, match=message):
        fzoo.load_keras_weights(module.clone(classifier_activation="tanh"), path)
    with pytest.raises(ValueError, match=f"the file has {module.classes} classes, the model 5"):
        fzoo.load("MobileNet", weights=path, classes=5, **given)
    without, _ = fzoo.load("MobileNet", weights=path, include_top=False, **given)
    assert without.classifier_activation == "softmax"  # which it does not use
    fits = fzoo.inspect_weights(path).fits
    assert fzoo.load(fits[0].model, weights=path, **fits[0].options)[0].classifier_activation == activation


@pytest.mark.slow
def test_a_users_dense_head(tmp_path):
    """Keras's own recipe, laid flat: a binary classifier with one sigmoid on a family whose top is a Dense."""
    base = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(32, 32, 3), pooling="avg")
    x = layers.Dropout(0.2)(base.output)
    model = randomise(keras.Model(base.input, layers.Dense(1, activation="sigmoid")(x)))
    model.save(tmp_path / "m.keras")
    module, _ = fzoo.load("ResNet50", weights=tmp_path / "m.keras", input_shape=(32, 32, 3))
    assert (module.classes, module.classifier_activation) == (1, "sigmoid")


def configuration_of(model: keras.Model) -> Configuration:
    entry = json.loads(model.to_json())
    return Configuration({"class_name": entry["class_name"], "config": entry["config"]}, (3, 0))


@pytest.mark.slow
def test_endings_that_are_not_the_networks():
    """A head over a network inside is not that network's, nor is what has no name."""
    image = layers.Input((8, 8, 3))
    inside = keras.Model(image, layers.Dense(4, activation="softmax")(layers.Flatten()(image)))
    whole = configuration_of(inside)
    assert classifier_ending(whole) == (4, "softmax")
    for outer, expected in (
        (keras.Sequential([inside, layers.Dense(2, activation="sigmoid")]), None),
        (keras.Sequential([layers.Input((8, 8, 3)), inside]), (4, "softmax")),
        (keras.Model(image, layers.Activation("tanh")(layers.Dense(3)(layers.Flatten()(image)))), (3, "tanh")),
        (keras.Model(image, layers.Softmax()(layers.Dense(3)(layers.Flatten()(image)))), (3, "softmax")),
        (keras.Model(image, layers.Reshape((3,))(layers.Conv2D(3, 8, activation="sigmoid")(image))), (3, "sigmoid")),
        (keras.Model(image, layers.Activation("tanh")(layers.Dense(3, activation="relu")(image))), None),
        (keras.Model(image, layers.GlobalAveragePooling2D()(layers.Conv2D(3, 8)(image))), None),
        (keras.Model(image, [image, image]), None),
    ):
        assert classifier_ending(configuration_of(outer)) == expected, outer.name
    for damaged in ({}, {"layers": [], "output_layers": []}, None, [1]):
        assert classifier_ending(Configuration({"class_name": "Functional", "config": damaged}, (3, 0))) is None


@pytest.mark.parametrize("activation", ["softmax", jax.nn.log_softmax])
def test_one_class_with_softmax_is_refused(tmp_path, activation):
    for make in (
        lambda: fzoo.create("MobileNet", classes=1, classifier_activation=activation),
        lambda: fzoo.create("MobileNet", classes=1, head=fzoo.Head(), classifier_activation=activation),
        lambda: fzoo.create("MobileNet").clone(classes=1, classifier_activation=activation),
        lambda: fzoo.load("MobileNet", weights=None, classes=1, classifier_activation=activation),
    ):
        with pytest.raises(ValueError, match="the same for every image: 'sigmoid' or classes=2 would do"):
            make()
    assert fzoo.create("MobileNet", classes=1, classifier_activation="sigmoid").classes == 1


@pytest.mark.slow
def test_binary_weights_alone(tmp_path):
    """Which can't tell their activation: it is asked for, and never a softmax."""
    module, _ = fzoo.load("MobileNet", weights=None, alpha=0.25, classes=1, classifier_activation="sigmoid")
    model = keras.applications.MobileNet(weights=None, alpha=0.25, classes=1, classifier_activation="sigmoid")
    model.save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(ValueError, match="'sigmoid' or classes=2"):
        fzoo.load("MobileNet", weights=tmp_path / "w.weights.h5", alpha=0.25, classes=1)
    (fit,) = fzoo.inspect_weights(tmp_path / "w.weights.h5").fits
    assert fzoo.load(fit.model, weights=tmp_path / "w.weights.h5", **fit.options)[0] == module
