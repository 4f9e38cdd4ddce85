"""The networks that Keras 3 has no more, against tf-keras: layers, outputs, files; weights for several sizes.

What tf-keras gave is stored (`stored_tf_keras.py`); the slow tests ask the one that is installed.
"""

import importlib.util
import lzma
import re

import h5py
import jax
import numpy as np
import pytest
from hurry import COMPILER_OPTIONS
from networks import assert_alive, images_for, random_variables
from reference import assert_close, assert_equal, by_model
from stored import assert_summaries_close, summarise
from stored_tf_keras import (
    FILE,
    MODELS,
    SAVED,
    SMALL,
    build,
    build_small,
    create_options,
    create_small,
    describe_layers,
    measure_small,
    own_layers,
    save_file,
    small_network,
    stored_layers,
    stored_values,
)
from tiers import slow_but

import fzoo
from fzoo.layers.graph import trace
from fzoo.pretrained.imagenet import published
from fzoo.weights import WeightsMismatch
from fzoo.weights.mapping import slots

needs_tf_keras = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("tensorflow", "tf_keras"))), reason="tf-keras is not installed"
)

#: Their tests are quick.
QUICK = ("RegNetX080", "RegNetY002", "ResNetRS50")

#: Keras's weights of a size.
SIZES = [name for name in fzoo.list_models("ResNetRS*", tagged=True) if re.search(r"\.i\d+$", name)]


def test_all_are_there():
    assert set(MODELS) == {*fzoo.list_models("RegNet*", tagged=False), *fzoo.list_models("ResNetRS*", tagged=False)}
    assert set(MODELS) == set(stored_layers())


@pytest.mark.parametrize("name", by_model(MODELS, quick=QUICK))
def test_layers(name):
    """Keras's layers and their order, shapes and parameters, at full depth."""
    module, spec = fzoo.create(name), fzoo.spec(name)
    found = trace(module)
    ours = [[node.name, node.kind, list(node.shape), found.parameters[node.name]] for node in found.layers]
    assert ours == stored_layers()[name]
    assert module.example_shape == (224, 224, 3) and module.min_size == 32
    assert sum(leaf.size for leaf in jax.tree.leaves(found.variables)) == spec.parameters
    assert spec.depth == len(slots(module)) == sum(count > 0 for *_, count in ours)
    assert {file.include_top for file in spec.weight_files} == {True, False}


@pytest.mark.parametrize("name", slow_but(SMALL, "RegNetX080", "RegNetY002"))
def test_every_layer_of_a_small_version(name):
    """Those of the network, and those that are left in its form for inference; Keras's RegNet gives logits."""
    module, variables = small_network(name)
    if name.startswith("RegNet"):
        module = module.clone(classifier_activation=None)
    images, names = images_for(module, 2), fzoo.layer_names(module)
    theirs = dict(zip(names, stored_values()[f"{name} values"], strict=True))
    output = stored_values()[f"{name} output"]
    assert_alive(output)
    for form in ("plain", "optimized"):
        if form == "optimized":
            module, variables = fzoo.optimize_for_inference(module, variables)
        layers = fzoo.layer_names(module)
        found = jax.jit(
            lambda v, x, m=module, t=tuple(layers): m.apply(v, x, t, method="endpoints"),
            compiler_options=COMPILER_OPTIONS,
        )(variables, images)
        for layer in layers:
            assert_summaries_close(summarise(layer, found[layer]), theirs[layer], f"{name} {layer}, {form}", 1e-4)
        assert_close(found[names[-1]], output, f"{name}, {form}")


@pytest.mark.slow
@needs_tf_keras
@pytest.mark.parametrize("name", SMALL)
def test_stored_values_are_tf_keras(name):
    stored = stored_values()
    found = measure_small(name, stored[f"{name} statistics"])
    layers = fzoo.layer_names(small_network(name)[0])
    for layer, ours, theirs in zip(layers, found[f"{name} values"], stored[f"{name} values"], strict=True):
        assert_summaries_close(ours, theirs, f"{name} {layer}", 1e-4)
    assert_close(found[f"{name} output"], stored[f"{name} output"], name)


@pytest.mark.slow
@needs_tf_keras
@pytest.mark.parametrize("name", MODELS)
def test_stored_layers_are_tf_keras(name):
    model = build(name)
    assert describe_layers(model) == stored_layers()[name]
    assert model.count_params() == fzoo.spec(name).parameters


@pytest.mark.slow
@needs_tf_keras
@pytest.mark.parametrize("name", SMALL)
def test_what_training_starts_from_is_tf_keras(name):
    """Initial values, and how often what is dropped."""
    module = create_small(name)
    nodes = {node.name: node for node in trace(module).layers}
    drawn = 0
    for layer in own_layers(build_small(name, create_options(module)))[1:]:
        node = nodes[re.sub(r"\A\d+(_?head)", r"1\1", re.sub(r"\Astem_\d+", "stem_1", layer.name))]
        if hasattr(layer, "kernel_initializer"):
            start = layer.kernel_initializer
            assert node.kernel_init == (start.scale, start.mode, start.distribution), layer.name
            drawn += 1
        if hasattr(layer, "rate"):
            assert node.config["rate"] == pytest.approx(layer.rate), layer.name
    assert drawn == sum(node.kind in ("Conv2D", "Dense") for node in nodes.values())


