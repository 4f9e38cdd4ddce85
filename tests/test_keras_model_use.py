"""What a network of a Keras file is used for: all that a network of the zoo is."""

import pickle
import re
import subprocess
import sys
from collections import Counter

import jax
import jax.export
import jax.numpy as jnp
import keras
import numpy as np
import PIL.Image
import pytest
from networks import assert_alive
from reference import assert_close, random_images
from test_keras_graphs import Maker
from test_keras_model import BRIGHTNESS, randomise, small_network
from tiers import slow, slow_but

import fzoo
from fzoo.layers.graph import trace
from fzoo.training.steps import phase_mask

layers = keras.layers


#: Files of strangers: with models inside of models, and without a Dense at the end; the others take longer.
STRANGERS = [
    "oar_gender_mini_xception.hdf5",
    *map(slow, ("tm_waste.h5", "mlc_vww_96.h5", "mlc_resnet8.h5")),
]


def images_of(side: int = 16, count: int = 3) -> np.ndarray:
    return random_images((count, side, side, 3)) * BRIGHTNESS[:count]


def loaded(model: keras.Model, tmp_path, ending: str = ".keras"):
    """The module and the variables of a model, saved and loaded."""
    path = tmp_path / f"model{ending}"
    model.save(path)
    return fzoo.load_model(path)


# -- optimising -------------------------------------------------------------------------------------------------------


def head_of(x):
    return layers.Dense(4, name="classes")(layers.GlobalAveragePooling2D()(x))


def conv(filters: int = 6, size: int = 3, **options):
    return layers.Conv2D(filters, size, padding="same", **options)


def conv_called_twice(x):
    shared = conv(3)
    return head_of(layers.BatchNormalization()(shared(layers.BatchNormalization()(shared(x)))))


def conv_called_twice_beside(x):
    shared = conv()
    return head_of(
        layers.Add()([layers.BatchNormalization()(shared(x)), layers.BatchNormalization()(shared(layers.ReLU()(x)))])
    )


def batch_norm_called_twice(x):
    shared = layers.BatchNormalization()
    return head_of(layers.Concatenate()([shared(conv()(x)), shared(conv(use_bias=False)(x))]))


def model_called_twice(x):
    inside = keras.Sequential([conv(3, use_bias=False), layers.BatchNormalization(), layers.ReLU()], name="inside")
    return head_of(inside(inside(x)))


def model_before_batch_norm(x):
    inside = keras.Sequential([layers.Input((16, 16, 3)), conv(6, activation="linear")], name="inside")
    return head_of(layers.BatchNormalization()(inside(x)))


def conv_that_is_an_output(x):
    y = conv(4)(x)
    return [layers.GlobalAveragePooling2D()(y), head_of(layers.BatchNormalization()(y)), y]


def conv_with_two_readers(x):
    y = conv()(x)
    return head_of(layers.Add()([y, layers.BatchNormalization()(y)]))


def activation_between(x):
    y = layers.BatchNormalization()(conv(activation="tanh")(x))
    return head_of(layers.BatchNormalization()(layers.Activation("sigmoid")(conv()(y))))


def dense_without_bias(x):
    y = layers.GlobalAveragePooling2D()(conv(activation="relu")(x))
    y = layers.BatchNormalization()(layers.Dense(5, use_bias=False)(y))
    return layers.Dense(4)(layers.BatchNormalization(scale=False, center=False)(layers.Dense(5)(y)))


def separable_and_depthwise(x):
    y = layers.BatchNormalization()(layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)(x))
    return head_of(layers.BatchNormalization()(layers.SeparableConv2D(5, 3, use_bias=False)(y)))


def batch_norm_of_a_pool(x):
    y = layers.AveragePooling2D(3, 2, padding="same")(layers.Concatenate()([conv(3)(x), conv(2, 1)(x)]))
    return head_of(layers.BatchNormalization()(layers.Dropout(0.5)(y)))


def padding_between(x):
    return head_of(layers.BatchNormalization()(layers.ZeroPadding2D(2)(conv()(x))))


def shared_kernels_of_winograd(x):
    shared = conv(32)
    return head_of(shared(shared(layers.ReLU()(conv(32)(x)))))


GRAPHS = (
    conv_called_twice,
    conv_called_twice_beside,
    batch_norm_called_twice,
    model_called_twice,
    model_before_batch_norm,
    conv_that_is_an_output,
    conv_with_two_readers,
    activation_between,
    dense_without_bias,
    separable_and_depthwise,
    batch_norm_of_a_pool,
    padding_between,
    shared_kernels_of_winograd,
)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_form_for_inference(tmp_path, graph):
    """It gives what the network gives, and what Keras does."""
    x = layers.Input((16, 16, 3))
    model = randomise(keras.Model(x, graph(x)))
    module, variables = loaded(model, tmp_path)
    images = images_of()
    optimised = fzoo.optimize_for_inference(module, variables)
    ends = [jax.tree.leaves(y) for y in (model(images), fzoo.predict(module, variables, images))]
    ends.append(jax.tree.leaves(fzoo.predict(*optimised, images)))
    for expected, plain, found in zip(*ends, strict=True):
        assert_alive(expected, 0.02)
        assert_close(np.asarray(plain), np.asarray(expected), "as it is")
        assert_close(np.asarray(found), np.asarray(expected), "optimised")
    assert len(jax.tree.leaves(fzoo.predict(*optimised, images[:0]))) == len(ends[0])


