"""A whole model of Keras's, loaded by the name of a model: it is that network, or an error says where it is not."""

import json
import re
import warnings
import zipfile

import keras
import numpy as np
import pytest
from networks import assert_alive
from reference import build, keras_model, random_images
from tiers import slow

import fzoo
from fzoo.layers.computation import computation_of

layers = keras.layers
OPTIONS = {"alpha": 0.25, "input_shape": (32, 32, 3), "classes": 4}


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """The file of a small MobileNet, and what it gives for `images()`."""
    path = tmp_path_factory.mktemp("mobilenet") / "m.keras"
    model = keras_model("MobileNet", **OPTIONS)
    model.save(path)
    return path, np.asarray(model(images(), training=False))


def images() -> np.ndarray:
    return random_images((3, 32, 32, 3))


def edited(path, target, change):
    """A copy of a `.keras` file, in whose configuration the layers, by name, are changed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                whole = json.loads(content)
                change({entry["name"]: entry["config"] for entry in whole["config"]["layers"]}, whole["config"])
                content = json.dumps(whole).encode()
            new.writestr(name, content)
    return target


@pytest.mark.slow
def test_options_are_the_files(mobilenet):
    """Size, classes and alpha; what the caller says comes first."""
    path, expected = mobilenet
    module, variables = fzoo.load("MobileNet", weights=path)
    assert module == fzoo.create("MobileNet", **OPTIONS)
    assert_alive(expected)
    np.testing.assert_allclose(fzoo.predict(module, variables, images()), expected, atol=1e-5)
    other, _ = fzoo.load("MobileNet", weights=path, input_shape=(64, 64, 3))
    assert other.input_shape == (64, 64, 3) and other.alpha == 0.25
    logits, _ = fzoo.load("MobileNet", weights=path, classifier_activation=None)
    assert logits.classifier_activation is None
    bottom, _ = fzoo.load("MobileNet", weights=path, include_top=False, pooling="max", input_shape=(48, 64, 3))
    assert bottom.pooling == "max" and not bottom.include_top
    with pytest.raises(ValueError, match="does not fit this MobileNet"):
        fzoo.load("MobileNet", weights=path, alpha=0.5)


def set_option(layer, **options):
    def change(entries, config):
        assert options.keys() <= entries[layer].keys()
        entries[layer].update(options)

    return change


def swap_order(entries, config):
    """ReLU before BN, in the first block."""
    nodes = {entry["name"]: entry["inbound_nodes"] for entry in config["layers"]}
    for layer, fed_by in (("conv1_relu", "conv1"), ("conv1_bn", "conv1_relu"), ("conv_dw_1", "conv1_bn")):
        nodes[layer][0]["args"][0]["config"]["keras_history"][0] = fed_by


def without_six(entries, config):
    """No ReLU has a limit."""
    for name, entry in entries.items():
        if name.endswith("_relu"):
            entry["max_value"] = None


SIDE = r"conv_pad_2 \(ZeroPadding2D\) .*padding=\(\(1, 0\), \(1, 0\)\), \(\(0, 1\), \(0, 1\)\) wanted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_option("conv1_bn", epsilon=1e-5), r"conv1_bn \(BatchNormalization\) .*epsilon=1e-05, 0.001 wanted"),
        slow(without_six, r"conv1_relu \(ReLU\) .*max_value=None, 6 wanted"),
        slow(set_option("conv_pad_2", padding=[[1, 0], [1, 0]]), SIDE),
        slow(set_option("conv_pw_3", activation="relu"), r"conv_pw_3 \(Conv2D\) .*activation='relu', 'linear' wanted"),
        slow(swap_order, "conv1_relu is a ReLU, conv1_bn a BatchNormalization"),
    ],
    ids=["epsilon", "no six", "side of padding", "activation", "order"],
)
def test_another_network_is_told(mobilenet, tmp_path, change, message):
    """With the same arrays; the file runs as it is."""
    path = edited(mobilenet[0], tmp_path / "m.keras", change)
    theirs = np.asarray(keras.models.load_model(path)(images(), training=False))
    assert not np.allclose(theirs, mobilenet[1], atol=1e-5)
    with pytest.raises(ValueError, match=message) as error:
        fzoo.load("MobileNet", weights=path)
    assert "is not MobileNet as it is known" in str(error.value) and "fzoo.load_model(path) runs" in str(error.value)
    assert "\n" not in str(error.value)
    report = fzoo.inspect_weights(path)
    assert [fit.model for fit in report.fits] == ["MobileNet"] and re.search(message, report.fits[0].difference)
    assert report.calls == (f"fzoo.load_model({str(path)!r})",)
    assert f"has the arrays of {report.fits[0]}, but its layer" in str(report)
    np.testing.assert_allclose(fzoo.predict(*fzoo.load_model(path), images()), theirs, atol=1e-5)


def test_padding_of_its_own_is_the_same(mobilenet, tmp_path):
    """A layer that pads and a convolution that does not, as Keras has it now, or a convolution that does both."""

    def change(entries, config):
        entries["conv_pad_2"]["padding"] = [[0, 0], [0, 0]]
        entries["conv_dw_2"]["padding"] = "same"

    module, variables = fzoo.load("MobileNet", weights=edited(mobilenet[0], tmp_path / "m.keras", change))
    np.testing.assert_allclose(fzoo.predict(module, variables, images()), mobilenet[1], atol=1e-5)


@pytest.mark.slow
def test_a_dilation_of_one_pixel_is_nothing(mobilenet, tmp_path):
    """Of a 1x1 kernel; of a 3x3 it is another network."""
    path = edited(mobilenet[0], tmp_path / "m.keras", set_option("conv_pw_3", dilation_rate=[2, 2]))
    module, variables = fzoo.load("MobileNet", weights=path)
    np.testing.assert_allclose(fzoo.predict(module, variables, images()), mobilenet[1], atol=1e-5)
    edited(mobilenet[0], path, set_option("conv_dw_1", dilation_rate=[2, 2]))
    with pytest.raises(ValueError, match=r"conv_dw_1 \(DepthwiseConv2D\)"):
        fzoo.load("MobileNet", weights=path)


@pytest.mark.slow
def test_a_head_with_another_pooling(tmp_path):
    """Of as many arrays as the family's own top."""
    base = build(keras.applications.MobileNetV2, weights=None, include_top=False, input_shape=(32, 32, 3), alpha=0.35)
    for pool, right in ((layers.GlobalAveragePooling2D, True), (layers.GlobalMaxPooling2D, False)):
        model = keras.Model(base.input, layers.Dense(5, activation="softmax")(layers.Dropout(0.2)(pool()(base.output))))
        model.save(tmp_path / "m.keras")
        if right:
            assert fzoo.load("MobileNetV2", weights=tmp_path / "m.keras")[0].classes == 5
            continue
        with pytest.raises(ValueError, match="is a GlobalMaxPooling2D, global_average_pooling2d a GlobalAverage"):
            fzoo.load("MobileNetV2", weights=tmp_path / "m.keras")
        fzoo.load("MobileNetV2", weights=tmp_path / "m.keras", include_top=False)  # which is as it should be


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_a_network_inside_is_compared(tmp_path, ending):
    """What is done before it is left out, and said."""
    options = {"include_top": False, "alpha": 0.25}
    base = build(keras.applications.MobileNet, input_shape=(48, 48, 3), **options)
    image = layers.Input((64, 64, 3))
    for wrong in (False, True):
        if wrong:
            base.get_layer("conv1_bn").epsilon = 0.1
        x = base(layers.Rescaling(1 / 127.5, -1)(layers.Resizing(48, 48)(image)))
        model = keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
        path = tmp_path / f"m{ending}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras's, of its legacy format
            model.save(path)
        with pytest.warns(UserWarning) as warned:
            if wrong:
                with pytest.raises(ValueError, match=r"conv1_bn .*epsilon=0.1, 0.001 wanted"):
                    fzoo.load("MobileNet", weights=path, **options)
            else:
                fzoo.load("MobileNet", weights=path, **options)
        said = [str(one.message) for one in warned]
        assert any(re.search(r"was loaded; left out: \S*dense", one) for one in said)
        assert wrong or any("resizing before the network left out" in one for one in said)