@pytest.mark.parametrize(
    ("name", "layer", "momentum"), [("RegNetX080", "regnetx080_stem", 0.9), ("ResNetRS200", "stem_1_stem", 0.0)]
)
def test_statistics_move_as_keras_moves_them(name, layer, momentum):
    """ResNet-RS forgets all but the last batch."""
    module, variables = small_network(name)
    conv, norm = (f"{layer}_{end}" for end in (("conv", "bn") if momentum else ("conv_1", "batch_norm_1")))
    tapped, updates = jax.jit(
        lambda v, x: module.apply(v, x, [conv], train=frozenset([norm]), mutable=["batch_stats"], method="endpoints")
    )(variables, images_for(module, 2))
    mean = np.asarray(tapped[conv]).mean((0, 1, 2))
    before, after = (tree["batch_stats"][norm]["mean"] for tree in (variables, updates))
    assert_close(after, momentum * before + (1 - momentum) * mean, norm)


def test_stochastic_depth():
    """Blocks of the last stage are dropped most; those of 50, 101 and 152 never."""
    for name, most in (("ResNetRS50", 0.0), ("ResNetRS200", 0.1)):
        nodes = [node for node in trace(fzoo.create(name)).layers if node.name.endswith("_drop")]
        rates = {node.name.partition("__")[0]: node.config["rate"] for node in nodes}
        assert rates == pytest.approx({f"BlockGroup{stage}": most * stage / 5 for stage in range(2, 6)} if most else {})
    dropouts = {name: fzoo.spec(name).options["dropout_rate"] for name in MODELS if name.startswith("ResNetRS")}
    assert {name for name, rate in dropouts.items() if rate == 0.4} == {"ResNetRS350", "ResNetRS420"}


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, pytest.param(True, marks=[pytest.mark.slow, needs_tf_keras])], ids=["stored", "new"])
def saved(request, tmp_path):
    """A whole model as tf-keras saved it."""
    path = tmp_path / "whole.h5"
    if request.param:
        save_file(path)
    else:
        path.write_bytes(lzma.decompress(SAVED.read_bytes()))
    return path


def weights_only(whole, path):
    """The weights of a whole model alone, as Keras's published files have them: the same groups, at the root."""
    with h5py.File(whole) as source, h5py.File(path, "w") as file:
        for name, group in source["model_weights"].items():
            source.copy(group, file, name)
        file.attrs.update(source["model_weights"].attrs)
    return path


@pytest.mark.slow
def test_files(saved, tmp_path):
    """The head of the file is the second of its session; the file of a whole model says that its output is logits."""
    name, options = FILE
    module = fzoo.create(name, **options)
    variables = random_variables(module, statistics={})
    with h5py.File(saved) as file:
        assert "model_weights/2head_dense" in file
    alone = weights_only(saved, tmp_path / "weights.h5")
    loaded, found = fzoo.load(name, weights=alone, **options)
    assert loaded == module and loaded.classifier_activation == "softmax"
    assert_equal(found, variables)
    given = {key: value for key, value in options.items() if key != "classes"}
    whole, found = fzoo.load(name, weights=saved, **given)
    assert whole == module.clone(classifier_activation=None)
    assert_equal(found, variables)
    images = images_for(module, 2)
    logits = fzoo.predict(whole, found, images)
    assert_close(fzoo.predict(module, variables, images), np.asarray(jax.nn.softmax(logits)), "softmax")
    assert_close(fzoo.predict(*fzoo.load_model(saved), images), logits, "as the file describes it")
    with pytest.raises(WeightsMismatch, match="ends in no activation, classifier_activation='softmax' given"):
        fzoo.load(name, weights=saved, **given, classifier_activation="softmax")


def test_files_of_another_session():
    """Names that Keras counts over a session lead to those of the first."""
    regnet, resnet = (fzoo.spec(name).family.current_name for name in ("RegNetX002", "ResNetRS50"))
    assert [regnet(name) for name in ("12head_dense", "12_head_gap", "head_dense", "regnetx002_stem_conv")] == [
        "1head_dense",
        "1_head_gap",
        "head_dense",
        "regnetx002_stem_conv",
    ]
    assert [resnet(name) for name in ("stem_12_stem_conv_3", "stem_1_stem_batch_norm_4", "BlockGroup2__drop")] == [
        "stem_1_stem_conv_3",
        "stem_1_stem_batch_norm_4",
        "BlockGroup2__drop",
    ]


@pytest.mark.wrong_types
def test_bad_options():
    with pytest.raises(ValueError, match=r"widths=\(8, 12, 16, 24\) given, multiples of group_width=8 or less than it"):
        fzoo.create("RegNetX002", widths=(8, 12, 16, 24))
    with pytest.raises(ValueError, match="block_type='Z' given, 'X' or 'Y' expected"):
        fzoo.create("RegNetX002", block_type="Z")


# -- Keras's weights for several sizes ---------------------------------------------------------------------------------


def test_weights_of_a_size():
    """Without a tag, those for the largest size, at 224 x 224; with one, those that it names, at their size."""
    assert len(SIZES) == 11
    for name in SIZES:
        record, module = fzoo.spec(name), fzoo.create(name)
        model, _, tag = name.partition(".")
        size = int(tag.removeprefix("i"))
        assert module.example_shape == (size, size, 3) and record.input_size == size and module.tag == record.tag == tag
        assert record.top1 is not None and record.top5 is not None and 0.78 < record.top1 < record.top5 < 0.97
        assert fzoo.spec(model).input_size == 224 and fzoo.spec(model).top1 is None
        for top in (True, False):
            file = published(name, fzoo.create(name, include_top=top))
            ending = "" if top else "_notop"
            assert file.name == f"resnet-rs-{model.removeprefix('ResNetRS')}-{tag}{ending}.h5"
            largest = max(int(other.partition(".i")[2]) for other in SIZES if other.startswith(f"{model}."))
            assert (published(model, fzoo.create(model, include_top=top)) == file) == (size == largest)
    assert fzoo.create("ResNetRS152.i192", input_shape=(64, 64, 3)).example_shape == (64, 64, 3)