@pytest.mark.slow
def test_what_is_folded(tmp_path):
    """Convolutions that are called once, through a model's end; no layer that is called more than once."""

    def folded(graph) -> set[str]:
        x = layers.Input((16, 16, 3))
        keras.backend.clear_session()
        module, variables = loaded(randomise(keras.Model(x, graph(x))), tmp_path)
        return set(fzoo.optimize_for_inference(module, variables)[0].prepared.folded)

    assert len(folded(model_before_batch_norm)) == len(folded(batch_norm_of_a_pool)) == 1
    assert len(folded(dense_without_bias)) == len(folded(separable_and_depthwise)) == 2
    nothing = (conv_called_twice, batch_norm_called_twice, model_called_twice, conv_that_is_an_output, padding_between)
    assert not any(map(folded, nothing))


# -- order and names --------------------------------------------------------------------------------------------------


def random_flat_graph(seed: int) -> keras.Model:
    """Layers of one width that take any of those before, some of them called again, with one or two outputs."""
    rng = np.random.default_rng(seed)
    tensors, known = [layers.Input((8, 8, 4), name="image"), layers.Input((8, 8, 4), name="unused")], []
    tensors += [layers.Input((8, 8, 4), name="mask")] if seed % 3 == 0 else []
    inputs = list(tensors)
    tensors = [tensor for tensor in tensors if tensor.name != "unused"]
    for _ in range(10):
        picked = [tensors[i] for i in rng.integers(max(0, len(tensors) - 4), len(tensors), 2)]
        what = rng.integers(4)
        if what == 0 and picked[0] is not picked[1]:
            tensors.append(layers.Add()(picked))
        elif what == 1 and known:
            tensors.append(known[rng.integers(len(known))](picked[0]))
        else:
            known.append(layers.Conv2D(4, 1) if what == 2 else layers.BatchNormalization())
            tensors.append(known[-1](picked[0]))
    ends = tensors[-2:] if seed % 2 else tensors[-1:]
    return keras.Model(inputs if seed % 3 else inputs[::-1], ends)


def test_the_order_of_layers_is_kerass(tmp_path):
    """With layers that are called more than once, several outputs, inputs that nothing reads."""
    for seed in range(30):
        model = random_flat_graph(seed)
        module, _ = loaded(model, tmp_path)
        assert fzoo.layer_names(module) == [layer.name for layer in model.layers], seed
    for model in (keras.Sequential([layers.Input((8, 8, 3)), conv(), layers.Flatten(), layers.Dense(2)]),):
        assert fzoo.layer_names(loaded(model, tmp_path)[0]) == [layer.name for layer in model.layers]


def test_layers_of_models_inside(tmp_path):
    """Their paths, before the model's own name; its input is none of them, and each layer is there once."""
    module, variables = loaded(randomise(small_network()), tmp_path)
    names = fzoo.layer_names(module)
    at = names.index("inside")
    assert [name.partition("/")[0] for name in names[at - 3 : at]] == ["inside"] * 3
    assert names.count("shared") == 1 and "shared:1" not in names
    images = images_of()
    found = fzoo.features(module, variables, images, ["shared", "shared:1", names[at - 1], "inside"])
    assert not np.allclose(found["shared"], found["shared:1"])
    np.testing.assert_array_equal(found["inside"], found[names[at - 1]])


# -- saving -----------------------------------------------------------------------------------------------------------


def same_in_keras(module, variables, path, images) -> None:
    """What is written is opened by Keras and by fzoo, and gives the same; each layer, too."""
    expected = jax.tree.leaves(fzoo.predict(module, variables, images))
    fzoo.save_keras_weights(module, variables, path)
    again = fzoo.load_model(path)
    jax.tree.map(np.testing.assert_array_equal, again[1], variables)
    model = keras.models.load_model(path, compile=False)
    for found, y in zip(jax.tree.leaves(model(images)), expected, strict=True):
        assert_close(np.asarray(found), np.asarray(y), "by Keras")
    for found, y in zip(jax.tree.leaves(fzoo.predict(*again, images)), expected, strict=True):
        np.testing.assert_array_equal(found, y)
    assert fzoo.layer_names(again[0]) == fzoo.layer_names(module)


@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_it_is_saved_as_a_model_of_keras(tmp_path, ending):
    """From both layouts, with a model inside some of whose layers are frozen, and with another activation."""
    for number, model in enumerate((small_network(), random_flat_graph(6), random_flat_graph(7))):
        if number == 0:
            model.get_layer("inside").layers[0].trainable = False
        module, variables = loaded(randomise(model), tmp_path, ending)
        images = tuple(random_images((3, 8, 8, 4), seed) for seed in range(len(model.inputs)))
        same_in_keras(module, variables, tmp_path / f"out{ending}", images if number else images_of())
        if number == 0:
            same_in_keras(module.clone(classifier_activation=None), variables, tmp_path / f"out{ending}", images_of())
            weights = tmp_path / "out.weights.h5"
            fzoo.save_keras_weights(module, variables, weights)
            other = randomise(small_network(), 1)
            other.load_weights(weights)
            assert_close(np.asarray(other(images_of())), np.asarray(model(images_of())), "by load_weights")
            jax.tree.map(np.testing.assert_array_equal, fzoo.load_keras_weights(module, weights), variables)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("seed", slow_but(range(6), 0, 1))
