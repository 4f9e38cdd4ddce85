"""What files say of their networks: fzoo's in words, Keras's by their layers."""

import json
import subprocess
import sys
import zipfile

import h5py
import jax
import keras
import numpy as np
import pytest
from networks import network, small_options
from reference import assert_equal, build, save_weights_only, small_keras_model
from tiers import slow, slow_but

import fzoo
from fzoo.convert import convert
from fzoo.weights import WeightsMismatch, read_description
from fzoo.weights.description import describe
from fzoo.weights.files import KEY

ENDINGS = (".h5", ".weights.h5", ".keras", ".safetensors", ".orbax")

EFFICIENTNET = {**small_options("EfficientNetB0"), "divide_by_std": True, "classifier_activation": "sigmoid"}

#: Networks whose options show in no array.
TOLD = {
    "EfficientNetB0": EFFICIENTNET,
    "ConvNeXtTiny": {**small_options("ConvNeXtTiny"), "include_preprocessing": False, "head": fzoo.Head("max", 8, 0.5)},
    "ResNet50": {"blocks": (1, 1, 1, 1), "include_top": False, "pooling": "max", "input_shape": (32, 40, 3)},
}

#: Another, of a network that is larger.
MOBILENET = {
    "include_preprocessing": False,
    "alpha": 0.5,
    "input_shape": (32, 40, 3),
    "classes": 3,
    "head": fzoo.Head("max", 8, 0.5),
}


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """A small EfficientNet that divides by the deviation, and its files by their endings."""
    module, variables = network("EfficientNetB0", **EFFICIENTNET)
    folder = tmp_path_factory.mktemp("divided")
    files = {ending: folder / f"w{ending}" for ending in ENDINGS}
    for path in files.values():
        fzoo.save_variables(module, variables, path)
    return module, variables, files


def random(name, **options):
    return fzoo.load(name, weights=None, **options)


@pytest.mark.parametrize("name", slow_but(TOLD, "ResNet50"))
def test_files_carry_their_network(name, tmp_path):
    module, variables = random(name, **TOLD[name])
    for ending in ENDINGS:
        path = tmp_path / f"w{ending}"
        fzoo.save_variables(module, variables, path)
        for found, loaded in (fzoo.load(name, weights=path), fzoo.load(weights=path)):
            assert found == module and hash(found) == hash(module)  # so it compiles once
            assert_equal(loaded, variables)
            assert not any(leaf.committed for leaf in jax.tree.leaves(loaded))
    (fit,) = fzoo.inspect_weights(tmp_path / "w.h5").fits
    usual = fzoo.create(name)
    assert fit.model == name
    assert fit.options == {k: v for k, v in TOLD[name].items() if v != getattr(usual, k)}  # in any order
    assert fzoo.create(name, **fit.options) == module
    assert convert(tmp_path / "w.orbax", tmp_path / "again.safetensors") == module
    assert fzoo.load(weights=tmp_path / "again.safetensors")[0] == module


@pytest.mark.parametrize("ending", slow_but(ENDINGS, ".h5", ".orbax"))
def test_an_option_that_makes_it_another_network(divided, ending):
    module, _, files = divided
    path = files[ending]
    for option, value, told in (
        ("divide_by_std", False, "divide_by_std=True"),
        ("classifier_activation", "softmax", "classifier_activation='sigmoid'"),
        ("classes", 6, "classes=7"),
        ("head", fzoo.Head(), "head=None"),
        ("width_coefficient", 0.31, "width_coefficient=0.3"),
        ("input_shape", (32, 32, 1), r"input_shape=\(32, 32, 3\)"),
    ):
        with pytest.raises(WeightsMismatch, match=rf"w{ending} is of EfficientNet with {told}, .* would do") as error:
            fzoo.load("EfficientNetB0", weights=path, **{option: value})
        assert "\n" not in str(error.value) and str(error.value).count(str(path)) == 1
    with pytest.raises(WeightsMismatch, match="divide_by_std=True, divide_by_std=False given"):
        fzoo.load_variables(module.clone(divide_by_std=False), path)
    for name in ("MobileNet", "EfficientNetV2B0"):
        with pytest.raises(WeightsMismatch, match=f"w{ending} is of EfficientNetB0, not of {name}"):
            fzoo.load(name, weights=path)


