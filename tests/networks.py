"""Networks of the tests' own, alive: every array random, and outputs that differ between images and between classes.

Keras's initial weights give a small network's every image the same output, on which wrong code passes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from hurry import COMPILER_OPTIONS

import fzoo
from fzoo.files import replacing
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.weights.mapping import arrays_of

#: How much outputs must differ, between two images and between two classes: a share of the largest magnitude.
LEAST_DIFFERENCE = 0.05

#: What is added to the biases of BNs: where most of a ReLU's inputs are above zero, differences do not grow from layer
#: to layer until rounding is all there is.
ABOVE_ZERO = np.float32(1)

#: Each family with as few layers and channels as its options allow, but with whatever repeats in it, and the side of
#: its images.
SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "ConvNeXtTiny": (64, {"depths": (1, 2, 1, 1), "projection_dims": (8, 16, 24, 32)}),
    "DenseNet121": (32, {"blocks": (2, 3, 2, 2)}),
    "EfficientNetB0": (32, {"width_coefficient": 0.3, "depth_coefficient": 0.3}),
    "EfficientNetV2B0": (32, {"width_coefficient": 0.3, "depth_coefficient": 0.51}),
    "InceptionResNetV2": (75, {"blocks": (1, 2, 2)}),
    "InceptionV3": (75, {}),
    "MobileNet": (32, {"alpha": 0.25}),
    "MobileNetV2": (32, {"alpha": 0.35}),
    "MobileNetV3Small": (32, {"alpha": 0.5}),
    "NASNetMobile": (32, {"penultimate_filters": 96, "num_blocks": 1, "stem_block_filters": 8}),
    "ResNet50": (32, {"blocks": (1, 2, 1, 1)}),
    "ResNet50V2": (32, {"blocks": (2, 3, 2, 2)}),
    "VGG16": (32, {}),
    "Xception": (71, {}),
}

#: Families whose activations depend on the images' size.
BY_SIZE = ("EfficientNetB0", "NASNetMobile")


def small_options(name: str) -> dict[str, Any]:
    """Options of a family's small version, with seven classes."""
    side, options = SMALL[name]
    return {**options, "input_shape": (side, side, 3), "classes": 7}


def random_images(shape: tuple[int, ...], seed: int = 1, pixels: bool = False) -> np.ndarray:
    """Images (N, H, W, C) that differ in colour and in the large, with noise over it, around 0 or as pixels up to 255.

    Noise alone is the same to a network that averages over the image.
    """
    rng, (n, h, w, c) = np.random.default_rng(seed), shape
    rows, columns = np.arange(h) * 4 // h, np.arange(w) * 4 // w
    images = rng.normal(size=(n, 1, 1, c)) + rng.normal(size=(n, 4, 4, c))[:, rows][:, :, columns]
    images = 0.6 * (images + rng.normal(size=shape))
    return (np.clip(128 + 60 * images, 0, 255) if pixels else images).astype(np.float32)


def images_for(module: Classifier, count: int = 4, seed: int = 1) -> np.ndarray:
    """Images such as the network takes, its own preprocessing seen to."""
    own = any(node.kind in ("Rescaling", "Normalization") for node in trace(module).nodes)
    return random_images((count, *module.example_shape), seed, pixels=own)


