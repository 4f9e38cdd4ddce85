"""Fine-tuning: what is frozen stays, what trains trains as in Keras, and a run survives what may happen to it."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from keras.src.applications.convnext import ConvNeXt
from keras.src.applications.efficientnet_v2 import EfficientNetV2
from networks import SMALL, assert_alive, images_for, random_images
from networks import network as alive_network
from PIL import Image
from reference import COMPILER_OPTIONS, assert_close, assert_equal, build, save_weights_only, set_variables
from stored import small_network
from tiers import slow

import fzoo
from fzoo import Head, Phase
from fzoo.models.efficientnet_v2 import Stage
from fzoo.training import finetune as loop
from fzoo.training.runs import describe, network, options_of
from fzoo.training.steps import TrainState, flow, logits_of, partition_params, phase_mask, trained_layers

TINY = {
    "stages": (Stage(True, 1, 32, 1, 2), Stage(True, 2, 32, 1, 2), Stage(False, 2, 64, 1, 2)),
    "width_coefficient": 0.25,
}


@pytest.fixture(scope="module")
def arrays():
    """Three classes told by the place of a bright square: 48 images to train on, 24 to test on; no two are alike."""
    labels = np.arange(72) % 3
    images = random_images((72, 32, 32, 3), pixels=True).astype(np.uint8) // 2
    for image, label in zip(images, labels, strict=True):
        image[8 * label : 8 * label + 10, 8 * label : 8 * label + 10] += 120
    return (images[:48], labels[:48]), (images[48:], labels[48:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, arrays):
    """The same images, as a folder that is split, with one that can't be read."""
    folder = tmp_path_factory.mktemp("photos")
    for split_name, (images, labels) in zip(("train", "val"), arrays, strict=True):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split_name / f"class_{'abc'[label]}" / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    (folder / "train" / "class_b" / "broken.png").write_bytes((folder / "val/class_a/00.png").read_bytes()[:100])
    return folder


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """Options of a fine-tuning of a small MobileNet that is alive."""
    path = tmp_path_factory.mktemp("mobilenet") / "weights.h5"
    fzoo.save_keras_weights(*small_network("MobileNet"), path)
    return {"alpha": 0.25, "size": 32, "weights": path}


@pytest.fixture(scope="module")
def backbone(arrays, tmp_path_factory):
    """A Keras MobileNet with these weights, without its top, and its file."""
    _, variables = small_network("MobileNet")
    model = build(keras.applications.MobileNet, alpha=0.25, input_shape=(32, 32, 3), include_top=False)
    images = fzoo.preprocess_input(arrays[0][0][:6].astype(np.float32), "MobileNet")
    assert_alive(set_variables(model, variables).predict(images, verbose=0))
    return model, save_weights_only(model, tmp_path_factory.mktemp("backbone") / "notop.h5")


@pytest.fixture(scope="module")
def tiny(arrays, tmp_path_factory):
    """Options of a fine-tuning of an EfficientNetV2 with three blocks, alive: what is quick to trace and to compile."""
    module, variables = alive_network("EfficientNetV2B0", **TINY, input_shape=(32, 32, 3), include_top=False)
    assert_alive(fzoo.predict(module, variables, arrays[0][0][:6].astype(np.float32)))
    path = tmp_path_factory.mktemp("tiny") / "notop.h5"
    fzoo.save_keras_weights(module, variables, path)
    return {**TINY, "size": 32, "weights": path}


# -- what trains -------------------------------------------------------------------------------------------------------


def test_frozen_is_frozen(arrays, tiny):
    """Parameters, batch statistics, the optimizer's state and the arithmetic of what does not train."""
    options = {**TINY, "weights": tiny["weights"], "input_shape": (32, 32, 3)}
    module, variables = fzoo.transfer("EfficientNetV2B0", classes=3, **options)
    start = fzoo.layer_names(module).index("block3a_dwconv2")
    phase = Phase(1, from_layer=start, optimizer="adam", batch_statistics=True)
    options = {**tiny, "phases": (phase,), "validation": arrays[1], "batch_size": 16}
    result = fzoo.finetune(arrays[0], "EfficientNetV2B0", **options)
    upper = set(fzoo.layer_names(module)[start:])
    for kind in ("params", "batch_stats"):
        for layer, before in variables[kind].items():
            after = result.variables[kind][layer]
            same = all(np.array_equal(before[name], after[name]) for name in before)
            assert same == (layer not in upper), f"{kind} of {layer}"

    mask = phase_mask(module, variables, phase)
    trained, _ = partition_params(variables["params"], mask)
    state = phase.transformation(10).init(trained)
    sizes = [leaf.size for leaf in jax.tree.leaves(trained)]
    assert sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == sorted(2 * sizes)


def flops(module, variables, phase, inputs=None):
    """Of a compiled step of training."""
    mask = phase_mask(module, variables, phase)
    stream = flow(module, trained_layers(mask), phase.batch_statistics)
    trained, frozen = partition_params(variables["params"], mask)
    optimizer = phase.transformation(1)
    state = TrainState(trained, variables["batch_stats"], optimizer.init(trained))
    step = jax.jit(functools.partial(fzoo.train_step, module, optimizer, train=stream.training))
    images = jnp.zeros((4, 32, 32, 3))
    if inputs == "frontier":
        images = fzoo.features(module, variables, images, stream.frontier)
    compiled = step.lower(state, frozen, images, jnp.zeros(4, int), jax.random.key(0)).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.slow