@pytest.mark.parametrize(
    ("hidden", "ending"), [(7, ".keras"), slow(7, ".weights.h5"), slow(None, ".keras"), slow(None, ".weights.h5")]
)
def test_a_head_around_a_backbone(tmp_path, ending, hidden):
    """As Keras's guide makes it: both are loaded, and the end is the file's."""
    options = {"alpha": 0.25, "input_shape": (32, 32, 3)}
    base = keras_model("MobileNet", include_top=False, **options)
    image = layers.Input((32, 32, 3))
    x = layers.GlobalAveragePooling2D()(base(image))
    x = layers.Dense(hidden, activation="relu")(x) if hidden else x
    model = keras.Model(image, layers.Dense(4, activation="sigmoid")(layers.Dropout(0.2)(x)))
    pooled = np.asarray(keras.Model(image, model.layers[2].output)(images(), training=False))
    first, *others = [layer for layer in model.layers if isinstance(layer, layers.Dense)]
    kernel = np.random.default_rng(1).normal(0, 1 / np.ptp(pooled, axis=0).mean() / 16, first.kernel.shape)
    first.set_weights([kernel, 0.1 - pooled.mean(0) @ kernel])  # what all images have in common is taken away
    for layer in others:
        layer.set_weights([np.random.default_rng(2).normal(size=weight.shape) for weight in layer.weights])
    expected = np.asarray(model(images(), training=False))
    assert_alive(expected)
    path = tmp_path / f"m{ending}"
    model.save_weights(path) if ending == ".weights.h5" else model.save(path)
    options["head"] = fzoo.Head(hidden=hidden)
    if ending == ".weights.h5":
        options |= {"classes": 4, "classifier_activation": "sigmoid"}
    module, variables = fzoo.load("MobileNet", weights=path, **options)
    assert (module.classes, module.classifier_activation) == (4, "sigmoid")
    np.testing.assert_allclose(fzoo.predict(module, variables, images()), expected, atol=1e-5)
    if ending == ".keras":
        with pytest.raises(ValueError, match="ends in sigmoid, classifier_activation='softmax' given"):
            fzoo.load("MobileNet", weights=path, classifier_activation="softmax", **options)