def test_random_networks_are_saved_as_keras_opens_them(tmp_path, seed):
    """With models inside, layers that are called twice, operations."""
    model = randomise(Maker(10 * seed).model())
    module, variables = loaded(model, tmp_path)
    fzoo.save_keras_weights(module, variables, tmp_path / "out.keras")
    images = random_images((2, *model.input_shape[1:]))
    again = keras.models.load_model(tmp_path / "out.keras", compile=False)
    y, expected = (np.asarray(network(images, training=False)) for network in (again, model))  # flips by default
    assert_close(y, expected, f"seed {seed}")


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_operations_of_an_h5_file_are_not_saved(tmp_path):
    """An h5 file of Keras's does not tell all of them."""
    x = layers.Input((16, 16, 3))
    module, variables = loaded(keras.Model(x, head_of(keras.ops.silu(x))), tmp_path, ".h5")
    with pytest.raises(ValueError, match=r"silu(_\d+)? \(Silu\) is an operation, of which an .h5 file does not say"):
        fzoo.save_keras_weights(module, variables, tmp_path / "out.keras")


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_files_are_saved_as_keras_opens_them(real, tmp_path, name):
    """Whatever Keras wrote them."""
    module, variables = fzoo.load_model(real / "keras_files" / name)
    images = random_images((2, *module.example_shape))
    same_in_keras(module, variables, tmp_path / ("out.h5" if name == "tm_waste.h5" else "out.keras"), images)


# -- another head -----------------------------------------------------------------------------------------------------


def test_transfer_cuts_at_the_last_feature_map(tmp_path):
    """What is kept gives what it gave; the head is new, is all that "head" trains, and Keras opens the whole."""
    module, variables = loaded(randomise(small_network()), tmp_path)
    assert module.cut == "both"
    new, its = fzoo.transfer(module, variables=variables, classes=5, head=fzoo.Head(hidden=7, dropout=0.5))
    assert (new.classes, new.cut) == (5, "both")
    images = images_of()
    for layer in ("both", "inside", "shared:1"):
        expected = fzoo.features(module, variables, images, layer)[layer]
        np.testing.assert_array_equal(fzoo.features(new, its, images, layer)[layer], expected)
    top = {"dense", "predictions"}
    assert set(its["params"]) == set(variables["params"]) - {"hidden", "classes"} | top
    trained = phase_mask(new, its, fzoo.Phase(trains="head"))
    assert {layer for layer, marks in trained.items() if all(jax.tree.leaves(marks))} == top
    stage = phase_mask(new, its, fzoo.Phase(trains="top"))
    assert any(jax.tree.leaves(stage["shared"])) and any(jax.tree.leaves(stage["inside/" + inner(its)]))
    same_in_keras(new, its, tmp_path / "out.keras", images)
    p = fzoo.predict(new, its, images)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    from_path, _ = fzoo.transfer(tmp_path / "model.keras", classes=5, head=fzoo.Head(hidden=7, dropout=0.5))
    assert from_path == new


def inner(variables) -> str:
    """The name of the convolution inside."""
    return next(name.partition("/")[2] for name in variables["params"] if name.startswith("inside/conv"))


@pytest.mark.parametrize("cut", ["hidden", "stem", "inside", "shared"])
def test_transfer_cuts_at_a_layer(tmp_path, cut):
    module, variables = loaded(randomise(small_network()), tmp_path)
    cut = cut if cut != "inside" else f"inside/{inner(variables)}"
    new, its = fzoo.transfer(module, variables=variables, classes=3, cut=cut, classifier_activation=None)
    pooled = np.asarray(fzoo.features(module, variables, images_of(), cut)[cut])
    pooled = pooled.mean((1, 2)) if pooled.ndim == 4 else pooled
    head = its["params"]["predictions"]
    expected = pooled @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    assert_close(np.asarray(fzoo.predict(new, its, images_of())), expected, cut)
    head_alone = phase_mask(new, its, fzoo.Phase(trains="head"))
    assert [layer for layer, marks in head_alone.items() if any(jax.tree.leaves(marks))] == ["predictions"]
    same_in_keras(new, its, tmp_path / "out.keras", images_of())


def test_channels_first(tmp_path):
    """A network whose file has the channels first is saved as it was, and has a head that is told of them."""
    x = image = layers.Input((3, 16, 12))
    x = layers.Conv2D(4, 3, strides=2, data_format="channels_first", activation="relu", name="stem")(x)
    x = layers.Flatten(data_format="channels_first")(layers.BatchNormalization(axis=1, name="last")(x))
    module, variables = loaded(randomise(keras.Model(image, layers.Dense(4)(x))), tmp_path)
    new, its = fzoo.transfer(module, variables=variables, classes=3)
    images = random_images((2, 16, 12, 3))
    for network, arrays in ((module, variables), (new, its)):
        fzoo.save_keras_weights(network, arrays, tmp_path / "out.keras")
        found = keras.models.load_model(tmp_path / "out.keras", compile=False)(images.transpose(0, 3, 1, 2))
        assert_close(np.asarray(fzoo.predict(network, arrays, images)), np.asarray(found), "channels first")