def test_no_gradient_below_what_trains():
    """By the operations of the compiled step."""
    module, variables = fzoo.transfer("MobileNet", classes=3, weights=None, alpha=0.25, input_shape=(32, 32, 3))
    images = jnp.zeros((4, 32, 32, 3))
    forward = jax.jit(module.apply).lower(variables, images).compile().cost_analysis()["flops"]
    head = flops(module, variables, Phase(trains="head"))
    assert forward < head < 1.02 * forward
    assert flops(module, variables, Phase(trains="head"), "frontier") < 0.02 * forward  # features that were kept


@pytest.mark.parametrize(
    ("phase", "first"),
    [
        (Phase(trains="head"), "predictions"),
        (Phase(trains="top"), "conv_dw_12"),
        (Phase(pattern="conv_pw_13*"), "conv_pw_13"),
        (Phase(from_layer="conv_pw_11_relu"), "conv_dw_12"),
        (Phase(trains="all"), "conv1"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.pattern or x.from_layer or x.trains,
)
def test_what_a_phase_trains(phase, first):
    module, variables = fzoo.transfer("MobileNet", classes=3, weights=None, alpha=0.25, input_shape=(64, 64, 3))
    names = fzoo.layer_names(module)
    layers = sorted(trained_layers(phase_mask(module, variables, phase)), key=names.index)
    assert layers[0] == first and layers[-1] == "predictions"


@pytest.mark.parametrize("model", ["VGG16", "InceptionV3", "ConvNeXtTiny", "EfficientNetB0"])
def test_the_top_of_other_families(model):
    """There is something to train in the second default phase, and less than all; frozen features suffice for it."""
    module = fzoo.create(model, classes=3, head=Head(), **SMALL[model][1])
    found = fzoo.layers.trace(module)
    mask = phase_mask(module, found.variables, Phase(trains="top"))
    layers = trained_layers(mask)
    assert {"predictions"} < layers < set(found.variables["params"])
    frontier = flow(module, layers).frontier
    assert frontier and "input_layer" not in frontier


# -- beside Keras ------------------------------------------------------------------------------------------------------


def keras_losses(model, rate, batches):
    """Keras's loss at each step of SGD with momentum, of a model that gives logits."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), loss)
    losses = []
    for batch in batches:
        model.reset_metrics()
        losses.append(float(model.train_on_batch(*batch)))
    return losses


@pytest.fixture(scope="module")
def tiny_backbone(tiny):
    """The Keras network of which `tiny` has the weights."""
    common = {"input_shape": (32, 32, 3), "include_top": False}
    _, variables = alive_network("EfficientNetV2B0", **TINY, **common)
    rows, before = [], 32
    for stage in TINY["stages"]:
        rows.append({"kernel_size": 3, "num_repeat": stage.repeats, "input_filters": before, "strides": stage.stride})
        rows[-1] |= {"output_filters": stage.filters, "expand_ratio": stage.expansion}
        rows[-1] |= {"se_ratio": 0 if stage.fused else 0.25, "conv_type": int(stage.fused)}
        before = stage.filters
    options = {"width_coefficient": TINY["width_coefficient"], "depth_coefficient": 1.0, "default_size": 224}
    model = build(EfficientNetV2, **options, blocks_args=rows, name="efficientnetv2-b0", **common)
    return set_variables(model, variables)


@pytest.mark.parametrize(
    ("name", "first", "rate"),
    [
        pytest.param("EfficientNetV2B0", "block3a_dwconv2", 1e-3, id="tiny-top"),
        slow("MobileNet", "predictions", 1e-2, id="head"),
        slow("MobileNet", "conv_dw_12", 1e-3, id="top"),
    ],
)
def test_training_is_keras(request, arrays, name, first, rate):
    """SGD with momentum from the same weights on the same batches: the same losses for 20 steps, and statistics."""
    small = request.getfixturevalue("mobilenet" if name == "MobileNet" else "tiny")
    base = request.getfixturevalue("backbone")[0] if name == "MobileNet" else request.getfixturevalue("tiny_backbone")
    options = {"optimizer": "sgd", "options": {"momentum": 0.9}, "learning_rate": rate}
    phase = Phase(20, from_layer=first, batch_statistics=True, **options)
    common = {**small, "classes": 3, "head": Head(hidden=8)}
    module, variables = fzoo.transfer(name, **{k: v for k, v in common.items() if k != "size"}, input_shape=(32, 32, 3))

    keras.utils.clear_session()  # numbered layers start anew
    copy = keras.models.clone_model(base)
    copy.set_weights(base.get_weights())
    pool = None if name == "MobileNet" else "avg_pool"
    x = keras.layers.GlobalAveragePooling2D(name=pool)(copy.output)
    x = keras.layers.Dense(8, activation="relu", name="dense")(x)
    model = keras.Model(copy.input, keras.layers.Dense(3, name="predictions")(x))
    names = [layer.name for layer in model.layers]
    assert names[1:] == fzoo.layer_names(module)[1:]
    for layer in ("dense", "predictions"):
        model.get_layer(layer).set_weights([variables["params"][layer][k] for k in ("kernel", "bias")])
    for layer in model.layers[: names.index(first)]:
        layer.trainable = False

    (images, labels), _ = arrays
    batches = []
    for step in range(20):
        chosen = np.random.default_rng(step).choice(48, 16, replace=False)
        batches.append((fzoo.preprocess_input(images[chosen], name), labels[chosen]))
    theirs = keras_losses(model, rate, batches)
    ours = fzoo.finetune(iter(batches), name, **common, phases=(phase,), steps_per_epoch=1)
    np.testing.assert_allclose([row["loss"] for row in ours.history], theirs, rtol=1e-3)
    assert theirs[-1] < theirs[0]
    last = "conv_pw_13_bn" if name == "MobileNet" else "top_bn"
    bn = model.get_layer(last).get_weights()
    np.testing.assert_allclose(ours.variables["batch_stats"][last]["mean"], bn[2], rtol=2e-3, atol=1e-4)


@pytest.mark.slow  # by default, a step of it is done by hand: `test_options_of_training`
def test_training_of_everything_is_keras(arrays, tmp_path):
    """All layers of a smooth network. With BN and ReLU, Keras beside itself, a bit apart, differs after five steps."""
    small: dict[str, Any] = {"depths": (1, 1, 2, 1), "projection_dims": (8, 16, 32, 64), "layer_scale_init_value": 0.5}
    keras.utils.set_random_seed(0)
    options = {"include_top": False, "input_shape": (32, 32, 3), "pooling": "avg", "name": "convnext_tiny"}
    base = ConvNeXt(**small, **options)
    base.save_weights(tmp_path / "base.weights.h5")
    (images, labels), _ = arrays
    chosen = [np.random.default_rng(step).choice(48, 16, replace=False) for step in range(20)]
    batches = [(images[c], labels[c]) for c in chosen]
    options = {"weights": tmp_path / "base.weights.h5", "classes": 3, **small}
    phases = (Phase(20, trains="all", optimizer="sgd", options={"momentum": 0.9}, learning_rate=1e-3),)
    ours = fzoo.finetune(iter(batches), "ConvNeXtTiny", **options, size=32, phases=phases, steps_per_epoch=1)

    _, variables = fzoo.transfer("ConvNeXtTiny", **options, input_shape=(32, 32, 3))  # the same seed, and first head
    top = keras.layers.Dense(3, name="predictions")
    model = keras.Model(base.input, top(base.output))
    top.set_weights([variables["params"]["predictions"][name] for name in ("kernel", "bias")])
    theirs = keras_losses(model, 1e-3, batches)
    np.testing.assert_allclose([row["loss"] for row in ours.history], theirs, rtol=1e-3)
    assert theirs[-1] < 0.9 * theirs[0]
    kernel = "convnext_tiny_stage_2_block_1_depthwise_conv"
    expected, _ = base.get_layer(kernel).get_weights()
    trained = ours.variables["params"][kernel]["kernel"]
    np.testing.assert_allclose(trained.ravel(), expected.ravel(), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_keras(backbone):
    """Of every parameter, in training: all that a step of the whole network depends on."""
    base, file = backbone
    module = fzoo.create("MobileNet", alpha=0.25, include_top=False, input_shape=(32, 32, 3))
    variables = fzoo.load_keras_weights(module, file)
    rng = np.random.default_rng(0)
    images, weights = random_images((16, 32, 32, 3)), rng.normal(size=(16, 1, 1, 256))

    def ours(params):
        tree = {"params": params, "batch_stats": variables["batch_stats"]}
        y, _ = module.apply(tree, images, train=True, mutable=["batch_stats"])
        return jnp.mean(y * weights)

    def theirs(trained):
        y, _ = base.stateless_call(trained, [v.value for v in base.non_trainable_variables], images, training=True)
        return jnp.mean(y * weights)

    found = jax.jit(jax.grad(ours), compiler_options=COMPILER_OPTIONS)(variables["params"])
    expected = jax.jit(jax.grad(theirs), compiler_options=COMPILER_OPTIONS)([v.value for v in base.trainable_variables])
    for variable, gradient in zip(base.trainable_variables, expected, strict=True):
        layer, name = variable.path.split("/")[-2:]
        array = found[layer][{"gamma": "scale", "beta": "bias"}.get(name, name)]
        assert_close(array, np.asarray(gradient).reshape(array.shape), variable.path)


# -- a run -------------------------------------------------------------------------------------------------------------

RUN = {
    "batch_size": 16,
    "seed": 1,
    "phases": (
        Phase(3, trains="head", learning_rate=1e-2),
        Phase(3, trains="top", optimizer="sgd", options={"momentum": 0.9}, learning_rate=1e-2, schedule="cosine"),
    ),
}


def test_a_run_and_what_reads_it(folder, mobilenet, tmp_path):
    """From a folder of images: what is written, what Keras and fzoo make of it, and what was said of a broken image."""
    said = []
    options = {**mobilenet, **RUN, "head": Head(hidden=8, dropout=0.2), "out": tmp_path / "run"}
    result = fzoo.finetune(folder, "MobileNet", **options, report=said.append)
    assert result.class_names == ("class_a", "class_b", "class_c")
    assert [path.name for path in result.broken] == ["broken.png"]
    assert sum("broken.png" in line for line in said) == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert [(row["phase"], row["epoch"]) for row in rows] == [(phase, epoch) for phase in (1, 2) for epoch in (1, 2, 3)]
    assert result.evaluation is not None and result.evaluation.images == 24
    for picture in ("curves.png", "confusion.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / "run" / picture)))) > 10
    table = [line.split(",") for line in (tmp_path / "run" / "confusion.csv").read_text().splitlines()]
    np.testing.assert_array_equal([row[1:] for row in table[1:]], result.evaluation.confusion.astype(str))

    run = fzoo.load_run(tmp_path / "run")
    assert_equal(run.variables, result.variables)
    images = np.stack([run.recipe.load(path) for path in sorted((folder / "val").rglob("*.png"))])
    ours = fzoo.predict(run.module, run.variables, images, preprocess="MobileNet")
    base = build(keras.applications.MobileNet, include_top=False, alpha=0.25, input_shape=(32, 32, 3))
    x = keras.layers.Dense(8, activation="relu")(keras.layers.GlobalAveragePooling2D()(base.output))
    x = keras.layers.Dense(3, activation="softmax", name="predictions")(keras.layers.Dropout(0.2)(x))
    model = keras.Model(base.input, x)
    model.load_weights(tmp_path / "run" / "model.h5")
    theirs = model.predict(fzoo.preprocess_input(images, "MobileNet"), verbose=0)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.std(theirs, axis=0).max() > 0.05  # it is alive
    labels = np.repeat(np.arange(3), 8)
    assert np.mean(theirs.argmax(1) == labels) == pytest.approx(result.evaluation.top1)
    assert -np.log(theirs[np.arange(24), labels]).mean() == pytest.approx(result.evaluation.mean_loss, rel=1e-4)

    again = fzoo.finetune(folder, "MobileNet", **options, resume=True)
    assert_equal(again.variables, result.variables)  # a finished run is not trained again


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("EfficientNetB0", {"divide_by_std": True}),  # which published weights bring along
        ("MobileNetV2", {"alpha": 0.35, "dtype": jnp.bfloat16}),
        ("MobileNetV3Small", {"minimalistic": True}),
        ("ResNet50", {}),
        ("EfficientNetV2B0", TINY),  # rows of a table
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_configuration_tells_the_network(model, options):
    """From the configuration as JSON has it, the same network."""
    head = Head(hidden=4)
    module = fzoo.create(model, classes=3, head=head, input_shape=(64, 64, 3), **options)
    config = describe(model=model, head=head, classes=["a", "b", "c"], options=options_of(module, model))
    assert network(json.loads(json.dumps(config))) == module


def test_features_that_are_kept_change_nothing(arrays, tiny):
    """The same batches in the same order, whether the frozen part is computed once or in each epoch."""
    options = {**tiny, **RUN, "validation": arrays[1]}
    kept, computed = (
        fzoo.finetune(arrays[0], "EfficientNetV2B0", **options, cache_features=cache) for cache in (None, False)
    )
    for a, b in zip(kept.history, computed.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)


@pytest.mark.parametrize("cache", [None, False], ids=["kept", "computed"])
def test_each_image_has_its_label(arrays, tiny, cache):
    """An epoch at a rate of next to nothing has the losses of the network as it starts, reckoned by hand."""
    phases = (Phase(1, trains="head", optimizer="sgd", learning_rate=1e-12),)
    options = {**tiny, "phases": phases, "validation": arrays[1], "batch_size": 16, "seed": 3}
    result = fzoo.finetune(arrays[0], "EfficientNetV2B0", **options, cache_features=cache)
    common = {"weights": tiny["weights"], **TINY, "input_shape": (32, 32, 3)}
    module, variables = fzoo.transfer("EfficientNetV2B0", classes=3, rng=jax.random.key(3), **common)
    (row,) = result.history
    images = np.concatenate([images for images, _ in arrays]).astype(np.float32)
    probabilities = np.asarray(jax.jit(module.apply, compiler_options=COMPILER_OPTIONS)(variables, images))
    for prefix, (_, labels), p in zip(("", "val_"), arrays, np.split(probabilities, [48]), strict=True):
        losses = -np.log(p)
        wanted = losses[np.arange(len(labels)), labels].mean()
        assert row[f"{prefix}loss"] == pytest.approx(wanted, rel=1e-4)
        assert row[f"{prefix}accuracy"] == pytest.approx(np.mean(p.argmax(1) == labels))
        for others in (np.roll(labels, 1), labels[::-1]):
            assert abs(losses[np.arange(len(labels)), others].mean() - wanted) > 1e-2 * wanted


def test_features_from_within_a_dense_block():
    """What is kept is a concatenation that grows on: the layers above read it, and not what led to it."""
    module, variables = small_network("DenseNet121")
    module = module.clone(classifier_activation=None)
    images, layer = images_for(module), "conv3_block1_concat"

    def both(variables, images):
        taps = module.apply(variables, images, (layer,), method="endpoints")
        return module.apply(variables, images), logits_of(module, variables, taps)[0]

    whole, above = jax.jit(both, compiler_options=COMPILER_OPTIONS)(variables, images)
    assert_alive(whole)
    assert_close(above, np.asarray(whole), "from the features on")


@pytest.mark.slow
def test_real_photographs(real, tmp_path):
    """Parts of scikit-learn's two photographs, with real weights: the head alone tells them apart in seconds."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        (tmp_path / name).mkdir()
        for i in range(20):
            top, left = rng.integers(0, 200), rng.integers(0, 400)
            Image.fromarray(photo[top : top + 200, left : left + 200]).save(tmp_path / name / f"{i}.jpg")
    weights = real / "mobilenet_v2_imagenet.h5"
    options = {"size": 96, "batch_size": 8, "validation_split": 0.5, "phases": (Phase(3, trains="head"),)}
    result = fzoo.finetune(tmp_path, "MobileNetV2", weights=weights, **options)
    assert result.evaluation is not None and result.evaluation.top1 >= 0.9


@pytest.mark.parametrize(
    ("trains", "options"),
    [
        ("head", {"accumulate": 2}),
        ("head", {"label_smoothing": 0.1}),
        ("head", {"dtype": jnp.bfloat16}),
        ("all", {}),
    ],
    ids=str,
)
def test_options_of_training(arrays, tiny, trains, options):
    """Against the same done by hand, for one step."""
    (images, labels), _ = arrays
    rate = 0.5 if trains == "head" else 1e-3
    phase = Phase(1, trains=trains, optimizer="sgd", learning_rate=rate)
    common = {**tiny, "phases": (phase,), "validation_split": 0.0, "classes": 3}
    x = images[:32].astype(np.float32)
    halves = [(x[:16], labels[:16]), (x[16:], labels[16:32])]
    batches = halves if "accumulate" in options else [(x, labels[:32])]
    result = fzoo.finetune(batches, "EfficientNetV2B0", **common, **options)
    dtype = options.get("dtype", jnp.float32)
    create = {**TINY, "input_shape": (32, 32, 3), "dtype": dtype, "classifier_activation": None}
    module, variables = fzoo.transfer("EfficientNetV2B0", classes=3, weights=tiny["weights"], **create)

    trained = {"predictions": variables["params"]["predictions"]} if trains == "head" else variables["params"]

    def loss(trained):
        logits = module.apply({**variables, "params": {**variables["params"], **trained}}, x)
        wanted = optax.smooth_labels(jax.nn.one_hot(labels[:32], 3), options.get("label_smoothing", 0.0))
        return optax.softmax_cross_entropy(logits, wanted).mean()

    gradients = jax.jit(jax.grad(loss), compiler_options=COMPILER_OPTIONS)(trained)
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-4
    for layer, arrays_of in gradients.items():
        for name, gradient in arrays_of.items():
            before, after = variables["params"][layer][name], result.variables["params"][layer][name]
            assert after.dtype == jnp.float32 and np.abs(gradient).max() > 0
            wanted = before - rate * gradient
            np.testing.assert_allclose(after, wanted, atol=tolerance * float(np.abs(wanted).max()))


def test_augmented_images():
    """Other parts of the image each time, mirrored or not, the same for the same seed; none in evaluation."""
    from fzoo.images.recipe import Recipe, random_box

    boxes = [random_box(400, 300, np.random.default_rng(i)) for i in range(200)]
    areas = [(right - left) * (bottom - top) / 120000 for left, top, right, bottom in boxes]
    assert min(areas) >= 0.07 and max(areas) <= 1.0 and np.std(areas) > 0.2
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        assert 0.7 < (right - left) / (bottom - top) < 1.4
    left, top, right, bottom = random_box(1000, 10, np.random.default_rng(0))
    assert (right - left, bottom - top) == (10, 10)
    assert str(Recipe((224, 224))) == "shorter side to 256 by bicubic, centre crop of 224 x 224"


# -- what may happen ---------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, numpy as np, fzoo
sys.path.insert(0, {tests!r})
from test_finetune import RUN
fzoo.enable_compilation_cache({cache!r})
options = {{**{small!r}, **RUN, "out": {out!r}, "resume": True, "checkpoint_every": 1}}
fzoo.finetune({data!r}, "MobileNet", **options, report=lambda line: print(line, flush=True))
"""


def start(data, small, out, cache):
    small = {**small, "weights": str(small["weights"])}
    code = PROGRAM.format(tests=str(Path(__file__).parent), cache=str(cache), data=str(data), small=small, out=str(out))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ})


@pytest.mark.slow
def test_ten_kills(folder, mobilenet, tmp_path):
    """Killed again and again, at random moments; a run that never was, beside it."""
    cache = tmp_path / "cache"
    process = start(folder, mobilenet, tmp_path / "whole", cache)
    process.communicate()
    assert process.returncode == 0
    rng = random.Random(0)
    for _ in range(10):
        process = start(folder, mobilenet, tmp_path / "killed", cache)
        assert process.stdout is not None
        process.stdout.readline()  # it is under way
        try:
            process.wait(rng.uniform(0, 4))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    process = start(folder, mobilenet, tmp_path / "killed", cache)
    process.communicate()
    assert process.returncode == 0
    whole, survivor = (
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "killed")
    )
    assert whole == survivor
    assert_equal(*(fzoo.load_run(tmp_path / run).variables for run in ("whole", "killed")))


@pytest.mark.slow
def test_long_epoch(arrays, tiny, tmp_path, monkeypatch):
    """It is saved in the middle, too: what stops there goes on from the last step, of the phase that it was in."""
    (images, labels), validation = arrays
    batches = [(images[i : i + 16], labels[i : i + 16]) for i in (0, 16, 32)]

    def stops():
        yield from batches
        yield from batches[:2]
        raise OSError("the disk with the images is gone")

    phases = (Phase(1, trains="head", learning_rate=1e-2), Phase(1, trains="top", learning_rate=1e-3))
    options = {**tiny, "phases": phases, "classes": 3, "steps_per_epoch": 3, "validation": validation}
    whole = fzoo.finetune(batches, "EfficientNetV2B0", **options)
    options["out"] = tmp_path / "run"
    with pytest.raises(OSError, match="gone"), monkeypatch.context() as patch:
        patch.setattr(loop, "LONG_EPOCH_SECONDS", 0)
        fzoo.finetune(stops(), "EfficientNetV2B0", **options)
    said = []
    again = fzoo.finetune(batches, "EfficientNetV2B0", **options, resume=True, report=said.append)
    assert said[0] == "resumed in phase 2, epoch 1, after 5 steps"
    assert len(said) == 2 and said[1].startswith("phase 2, epoch 1/1: ")
    assert_equal(whole.variables, again.variables)
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]


DISTRIBUTED = """
import os, sys, numpy as np
out, count = sys.argv[1], int(sys.argv[2])
if count > 1:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={{count}}"
import jax, fzoo
from fzoo import devices
if len(sys.argv) > 3:
    devices.start_distributed(sys.argv[3])
assert jax.device_count() == max(count, jax.process_count())
from fzoo import Phase
data = np.load({data!r})
phases = (Phase(1, trains="top", optimizer="sgd", learning_rate=1e-2, batch_statistics=True),)
options = dict(weights={weights!r}, alpha=0.25, size=32, phases=phases, batch_size=16, seed=1, cache_features=False)
options["steps_per_epoch"] = 1  # the gradients alone: what rounding differs by grows from step to step
validation = data["vx"], data["vy"]
result = fzoo.finetune((data["x"], data["y"]), "MobileNet", **options, validation=validation, out=out + ".run")
if jax.process_index() == 0:
    leaves = jax.tree.leaves(result.variables)
    np.savez(out, *leaves, losses=[r["loss"] for r in result.history], confusion=result.evaluation.confusion)
"""


@pytest.mark.slow
def test_devices_and_processes_train_as_one(arrays, backbone, tmp_path):
    """8 devices of a process, and 2 processes: gradients and batch statistics of the whole batch, as on one device."""
    (x, y), (vx, vy) = arrays
    np.savez(tmp_path / "data.npz", x=x, y=y, vx=vx, vy=vy)
    code = DISTRIBUTED.format(weights=str(backbone[1]), data=str(tmp_path / "data.npz"))

    def run(name, *arguments):
        command = [sys.executable, "-c", code, str(tmp_path / name), *arguments]
        return subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"})

    port = 20000 + os.getpid() % 20000
    assert run("one.npz", "1").wait() == 0
    assert run("eight.npz", "8").wait() == 0
    both = [run("two.npz", "1", f"127.0.0.1:{port},{i},2") for i in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    one = np.load(tmp_path / "one.npz")
    for name in ("one.npz", "two.npz"):
        leaves = jax.tree.leaves(fzoo.load_run(tmp_path / f"{name}.run").variables)
        for i, leaf in enumerate(leaves):
            np.testing.assert_array_equal(leaf, np.load(tmp_path / name)[f"arr_{i}"])
    for name in ("eight.npz", "two.npz"):
        other = np.load(tmp_path / name)
        assert other.files == one.files
        for key in one.files:
            np.testing.assert_allclose(other[key], one[key], rtol=2e-3, atol=2e-4, err_msg=f"{name} {key}")


@pytest.mark.slow
def test_processes_begin_a_run_together(tmp_path):
    """The one that comes late finds the folder begun, and takes it for no other run; all end where the first can't."""
    code = """
import pathlib, sys, time
from fzoo import devices
from fzoo.training import runs
number, _ = devices.start_distributed(sys.argv[2])
time.sleep(2 * number)
run = runs.Run(pathlib.Path(sys.argv[1]), {"model": "MobileNet"}, False)
run.checkpoints.close()
try:
    runs.Run(pathlib.Path(sys.argv[1]), {"model": "MobileNet"}, False)
except OSError as e:
    print(e)
"""
    port = 20000 + os.getpid() % 20000
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    env, pipes = {**os.environ, "JAX_PLATFORMS": "cpu"}, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen([*command, f"127.0.0.1:{port},{i},2"], env=env, text=True, **pipes) for i in range(2)]
    (first, _), (second, _) = said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "holds a run already" in first and "process 0 could not begin" in second


def test_loss_that_is_not_finite(arrays, tiny, tmp_path):
    """It stops and says so, and the last good checkpoint is what the run goes on from."""
    phases = (Phase(1, trains="head"), Phase(3, trains="head", optimizer="sgd", learning_rate=1e38))
    options = {**tiny, "phases": phases, "batch_size": 16, "validation": arrays[1], "out": tmp_path / "run"}
    said = r"not finite any more \(phase 2, epoch 1.*lower learning_rate.*checkpoint is kept"
    with pytest.raises(ValueError, match=said):
        fzoo.finetune(arrays[0], "EfficientNetV2B0", **options)
    said = []
    with pytest.raises(ValueError, match="not finite"):
        fzoo.finetune(arrays[0], "EfficientNetV2B0", **options, resume=True, report=said.append)
    assert any("resumed in phase 2, epoch 1, after" in line for line in said)
    with pytest.raises(ValueError, match="has not finished"):
        fzoo.load_run(tmp_path / "run")


def test_run_of_other_settings(arrays, tiny, mobilenet, tmp_path):
    options = {**tiny, "phases": (Phase(1, trains="head"),), "validation": arrays[1]}
    fzoo.finetune(arrays[0], "EfficientNetV2B0", **options, batch_size=16, out=tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"holds a run already.*--resume"):
        fzoo.finetune(arrays[0], "EfficientNetV2B0", **options, batch_size=16, out=tmp_path / "run")
    with pytest.raises(ValueError, match="other settings: batch_size 16, not 24"):
        fzoo.finetune(arrays[0], "EfficientNetV2B0", **options, batch_size=24, out=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"other settings: model .*EfficientNetV2B0.*, not .*MobileNet"):
        other = {**mobilenet, "phases": options["phases"], "validation": arrays[1], "batch_size": 16}
        fzoo.finetune(arrays[0], "MobileNet", **other, out=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"other settings: .*other images"):
        fzoo.finetune(arrays[1], "EfficientNetV2B0", **options, batch_size=16, out=tmp_path / "run", resume=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        fzoo.finetune(arrays[0], "EfficientNetV2B0", **options, batch_size=16, out=tmp_path / "else")


def test_damaged_checkpoint(arrays, tiny, tmp_path):
    options = {**tiny, "phases": (Phase(1, trains="head"),), "validation": arrays[1], "batch_size": 16}
    options["out"] = tmp_path / "run"
    fzoo.finetune(arrays[0], "EfficientNetV2B0", **options)
    (tmp_path / "run" / "model.h5").unlink()
    for path in (tmp_path / "run" / "checkpoints").rglob("*"):
        if path.is_file() and "variables" in path.parts:
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoints/.*not of this network"):
        fzoo.finetune(arrays[0], "EfficientNetV2B0", **options, resume=True)


@pytest.mark.slow
def test_full_disk(folder, mobilenet, tmp_path):
    """A checkpoint that does not fit is an error of one line; with room again, the run goes on from the one before."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        options = {**mobilenet, "batch_size": 16, "phases": (Phase(1, trains="head"),) * 2, "out": disk / "run"}
        fzoo.finetune(folder, "MobileNet", **options)
        (disk / "run" / "model.h5").unlink()
        last = max((disk / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
        shutil.rmtree(last)  # as a kill in the second phase leaves it
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 20000))
        phase = "trains=head epochs=1"
        command = ["finetune", folder, "--out", disk / "run", "--model", "MobileNet", "-o", "alpha=0.25", "--resume"]
        command += ["--size", 32, "--batch-size", 16, "--phase", phase, "--phase", phase]
        command += ["--weights", mobilenet["weights"]]
        done = run_command(*command)
        assert done.returncode == 2, done.stderr
        *before, error = done.stderr.splitlines()
        assert error.startswith("fzoo: error: ") and "No space left" in error and str(disk / "run") in error
        assert all(line.startswith("fzoo: ") for line in before)
        ballast.unlink()
        done = run_command(*command)
        assert "resumed in phase 2, epoch 1" in done.stderr and done.returncode == 1, done.stderr  # one image is broken
        assert len((disk / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def run_command(*arguments):
    command = [sys.executable, "-m", "fzoo.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


@pytest.mark.slow  # by default the README's commands are run
def test_on_the_command_line(folder, mobilenet, tmp_path):
    """Trained, evaluated and used by the folder of the run alone, with its own names and recipe."""
    run = tmp_path / "run"
    options = ["--size", 32, "--batch-size", 16, "-o", "alpha=0.25", "--model", "MobileNet"]
    options += ["--weights", mobilenet["weights"]]
    done = run_command(
        "finetune", folder, "--out", run, *options, "--phase", "trains=head epochs=2 optimizer=sgd momentum=0.9"
    )
    assert done.returncode == 1 and "1 images could not be read" in done.stderr, done.stderr
    assert "phase 1, epoch 2/2: loss" in done.stderr
    told = dict(line.split("\t") for line in done.stdout.splitlines())
    accuracy = told["accuracy on held-out images"]

    done = run_command("evaluate", folder / "val", "--weights", run, "--out", tmp_path / "classes.csv")
    assert done.returncode == 0, done.stderr
    told = dict(line.split("\t")[:2] for line in done.stdout.splitlines()[:5])
    assert float(told["top-1"].rstrip("%")) == pytest.approx(float(accuracy.split("%")[0]), abs=0.06)
    assert told["recipe"] == "shorter side to 37 by bicubic, centre crop of 32 x 32" and told["top-5"] == "100.00%"
    assert (tmp_path / "classes.csv").read_text().startswith("class,images,top1\nclass_")

    image = folder / "val" / "class_a" / "00.png"
    done = run_command("classify", image, "--weights", run, "--top", 3)
    assert done.returncode == 0, done.stderr
    said = {label: float(p) for _, _, label, p in (line.split("\t") for line in done.stdout.splitlines())}
    found = fzoo.load_run(run)
    expected = np.asarray(
        fzoo.predict(found.module, found.variables, found.recipe.load(image)[None], preprocess="MobileNet")
    )
    assert said == pytest.approx(dict(zip(found.class_names, expected[0], strict=True)), abs=1e-5)

    for arguments, error in (
        (["finetune", folder, "--out", run, *options], "holds a run already"),
        (["finetune", folder, "--out", tmp_path / "b", "--phase", "epochs"], "NAME=VALUE pairs expected"),
        (
            ["evaluate", folder, "--weights", run],
            f"a part of a data set by its name: {folder}/train expected",
        ),
        (["classify", image, "--weights", run, "--size", 64], "was trained on 32 x 32"),
    ):
        done = run_command(*arguments)
        *before, last = done.stderr.splitlines()
        assert done.returncode == 2 and error in last, done.stderr
        assert not any("error" in line for line in before) and all(line.startswith("fzoo: ") for line in before)


# -- bad input ---------------------------------------------------------------------------------------------------------


def make(root, **classes):
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / name / f"{i}.png")
    return root


def test_bad_folders(tiny, tmp_path):
    def tune(path, **options):
        return fzoo.finetune(path, "EfficientNetV2B0", **{**tiny, **options})

    with pytest.raises(FileNotFoundError, match="no such folder"):
        tune(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        tune(tmp_path / "file")
    with pytest.raises(ValueError, match=r"1 class folders \(cats\), 2 or more"):
        tune(make(tmp_path / "one", cats=3))
    with pytest.raises(ValueError, match=r"class folder .*dogs has no images"):
        tune(make(tmp_path / "empty", cats=3, dogs=0))
    with pytest.raises(ValueError, match="class dogs has 1 image: none can be held out"):
        tune(make(tmp_path / "single", cats=3, dogs=1))
    with pytest.raises(ValueError, match="batch_size=32 given, 4 training images"):
        tune(make(tmp_path / "few", cats=3, dogs=3))
    make(tmp_path / "split" / "train", cats=2, dogs=2)
    make(tmp_path / "split" / "val", cats=2, cows=2)
    with pytest.raises(ValueError, match="different classes: cows, dogs"):
        tune(tmp_path / "split")
    bad = make(tmp_path / "bad", cats=6, dogs=6)
    for path in bad.rglob("*.png"):
        path.write_bytes(b"no image")
    said = []
    with pytest.raises(ValueError, match=r"^more than 2 images could not be read \(max_broken\)$"):
        tune(bad, max_broken=2, batch_size=2, report=said.append)
    assert sum(line.startswith("skipped:") for line in said) >= 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"phases": ()}, "phases="),
        ({"batch_size": 0}, "batch_size=0"),
        ({"label_smoothing": 1}, "label_smoothing=1"),
        ({"phases": (Phase(1, from_layer="conv_99"),)}, "unknown layer 'conv_99': did you mean"),
        ({"phases": (Phase(1, from_layer=999),)}, "from_layer=999"),
        ({"phases": (Phase(1, pattern="zzz*"),)}, "unknown layer pattern"),
        ({"weights": "nothing.h5"}, "nothing.h5"),
        ({"cache_features": True, "augment": True}, "cache_features=True"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_options(arrays, tiny, options, said):
    with pytest.raises((ValueError, OSError), match=said):
        fzoo.finetune(arrays[0], "EfficientNetV2B0", **{**tiny, "batch_size": 16, "validation": arrays[1], **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"trains": "tail"}, "trains='tail'"),
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm': did you mean adam"),
        ({"options": {"momentun": 0.9}, "optimizer": "sgd"}, "momentun"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin': did you mean cosine"),
        ({"learning_rate": -1}, "learning_rate=-1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_phases(options, said):
    with pytest.raises(ValueError, match=said):
        Phase(**options)


@pytest.mark.wrong_types
def test_bad_batches(tiny):
    x, y = np.zeros((4, 32, 32, 3), np.float32), np.array([0, 1, 2, 3])
    for data, said in (
        ([(x, y)] * 2, "labels from 0 to 3 given, 0 to 2 expected"),
        ([x], r"\(images, labels\) expected"),
        (iter([(x, y % 3)]), "steps_per_epoch expected"),
        (5, "a folder, arrays or an iterable"),
    ):
        with pytest.raises(ValueError, match=said):
            fzoo.finetune(data, "EfficientNetV2B0", **tiny, classes=3, phases=(Phase(1, trains="head"),))
    with pytest.raises(ValueError, match="the data ended after 2 batches"):
        options = {**tiny, "classes": 3, "steps_per_epoch": 3, "phases": (Phase(1, trains="head"),)}
        fzoo.finetune(iter([(x, y % 3)] * 2), "EfficientNetV2B0", **options)
    with pytest.raises(ValueError, match="classes expected"):
        fzoo.finetune([(x, y)], "EfficientNetV2B0", **tiny)
