"""What a fine-tuning is given: folders, arrays, batches and options are right, or refused in a line that is true."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import network as alive_network
from networks import random_images
from PIL import Image

import fzoo
from fzoo import FinetuneConfig, Phase
from fzoo.images.preprocessing import MODES, check_range
from fzoo.models.efficientnet_v2 import Stage
from fzoo.training.config import FIELDS
from fzoo.training.data import Broken
from fzoo.training.inputs import sources
from fzoo.training.splits import part_of

TINY = {"stages": (Stage(True, 1, 32, 1, 2), Stage(False, 2, 64, 1, 2)), "width_coefficient": 0.25, "size": 32}
HEAD = (Phase(1, trains="head"),)


def fill(root, *names, count=3, seed=0):
    """Folders with images, all different."""
    rng = np.random.default_rng([seed, *f"{root}{names}".encode()])
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


def find(data, validation=None, **options):
    """(training data, validation data, what was said)."""
    said, config = [], FinetuneConfig(**options)
    return *sources(data, validation, config, Broken(3, said.append), said.append), said


def folders(files):
    return sorted({path.parent.relative_to(path.parents[3]).as_posix() for path in files.paths})


# -- the parts of a data set -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "train", "validation", "left"),
    [
        (("Train", "Test"), "Train", None, "Test"),
        (("seg_train", "seg_test", "seg_pred"), "seg_train", None, "seg_test"),
        (("training_set", "test_set"), "training_set", None, "test_set"),
        (("TRAIN", "valid", "test"), "TRAIN", "valid", "test"),
        (("train-images", "dev-images"), "train-images", "dev-images", None),
        (("train2017", "val2017"), "train2017", "val2017", None),
        (("flowers_train", "flowers_holdout"), "flowers_train", "flowers_holdout", None),
        (("TrainSet", "ValidationSet", "TestSet"), "TrainSet", "ValidationSet", "TestSet"),
        (("training", "heldout"), "training", "heldout", None),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_known_parts(tmp_path, names, train, validation, left):
    """They are told by their names; what is to test on is left alone, and a share of the rest is held out."""
    for part in names:
        fill(tmp_path / "photos" / part, "cats", "dogs")
    trained, held_out, said = find(tmp_path / "photos")
    assert trained.class_names == ("cats", "dogs")
    assert folders(trained) == [f"photos/{train}/{name}" for name in ("cats", "dogs")]
    assert folders(held_out) == [f"photos/{validation or train}/{name}" for name in ("cats", "dogs")]
    assert len(trained.labels) == (6 if validation else 4) and not set(trained.paths) & set(held_out.paths)
    assert any(f"{left} is left for `fzoo evaluate`" in line for line in said) == (left is not None)
    assert any("not used: seg_pred/" in line for line in said) == ("seg_pred" in names)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("val/a", "val/b", "test/a", "test/b"), r"holds test/, val/ and nothing to train on: train/ with a folder"),
        (("test/a", "test/b"), r"holds test/ and nothing to train on"),
        (("train/a", "train/b", "training/a", "training/b"), "train/, training/, which are all to train on"),
        (("train/a", "train/b", "val/a", "valid/a"), "val/, valid/, which are all to validate on"),
        (
            ("train/a", "train/b", "cats", "dogs"),
            r"holds train/, a part of a data set by its name, beside cats/, dogs/",
        ),
        (("cats", "dogs", "test"), "holds test/, a part of a data set by its name, beside cats/, dogs/"),
        (("train", "test"), r"train has 0 class folders \(none\)"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_doubtful_parts(tmp_path, names, said):
    with pytest.raises(ValueError, match=said):
        find(fill(tmp_path / "photos", *names))


def test_classes_with_such_names(tmp_path):
    """Trains beside cars are a class, and what is valid beside what is not."""
    for names in (("car", "train"), ("invalid", "valid"), ("test tubes", "trains")):
        trained, _, said = find(fill(tmp_path / names[0], *names))
        assert trained.class_names == names and len(said) == 1
    assert [part_of(name) for name in ("trainer", "contest", "validity", "train station", "images")] == [None] * 5


def test_nested_folders(tmp_path):
    """An archive that was unpacked into a folder of its name."""
    fill(tmp_path / "photos" / "photos" / "train" / "train", "cats", "dogs")
    fill(tmp_path / "photos" / "photos" / "val", "cats", "dogs")
    trained, held_out, _ = find(tmp_path / "photos")
    assert (trained.class_names, len(trained.labels), len(held_out.labels)) == (("cats", "dogs"), 6, 6)


def test_what_was_found_is_said(tmp_path):
    """Classes, images of each, what is held out, and copies across the parts."""
    fill(tmp_path / "train", "cats", count=4)
    fill(tmp_path / "train", "dogs", count=5)
    fill(tmp_path / "val", "cats", "dogs")
    (tmp_path / "val/dogs/copy.png").write_bytes((tmp_path / "train/cats/2.png").read_bytes())
    _, _, said = find(tmp_path)
    assert said == [
        "9 images of 2 classes to train on (cats 4, dogs 5), 7 held out",
        f"1 of the images held out are among those to train on, byte for byte, e.g. {tmp_path}/val/dogs/copy.png is "
        f"{tmp_path}/train/cats/2.png",
    ]
    many = fill(tmp_path / "many", *map(str, range(12)))
    Image.new("RGB", (8, 8)).save(many / "7" / "more.png")
    _, _, said = find(many, validation_split=0)
    assert said == ["37 images of 12 classes to train on (the fewest 0 3, the most 7 4), none held out"]
    images = random_images((8, 32, 32, 3), pixels=True).astype(np.uint8)
    images[7] = images[0]
    labels = np.arange(8) % 2
    _, _, said = find((images[:6], labels[:6]), (images[6:], labels[6:]))
    assert said[1] == "1 of the images held out are among those to train on, byte for byte"


def test_names_of_classes(tmp_path):
    """Two forms of "é" are one name; two such folders, or a line end, are refused."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    fill(tmp_path / "a" / "train", composed, "dogs")
    fill(tmp_path / "a" / "val", decomposed, "dogs")
    trained, held_out, _ = find(tmp_path / "a")
    assert trained.class_names == held_out.class_names == (composed, "dogs")
    with pytest.raises(ValueError, match=f"two class folders called {composed}"):
        find(fill(tmp_path / "b", composed, decomposed))
    with pytest.raises(ValueError, match=r"class folder '.*a\\nb' has a line end in its name"):
        find(fill(tmp_path / "c", "a\nb", "dogs"))