@pytest.mark.parametrize("ending", slow_but(ENDINGS, ".h5", ".orbax"))
def test_an_option_that_does_not(divided, ending):
    """Of training, of the size, of the computation; or an end that is left out."""
    module, variables, files = divided
    options = {"dropout_rate": 0.5, "drop_connect_rate": 0.0, "dtype": jax.numpy.bfloat16, "input_shape": None}
    options |= {"classifier_activation": None, "divide_by_std": True}
    found, loaded = fzoo.load("EfficientNetB0", weights=files[ending], **options)
    assert found == module.clone(**options)
    assert_equal(loaded, variables)
    found, loaded = fzoo.load(weights=files[ending], include_top=False, pooling="avg", input_shape=(64, 48, 3))
    assert found == fzoo.create(
        "EfficientNetB0",
        include_top=False,
        pooling="avg",
        input_shape=(64, 48, 3),
        **{k: v for k, v in EFFICIENTNET.items() if k not in ("classes", "input_shape", "classifier_activation")},
    )
    below = {**variables, "params": {k: v for k, v in variables["params"].items() if k != "predictions"}}
    assert_equal(loaded, below)


@pytest.mark.parametrize("ending", (".safetensors", ".orbax"))
def test_the_top_is_left_out_by_its_place(ending, tmp_path):
    """ConvNeXt's last LayerNorm has another name with the top."""
    module, variables = random("ConvNeXtTiny", **small_options("ConvNeXtTiny"))
    fzoo.save_variables(module, variables, tmp_path / f"w{ending}")
    fzoo.save_variables(module, variables, tmp_path / "w.h5")
    by_name = fzoo.load(weights=tmp_path / f"w{ending}", include_top=False)
    assert "layer_normalization" in by_name[1]["params"]
    assert_equal(by_name[1], fzoo.load(weights=tmp_path / "w.h5", include_top=False)[1])


def test_a_model_of_a_family(tmp_path):
    """B0 and B1 have arrays of the same shapes, but not as many."""
    path = tmp_path / "w.h5"
    module, variables = random("EfficientNetB0", input_shape=(32, 32, 3), dropout_rate=0.5)
    fzoo.save_variables(module, variables, path)
    assert fzoo.load(weights=path)[0] == module and fzoo.inspect_weights(path).fits[0].model == "EfficientNetB0"
    with pytest.raises(WeightsMismatch, match="is of EfficientNetB0, not of EfficientNetB1"):
        fzoo.load("EfficientNetB1", weights=path)


@pytest.mark.parametrize("ending", [".h5", ".safetensors"])
def test_an_activation_of_ones_own(ending, tmp_path):
    """One that Keras knows is stored by its name; another is asked for, and no address is in the file."""
    options = {"alpha": 0.25, "classes": 3, "input_shape": (32, 32, 3)}
    path = tmp_path / f"w{ending}"
    module, variables = random("MobileNet", classifier_activation=jax.nn.sigmoid, **options)
    fzoo.save_variables(module, variables, path)
    assert fzoo.load(weights=path)[0].classifier_activation == "sigmoid"
    assert fzoo.load(weights=path, classifier_activation=jax.nn.sigmoid)[0] == module

    def mine(x):
        return x / 2

    module = module.clone(classifier_activation=mine)
    assert "0x" not in describe(module)
    fzoo.save_variables(module, variables, path)
    with pytest.raises(WeightsMismatch, match="ends in a function that no file can hold: classifier_activation="):
        fzoo.load(weights=path)
    assert fzoo.load(weights=path, classifier_activation=mine)[0] == module
    assert not fzoo.load(weights=path, include_top=False)[0].include_top


