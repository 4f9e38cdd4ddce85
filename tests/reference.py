"""Keras's own networks with random arrays, and what they compute: the truth that the tests hold fzoo against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import jax
import keras
import numpy as np
import pytest
from keras.src.initializers import random_initializers
from keras.src.legacy.saving import legacy_h5_format


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs that a model is tested on: its least size, and one whose sides are odd and differ.

    A small input keeps the suite short; parameter counts are checked at the default size. `gain` is the variance of
    random kernels, times their fan: what keeps activations alive through ReLUs grows without end through the residuals
    of the deepest networks, until sigmoids amplify rounding.
    """

    least: int
    odd: tuple[int, int]
    gain: float = 1.5


SMALL = Case(32, (65, 47))
LARGE = Case(75, (97, 83))

#: Every model of the registry; a test fails for one that is missing here.
CASES = {
    **dict.fromkeys(["ConvNeXtBase", "ConvNeXtLarge", "ConvNeXtSmall", "ConvNeXtTiny", "ConvNeXtXLarge"], SMALL),
    **dict.fromkeys(["DenseNet121", "DenseNet169", "DenseNet201"], SMALL),
    **dict.fromkeys([f"EfficientNetB{i}" for i in range(8)], SMALL),
    **dict.fromkeys([f"EfficientNetV2{size}" for size in ("B0", "B1", "B2", "B3")], SMALL),
    **dict.fromkeys([f"EfficientNetV2{size}" for size in ("S", "M", "L")], Case(32, (65, 47), gain=0.5)),
    **dict.fromkeys(["InceptionResNetV2", "InceptionV3"], LARGE),
    **dict.fromkeys(["MobileNet", "MobileNetV2", "MobileNetV3Large", "MobileNetV3Small"], SMALL),
    **dict.fromkeys(["NASNetLarge", "NASNetMobile"], SMALL),
    **dict.fromkeys(["ResNet50", "ResNet101", "ResNet152", "ResNet50V2", "ResNet101V2", "ResNet152V2"], SMALL),
    **dict.fromkeys(["VGG16", "VGG19"], SMALL),
    "Xception": Case(71, (97, 83)),
}

#: One model of each family; the tests of the others are marked as heavy.
FAMILIES = (
    "ConvNeXtTiny",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "InceptionResNetV2",
    "InceptionV3",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "NASNetMobile",
    "ResNet50",
    "ResNet50V2",
    "VGG16",
    "Xception",
)


def by_model(names: Iterable[str], light: Iterable[str] = FAMILIES) -> list[Any]:
    """Parameters of a test, those of one model in one process, so that they share its networks; heavy but for some."""
    light = frozenset(light)
    return [
        pytest.param(name, marks=[pytest.mark.xdist_group(name), *([] if name in light else [pytest.mark.slow])])
        for name in names
    ]


#: Quick to compile, and without XLA:CPU's default fusions, some of which sum wrongly in jaxlib 0.10 (jax issue 39103).
COMPILER_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_llvm_disable_expensive_passes": True,
}


def keras_model(name: str, seed: int = 0, **options: Any) -> Any:
    """Keras's network, its layers named as in a fresh session, every array random."""
    return randomise(build(getattr(keras.applications, name), **options), seed, CASES[name].gain)


def build(constructor: Callable[..., Any], weights: str | None = None, fresh: bool = True, **options: Any) -> Any:
    """A network in a fresh session. Its initial values are all zero: drawing them takes Keras most of the time."""
    if fresh:
        keras.utils.clear_session(free_memory=False)
    with pytest.MonkeyPatch.context() as patch:
        for initializer in (random_initializers.VarianceScaling, random_initializers.RandomUniform):
            patch.setattr(initializer, "__call__", lambda self, shape, dtype=None: np.zeros(shape, np.float32))
        return constructor(weights=weights, **options)


def randomise(model: Any, seed: int = 0, gain: float = 1.5) -> Any:
    """Make every array random, BN statistics too."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        layer.set_weights(
            [random_array(rng, layer, weight.path.rsplit("/", 1)[1], weight.shape, gain) for weight in layer.weights]
        )
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    return model


def random_array(rng: np.random.Generator, layer: Any, name: str, shape: tuple[int, ...], gain: float) -> np.ndarray:
    """Random values, in a range that keeps activations alive through a deep network."""
    if name == "count":
        return np.array(rng.integers(1000), np.int32)
    if name in ("gamma", "moving_variance", "variance") or name.startswith("variable"):  # a LayerScale's
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name in ("bias", "beta", "moving_mean", "mean"):
        return rng.normal(0, 0.1, shape).astype(np.float32)
    depthwise = name == "depthwise_kernel" or "Depthwise" in type(layer).__name__
    variance = 1 / np.prod(shape[:2]) if depthwise else gain / np.prod(shape[:-1])
    return rng.normal(0, np.sqrt(variance), shape).astype(np.float32)


def random_images(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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


def variables_of(model: Any) -> dict[str, Any]:
    """A Keras model's arrays as fzoo's variables, straight from its layers: no file, no fzoo.weights."""
    variables: dict[str, Any] = {}
    for layer in model.layers:
        for weight in layer.weights:
            *_, owner, name = weight.path.split("/")
            name = "variable" if name.startswith("variable_") else name  # those of LayerScales are numbered
            array = np.asarray(weight)
            if name == "depthwise_kernel" or ("Depthwise" in type(layer).__name__ and name == "kernel"):
                array = array.reshape(*array.shape[:2], 1, -1)
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
            at = variables
            for key in (collection, layer.name, *([] if owner == layer.name else [owner]), *below[:-1]):
                at = at.setdefault(key, {})
            at[below[-1]] = array
    return variables


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