def test_what_can_not_be_compared_is_said(mobilenet, tmp_path):
    """A layer that runs code of the file's."""

    def change(entries, config):
        entry = next(entry for entry in config["layers"] if entry["name"] == "dropout")
        entry["class_name"], entry["config"] = "Lambda", {"name": "dropout", "function": "?"}

    path = edited(mobilenet[0], tmp_path / "m.keras", change)
    with pytest.warns(UserWarning, match="whether its model is MobileNet can't be told: .*Lambda"):
        module, variables = fzoo.load("MobileNet", weights=path, input_shape=(32, 32, 3))
    np.testing.assert_allclose(fzoo.predict(module, variables, images()), mobilenet[1], atol=1e-5)


def test_digests_tell_arrays_apart():
    """The same computation of other arrays is another."""
    module = fzoo.create("MobileNet", **OPTIONS)
    computation = computation_of(module)
    names = {path: "/".join(path) for path in computation.variables}
    plain = computation.digests(names)
    first = ("params", "conv_dw_1", "kernel")
    other = computation.digests({**names, first: "another"})
    order = fzoo.layer_names(module)
    differ = [name for name in order if plain[name] != other[name]]
    assert differ == order[order.index("conv_dw_1") :]
    assert len(set(plain.values())) == len(order) - 1  # the dropout is nothing
    assert computation.digests(names, "conv1")["conv1"] == "image 0"