def test_a_description_is_the_same_in_every_process():
    module = fzoo.create("MobileNetV3Small", **MOBILENET, dtype=jax.numpy.bfloat16)
    script = """
import fzoo, jax
from fzoo.weights.description import describe
options = {"include_preprocessing": False, "alpha": 0.5, "input_shape": [32, 40, 3], "classes": 3}
print(describe(fzoo.create("MobileNetV3Small", **options, head=fzoo.Head("max", 8, 0.5), dtype="bfloat16")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == describe(module)
    told = json.loads(describe(module))
    assert told["format"] == 1 and told["family"] == "MobileNetV3" and told["options"]["dtype"] == "bfloat16"


def damaged():
    """Descriptions with something wrong, and what is said of each."""
    good = json.loads(describe(fzoo.create("ResNet50", blocks=(1, 1, 1, 1), include_top=False)))

    def changed(**options):
        return json.dumps({**good, "options": {**good["options"], **options}})

    return {
        "{": "damaged: no JSON",
        "[" * 9999: "damaged: no JSON",
        "[]": "damaged: no format",
        '{"format": 3}': "format 3: a later fzoo",
        '{"format": 1}': "damaged: family, options or unsaid",
        json.dumps({**good, "family": "Nothing"}): "'Nothing', which is none of fzoo's families",
        json.dumps({**good, "unsaid": ["x"]}): "'x' of its ResNet, which has no such option",
        changed(alpha=1): "'alpha' of its ResNet, which has no such option",
        changed(prepared=[]): "'prepared' of its ResNet",
        changed(dtype="nothing"): "damaged",
        changed(dtype="int8"): "damaged",
        changed(head={"layers": 3}): "damaged",
        changed(blocks={}): "blocks={} given",
        changed(blocks=[1, 1, 1, 10**7]): "no such network can be made: a network has 4,096 layers at the most",
        changed(input_shape=[1, 1, 3]): "input_shape=",
        changed(classes=10**400): "can't be: classes=|missing",
        changed(include_top=True, classes=10**30): "missing|does not fit|too large|has no top",
    }


#: Of the damaged ones, that of which a network of thousands of layers is begun.
LONG = next(i for i, text in enumerate(damaged()) if str(10**7) in text)


@pytest.mark.wrong_types
@pytest.mark.parametrize("number", [slow(i) if i == LONG else i for i in range(len(damaged()))])
def test_a_damaged_description(number, tmp_path):
    text, message = list(damaged().items())[number]
    module, variables = random("ResNet50", blocks=(1, 1, 1, 1), include_top=False)
    fzoo.save_variables(module, variables, tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        file.attrs[KEY] = np.bytes_(text)
    with pytest.raises(ValueError, match=message) as error:
        fzoo.load(weights=tmp_path / "w.h5")
    assert "\n" not in str(error.value) and "w.h5" in str(error.value) and len(str(error.value)) < 2000


@pytest.mark.parametrize("value", [np.ones(3), "text of variable length", np.bytes_(b"x" * 65000)[:64000]])
def test_a_description_that_is_no_text(value, tmp_path):
    module, variables = random("ResNet50", blocks=(1, 1, 1, 1), include_top=False)
    fzoo.save_variables(module, variables, tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        file.attrs[KEY] = value
    with pytest.raises(ValueError, match=r"w\.h5.*(damaged|no JSON)"):
        read_description(tmp_path / "w.h5")


# -- Keras's files: what their layers show ----------------------------------------------------------------------------


def keras_files(model, folder):
    """The three layouts, the legacy one as weights and as a whole model."""
    folder.mkdir()
    model.save_weights(folder / "w.weights.h5")
    model.save(folder / "w.keras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("absl.logging.warning", lambda *args: None)  # that this is a legacy format
        model.save(folder / "whole.h5")
    save_weights_only(model, folder / "w.h5")
    return sorted(folder.iterdir())


def divided_keras_model(options):
    """What Keras makes of "imagenet": a second Rescaling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keras.src.utils.file_utils.get_file", lambda *args, **kwargs: "")
        patch.setattr(keras.Model, "load_weights", lambda *args, **kwargs: None)
        constructor = keras.src.applications.efficientnet.EfficientNet
        keras.utils.clear_session(free_memory=False)
        return constructor(weights="imagenet", default_size=224, weights_name="b0", **options)


@pytest.mark.slow
def test_keras_shows_the_division_by_a_layer(tmp_path):
    options = {"width_coefficient": 0.3, "depth_coefficient": 0.3, "include_top": False, "input_shape": (32, 32, 3)}
    model = divided_keras_model(options)
    assert [layer.name for layer in model.layers][1:4] == ["rescaling", "normalization", "rescaling_1"]
    plain = build(
        keras.src.applications.efficientnet.EfficientNet, fresh=False, default_size=224, name="plain", **options
    )
    for kind, theirs, expected in (("divided", model, True), ("plain", plain, False)):
        for path in keras_files(theirs, tmp_path / kind):
            assert fzoo.load("EfficientNetB0", weights=path, **options)[0].divide_by_std is expected, path
            fzoo.load("EfficientNetB0", weights=path, divide_by_std=expected, **options)
            with pytest.raises(ValueError, match=rf"{path.name}: .*show .*divide_by_std={expected}"):
                fzoo.load("EfficientNetB0", weights=path, divide_by_std=not expected, **options)
            if expected:
                with pytest.warns(UserWarning, match="has 1 rescaling layer more than this EfficientNet"):
                    fzoo.load_keras_weights(fzoo.create("EfficientNetB0", **options), path)