def test_validation_by_name(tmp_path):
    """Of labels that are numbers, folders are numbers: 10 is the eleventh class."""
    images = random_images((22, 32, 32, 3), pixels=True).astype(np.uint8)
    arrays = images, np.arange(22) % 11
    _, held_out, _ = find(arrays, fill(tmp_path / "numbers", *map(str, range(11)), count=1))
    assert {path.parent.name: label for path, label in zip(held_out.paths, held_out.labels, strict=True)} == {
        str(i): i for i in range(11)
    }
    with pytest.raises(ValueError, match="class folder 'cats' given, class folders named 0 to 10 expected"):
        find(arrays, fill(tmp_path / "names", "cats", "dogs"))
    with pytest.raises(ValueError, match="has other classes than the training images: cats, cows"):
        find(fill(tmp_path / "a", "cats", "dogs"), fill(tmp_path / "b", "cows", "dogs"))


# -- labels and pixels -------------------------------------------------------------------------------------------------

X, Y = random_images((6, 32, 32, 3), pixels=True).astype(np.uint8), np.arange(6) % 3
ONE_HOT = np.eye(3, dtype=np.float32)[Y]


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((X, ONE_HOT), r"labels of shape \(6, 3\) and float32 given, .*: of one-hot rows, labels.argmax\(1\)"),
        ((X, Y[:, None]), r"labels of shape \(6, 1\) and int\d+ given, .*: labels\[:, 0\]"),
        ((X, Y.astype(np.float32)), r"labels of shape \(6,\) and float32 given, the number of its class"),
        ((X, Y, np.ones(6)), r"a tuple of 3 given, \(images, labels\) expected: weights of images are not taken"),
        ((X, Y + 1), "labels from 1 to 3 given, but none is 0"),
        ((X, Y * 2), "labels from 0 to 4 given, but none is 1"),
        ((X, Y[:5]), "6 images and 5 labels given"),
        (X, "data of ndarray given, a folder, arrays or an iterable"),
        (iter([(X, ONE_HOT)]), r"labels of shape \(6, 3\) and float32 given"),
        (iter([(X, Y, np.ones(6))]), r"a batch of 3 parts given, .* weights of images are not taken"),
        (iter([(X, Y[:5])]), r"images of shape \(6, 32, 32, 3\) and 5 labels given"),
        (iter([(X.astype(np.uint16) * 257, Y)]), r"images of uint16 from 0 to 65535 given, pixels from 0 to 255"),
        (
            iter([(X / np.float32(255), Y), (X.astype(np.float32), Y)]),
            r"images of float32 from .* 255 given, which Mob",
        ),
    ],
)
def test_labels_and_pixels(data, said):
    options = {"validation_split": 0.0, "phases": HEAD, "alpha": 0.35, "size": 32, "weights": None, "batch_size": 6}
    if not isinstance(data, (tuple, np.ndarray)):
        options |= {"classes": 3, "steps_per_epoch": 2}
    with pytest.raises(ValueError, match=said):
        fzoo.finetune(data, **options)


