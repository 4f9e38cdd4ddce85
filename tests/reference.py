"""Keras's own networks with random arrays, and what they compute: the truth that the tests hold fzoo against."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import jax
import keras
import numpy as np
import pytest
from hurry import COMPILER_OPTIONS
from keras.src.applications import convnext, densenet, efficientnet, efficientnet_v2, inception_resnet_v2, nasnet
from keras.src.applications import resnet as resnet_module
from keras.src.initializers import random_initializers
from keras.src.legacy.saving import legacy_h5_format
from networks import SMALL, random_array, random_images, random_variables, small_options
from tiers import slow

import fzoo
from fzoo.layers.classifier import Classifier
from fzoo.layers.computation import computation_of
from fzoo.models.keras_model import keras_model as keras_model_of
from fzoo.weights.config import Configuration
from fzoo.weights.graph import build_graph

__all__ = ["COMPILER_OPTIONS", "random_images"]  # for those that compare with Keras


class Case(NamedTuple):
    """The inputs that a model is tested on at full depth: its least size, and one whose sides are odd and differ."""

    least: int
    odd: tuple[int, int]


LEAST_32 = Case(32, (65, 47))
LEAST_75 = Case(75, (97, 83))

#: Every model of the registry; a test fails for one that is missing here.
CASES = {
    **dict.fromkeys(["ConvNeXtBase", "ConvNeXtLarge", "ConvNeXtSmall", "ConvNeXtTiny", "ConvNeXtXLarge"], LEAST_32),
    **dict.fromkeys(["DenseNet121", "DenseNet169", "DenseNet201"], LEAST_32),
    **dict.fromkeys([f"EfficientNetB{i}" for i in range(8)], LEAST_32),
    **dict.fromkeys([f"EfficientNetV2{size}" for size in ("B0", "B1", "B2", "B3", "S", "M", "L")], LEAST_32),
    **dict.fromkeys(["InceptionResNetV2", "InceptionV3"], LEAST_75),
    **dict.fromkeys(["MobileNet", "MobileNetV2", "MobileNetV3Large", "MobileNetV3Small"], LEAST_32),
    **dict.fromkeys(["NASNetLarge", "NASNetMobile"], LEAST_32),
    **dict.fromkeys(["ResNet50", "ResNet101", "ResNet152", "ResNet50V2", "ResNet101V2", "ResNet152V2"], LEAST_32),
    **dict.fromkeys(["VGG16", "VGG19"], LEAST_32),
    "Xception": Case(71, (97, 83)),
}

#: One model of each family; the tests of the others are slow.
FAMILIES = tuple(SMALL)


def by_model(names: Iterable[str], quick: Iterable[str] = FAMILIES) -> list[Any]:
    """Parameters of a test, those of one model in a row, so that they share its networks; slow but for some."""
    quick = frozenset(quick)
    return [(pytest.param if name in quick else slow)(name, marks=[pytest.mark.network(name)]) for name in names]


def allow_rank_promotion(owner: Any, name: str) -> None:
    """Exempt a function of Keras from what the tests ask of fzoo."""
    strict = getattr(owner, name)

    @functools.wraps(strict)
    def call(*args: Any, **options: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return strict(*args, **options)

    setattr(owner, name, call)


for _name in ("__call__", "stateless_call", "predict", "train_on_batch"):
    allow_rank_promotion(keras.Layer if _name == "__call__" else keras.Model, _name)


def keras_model(name: str, seed: int = 0, **options: Any) -> Any:
    """Keras's network, its layers named as in a fresh session, with `random_variables`."""
    model = build(getattr(keras.applications, name), **options)
    return set_variables(model, random_variables(fzoo.create(name, **options), seed))