def test_what_transfer_refuses(tmp_path):
    module, variables = loaded(randomise(small_network()), tmp_path)
    for options, message in (
        ({"cut": "steam"}, "unknown layer 'steam': did you mean stem"),
        ({"cut": "image"}, "cut='image' given, whose output"),
        ({"alpha": 0.5}, "alpha=0.5 given"),
        ({"weights": None}, "variables=... of the network expected, and no weights"),
    ):
        with pytest.raises(ValueError, match=message):
            fzoo.transfer(module, variables=variables, classes=3, **options)
    with pytest.raises(ValueError, match=r"variables=\.\.\. of the network expected"):
        fzoo.transfer(module, classes=3)
    with pytest.raises(ValueError, match=r"cut='stem' given, which goes with a network of load_model"):
        fzoo.transfer("MobileNet", classes=3, cut="stem", weights=None)


@pytest.mark.parametrize("name", STRANGERS)
def test_transfer_of_strangers_files(real, name):
    """A head of the user's own in place of theirs, models inside of models or not."""
    file = real / "keras_files" / name
    new, variables = fzoo.transfer(file, classes=3, head=fzoo.Head(hidden=5))
    old = fzoo.load_model(file)
    images = random_images((2, *new.example_shape))
    (there,), (here,) = (fzoo.features(*pair, images, new.cut).values() for pair in (old, (new, variables)))
    np.testing.assert_array_equal(there, here)
    assert min(there.shape[1:3]) > 1
    assert jax.eval_shape(new.apply, variables, images).shape == (2, 3)


# -- training ---------------------------------------------------------------------------------------------------------


def squares() -> tuple[np.ndarray, np.ndarray]:
    """Pixels of three classes, told by the place of a bright square."""
    labels = np.arange(48) % 3
    images = random_images((48, 16, 16, 3), pixels=True).astype(np.uint8) // 2
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 6, 4 * label : 4 * label + 6] += 120
    return images, labels


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "user.keras"
    randomise(small_network()).save(path)
    return path


PHASES = (fzoo.Phase(epochs=2, trains="head", learning_rate=0.02), fzoo.Phase(epochs=1, pattern="inside/*"))


@pytest.mark.slow
def test_finetune_starts_from_a_file(tmp_path, user_file, command_line):
    """The run is made again from what it wrote down, by its folder alone; Keras opens its model.h5."""
    images, labels = squares()
    options = {"preprocess": "tf", "phases": PHASES, "batch_size": 16, "head": fzoo.Head(hidden=8, dropout=0.2)}
    lines = []
    done = fzoo.finetune((images, labels), user_file, out=tmp_path / "run", report=lines.append, **options)
    assert f"a new head starts, after both of {user_file}; pixels: preprocess tf" in lines
    assert any("features of the frozen part" in line for line in lines)
    assert [row["phase"] for row in done.history] == [1, 1, 2]
    start = fzoo.load_model(user_file)[1]
    np.testing.assert_array_equal(done.variables["params"]["stem"]["kernel"], start["params"]["stem"]["kernel"])
    inside = f"inside/{inner(start)}"
    assert np.abs(done.variables["params"][inside]["kernel"] - start["params"][inside]["kernel"]).max() > 0
    user_file.unlink()
    run = fzoo.load_run(tmp_path / "run")
    assert (run.module, run.model) == (done.module, "tf")
    expected = np.asarray(fzoo.predict(done.module, done.variables, images, preprocess="tf"))
    np.testing.assert_array_equal(fzoo.predict(run.module, run.variables, images, preprocess=run.model), expected)
    model = keras.models.load_model(tmp_path / "run" / "model.h5", compile=False)
    assert_close(np.asarray(model(images / np.float32(127.5) - 1)), expected, "by Keras")
    with pytest.raises(ValueError, match=r"model='.*model.h5' with preprocess='tf' goes on from it"):
        fzoo.finetune((images, labels), weights=tmp_path / "run", phases=PHASES)
    PIL.Image.fromarray(images[0]).save(tmp_path / "a.png")
    code, out, errors = command_line("classify", tmp_path / "a.png", "--weights", tmp_path / "run")
    assert (code, errors) == (0, [])
    assert str(expected[0].argmax()) in out[0].split("\t")


@pytest.mark.slow
def test_finetune_goes_on(tmp_path, user_file):
    """A run that was stopped gives what one does that was not."""
    images, labels = squares()
    options = {"preprocess": "tf", "phases": PHASES, "batch_size": 16, "cut": "both"}
    whole = fzoo.finetune((images, labels), user_file, **options)

    def report(line: str) -> None:
        if "epoch 1/1" not in line and "phase 1, epoch 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fzoo.finetune((images, labels), user_file, out=tmp_path / "run", report=report, checkpoint_every=1, **options)
    again = fzoo.finetune((images, labels), user_file, out=tmp_path / "run", resume=True, checkpoint_every=1, **options)
    jax.tree.map(np.testing.assert_array_equal, again.variables, whole.variables)