@pytest.mark.parametrize("mode", MODES)
def test_ranges(mode):
    """What preprocessing gives is taken, with what a resize may add; pixels are not, nor what another mode gives."""
    from fzoo.images.preprocessing import preprocess

    pixels = random_images((4, 16, 16, 3), pixels=True)
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    for kind in (np.asarray, jnp.asarray):
        right = preprocess(kind(pixels), mode)
        check_range(right, mode)
        check_range(1.04 * right, mode)
        check_range(kind(pixels.astype(np.uint8)), mode)
        check_range(right.astype(jnp.bfloat16), mode)
    wrong = {
        "torch": ["none", "caffe"],
        "clip": ["none", "caffe", "torch"],
        "tf": ["none", "caffe", "torch", "clip"],
        "unit": ["none", "caffe", "torch", "clip", "tf"],
    }
    for other in wrong.get(mode, [other for other in MODES if other not in ("caffe", "none")]):
        with pytest.raises(ValueError, match=r"^images of float32 from .* given, which MyNet takes from"):
            check_range(preprocess(pixels, other), mode, "MyNet")
    if mode in ("caffe", "none"):
        with pytest.raises(ValueError, match=r"^images of float32 from 0 to 1 given, which MyNet takes from"):
            check_range(pixels / np.float32(255), mode, "MyNet")
    check_range(np.zeros((1, 4, 4, 3), np.float32), mode)
    for bad, said in (
        (pixels.astype(np.int16) - 1, r"images of int16 from -1 to 254 given, pixels from 0 to 255 expected"),
        (pixels.astype(np.uint16) * 257, "images of uint16 from 0 to 65535 given"),
        (pixels > 100, "images of bool given"),
        (np.where(pixels == 255, np.nan, pixels), "finite numbers expected"),
    ):
        with pytest.raises(ValueError, match=said):
            check_range(bad, mode)


def test_pixels_without_preprocessing():
    """A network that is built without its own takes what the user preprocessed, and no pixels."""
    options = {"model": "MobileNetV3Small", "options": {"include_preprocessing": False}, "classes": 3}
    with pytest.raises(ValueError, match=r"images of uint8 from .* which MobileNetV3Small does not preprocess"):
        find((X, Y), **options)
    with pytest.raises(ValueError, match="include_preprocessing=False given"):
        find("photos", **options)
    find((X / np.float32(127.5) - 1, Y), **options)


