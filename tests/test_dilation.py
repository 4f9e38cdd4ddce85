"""Networks with `output_stride`: the same weights, and every r-th value of the maps as without it."""

import dataclasses
import functools
import importlib.util
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from hurry import COMPILER_OPTIONS
from networks import SMALL, assert_alive, images_for, network
from reference import assert_close, assert_equal
from stored_tf_keras import SMALL as OTHERS
from tiers import slow, slow_but

import fzoo
from fzoo import ops
from fzoo.layers.dilation import Axis, dense_window
from fzoo.layers.graph import trace
from fzoo.layers.keras import Layers
from fzoo.training.config import FinetuneConfig
from fzoo.training.runs import network as run_network
from fzoo.training.runs import options_of
from fzoo.weights import WeightsMismatch, read_description
from fzoo.weights.description import describe
from fzoo.weights.state_dict import state_dict

SIZES = {**SMALL, **OTHERS}

#: What shows all ways to stride: inside a Sequential, a pool without padding, padding beforehand, by parity and not,
#: "same".
QUICK = ("ConvNeXtTiny", "EfficientNetB0", "MobileNet")

#: Networks that stride without padding, and so leave out the last values of a map.
UNPADDED = (
    "ConvNeXtTiny",
    "DenseNet121",
    "InceptionResNetV2",
    "InceptionV3",
    "MobileNet",
    "NASNetMobile",
    "VGG16",
    "Xception",
)

#: Networks that squeeze and excite.
SQUEEZING = ("EfficientNetB0", "EfficientNetV2B0", "MobileNetV3Small", "RegNetY002", "ResNetRS200")

has_torch = all(importlib.util.find_spec(name) for name in ("torch", "timm"))


def small(name, seed=0):
    """A small version without its top, of images whose sides are even and odd on the way."""
    side, options = SIZES[name]
    shape = (139, 150, 3) if side > 65 else (72, 85, 3)
    return network(name, seed, **options, include_top=False, input_shape=shape)


@functools.lru_cache(maxsize=4)
def small_images(module, count=1):
    return images_for(module, count)


def run(module, variables, images):
    return np.asarray(jax.jit(module.apply, compiler_options=COMPILER_OPTIONS)(variables, images))


def mean_of_plain(self, x, *, keepdims=False, name=None):
    """GlobalAveragePooling2D over the values that the network has without `output_stride`."""
    name = self._name("GlobalAveragePooling2D", name)
    down, right = (axis.dilation for axis in self.axes(x))
    y = jnp.mean(x[:, ::down, ::right], (1, 2), keepdims=keepdims)
    return self._note("GlobalAveragePooling2D", name, [x], y)


def of_model(name):
    """Tests of one model share its network."""
    return pytest.mark.network(f"dense {name}")


def families():
    return [
        (pytest.param if name in QUICK and stride == 8 else slow)(name, stride, marks=[of_model(name)])
        for name in SIZES
        for stride in (8, 16)
    ]


@pytest.mark.parametrize(("name", "output_stride"), families())
def test_every_rth_value_is_the_plain_networks(name, output_stride, monkeypatch):
    """Where there is squeeze-and-excitation: if that averages over the same."""
    module, variables = small(name)
    dense = module.clone(output_stride=output_stride)
    assert jax.tree.map(jnp.shape, trace(dense).variables) == jax.tree.map(jnp.shape, trace(module).variables)
    images = small_images(module)
    plain = run(module, variables, images)
    if name in SQUEEZING:
        monkeypatch.setattr(Layers, "global_avg_pool", mean_of_plain)
    found = run(dense, variables, images)
    r = 32 // output_stride
    assert min(np.subtract(found.shape, plain.shape)[1:3]) > 0
    assert_close(found[:, ::r, ::r], plain, name, 1e-5)
    assert_alive(found[0].reshape(-1, found.shape[-1]))  # the values between are others