def random_variables(
    module: Classifier, seed: int = 0, statistics: dict[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Every array random, each by its own name, and BNs centred on what comes in, so that activations stay alive.

    `statistics` are what `measured_statistics` gives; where they are left out, those that are stored for the same
    arrays, or they are measured.
    """

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        keys = [step.key for step in path]
        rng = np.random.default_rng([seed, zlib.crc32("/".join(keys).encode())])
        return random_array(rng, keys[-1], leaf.shape)

    variables = jax.tree_util.tree_map_with_path(draw, trace(module).variables)
    for layer in variables.get("batch_stats", {}):
        if "bias" in variables["params"].get(layer, {}):
            variables["params"][layer]["bias"] += ABOVE_ZERO
    set_statistics(variables, statistics_of(module, variables, seed) if statistics is None else statistics)
    return variables


def statistics_of(module: Classifier, variables: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """What keeps a network with these random arrays alive: what is stored for the same ones, or measured."""
    known = known_statistics(module) if seed == 0 else None
    return measured_statistics(module, variables) if known is None else known


def known_statistics(module: Classifier) -> dict[str, np.ndarray] | None:
    """What is stored for the family's small version, where this network has its arrays; the classes may be others."""
    from stored import small_statistics

    ours = arrays_of(module)
    for name in SMALL:
        small = fzoo.create(name, **small_options(name))
        if type(small) is not type(module) or (name in BY_SIZE and small.example_shape != module.example_shape):
            continue
        statistics, theirs, layers = small_statistics(name), arrays_of(small), {path[1] for path in ours}
        heads = [layer for layer, numbers in statistics.items() if not numbers.shape]
        if all(path[1] in heads or (path in theirs and theirs[path].shape == ours[path].shape) for path in ours):
            return {layer: numbers for layer, numbers in statistics.items() if layer in layers}
    return None


def set_statistics(variables: dict[str, Any], statistics: dict[str, np.ndarray]) -> None:
    """Change the variables to what was measured."""
    for layer, numbers in statistics.items():
        if layer in variables.get("batch_stats", {}):
            mean, var = numbers[0], np.exp2(numbers[1].astype(np.float32) / 8)
            variables["batch_stats"][layer] = {"mean": mean.astype(np.float32) / 16 * np.sqrt(var), "var": var}
        else:
            variables["params"][layer]["kernel"] *= np.float32(2.0**numbers)


def random_array(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A variable of Flax's by its last name."""
    if name == "count":
        return np.array(rng.integers(1000), np.int32)
    if name in ("scale", "var", "gamma"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name in ("bias", "mean"):
        return rng.normal(0, 0.1, shape).astype(np.float32)
    assert name == "kernel", name
    fan_in = np.prod(shape[:-1])
    kernel = rng.normal(0, np.sqrt(2 / fan_in), shape)
    if fan_in > 49:  # what all inputs have in common, which grows with each ReLU, would hide what differs
        kernel -= kernel.mean(tuple(range(len(shape) - 1)), keepdims=True)
    return kernel.astype(np.float32)


def measured_statistics(module: Classifier, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """What keeps a network alive, measured on some images, and so rounded that every machine has the same.

    For each BN int8 (2, channels): the mean in 16ths of the deviation, and 8 times the binary logarithm of the
    variance. For a classifier int8 (): the binary logarithm of the factor that makes its logits a few.
    """
    module = module.clone(classifier_activation=None)
    layers = trace(module).layers
    inputs = {node.name: node.inputs[0] for node in layers if node.kind == "BatchNormalization"}
    head = layers[-1].name if layers[-1].kind == "Dense" else None
    taps = tuple({*inputs.values(), *([head] if head else [])})
    if not taps:
        return {}

    def normalised(variables: Any, images: Any) -> dict[str, Any]:
        """Each BN normalises by the batch on the way."""
        return module.apply(
            variables, images, taps, train=frozenset(inputs), mutable=["batch_stats"], method="endpoints"
        )[0]

    found = jax.jit(normalised, compiler_options=COMPILER_OPTIONS)(variables, images_for(module, 16, seed=2))
    statistics = {}
    for layer, name in inputs.items():
        x = np.asarray(found[name], np.float64).reshape(-1, found[name].shape[-1])
        var = np.maximum(x.var(0), 0.25 * np.median(x.var(0)) + 1e-4)  # more where a channel is the same everywhere
        exponent = np.round(8 * np.log2(var))
        mean = np.round(16 * x.mean(0) / np.exp2(exponent / 16))
        statistics[layer] = np.clip([mean, exponent], -127, 127).astype(np.int8)
    if head:
        statistics[head] = np.int8(np.round(np.log2(2 / np.std(found[head]))))
    return statistics


@functools.lru_cache(maxsize=8)
def network(name: str, seed: int = 0, **options: Any) -> tuple[Classifier, dict[str, Any]]:
    """A model of the zoo with random variables, shown to be alive, once in a session of tests."""
    module = fzoo.create(name, **options)
    shown = shown_alive(module, seed)
    if shown is not None and shown.exists():
        with np.load(shown) as statistics:
            return module, random_variables(module, seed, dict(statistics))
    variables = random_variables(module, seed, {})
    statistics = statistics_of(module, variables, seed)
    set_statistics(variables, statistics)
    assert_alive(jax.jit(module.apply, compiler_options=COMPILER_OPTIONS)(variables, images_for(module)))
    if shown is not None:
        with replacing(shown) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **statistics)
    return module, variables


def shown_alive(module: Classifier, seed: int) -> Path | None:
    """Where a session of tests keeps what it measured of a network that is alive, for its other processes and files."""
    if "FZOO_TEST_SCRATCH" not in os.environ:
        return None
    folder = Path(os.environ["FZOO_TEST_SCRATCH"], "networks")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(f'{module!r} {seed}'.encode()).hexdigest()}.npz"


def differences(outputs: Any) -> tuple[float, float]:
    """The least difference between the outputs for two images, and between two classes, over the largest magnitude.

    Of two images: in that class where they differ most. Of the classes: between the first and last of each image.
    """
    rows = np.asarray(outputs, np.float64).reshape(len(outputs), -1)
    largest = np.abs(rows).max()
    images = [np.abs(a - b).max() for i, a in enumerate(rows) for b in rows[:i]]
    return float(min(images, default=largest) / largest), float(np.ptp(rows, axis=1).min() / largest)


def assert_alive(outputs: Any, least: float = LEAST_DIFFERENCE) -> None:
    """Fail where wrong code could pass: outputs that are no numbers, or the same for two images or for all classes."""
    assert np.isfinite(outputs).all(), "outputs that are not finite"
    images, classes = differences(outputs)
    assert images > least, f"outputs of two images differ by {images:.1e} of the largest: a dead network"
    assert classes > least, f"outputs of all classes differ by {classes:.1e} of the largest: a dead network"