def test_what_finetune_asks_of_a_file(user_file):
    with pytest.raises(ValueError, match=r"user.keras does not show .*: preprocess=... \(--preprocess\) .* unit \("):
        fzoo.FinetuneConfig(model=str(user_file))
    with pytest.raises(ValueError, match=r"unknown option 'alpha'"):
        fzoo.FinetuneConfig.of({"model": str(user_file), "preprocess": "tf", "alpha": 0.5})
    with pytest.raises(ValueError, match=r"preprocess='tf' given, which goes with a file as the model"):
        fzoo.FinetuneConfig(model="MobileNet", preprocess="tf")
    with pytest.raises(FileNotFoundError, match=r"no such file: gone.keras"):
        fzoo.FinetuneConfig(model="gone.keras")
    with pytest.raises(ValueError, match=r"unknown model 'tff': did you mean .*, or one of the modes caffe, tf"):
        fzoo.FinetuneConfig(model=str(user_file), preprocess="tff")
    assert fzoo.FinetuneConfig(model=str(user_file), preprocess="MobileNetV2").size == 16


def of_teachable_machine() -> keras.Model:
    """Layers called as those of a file that Teachable Machine exported."""
    x = image = layers.Input((16, 16, 3))
    x = layers.GlobalAveragePooling2D()(conv(4, activation="relu")(x))
    return keras.Model(image, layers.Dense(3, activation="softmax", name="dense_Dense2")(x))


def with_rescaling() -> keras.Model:
    x = image = layers.Input((16, 16, 3))
    x = layers.GlobalAveragePooling2D()(conv(4, activation="relu")(layers.Rescaling(1 / 255)(x)))
    return keras.Model(image, layers.Dense(3)(x))


def with_adapted_normalization() -> keras.Model:
    """Whose mean is among the weights alone."""
    normalization = layers.Normalization(name="normal")
    normalization.adapt(random_images((4, 16, 16, 3), pixels=True))
    x = image = layers.Input((16, 16, 3))
    x = layers.GlobalAveragePooling2D()(conv(4, activation="relu")(normalization(x)))
    return keras.Model(image, layers.Dense(3)(x))


def with_rescaling_within() -> keras.Model:
    """Of what a layer gives, which says nothing of its pixels."""
    x = image = layers.Input((16, 16, 3))
    x = layers.GlobalAveragePooling2D()(layers.Rescaling(1 / 255)(conv(4, activation="relu")(x)))
    return keras.Model(image, layers.Dense(3)(x))


def on_mobilenet() -> keras.Model:
    base = keras.applications.MobileNet(include_top=False, weights=None, alpha=0.25, input_shape=(32, 32, 3))
    return keras.Model(base.input, layers.Dense(3)(layers.GlobalAveragePooling2D()(base.output)))


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (of_teachable_machine, "tf"),
        (with_rescaling, "none"),
        (with_adapted_normalization, "none"),
        (on_mobilenet, "tf"),
        (with_rescaling_within, None),
    ],
)
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_finetune_recognises_what_a_file_wants(tmp_path, make, mode):
    """As the command line does for `fzoo classify`."""
    file = tmp_path / "m.h5"
    make().save(file)
    if mode is None:
        with pytest.raises(ValueError, match=r"m.h5 does not show what it wants of its pixels: preprocess=... \("):
            fzoo.FinetuneConfig(model=str(file))
    else:
        assert fzoo.FinetuneConfig(model=str(file)).preprocess == mode
    assert fzoo.FinetuneConfig(model=str(file), preprocess="unit").preprocess == "unit"