@pytest.mark.parametrize("name", slow_but(SIZES, "ConvNeXtTiny", "MobileNetV3Small", "Xception", "ResNet50V2"))
def test_shapes_of_every_layer(name):
    """All layers have as many values as it takes for every r-th to be the plain network's."""
    side, options = SIZES[name]
    sides = (101, 130) if side > 65 else (49, 76)
    plain = fzoo.create(name, **options, include_top=False, input_shape=(*sides, 3))
    shapes = {node.name: node.shape for node in trace(plain).layers}
    for output_stride in (8, 16):
        dense = trace(plain.clone(output_stride=output_stride)).layers
        assert [node.name for node in dense] == list(shapes)
        found = set()
        for node in dense:
            theirs = shapes[node.name]
            assert (len(node.shape), node.shape[-1]) == (len(theirs), theirs[-1]), node.name
            if node.shape != theirs:
                pairs = list(zip(node.shape[:2], theirs[:2], strict=True))
                fitting = [r for r in (2, 4) if all(-(-ours // r) == n for ours, n in pairs)]
                assert fitting, (node.name, node.shape, theirs)
                found.update(fitting)
            if convolution := node.config.get("convolution"):
                assert convolution.size == node.shape[:2], node.name
        assert 32 // output_stride in found
        if name not in UNPADDED:
            assert dense[-1].shape[:2] == tuple(-(-n // output_stride) for n in sides)


def convolve(x, kernel, stride, pads, dilation=1):
    """In one dimension, by the definition."""
    x = np.pad(x, pads)
    reach = (len(kernel) - 1) * dilation + 1
    count = (len(x) - reach) // stride + 1
    return np.array([sum(kernel * x[i * stride : i * stride + reach : dilation]) for i in range(count)])


def plain_pads(side, taps, stride, padding):
    if isinstance(padding, str):
        [pads] = jax.lax.padtype_to_pads((side,), (taps,), (stride,), padding)
        return pads
    return padding


def layers_of_a_chain():
    paddings = ("SAME", "VALID", (1, 1), (0, 1), (1, 2))
    return [(t, s, p) for t in (1, 2, 3, 5) for s in (1, 2) for p in paddings if isinstance(p, str) or sum(p) < t]


@pytest.mark.parametrize("zeros", [(0, 0), (0, 1), (1, 1), (1, 2)], ids=str)
def test_windows_of_chains_of_layers(zeros):
    """Two layers after each other, of all kinds, on maps that are dense already and of all sizes mod 4."""
    rng = np.random.default_rng(0)
    kinds = layers_of_a_chain()
    seconds = [(3, 1, "SAME"), (3, 2, "SAME"), (2, 2, "VALID"), (3, 2, (1, 1))]
    for (first, second), side, dilation in itertools.product(
        itertools.product(kinds, seconds), range(21, 25), (1, 2, 4)
    ):
        taps, stride, padding = first
        if sum(zeros) and (padding != "VALID" or sum(zeros) >= taps):
            continue
        dense = rng.normal(size=side)
        plain = dense[::dilation]
        axis = Axis(8 * dilation, dilation, zeros)
        dense = np.pad(dense, [dilation * n for n in zeros])
        plain = np.pad(plain, zeros)
        before = len(dense) - sum(zeros) * dilation
        for taps, stride, padding in (first, second):
            pads = plain_pads(len(plain), taps, stride, padding)
            if len(plain) + sum(pads) < taps:
                break
            kernel = rng.normal(size=taps)
            window = dense_window(len(dense), axis, 8, taps, stride, padding)
            dense = convolve(dense, kernel, window.stride, window.pads, window.dilation)
            plain = convolve(plain, kernel, stride, pads)
            axis = window.axis
            np.testing.assert_allclose(dense[:: axis.dilation], plain, rtol=1e-12, atol=1e-12)
            if stride == 1 or padding == "SAME":
                break
        if first[2] == "SAME":
            assert len(dense) == before, "a padded layer keeps the size"


def test_a_stride_below_the_output_stride_stays():
    for stride, before, step in ((2, 1, 2), (2, 4, 2), (2, 8, 1), (4, 1, 4), (4, 4, 2), (8, 2, 4)):
        window = dense_window(32, Axis(before), 8, 3, stride, "SAME")
        assert (window.stride, window.dilation) == (step, 1)
        assert window.axis == Axis(before * stride, stride // step)
    assert dense_window(32, Axis(16, 2), 8, 1, 2, "SAME") == (1, (0, 0), 1, Axis(32, 4))  # one tap is never dilated


# -- pools and convolutions --------------------------------------------------------------------------------------------


def pool_by_definition(kind, x, window, pads, apart, stride):
    """Of images, as a reduction over the shifted images that are stacked."""
    fill = -jnp.inf if kind == "max" else jnp.nan
    y = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    size = [side - (w - 1) * by for side, w, by in zip(y.shape[1:3], window, apart, strict=True)]
    shifted = [
        y[:, i * apart[0] : i * apart[0] + size[0] : stride, j * apart[1] : j * apart[1] + size[1] : stride]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.max(jnp.stack(shifted), 0) if kind == "max" else jnp.nanmean(jnp.stack(shifted), 0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_dilated_pools_and_their_gradients(kind, stride):
    """On CPU as shifted images, and elsewhere by phases, which the gradient is taken of everywhere."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 11, 14, 3)), jnp.float32)
    pads, apart = ((2, 4), (0, 6)), (2, 3)
    how = ops.Pool(kind, (3, 3), (stride, stride), pads, apart)
    theirs = functools.partial(pool_by_definition, kind, window=(3, 3), pads=pads, apart=apart, stride=stride)
    expected = theirs(x)
    assert_close(ops.pool(how, x), expected, "output", 1e-6)
    assert_close(ops.pooling._pool(how, x), expected, "by phases", 1e-6)
    assert ops.pool(how, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    weights = jnp.asarray(np.random.default_rng(1).normal(size=expected.shape), jnp.float32)
    ours, wanted = (jax.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (lambda x: ops.pool(how, x), theirs))
    assert_close(ours, wanted, "gradient", 1e-6)


def test_of_equal_values_one_takes_the_gradient():
    how = ops.Pool("max", (3, 3), (1, 1), "VALID", (2, 2))
    gradient = jax.grad(lambda x: ops.pool(how, x).sum())(jnp.ones((1, 9, 9, 1)))
    assert set(np.unique(gradient)) <= set(range(10))
    assert gradient.sum() == 25


@pytest.mark.parametrize("multiplier", [1, 2])
def test_dilated_depthwise_convolutions(multiplier):
    """They are shifted images on CPU, too: XLA's own are thirty times slower."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 13, 11, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 5, 1, 4 * multiplier)), jnp.float32)

    def both(x, kernel, convolve):
        return convolve(
            x,
            kernel,
            (1, 1),
            ((2, 4), (3, 1)),
            rhs_dilation=(3, 2),
            feature_group_count=4,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    ours = functools.partial(both, convolve=ops.conv_general_dilated)
    theirs = functools.partial(both, convolve=jax.lax.conv_general_dilated)
    assert_close(ours(x, kernel), theirs(x, kernel), "output", 1e-5)
    weights = jnp.asarray(rng.normal(size=ours(x, kernel).shape), jnp.float32)
    gradients = (jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), argnums=(0, 1))(x, kernel) for f in (ours, theirs))
    for found, wanted in zip(*gradients, strict=True):
        assert_close(found, wanted, "gradient", 1e-5)
    assert "stablehlo.convolution" not in jax.jit(ours).lower(x, kernel).as_text()


def test_no_other_form_takes_a_dilated_kernel():
    for groups, channels in ((1, 64), (8, 64)):
        conv = ops.Convolution.of(
            (1, 28, 28, channels), (3, 3, channels // groups, channels), (1, 1), "SAME", groups, dilation=(2, 2)
        )
        assert conv.size == (28, 28)
        assert ops.convolution.cpu_form(conv) is None
        assert not ops.is_winograd(conv, prepared=True)
    assert ops.Convolution.of((1, 9, 9, 4), (1, 1, 4, 4), (1, 1), "SAME", dilation=(2, 2)).dilation == (1, 1)


# -- the option --------------------------------------------------------------------------------------------------------


@of_model("EfficientNetB0")
def test_before_the_first_squeeze_beyond_nothing_differs():
    """What comes after averages over other values: these are near, and no more."""
    module, variables = small("EfficientNetB0")
    images = small_images(module)
    taps = ("block6a_activation", "top_activation")

    def tapped(module):
        return jax.jit(lambda v, x: module.apply(v, x, taps, method="endpoints"), compiler_options=COMPILER_OPTIONS)(
            variables, images
        )

    plain, dense = tapped(module), tapped(module.clone(output_stride=16))
    assert_close(dense[taps[0]][:, ::2, ::2], plain[taps[0]], taps[0], 1e-5)
    difference = np.abs(dense[taps[1]][:, ::2, ::2] - plain[taps[1]]).max() / np.abs(plain[taps[1]]).max()
    assert 1e-4 < difference < 0.5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("RegNetX080", marks=of_model("RegNetX080")),
        slow("DenseNet121", marks=[of_model("DenseNet121")]),
    ],
)
def test_optimized(name):
    """Kernels that are dilated are not prepared, those of strides left out may be."""
    module, variables = small(name)
    dense = module.clone(output_stride=8)
    optimized, prepared = fzoo.optimize_for_inference(dense, variables)
    images = small_images(module)
    assert_close(run(optimized, prepared, images), run(dense, variables, images), name, 1e-4)


def test_prepared_for_another_output_stride():
    """A kernel that Winograd's algorithm has transformed can't be dilated."""
    module, variables = fzoo.load("VGG16", weights=None, include_top=False, input_shape=(224, 224, 3))
    optimized, prepared = fzoo.optimize_for_inference(module, variables, platform="cpu")
    with pytest.raises(ValueError, match="block5_conv1 was not prepared: optimize_for_inference the network that has"):
        jax.eval_shape(optimized.clone(output_stride=8).apply, prepared, jnp.zeros((1, 224, 224, 3)))
    tiles = dict(fzoo.optimize_for_inference(module.clone(output_stride=8), variables)[0].prepared.tiles)
    assert "block4_conv3" in tiles
    assert "block5_conv1" not in tiles


def test_what_goes_with_it():
    whole = fzoo.create("ResNet50", blocks=(1, 1, 1, 1), classes=5, output_stride=16, input_shape=(64, 64, 3))
    assert trace(whole).nodes[-1].shape == (5,)
    assert trace(whole).nodes[-3].shape == (4, 4, 2048)
    headed = fzoo.create("VGG16", classes=5, head=fzoo.Head(), output_stride=8, input_shape=(64, 64, 3))
    assert trace(headed).nodes[-1].shape == (5,)
    pooled = fzoo.create("MobileNet", include_top=False, pooling="max", output_stride=8)
    assert trace(pooled).nodes[-1].shape == (1024,)
    with pytest.raises(
        ValueError, match=r"output_stride=8 goes with include_top=False or a fzoo\.Head: the top of VGG"
    ):
        fzoo.create("VGG16", output_stride=8)
    with pytest.raises(ValueError, match="output_stride=4 given, None, 8 or 16 expected"):
        fzoo.create("ResNet50", output_stride=4)


def test_not_of_a_file(tmp_path):
    """Its layers may do what has no dense form."""
    layers = keras.layers
    model = keras.Sequential([layers.Input((16, 16, 3)), layers.Conv2D(4, 3, 2), layers.Flatten(), layers.Dense(2)])
    model.save(tmp_path / "model.keras")
    module, variables = fzoo.load_model(tmp_path / "model.keras")
    refused = "output_stride=8 given, which goes with the families of list_models"
    with pytest.raises(ValueError, match=refused):
        module.clone(output_stride=8)
    with pytest.raises(ValueError, match=refused):
        fzoo.transfer(module, variables=variables, classes=3, output_stride=8)


@of_model("RegNetX080")
def test_given_outputs_of_layers():
    """What a caller gives for a layer lies as its output does."""
    module, variables = small("RegNetX080")
    dense, images = module.clone(output_stride=8), small_images(module)
    layer = trace(dense).layers[-5].name
    y, k = dense.apply(variables, images, False, (layer,), method="run")
    again, _ = dense.apply(variables, images, False, (), {layer: k.tapped[layer]}, method="run")
    assert_equal(again, y)


@pytest.mark.slow
@of_model("RegNetX080")
def test_with_remat():
    """Its parts are transformed, and the arrays of which it is known how they lie with them."""
    module, variables = small("RegNetX080")
    images = small_images(module)

    def gradient(module):
        def loss(params):
            return jnp.mean(jnp.square(module.apply({**variables, "params": params}, images) - 1))

        return jax.jit(jax.grad(loss), compiler_options=COMPILER_OPTIONS)(variables["params"])

    dense = module.clone(output_stride=8)
    wanted, found = gradient(dense), gradient(dense.clone(remat=True))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(ours, theirs, "gradient", 1e-5)


@pytest.mark.slow
def test_trains():
    """BNs take the statistics of all values, and every variable has a gradient."""
    module, variables = small("ConvNeXtTiny")
    dense, images = module.clone(output_stride=8), small_images(module)

    def loss(params):
        y: Any = dense.apply({**variables, "params": params}, images, train=True)
        return jnp.mean(jnp.square(y - 1))

    gradients = jax.jit(jax.grad(loss), compiler_options=COMPILER_OPTIONS)(variables["params"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@of_model("MobileNet")
def test_files_of_weights(tmp_path):
    """They say it where it is set; the weights are those of the network without, and the other way round."""
    module, variables = small("MobileNet")
    dense = module.clone(output_stride=16)
    assert "output_stride" not in json.loads(describe(module))["options"]  # older versions don't know it
    plain_file, dense_file = tmp_path / "plain.weights.h5", tmp_path / "dense.weights.h5"
    fzoo.save_variables(module, variables, plain_file)
    fzoo.save_variables(dense, variables, dense_file)
    again, loaded = fzoo.load(weights=dense_file)
    assert again == dense
    assert_equal(loaded, variables)
    assert read_description(plain_file) is not None
    for file, wanted in ((plain_file, dense), (dense_file, module)):
        assert_equal(fzoo.load_variables(wanted, file), variables)
    found, _ = fzoo.load("MobileNet", weights=plain_file, output_stride=16)
    assert found == dense
    with pytest.raises(WeightsMismatch):
        fzoo.load_variables(dense.clone(alpha=0.5), plain_file)


def test_configuration_of_a_run():
    """It is an option of a fine-tuning, too, and the run's network has it again."""
    config = FinetuneConfig(model="MobileNet", options={"output_stride": 16, "alpha": 0.5})
    module = fzoo.create("MobileNet", classes=2, head=config.head, input_shape=(64, 64, 3), **config.options)
    options = options_of(module, "MobileNet")
    assert options["output_stride"] == 16
    assert "output_stride" not in options_of(module.clone(output_stride=None), "MobileNet")
    head = dataclasses.asdict(module.head)
    assert run_network({"model": "MobileNet", "classes": ["a", "b"], "head": head, "options": options}) == module


def test_command_line(command_line):
    code, output, errors = command_line("summary", "VGG16", "--no-include-top", "--size", 64, "-o", "output_stride=16")
    assert (code, errors) == (0, [])
    assert any("block5_conv3" in line and "4 x 4 x 512" in line for line in output)
    code, _, errors = command_line("summary", "VGG16", "-o", "output_stride=5")
    assert (code, len(errors)) == (2, 1)
    assert "output_stride=5 given, None, 8 or 16 expected" in errors[0]
    code, output, _ = command_line("info", "ResNet50")
    assert any("output_stride=None" in line for line in output)


# -- beside timm -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not has_torch, reason="PyTorch and timm are not installed")
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(("name", "theirs"), [("ResNet50.tv2_in1k", "resnet50"), ("ResNet18.tv_in1k", "resnet18")])
def test_timm(name, theirs, output_stride):
    """Its ResNets pad on both sides, so that all values of its maps are the same."""
    import timm
    import torch

    module, variables = network(name, include_top=False, input_shape=(75, 96, 3))
    model = timm.create_model(theirs, num_classes=0, output_stride=output_stride).eval()
    arrays = {key: torch.from_numpy(np.array(value)) for key, value in state_dict(module, variables, "timm").items()}
    missing, unexpected = model.load_state_dict(arrays, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    images = images_for(module, 2)
    with torch.no_grad():
        expected = model.forward_features(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    assert_close(run(module.clone(output_stride=output_stride), variables, images), expected, name, 1e-4)