def small_keras_model(name: str, options: dict[str, Any] | None = None) -> Any:
    """The family's small version as Keras builds it, of `small_options` or of these; its arrays are not set."""
    _, sizes = SMALL[name]
    common = {key: value for key, value in (options or small_options(name)).items() if key not in sizes}
    with pytest.MonkeyPatch.context() as patch:
        if name == "InceptionResNetV2":  # Keras has no option for the number of its blocks
            patch.setattr(inception_resnet_v2, "inception_resnet_block", fewer_blocks(sizes["blocks"]))
        return build(KERAS_CONSTRUCTORS.get(name) or getattr(keras.applications, name), **common, **KERAS_SIZES[name])


def fewer_blocks(counts: tuple[int, ...]) -> Callable[..., Any]:
    """Keras's function for a block of InceptionResNetV2, where a block beyond these counts is its input."""
    block = inception_resnet_v2.inception_resnet_block
    most = dict(zip(("block35", "block17", "block8"), counts, strict=True))

    def some(x: Any, scale: float, block_type: str, block_idx: int, activation: str | None = "relu") -> Any:
        last = activation is None  # which stands apart in the network, and is the last of its kind
        if not last and block_idx > most[block_type] - (block_type == "block8"):
            return x
        return block(x, scale, block_type, most[block_type] if last else block_idx, activation)

    return some


def resnet(version: int) -> Callable[..., Any]:
    """Keras's constructor of ResNets, by the number of blocks in each stage."""
    stack = resnet_module.stack_residual_blocks_v1 if version == 1 else resnet_module.stack_residual_blocks_v2

    def construct(blocks: tuple[int, ...], **options: Any) -> Any:
        def stages(x: Any) -> Any:
            for stage, count in enumerate(blocks):
                # Strides are in the first block of a stage in the first version, in the last block in the second.
                first = {"stride1": 1} if stage == (0 if version == 1 else 3) else {}
                x = stack(x, 64 << stage, count, **first, name=f"conv{stage + 2}")
            return x

        return resnet_module.ResNet(stages, preact=version == 2, use_bias=True, **options)

    return construct


#: Keras's own constructors of families, where they make small versions.
KERAS_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "ConvNeXtTiny": functools.partial(convnext.ConvNeXt, name="convnext_tiny"),
    "DenseNet121": densenet.DenseNet,
    "EfficientNetB0": functools.partial(efficientnet.EfficientNet, default_size=224),
    "EfficientNetV2B0": functools.partial(efficientnet_v2.EfficientNetV2, default_size=224, name="efficientnetv2-b0"),
    "NASNetMobile": functools.partial(nasnet.NASNet, skip_reduction=False, default_size=224),
    "ResNet50": resnet(1),
    "ResNet50V2": resnet(2),
}

#: Their arguments: those of fzoo, where Keras has them.
KERAS_SIZES = {name: {} if name == "InceptionResNetV2" else sizes for name, (_, sizes) in SMALL.items()}


def build(constructor: Callable[..., Any], weights: str | None = None, fresh: bool = True, **options: Any) -> Any:
    """A network in a fresh session. Its initial values are all zero: drawing them takes Keras most of the time."""
    if fresh:
        keras.utils.clear_session(free_memory=False)
    with pytest.MonkeyPatch.context() as patch:
        for initializer in (random_initializers.VarianceScaling, random_initializers.RandomUniform):
            patch.setattr(initializer, "__call__", lambda self, shape, dtype=None: np.zeros(shape, np.float32))
        return constructor(weights=weights, **options)


def randomise(model: Any, seed: int = 0) -> Any:
    """Make every array random, for what is said of arrays alone: outputs may be the same for all images."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        layer.set_weights([random_array(rng, place(layer, weight)[-1], weight.shape) for weight in layer.weights])
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    return model


def outputs(model: Any, images: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """What layers of a Keras model give."""
    full = keras.Model(model.inputs, [model.get_layer(name).output for name in names])
    trainable = [v.value for v in full.trainable_variables]
    rest = [v.value for v in full.non_trainable_variables]

    def call(trainable, rest, images):
        return full.stateless_call(trainable, rest, images, training=False)[0]

    arrays = jax.jit(call, compiler_options=COMPILER_OPTIONS)(trainable, rest, images)
    return {name: np.asarray(y) for name, y in zip(names, jax.tree.leaves(arrays), strict=True)}


def save_weights_only(model: Any, path: Path) -> Path:
    """Legacy h5 with the layers at the root, as Keras 1 and 2 wrote and as all published files are."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    return path