@pytest.mark.parametrize("preprocess", [[], ["--preprocess", "unit"]])
def test_a_run_keeps_what_its_pixels_are(tmp_path, command_line, preprocess):
    """From the command line: what training took is what evaluate, classify, export and load_run take."""
    images, labels = squares()
    images = (images * BRIGHTNESS[np.arange(48) % 3]).clip(0, 255).astype(np.uint8)
    for i, (image, label) in enumerate(zip(images[:18], labels[:18], strict=True)):
        (tmp_path / "data" / f"c{label}").mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(tmp_path / "data" / f"c{label}" / f"{i}.png")
    x = image = layers.Input((16, 16, 3))
    x = x if preprocess else layers.Rescaling(1 / 255)(x)
    x = conv(6, activation="relu", name="last")(conv(6, activation="relu", name="first")(x))
    model = keras.Model(image, layers.Dense(2, activation="softmax")(layers.GlobalAveragePooling2D()(x)))
    randomise(model).save(tmp_path / "m.keras")
    mode, run = "unit" if preprocess else "none", tmp_path / "run"
    arguments = ["finetune", tmp_path / "data", "-m", tmp_path / "m.keras", "--out", run, "--cut", "first", *preprocess]
    arguments += ["--batch-size", 4, "--phase", "trains=head epochs=1 learning_rate=0.1", "--crop", 0]
    code, _, errors = command_line(*arguments)
    said = f"fzoo: a new head starts, after first of {tmp_path / 'm.keras'}; pixels: preprocess {mode}"
    assert code == 0 and said in errors
    loaded = fzoo.load_run(run)
    assert (loaded.model, loaded.module.cut) == (mode, "first")
    by_keras = keras.models.load_model(run / "model.h5", compile=False)
    pixels = images[:18].astype(np.float32)
    expected = np.asarray(by_keras(pixels / 255 if preprocess else pixels))
    assert_alive(expected[:3], 0.02)
    code, output, _ = command_line("classify", tmp_path / "data", "-w", run)
    found = {}
    for name, _, label, p in (line.split("\t") for line in output):
        found.setdefault(int(name.rpartition("/")[2].removesuffix(".png")), {})[label] = float(p)
    for i, row in enumerate(expected):
        assert found[i] == pytest.approx({f"c{c}": float(p) for c, p in enumerate(row)}, abs=1e-5)
    code, output, _ = command_line("evaluate", tmp_path / "data", "-w", run)
    right = (expected.argmax(1) == labels[:18]).mean()
    assert code == 0 and dict(line.split("\t")[:2] for line in output)["top-1"] == f"{right:.2%}"
    code, _, errors = command_line("export", run, tmp_path / "m.stablehlo", "--pixels", "--platform", "cpu")
    assert (code, errors) == (0, [])
    program = jax.export.deserialize(bytearray((tmp_path / "m.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(images[:18]), expected, atol=1e-5)
    for options, message in (
        (["--preprocess", "torch"], f"--preprocess torch given, {mode} wants {mode}: leave it out"),
        (["-m", "MobileNet"], f"--model MobileNet given, {run} began with"),
        (["--classes", "7"], f"--classes 7 given, {run} has 3: leave it out"),
        (["-o", "alpha=1"], f"--option alpha=1 given, {run} says its own: leave it out"),
    ):
        code, output, errors = command_line("classify", tmp_path / "data", "-w", run, *options)
        assert (code, output, len(errors)) == (2, [], 1) and message in errors[0], errors


# -- several inputs and outputs ---------------------------------------------------------------------------------------


def two_by_two() -> keras.Model:
    """An image and a vector in; classes and a map out."""
    image, facts = layers.Input((16, 16, 3), name="image"), layers.Input((5,), name="facts")
    y = conv(6, strides=2, activation="relu", name="stem")(image)
    beside = layers.Dense(4, activation="tanh", name="beside")(facts)
    joined = layers.Concatenate(name="joined")([layers.GlobalAveragePooling2D(name="vector")(y), beside])
    return keras.Model([facts, image], [layers.Dense(3, activation="softmax", name="classes")(joined), y])


def test_several_inputs_and_outputs(tmp_path):
    """In a tuple or by name, in batches, with a mesh, in a jit of the caller's; outputs in Keras's order."""
    model = randomise(two_by_two())
    module, variables = loaded(model, tmp_path)
    facts, images = np.random.default_rng(3).normal(size=(7, 5)).astype(np.float32), random_images((7, 16, 16, 3))
    expected = [np.asarray(y) for y in model([facts, images])]
    by_name = {"image": images, "facts": facts}
    jitted = jax.jit(lambda variables, inputs: fzoo.predict(module, variables, inputs))
    for found in (
        module.apply(variables, (facts, images)),
        module.apply(variables, by_name),
        fzoo.predict(module, variables, [facts, images]),
        fzoo.predict(module, variables, by_name, batch_size=3),
        fzoo.predict(module, variables, (facts, images), mesh=fzoo.devices.mesh()),
        fzoo.predict(*fzoo.optimize_for_inference(module, variables), by_name),
        jitted(variables, (facts, images)),
    ):
        assert isinstance(found, tuple)
        for y, wanted in zip(found, expected, strict=True):
            assert_close(np.asarray(y), wanted, "an output")
    nothing = fzoo.predict(module, variables, (facts[:0], images[:0]))
    assert [y.shape for y in nothing] == [(0, 3), (0, 8, 8, 6)]
    taps = fzoo.features(module, variables, by_name, ["beside", "stem"])
    np.testing.assert_allclose(taps["stem"], expected[1], atol=1e-5)
    assert fzoo.layer_names(module) == [layer.name for layer in model.layers]


def test_what_wants_one_image_says_so(tmp_path, command_line):
    """In one line, whoever is asked."""
    module, variables = loaded(two_by_two(), tmp_path)
    facts, images = np.zeros((2, 5), np.float32), np.zeros((2, 16, 16, 3), np.float32)
    one_array = r"one array given, a tuple or a mapping of 2 expected: facts, image"
    shapes = (
        r"a network from \(16, 16, 3\), \(5,\) to \(3,\), \(8, 8, 6\) given, one from images to a vector of classes"
    )
    PIL.Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    file = tmp_path / "model.keras"

    def job(module=module, variables=variables):
        return fzoo.run_job(module, variables, [tmp_path / "a.png"], tmp_path / "out.csv", preprocess="tf")

    for call, message in (
        (lambda: fzoo.predict(module, variables, images), one_array),
        (lambda: fzoo.predict(module, variables, (images,)), "1 inputs given, 2 expected: facts, image"),
        (lambda: fzoo.predict(module, variables, {"image": images}), "inputs image given, facts, image expected"),
        (
            lambda: fzoo.predict(module, variables, (facts, images), preprocess="tf"),
            "preprocess='tf' given, which goes",
        ),
        (lambda: fzoo.predict(module, variables, (facts[:1], images)), r"inputs of shapes \(1, 5\), \(2, 16, 16, 3\)"),
        (
            lambda: fzoo.predict(module, variables, (facts, images.astype(int))),
            "inputs of int64 given, arrays of floats",
        ),
        (lambda: module.apply(variables, (images, facts)), r"facts of shape \(2, 16, 16, 3\) given, \(2, 5\) expected"),
        (lambda: fzoo.explain(module, variables, images), shapes),
        (lambda: fzoo.grad_cam(module, variables, images, [0]), shapes),
        (lambda: fzoo.evaluate(module, variables, [(images, np.zeros(2, int))]), shapes),
        (lambda: fzoo.export(module, variables, tmp_path / "a.stablehlo"), one_array),
        (job, one_array),
        (
            lambda: fzoo.FinetuneConfig(model=str(file), preprocess="tf"),
            "takes facts, image, a network of images alone",
        ),
        (lambda: module.clone(include_top=False), "include_top=False given, but this network has no last feature map"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    code, out, errors = command_line("summary", file)
    assert (code, len(out), errors) == (0, 8, [])


def test_networks_of_vectors_are_refused(tmp_path):
    keras.Sequential([layers.Input((5,)), layers.Dense(2)]).save(tmp_path / "a.keras")
    with pytest.raises(ValueError, match=r"a.keras: it takes \(5,\), images \(height, width, channels\) expected"):
        fzoo.load_model(tmp_path / "a.keras")


# -- everything else --------------------------------------------------------------------------------------------------


def test_explanations(tmp_path):
    """Of the last feature map, or of a layer inside; the sum of a linear head's parts is its logit."""
    module, variables = loaded(randomise(small_network()), tmp_path)
    images = images_of()
    found = fzoo.explain(module, variables, images, top=2)
    assert found.heat.shape == (3, 2, 8, 8) and np.isfinite(found.heat).all() and (np.asarray(found.heat) > 0).any()
    p = np.asarray(fzoo.predict(module, variables, images))
    np.testing.assert_allclose(found.probabilities, -np.sort(-p, 1)[:, :2], rtol=1e-5)
    for layer in ("inside", f"inside/{inner(variables)}", "shared:1"):
        assert fzoo.grad_cam(module, variables, images, [0], layer=layer).shape == (3, 1, 8, 8)
    # Grad-CAM by hand, of the last map: the gradient through vector, hidden and classes.
    maps = fzoo.features(module, variables, images, "both")["both"]

    def logit(maps):
        network = module.clone(classifier_activation=None)
        return network.apply(variables, images, given={"both": maps}, method="run")[0][:, 1].sum()

    weights = np.asarray(jax.grad(logit)(maps)).mean((1, 2), keepdims=True)
    expected = np.maximum((weights * np.asarray(maps)).sum(-1), 0)
    np.testing.assert_allclose(fzoo.grad_cam(module, variables, images, [1])[:, 0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_files_are_explained(real, name):
    module, variables = fzoo.load_model(real / "keras_files" / name)
    heat = np.asarray(fzoo.explain(module, variables, random_images((1, *module.example_shape)), top=1).heat)
    assert min(heat.shape[2:]) > 1 and np.isfinite(heat).all()


def test_export_and_jobs(tmp_path):
    """With the pixels preprocessed as a mode says; the same numbers from each."""
    module, variables = loaded(randomise(small_network()), tmp_path)
    pixels = random_images((3, 16, 16, 3), pixels=True).astype(np.uint8)
    expected = np.asarray(fzoo.predict(module, variables, pixels, preprocess="tf"))
    assert_close(np.asarray(fzoo.predict(module, variables, pixels / np.float32(127.5) - 1)), expected, "by hand")
    fzoo.export(module, variables, tmp_path / "a.stablehlo", preprocess="tf", platforms="cpu")
    exported = jax.export.deserialize(bytearray((tmp_path / "a.stablehlo").read_bytes()))
    assert_close(np.asarray(exported.call(pixels)), expected, "exported")
    for i, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(tmp_path / f"{i}.png")
    photos = [tmp_path / f"{i}.png" for i in range(3)]
    options = {"preprocess": "tf", "recipe": fzoo.Recipe((16, 16), crop=None)}
    fzoo.run_job(module, variables, photos, tmp_path / "a.csv", top=1, **options)
    rows = [line.split(",") for line in (tmp_path / "a.csv").read_text().splitlines()[1:]]
    assert [int(row[2]) for row in rows] == expected.argmax(1).tolist()
    layer = f"inside/{inner(variables)}"
    for ending in ("npz", "h5"):
        fzoo.run_job(module, variables, photos, tmp_path / f"a.{ending}", layers=[layer, "shared:1"], **options)
    tapped = fzoo.features(module, variables, pixels, layer, preprocess="tf")[layer]
    assert_close(np.load(tmp_path / "a.npz")[layer], np.asarray(tapped), layer)
    labels = expected.argmax(1)
    found = fzoo.evaluate(module, variables, [(pixels, labels)], preprocess="tf")
    assert (found.top1, found.images) == (1.0, 3)


def test_summary_and_pictures_of_files(tmp_path, command_line):
    """Every layer by its path, and what they are drawn as."""
    module, _ = loaded(small_network(), tmp_path)
    code, out, errors = command_line("summary", tmp_path / "model.keras")
    assert (code, errors) == (0, [])
    assert [line.split("\t")[0] for line in out[:-1]] == fzoo.layer_names(module)
    assert command_line("summary", tmp_path / "model.keras", "--picture", tmp_path / "a.svg")[0] == 0
    drawn = (tmp_path / "a.svg").read_text()
    assert "Global avg pool" in drawn and "classes" in drawn
    code, out, errors = command_line("summary", tmp_path / "model.keras", "-o", "alpha=2")
    assert code != 0 and errors[-1].endswith("which " + str(tmp_path / "model.keras") + " says itself")


def test_pictures_of_strangers_files(real, tmp_path, command_line):
    """Models inside of models, hundreds of layers."""
    for file in sorted((real / "keras_files").glob("*.h*5")):
        code, _, errors = command_line("summary", file, "--picture", tmp_path / "a.svg")
        assert (code, errors) == (0, [])


@pytest.mark.slow
def test_a_module_like_any_other(tmp_path):
    """Equal from two loads of a file, so that nothing is compiled twice; pickled; in jit, vmap and grad; no leaks."""
    model = randomise(small_network())
    module, variables = loaded(model, tmp_path)
    again, _ = fzoo.load_model(tmp_path / "model.keras")
    assert again == module and hash(again) == hash(module) and again.graph is not module.graph
    apply = jax.jit(lambda module, variables, x: module.apply(variables, x), static_argnums=0)
    images = images_of()
    expected = np.asarray(apply(module, variables, images))
    apply(again, variables, images)
    assert apply._cache_size() == 1
    code = "import pickle, sys; sys.stdout.buffer.write(pickle.dumps(pickle.load(sys.stdin.buffer)))"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(module), capture_output=True, check=True)
    there = pickle.loads(done.stdout)  # through a process in which texts have other hashes
    assert there == module and hash(there) == hash(module) and there.graph.source == module.graph.source
    each = jax.vmap(lambda x: module.apply(variables, x[None])[0])(images)
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-6)
    with jax.checking_leaks():
        loss = lambda variables: jnp.square(module.apply(variables, images)).sum()  # noqa: E731
        gradients = jax.grad(loss)(variables)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert np.abs(gradients["params"]["shared"]["kernel"]).max() > 0
    _, moved = module.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    (name,) = moved["batch_stats"]
    assert np.abs(moved["batch_stats"][name]["mean"] - variables["batch_stats"][name]["mean"]).max() > 0


def test_other_dtypes(tmp_path):
    """bfloat16 by an option; float32 files under x64."""
    module, variables = loaded(randomise(small_network()), tmp_path)
    images = images_of()
    expected = np.asarray(fzoo.predict(module, variables, images))
    half, its = fzoo.load_model(tmp_path / "model.keras", dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(its)} == {"float32"}
    tapped = fzoo.features(half, its, images, ["stem", "classes"])
    assert (tapped["stem"].dtype, tapped["classes"].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(tapped["classes"], expected, atol=0.05)
    with jax.enable_x64(True):
        module, variables = fzoo.load_model(tmp_path / "model.keras", dtype=jnp.float64)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
        y = fzoo.predict(module, variables, images.astype(np.float64))
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
        fzoo.save_keras_weights(module, variables, tmp_path / "again.keras")


def test_other_files_of_variables(tmp_path):
    """Names with dots and slashes survive safetensors and Orbax."""
    inside = keras.Sequential([layers.Input((16, 16, 3)), conv(name="c.1"), layers.BatchNormalization()], name="a_1.00")
    x = layers.Input((16, 16, 3))
    module, variables = loaded(randomise(keras.Model(x, head_of(inside(x)))), tmp_path)
    for name in ("a.safetensors", "a.orbax"):
        fzoo.save_variables(module, variables, tmp_path / name)
        jax.tree.map(np.testing.assert_array_equal, fzoo.load_variables(module, tmp_path / name), variables)


@pytest.mark.slow
def test_the_walk_costs_nothing_once_compiled(tmp_path):
    """The program of a network by name, and of the same network by its file, have the same operations."""
    keras.backend.clear_session()
    model = keras.applications.MobileNetV2(alpha=0.35, input_shape=(32, 32, 3), weights=None)
    module, variables = loaded(model, tmp_path)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    named = fzoo.create("MobileNetV2", alpha=0.35, input_shape=(32, 32, 3))
    counts = []
    for network in (named, module):
        text = jax.jit(network.apply).lower(variables, images).as_text()
        counts.append(Counter(re.findall(r"= (?:\")?(stablehlo\.\w+)", text)))
    assert counts[0] == counts[1] and counts[0].total() > 500
    assert module.micro_batch == named.micro_batch
    assert module.clone(parent=None).graph is module.graph
    assert [node.name for node in trace(module).layers][1:] == fzoo.layer_names(named)[1:]