@pytest.mark.slow
def test_inspect_tells_what_layers_show(tmp_path):
    model = divided_keras_model(
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "include_top": False, "input_shape": (32, 32, 3)}
    )
    for path in keras_files(model, tmp_path / "files"):
        (fit,) = fzoo.inspect_weights(path).fits
        assert (fit.model, fit.options) == ("EfficientNetB0", {"include_top": False, "divide_by_std": True})
        convert(path, tmp_path / "w.safetensors")
        assert fzoo.load(weights=tmp_path / "w.safetensors")[0].divide_by_std


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ConvNeXtTiny", "EfficientNetV2B0", "MobileNetV3Small"])
def test_keras_shows_a_preprocessing_that_is_left_out(name, tmp_path):
    options = small_options(name)
    for included in (True, False):
        model = small_keras_model(name, {**options, "include_preprocessing": included})
        for path in keras_files(model, tmp_path / str(included)):
            module, _ = fzoo.load(name, weights=path, **options)
            assert module.include_preprocessing is included, path
            with pytest.raises(ValueError, match=f"include_preprocessing={included}: leave the option out"):
                fzoo.load(name, weights=path, include_preprocessing=not included, **options)


@pytest.mark.slow
def test_a_model_in_a_model(tmp_path):
    """Where layers without arrays are not listed, nothing tells; where they are, the rest's are told."""
    options = {"width_coefficient": 0.3, "depth_coefficient": 0.3, "include_top": False, "input_shape": (32, 32, 3)}
    backbone = divided_keras_model(options)
    images = keras.Input((32, 32, 3))
    x = backbone(keras.layers.Rescaling(2.0)(images))
    model = keras.Model(images, keras.layers.Dense(2, name="own")(keras.layers.GlobalAveragePooling2D()(x)))
    model.save_weights(tmp_path / "w.weights.h5")
    save_weights_only(model, tmp_path / "w.h5")
    with pytest.warns(UserWarning, match="left out: own.*rescaling"):
        assert fzoo.load("EfficientNetB0", weights=tmp_path / "w.weights.h5", **options)[0].divide_by_std
    with pytest.raises(ValueError, match=r"w\.h5 does not list .*: give divide_by_std=True if Keras's own weights"):
        fzoo.load("EfficientNetB0", weights=tmp_path / "w.h5", **options)
    with pytest.warns(UserWarning, match="left out: own"):
        assert fzoo.load("EfficientNetB0", weights=tmp_path / "w.h5", divide_by_std=True, **options)[0].divide_by_std


def test_a_rescaling_in_front_of_a_network_that_has_none(tmp_path):
    options = {"alpha": 0.25, "input_shape": (32, 32, 3), "include_top": False}
    backbone = build(keras.applications.MobileNet, **options)
    images = keras.Input((32, 32, 3))
    x = keras.layers.Rescaling(1 / 127.5, -1)(images)
    for layer in backbone.layers[1:]:
        x = layer(x)
    keras.Model(images, x).save_weights(tmp_path / "w.weights.h5")
    with pytest.warns(UserWarning, match="has 1 rescaling layer more than this MobileNet, left out: pixels"):
        fzoo.load("MobileNet", weights=tmp_path / "w.weights.h5", **options)


# -- scalars, folders, names -------------------------------------------------------------------------------------------