# -- options -----------------------------------------------------------------------------------------------------------


def test_options_are_said_once():
    """The command line has `FinetuneConfig`'s names and defaults; config.json says all that decides a result."""
    from fzoo.cli.train import Training

    for field in dataclasses.fields(Training):
        assert field.default == getattr(FinetuneConfig, field.name)
    given = set(inspect.signature(fzoo.finetune).parameters)
    assert not (given - {"model", "options"}) & set(FIELDS)
    config = FinetuneConfig.of({"model": "MobileNet", "alpha": 0.5, "batch_size": 8})
    assert (config.options, config.batch_size, config.recipe().size) == ({"alpha": 0.5}, 8, (224, 224))
    decides = set(FIELDS) - {"workers", "max_broken", "checkpoint_every"}
    for name in decides - {"options", "dtype"}:
        assert name in config.settings() or hasattr(config.settings()["recipe"], name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batchsize": 8}, "unknown option 'batchsize': did you mean batch_size"),
        ({"classifier_activation": "sigmoid"}, "classifier_activation='sigmoid' given, 'softmax' expected"),
        ({"classifier_activation": None}, "classifier_activation=None given, 'softmax' expected"),
        ({"include_top": False}, "include_top=False given, a classifier is what is trained"),
        ({"input_shape": (64, 64, 3), "size": 32}, r"size=32 and input_shape=\(64, 64, 3\) given"),
        ({"resume": True}, "resume given, which goes with out="),
        ({"checkpoint_every": 3}, "checkpoint_every given, which goes with out="),
        ({"config": FinetuneConfig()}, "config and .* given, one of both"),
        ({"augment": True}, "augment=True given, which goes with a folder"),
        ({"accumulate": 7, "phases": (Phase(3), Phase(2))}, "accumulate=7 given, phase 2 has 6 batches in all"),
        ({"seed": -1}, "seed=-1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"validation_split": 0.9}, "validation_split=0.9 of the 2 images of class 0 leaves none to train on"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_that_cannot_be_honoured(options, said):
    usual = {"validation_split": 0.0, "batch_size": 2, "phases": HEAD, "weights": None}
    with pytest.raises(ValueError, match=said):
        fzoo.finetune((X, Y), "MobileNetV2", **{**usual, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": optax.adam(1e-2), "learning_rate": 1e-3}, "learning_rate=0.001 given beside an optimizer"),
        ({"optimizer": optax.adam(1e-2), "schedule": "cosine"}, "schedule='cosine' given beside an optimizer"),
        ({"optimizer": optax.adam(1e-2), "options": {"b1": 0.5}}, "options={'b1': 0.5} given beside an optimizer"),
        ({"schedule": optax.constant_schedule(1), "learning_rate": 0.1}, "learning_rate=0.1 given beside an schedule"),
        ({"trains": "head", "from_layer": "x"}, "trains='head' and from_layer='x' given, one of both"),
        ({"trains": "top", "pattern": "x*"}, r"trains='top' and pattern='x\*' given, one of both"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_phases_that_ignore(options, said):
    with pytest.raises(ValueError, match=said.replace("an schedule", "a.? schedule")):
        Phase(**options)


def test_rates_of_phases():
    assert Phase().learning_rate == 1e-3
    assert Phase(optimizer=optax.sgd(1)).learning_rate is None
    assert Phase(schedule=optax.constant_schedule(1)).learning_rate is None


def test_masks_that_train_nothing():
    module = fzoo.create("MobileNet", alpha=0.25, include_top=False)
    variables = fzoo.layers.trace(module).variables
    with pytest.raises(ValueError, match="from_layer='conv_pw_13_relu' given, which trains nothing"):
        fzoo.trainable_mask(variables, from_layer="conv_pw_13_relu", module=module)
    with pytest.raises(ValueError, match=r"from_layer='conv_pw_13', pattern='conv1\*' given, which trains nothing"):
        fzoo.trainable_mask(variables, from_layer="conv_pw_13", pattern="conv1*", module=module)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a backbone of three blocks, alive."""
    options = {name: value for name, value in TINY.items() if name != "size"}
    module, variables = alive_network("EfficientNetV2B0", **options, input_shape=(32, 32, 3), include_top=False)
    path = tmp_path_factory.mktemp("tiny") / "notop.h5"
    fzoo.save_keras_weights(module, variables, path)
    return path


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    ("model", "name", "options"),
    [
        ("ConvNeXtTiny", "drop_path_rate", {"depths": (1, 1, 1, 1), "projection_dims": (8, 8, 8, 8)}),
        ("EfficientNetV2B0", "drop_connect_rate", {"stages": (Stage(True, 1, 32, 2, 1),), "width_coefficient": 0.25}),
        ("EfficientNetB0", "drop_connect_rate", {"width_coefficient": 0.1, "depth_coefficient": 0.5}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_drops_in_training(model, name, options):
    """In the layers that train it does, by the option's rate; below them nothing does."""
    from fzoo.training.steps import flow

    module = fzoo.create(model, classes=3, head=fzoo.Head(), input_shape=(32, 32, 3), **{**options, name: 0.9})
    nodes = fzoo.layers.trace(module).nodes
    dropping = {node.name for node in nodes if node.config.get("rate")}
    assert dropping and flow(module, {node.name for node in nodes}).training == dropping
    assert not flow(module, {"predictions"}).training


@pytest.mark.slow
def test_stochastic_depth_of_convnext():
    """The rate makes a difference to what is trained."""
    options = {"depths": (1, 1, 1, 1), "projection_dims": (8, 8, 8, 8), "layer_scale_init_value": 0.5, "size": 32}
    options |= {"weights": None, "validation_split": 0.0, "batch_size": 6, "phases": (Phase(1, learning_rate=1e-2),)}
    never, often = (fzoo.finetune((X, Y), "ConvNeXtTiny", **options, drop_path_rate=rate) for rate in (0.0, 0.9))
    layer = "convnext_tiny_stage_2_block_0_pointwise_conv_1"
    assert not same(never.variables["params"][layer], often.variables["params"][layer])


def test_the_last_of_an_accumulation(weights):
    """Three batches, two to a step: the third makes a step of its own at the end of the phase."""
    batches = [(X[i : i + 2], Y[i : i + 2]) for i in (0, 2, 4)]
    phase = Phase(1, trains="head", optimizer="sgd", learning_rate=0.5)
    options = {**TINY, "weights": weights, "classes": 3, "phases": (phase,)}
    accumulated = fzoo.finetune(batches, "EfficientNetV2B0", **options, accumulate=2)
    two = fzoo.finetune([(X[:4], Y[:4]), *batches[2:]], "EfficientNetV2B0", **options)
    for a, b in zip(*(jax.tree.leaves(each.variables) for each in (accumulated, two)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [None, False], ids=["kept", "computed"])
@pytest.mark.parametrize("broken", ["all", "class"])
def test_images_that_are_all_broken(weights, tmp_path, broken, cache):
    """One pass, and it ends; also where all of a class are."""
    data = fill(tmp_path / "photos", "cats", "dogs")
    for path in data.rglob("*.png" if broken == "all" else "dogs/*.png"):
        path.write_bytes(b"no image")
    options = {**TINY, "weights": weights, "phases": HEAD, "validation_split": 0.0, "batch_size": 2}
    with pytest.raises(ValueError, match=r"^none of the 3 images of class (cats|dogs) can be read, e\.g\. .*png$"):
        fzoo.finetune(data, "EfficientNetV2B0", **options, cache_features=cache)


@pytest.mark.slow
def test_training_goes_on_from_a_run(weights, tmp_path):
    """By the folder or its file: network and recipe are the run's, its head is kept where the classes are the same."""
    data = fill(tmp_path / "photos", "cats", "dogs", "cows")
    slow = (Phase(1, trains="head", optimizer="sgd", learning_rate=1e-12),)
    options = {"phases": slow, "validation_split": 0.0, "batch_size": 2}
    size = {name: value for name, value in TINY.items() if name != "size"}
    out, head, said = tmp_path / "run", fzoo.Head(hidden=5), []
    first = fzoo.finetune(
        data, "EfficientNetV2B0", **{**options, "seed": 7}, **TINY, weights=weights, head=head, crop=None, out=out,
        report=said.append,
    )  # fmt: skip
    assert any(line.startswith(f"a new head starts: {weights} has none") for line in said)

    said.clear()
    again = fzoo.finetune(data, **options, weights=out, out=tmp_path / "again", report=said.append)
    assert f"the head of {out} is kept" in said
    for a, b in zip(*(jax.tree.leaves(each.variables) for each in (first, again)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["model"] == "EfficientNetV2B0" and config["head"]["hidden"] == 5
    assert config["recipe"]["crop"] is None and config["recipe"]["size"] == [32, 32]
    run = fzoo.load_run(tmp_path / "again")
    assert run.recipe == fzoo.load_run(out).recipe and run.module == first.module

    said.clear()
    file = out / "model.h5"
    fzoo.finetune(data, "EfficientNetV2B0", **options, **size, size=32, weights=file, head=head, report=said.append)
    assert f"the head of {file} is kept" in said

    (data / "cows").rename(data / "hens")
    said.clear()
    other = fzoo.finetune(data, **options, weights=out, report=said.append)
    (line,) = [line for line in said if line.startswith(f"a new head starts: {out} has Head(")]
    assert line.endswith("for the classes cats, cows, dogs")
    params = [each.variables["params"] for each in (first, other)]
    assert not np.allclose(*(each["predictions"]["kernel"] for each in params))
    assert same(*(each["stem_conv"] for each in params))
    with pytest.raises(ValueError, match="MobileNet with other options than the run"):
        fzoo.finetune(data, "MobileNet", **options, weights=out)
    with pytest.raises(ValueError, match="EfficientNetV2B0 with other options"):
        fzoo.finetune(data, **options, weights=out, width_coefficient=0.5)
    (out / "model.h5").unlink()
    with pytest.raises(ValueError, match="has not finished"):
        fzoo.finetune(data, **options, weights=out)


def test_an_older_configuration(weights, tmp_path):
    """A run that an older fzoo wrote is loaded as it was trained, and resumed where nothing that it says differs."""
    data = fill(tmp_path / "photos", "cats", "dogs")
    options = {**TINY, "weights": weights, "phases": HEAD, "validation_split": 0.0, "batch_size": 2}
    plain = {"exif": False, "background": None, "clip": True}
    fzoo.finetune(data, "EfficientNetV2B0", **options, **plain, out=tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["validation_split"]
    for name in plain:
        del config["recipe"][name]
    path.write_text(json.dumps(config))
    assert not fzoo.load_run(tmp_path / "run").recipe.exif
    fzoo.finetune(data, "EfficientNetV2B0", **options, **plain, out=tmp_path / "run", resume=True)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"run of other settings: recipe\.exif false, not true"):
        fzoo.finetune(data, "EfficientNetV2B0", **options, out=tmp_path / "run", resume=True)


def test_names_in_files_of_a_run(weights, tmp_path):
    """What has a comma or a quotation mark in its name is one cell."""
    import csv

    names = ['a "b"', "c, d"]
    data = fill(tmp_path / "photos", *names)
    options = {**TINY, "weights": weights, "phases": HEAD, "validation_split": 0.4, "batch_size": 2}
    fzoo.finetune(data, "EfficientNetV2B0", **options, out=tmp_path / "run")
    with (tmp_path / "run" / "confusion.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == [row[0] for row in rows] == names and {len(row) for row in rows} == {3}
    assert (tmp_path / "run" / "classes.txt").read_text().splitlines() == names