def place(layer: Any, weight: Any) -> tuple[str, ...]:
    """Where fzoo keeps an array of a Keras layer: the keys of its variables; no file and no fzoo.weights is asked."""
    *_, owner, name = weight.path.split("/")
    name = "variable" if name.startswith("variable_") else name  # those of LayerScales are numbered
    collection, *below = {
        "gamma": ("params", "scale"),
        "beta": ("params", "bias"),
        "moving_mean": ("batch_stats", "mean"),
        "moving_variance": ("batch_stats", "var"),
        "mean": ("batch_stats", "mean"),
        "variance": ("batch_stats", "var"),
        "count": ("batch_stats", "count"),
        "variable": ("params", "gamma"),
        "depthwise_kernel": ("params", "depthwise", "kernel"),
        "pointwise_kernel": ("params", "pointwise", "kernel"),
    }.get(name, ("params", name))
    return (collection, layer.name, *([] if owner == layer.name else [owner]), *below)


def variables_of(model: Any) -> dict[str, Any]:
    """A Keras model's arrays as fzoo's variables, straight from its layers."""
    variables: dict[str, Any] = {}
    for layer in model.layers:
        for weight in layer.weights:
            array = np.asarray(weight)
            if weight.path.endswith("depthwise_kernel") or ("Depthwise" in type(layer).__name__ and array.ndim == 4):
                array = array.reshape(*array.shape[:2], 1, -1)
            *path, last = place(layer, weight)
            at = variables
            for key in path:
                at = at.setdefault(key, {})
            at[last] = array
    return variables


def set_variables(model: Any, variables: dict[str, Any]) -> Any:
    """Give a Keras model fzoo's variables, the other way round."""
    for layer in model.layers:
        arrays = []
        for weight in layer.weights:
            array: Any = variables
            for key in place(layer, weight):
                array = array[key]
            arrays.append(np.reshape(array, weight.shape))
        layer.set_weights(arrays)
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    return model


def assert_same_computation(module: Classifier, model: Any) -> None:
    """Every layer computes what Keras's does of the same arrays, as Keras describes it: no number is computed.

    What the layers of the description compute is held against Keras's numbers in `test_keras_graphs.py`.
    """
    entry = json.loads(model.to_json())
    described = {"class_name": entry["class_name"], "config": entry["config"]}
    whole = keras_model_of(build_graph(Configuration(described, (3, 0)))[0])
    sized = module.clone(input_shape=whole.image_shape)
    ours, theirs = (computation_of(network, whole.example_inputs).digests({}) for network in (sized, whole))
    names = [layer.name for layer in model.layers]
    assert fzoo.layer_names(module) == names
    assert ours == {name: theirs[name] for name in names}


def assert_close(ours: Any, theirs: np.ndarray, what: str, tolerance: float = 1e-4) -> None:
    """The largest difference, over the largest magnitude."""
    ours, largest = np.asarray(ours), float(np.abs(theirs).max())
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} instead of {theirs.shape}"
    assert np.isfinite(theirs).all() and largest > 0, f"{what}: the reference is {theirs}, which tests nothing"
    error = float(np.abs(ours - theirs).max()) / largest
    assert error <= tolerance, f"{what}: off by {error:.2e} of the largest magnitude"


def assert_equal(ours: Any, theirs: Any) -> None:
    """The same tree, bit for bit."""
    ours, theirs = (
        {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (ours, theirs)
    )
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array, err_msg=key)