def test_scalars_in_safetensors(divided):
    """EfficientNet's count of images; what fzoo wrote as (1,) is read, too."""
    from safetensors.numpy import load_file, save_file

    module, _, files = divided
    path = files[".safetensors"]
    arrays = load_file(path)
    assert arrays["batch_stats.normalization.count"].shape == ()
    old = path.with_name("old.safetensors")
    save_file({**arrays, "batch_stats.normalization.count": np.int32([5])}, old)
    loaded = fzoo.load_variables(module, old)
    assert loaded["batch_stats"]["normalization"]["count"].shape == ()
    assert int(loaded["batch_stats"]["normalization"]["count"]) == 5


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a fine-tuning, as far as weights are concerned."""
    head = fzoo.Head(hidden=4)
    module, variables = random("MobileNet", alpha=0.25, input_shape=(32, 32, 3), classes=3, head=head)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    fzoo.save_keras_weights(module, variables, folder / "model.h5")
    return module, variables, folder


@pytest.mark.slow
def test_a_run_is_taken_wherever_weights_are(run_folder, tmp_path, command_line):
    module, variables, folder = run_folder
    for found, loaded in (fzoo.load("MobileNet", weights=folder), fzoo.load(weights=str(folder))):
        assert found == module
        assert_equal(loaded, variables)
    assert_equal(fzoo.load_variables(module, folder), variables)
    assert_equal(fzoo.load_keras_weights(module, folder), variables)
    with pytest.raises(WeightsMismatch, match="is of MobileNet, not of MobileNetV2"):
        fzoo.load("MobileNetV2", weights=folder)
    backbone, _ = fzoo.load("MobileNet", weights=folder, include_top=False)
    assert backbone.head is None and not backbone.include_top
    assert fzoo.inspect_weights(folder).fits[0].options["head"] == fzoo.Head(hidden=4)
    assert command_line("convert", folder, tmp_path / "w.keras") == (0, [str(tmp_path / "w.keras")], [])
    assert fzoo.load(weights=tmp_path / "w.keras")[0] == module
    code, lines, errors = command_line("export", "MobileNet", tmp_path / "r.stablehlo", "-w", folder / "model.h5")
    assert (code, errors) == (0, []), errors
    (line,) = lines
    assert code == 0 and not errors and "float32[batch,32,32,3]\tfloat32[batch,3]" in line
    code, lines, errors = command_line("export", "VGG16", tmp_path / "r.stablehlo", "-w", folder / "model.h5")
    assert code == 2 and not lines and "is of MobileNet, not of VGG16" in errors[0] and len(errors) == 1
    (folder / "model.h5").unlink()
    with pytest.raises(ValueError, match=r"has not finished: .*--resume"):
        fzoo.load("MobileNet", weights=folder)


def test_the_command_line_takes_what_is_left_out_from_the_file(run_folder, tmp_path, command_line):
    from PIL import Image

    module, variables, _ = run_folder
    fzoo.save_variables(module, variables, tmp_path / "w.safetensors")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "x.png")
    arguments = ("classify", tmp_path / "x.png", "-m", "MobileNet", "-w", tmp_path / "w.safetensors", "--top", "3")
    code, lines, errors = command_line(*arguments)
    assert (code, len(lines), errors) == (0, 3, [])
    code, lines, errors = command_line(*arguments, "--classes", "1000")
    assert code == 2 and not lines and "classes=3, classes=1000 given" in errors[0]


def test_names_that_look_alike(tmp_path):
    """macOS's tools write the second; the message tells them apart."""
    composed, decomposed = "caf\u00e9.h5", "cafe\u0301.h5"
    (tmp_path / composed).touch()
    for ending in ("", ".safetensors"):
        if ending:
            (tmp_path / (composed + ending)).touch()
        with pytest.raises(FileNotFoundError, match=r"there is 'caf\\xe9\.h5.*looks like 'cafe\\u0301\.h5"):
            fzoo.load("MobileNet", weights=tmp_path / (decomposed + ending))
    (tmp_path / "u\u0308").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is 'u\\u0308'"):
        fzoo.load("MobileNet", weights=tmp_path / "\u00fc" / "w.h5")
    with pytest.raises(FileNotFoundError, match=r"no such weights file: \S+/other\.h5$"):
        fzoo.load("MobileNet", weights=tmp_path / "other.h5")


def test_spaces_of_a_name_stay(tmp_path, command_line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "my  file\u00a0of\u202fweights.h5"
    (tmp_path / name).write_text("no weights")
    code, _, errors = command_line("convert", name, "--dry-run")
    assert code == 2 and len(errors) == 1 and f"{name} is not a readable" in errors[0]
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("x", "")
    code, _, errors = command_line("convert", "a.keras", "--dry-run")
    assert code == 2 and len(errors) == 1 and "a.keras is not a readable Keras weights file: the archive" in errors[0]


def test_a_directory_in_place_of_a_file(tmp_path):
    for name in ("w.h5", "w.safetensors", "folder"):
        (tmp_path / name).mkdir()
        with pytest.raises(IsADirectoryError, match=rf"{tmp_path}/{name} is a directory, a"):
            fzoo.load("MobileNet", weights=tmp_path / name)
    with pytest.raises(IsADirectoryError, match=r"w\.h5 is a directory, the name of a file expected"):
        fzoo.save_variables(*random("MobileNet", alpha=0.25), tmp_path / "w.h5")


def test_a_description_from_before_an_option(tmp_path):
    """What it lacks was as the default is: Keras's VGG16, whose arrays are those of PyTorch's, too."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    small = {"classes": 3, "input_shape": (32, 32, 3)}
    module, variables = random("VGG16", **small)
    fzoo.save_variables(module, variables, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    described = json.loads(metadata[KEY])
    for option in ("tag", "preprocessing", "batch_norm"):
        del described["options"][option]
    save_file(arrays, tmp_path / "w.safetensors", {**metadata, KEY: json.dumps(described)})
    assert fzoo.load(weights=tmp_path / "w.safetensors")[0] == module
    with pytest.raises(ValueError, match=r"with preprocessing=None, preprocessing='torch' given"):
        fzoo.load_variables(fzoo.create("VGG16.tv_in1k", **small), tmp_path / "w.safetensors")
