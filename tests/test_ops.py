"""Every form of a convolution against XLA's own: outputs, gradients, other platforms."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from networks import images_for, network
from reference import assert_close
from tiers import slow_but

import fzoo
from fzoo import ops
from fzoo.inference.compiler import compiler_options
from fzoo.ops.shapes import NHWC

#: (images, kernel, stride, padding, groups), and the form that a CPU takes; None for XLA's own.
CONVOLUTIONS = {
    "depthwise": ((2, 9, 11, 8), (3, 3, 1, 8), 1, "SAME", 8, ops.depthwise_shifted),
    "depthwise of stride 2": ((2, 10, 11, 8), (5, 5, 1, 8), 2, ((1, 2), (2, 1)), 8, ops.depthwise_shifted),
    "depthwise with a multiplier": ((1, 7, 7, 4), (3, 3, 1, 12), 1, "VALID", 4, ops.depthwise_shifted),
    "1x1": ((2, 5, 7, 16), (1, 1, 16, 24), 1, "SAME", 1, ops.pointwise),
    "1x1 of stride 2": ((2, 5, 8, 16), (1, 1, 16, 24), 2, "VALID", 1, ops.pointwise),
    "1x1 with padding": ((1, 5, 8, 16), (1, 1, 16, 24), 1, ((1, 0), (0, 2)), 1, ops.pointwise),
    "small stem": ((2, 17, 18, 3), (3, 3, 3, 8), 2, "SAME", 1, ops.row_columns),
    "large stem": ((1, 17, 18, 3), (7, 7, 3, 8), 2, "SAME", 1, None),
    "Winograd": ((1, 17, 18, 64), (3, 3, 64, 72), 1, "SAME", 1, ops.winograd),
    "Winograd without padding": ((1, 20, 19, 64), (3, 3, 64, 64), 1, "VALID", 1, ops.winograd),
    "Winograd, uneven padding": ((1, 17, 16, 64), (3, 3, 64, 64), 1, ((2, 0), (1, 3)), 1, ops.winograd),
    "Winograd in small tiles": ((6, 8, 8, 64), (3, 3, 64, 64), 1, "SAME", 1, ops.winograd),
    "3x3 of few pixels": ((1, 7, 7, 64), (3, 3, 64, 64), 1, "SAME", 1, None),
    "3x3 of stride 2": ((1, 20, 20, 64), (3, 3, 64, 64), 2, "SAME", 1, None),
    "Winograd, 5x5": ((1, 18, 17, 64), (5, 5, 64, 48), 1, "SAME", 1, ops.winograd),
    "Winograd, 1x7": ((1, 17, 17, 64), (1, 7, 64, 72), 1, "SAME", 1, ops.winograd),
    "Winograd, 7x1": ((1, 17, 18, 64), (7, 1, 64, 72), 1, "SAME", 1, ops.winograd),
    "Winograd, 7x1 in small tiles": ((6, 8, 8, 64), (7, 1, 64, 64), 1, "SAME", 1, ops.winograd),
    "1x7 of few channels": ((1, 17, 17, 16), (1, 7, 16, 16), 1, "SAME", 1, None),
    "grouped": ((1, 20, 20, 64), (3, 3, 16, 64), 1, "SAME", 4, ops.by_groups),
    "grouped, four together": ((2, 9, 11, 32), (3, 3, 4, 32), 1, "SAME", 8, ops.by_groups),
    "grouped, none together": ((1, 9, 8, 40), (3, 3, 8, 80), 1, "VALID", 5, ops.by_groups),
    "grouped, of stride 2": ((1, 10, 9, 48), (3, 3, 8, 48), 2, ((1, 1), (1, 1)), 6, ops.by_groups),
    "grouped, of many channels": ((1, 9, 9, 96), (3, 3, 48, 96), 1, "SAME", 2, None),
}


def forms(images, kernel, stride, padding, groups):
    """(fzoo's, XLA's) of a convolution."""

    def ours(x, w):
        return ops.conv_general_dilated(x, w, (stride, stride), padding, feature_group_count=groups)

    def theirs(x, w):
        return lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=NHWC, feature_group_count=groups
        )

    return ours, theirs


def run(function, *arguments):
    return jax.jit(function, compiler_options=compiler_options("cpu"))(*arguments)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_outputs_and_gradients(name):
    *shape, form = CONVOLUTIONS[name]
    conv = ops.Convolution.of(shape[0], shape[1], (shape[2], shape[2]), shape[3], shape[4])
    assert ops.cpu_form(conv) is form
    ours, theirs = forms(*shape)
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=s).astype(np.float32) for s in shape[:2])
    expected = run(theirs, x, w)
    assert conv.size == expected.shape[1:3]
    assert_close(run(ours, x, w), np.asarray(expected), name, 1e-5)
    weights = rng.normal(size=expected.shape).astype(np.float32)
    tangents = tuple(rng.normal(size=s).astype(np.float32) for s in shape[:2])
    for argument in (0, 1):
        found, wanted = (
            run(jax.grad(lambda x, w, f=f: (f(x, w) * weights).sum(), argument), x, w) for f in (ours, theirs)
        )
        assert_close(found, np.asarray(wanted), f"{name}, gradient {argument}", 1e-5)
    found, wanted = (run(lambda x, w, f=f: jax.jvp(f, (x, w), tangents)[1], x, w) for f in (ours, theirs))
    assert_close(found, np.asarray(wanted), f"{name}, forward", 1e-5)
    found = run(jax.vmap(ours, (0, None)), np.stack([x, 2 * x]), w)
    assert_close(found[1], 2 * np.asarray(expected), f"{name}, vmap", 1e-5)


@pytest.mark.parametrize("dilation", ["lhs_dilation", "rhs_dilation"])
def test_dilated_is_left_to_xla(dilation):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((1, 20, 20, 64), (3, 3, 64, 64)))
    options = {"padding": "SAME" if dilation[0] == "r" else ((1, 1), (1, 1)), dilation: (2, 2)}
    found = ops.conv_general_dilated(x, w, (1, 1), **options)
    wanted = lax.conv_general_dilated(x, w, (1, 1), dimension_numbers=NHWC, **options)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("wide", "tile", "few"), [(True, 2, True), (False, 4, False)])
def test_what_winograd_is_for_on_each_kind_of_processor(monkeypatch, wide, tile, few):
    for module in ("winograd", "convolution"):
        monkeypatch.setattr(sys.modules[f"fzoo.ops.{module}"], "has_wide_vectors", lambda: wide)
    conv = ops.Convolution.of((4, 14, 14, 256), (3, 3, 256, 256), (1, 1), "SAME")
    assert ops.winograd_tile(conv) == tile
    assert ops.winograd_tile(ops.Convolution.of((4, 14, 14, 64), (5, 5, 64, 64), (1, 1), "SAME")) == 4
    assert ops.winograd_tile(ops.Convolution.of((4, 16, 16, 64), (3, 3, 64, 64), (1, 1), "SAME")) == 4
    conv = ops.Convolution.of((2, 28, 28, 128), (3, 3, 128, 32), (1, 1), "SAME")
    assert ops.is_winograd(conv, prepared=True) is few
    assert not ops.is_winograd(ops.Convolution.of((2, 14, 14, 128), (3, 3, 128, 32), (1, 1), "SAME"), prepared=True)


def test_bfloat16_sums_in_float32():
    x, w = jnp.full((1, 6, 6, 512), 1.0), jnp.full((3, 3, 512, 8), 1.0)
    conv = ops.Convolution.of(x.shape, w.shape, (1, 1), "VALID", dtype=jnp.bfloat16)
    assert ops.cpu_form(conv) is ops.shifted_products
    found = ops.conv_general_dilated(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), (1, 1), "VALID")
    assert found.dtype == jnp.bfloat16
    assert (np.asarray(found, np.float32) == 4608).all()  # bfloat16 itself stops counting at 256


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 1), (3, 2), (2, 3)])
def test_pools_and_their_gradients(kind, padding, window, stride):
    how = ops.Pool(kind, (window, window), (stride, stride), padding)
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(-0.5, 1, size=(2, 9, 12, 5)), 0).astype(np.float32)  # zeros: equal values in a window

    def theirs(x):
        if kind == "max":
            return nn.max_pool(x, how.window, how.strides, padding)
        return nn.avg_pool(x, how.window, how.strides, padding, count_include_pad=False)

    expected = np.asarray(run(theirs, x))
    assert_close(run(lambda x: ops.pool(how, x), x), expected, "output", 1e-6)
    assert "reduce_window" not in jax.jit(lambda x: ops.pool(how, x)).lower(x).as_text()
    assert ops.pool(how, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    weights = rng.normal(size=expected.shape).astype(np.float32)
    found, wanted = (
        run(jax.grad(lambda x, f=f: (f(x) * weights).sum()), x) for f in (lambda x: ops.pool(how, x), theirs)
    )
    assert_close(found, np.asarray(wanted), "gradient", 1e-6)


def test_means_and_their_gradients():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (3, 5, 4, 7)), jnp.float32)
    np.testing.assert_allclose(ops.channel_mean(x), x.mean((0, 1, 2)), rtol=1e-6)

    def variance(mean, spread):
        return lambda x: ((x - spread(mean(x), x)) ** 2).sum()

    plain = variance(lambda x: jnp.mean(x, (0, 1, 2), keepdims=True), lambda v, x: v)
    found, wanted = (jax.grad(f)(x) for f in (variance(ops.channel_mean, ops.broadcast_channels), plain))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_lowers_for_every_platform(optimized):
    """On a machine that has a CPU alone; GPUs and TPUs get the plain convolution."""
    module, variables = fzoo.load("MobileNet", weights=None, input_shape=(32, 32, 3), classes=3)
    if optimized:
        module, variables = fzoo.optimize_for_inference(module, variables)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    call = jax.jit(module.apply)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    convolutions = {
        platform: jax.export.export(call, platforms=[platform])(shapes, images)
        .mlir_module()
        .count("stablehlo.convolution")
        for platform in ("cpu", "cuda", "tpu")
    }
    # Of the 28, those of one shape share a function.
    assert convolutions["cpu"] < convolutions["cuda"] == convolutions["tpu"] == 20
    together = jax.export.export(call, platforms=["cpu", "cuda", "tpu"])(shapes, images)
    noise = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    assert_close(together.call(variables, noise), np.asarray(call(variables, noise)), "exported")


def test_a_training_step_lowers_for_every_platform():
    module, variables = fzoo.load("MobileNet", weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=3)

    def loss(params, images):
        y, _ = module.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return -jnp.log(y[:, 0]).mean()

    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=["cpu", "cuda", "tpu"])
    exported(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables["params"]), images)


def forms_of_platforms(function, *arguments):
    """How often a program asks for its platform, when it is traced anew."""
    return str(jax.make_jaxpr(lambda *given: function(*given))(*arguments)).count("platform_index")


@pytest.mark.parametrize("platform", slow_but(["cpu", "gpu"], "cpu"))
def test_only_the_forms_of_a_known_platform_are_traced(platform):
    """Of convolutions, pools and sums, forward and backward, whatever was traced before; the sums are the same."""
    module, variables = network("DenseNet121", blocks=(1, 1, 1, 1), input_shape=(32, 32, 3), classes=5)
    images = images_for(module)

    def gradient(params, known):
        def loss_of(params):
            given = {**variables, "params": params}
            return jnp.square(module.apply(given, images, train=True, mutable=["batch_stats"])[0]).sum()

        with fzoo.devices.traced_for(known):
            return jax.grad(loss_of)(params)

    params = variables["params"]
    every = forms_of_platforms(functools.partial(gradient, known=None), params)
    assert every > 20
    assert forms_of_platforms(functools.partial(gradient, known=platform), params) == 0
    assert forms_of_platforms(functools.partial(gradient, known=None), params) == every
    expected, found = (jax.jit(gradient, static_argnums=1)(params, known) for known in (None, platform))
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for theirs, ours in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * scale)


def test_a_depthwise_gradient_of_bfloat16_sums_in_float32():
    """Of the kernel, over thousands of pixels: within a rounding of what float32 gives."""
    images, kernel = (4, 32, 32, 8), (3, 3, 1, 8)
    conv = ops.Convolution.of(images, kernel, (1, 1), "SAME", 8, jnp.bfloat16)
    x = (jax.random.normal(jax.random.key(0), images) + 1).astype(jnp.bfloat16)
    w = jnp.ones(kernel, jnp.bfloat16)

    def gradient(x, w):
        return jax.grad(lambda w: ops.depthwise_shifted(conv, x, w).astype(jnp.float32).sum())(w)

    expected = gradient(x.astype(jnp.float32), w.astype(jnp.float32))
    found = gradient(x, w)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0.006)


#: (kernel's sides, stride, padding, dilation, outputs for each channel) of depthwise convolutions.
DEPTHWISE = {
    "same": ((3, 3), 1, "SAME", 1, 1),
    "more padding than the kernel reaches": ((3, 5), 1, ((4, 0), (1, 6)), 1, 1),
    "apart": ((3, 3), 1, "SAME", 2, 1),
    "stride 2": ((5, 3), 2, "SAME", 1, 1),
    "a multiplier": ((3, 3), 1, "VALID", 1, 2),
}


@pytest.mark.parametrize("case", slow_but(DEPTHWISE, "stride 2", "a multiplier"))
def test_derivatives_of_a_depthwise_convolution(case):
    """Of the first and the second order, forward and backward, alone and of several: as XLA's own."""
    kernel, stride, padding, apart, times = DEPTHWISE[case]
    keys = jax.random.split(jax.random.key(0), 4)
    x, dx = (jax.random.normal(key, (2, 9, 8, 6)) for key in keys[:2])
    w, dw = (jax.random.normal(key, (*kernel, 1, 6 * times)) for key in keys[2:])
    strides, dilation = (stride, stride), (apart, apart)
    conv = ops.Convolution.of(x.shape, w.shape, strides, padding, 6, dilation=dilation)
    ours = functools.partial(ops.depthwise_shifted, conv)

    def theirs(x, w):
        return lax.conv_general_dilated(
            x, w, strides, padding, rhs_dilation=dilation, dimension_numbers=NHWC, feature_group_count=6
        )

    def derivatives(convolve):
        def loss(x, w):
            return jnp.sin(convolve(x, w)).sum()

        gradient = jax.grad(loss, (0, 1))
        several = jax.vmap(gradient, (0, None))(jnp.stack([x, dx]), w)
        return (
            jax.jvp(convolve, (x, w), (dx, dw)),
            [jax.jvp(lambda w: convolve(x, w), (w,), (dw,)), gradient(x, w), several],
            jax.jvp(gradient, (x, w), (dx, dw)),
            jax.grad(lambda x, w: sum(jnp.square(g).sum() for g in gradient(x, w)), (0, 1))(x, w),
        )

    for found, expected in zip(
        *(jax.tree.leaves(jax.jit(derivatives, static_argnums=0)(f)) for f in (ours, theirs)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
