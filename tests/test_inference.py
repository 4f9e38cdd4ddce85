"""`predict`, `features` and the networks inside a user's own JAX."""

import functools
import re
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hurry import COMPILER_OPTIONS
from jax.sharding import NamedSharding, PartitionSpec
from networks import assert_alive, images_for, network, random_images, small_options
from reference import assert_close, assert_equal, by_model
from tiers import slow_but

import fzoo
from fzoo.inference import devices
from fzoo.inference.batches import compiled, default_batch, join_on_device, run
from fzoo.layers.graph import trace

#: Of a user, quick to compile.
quick = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


@pytest.fixture(scope="module")
def small():
    return network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))


@pytest.fixture(scope="module")
def images():
    return random_images((7, 32, 32, 3))


@pytest.fixture(scope="module")
def wanted(small, images):
    """What the images give: a layer, and the output."""
    layers = ("conv_dw_3_relu", "predictions")
    return quick(functools.partial(small[0].apply, method="endpoints"), static_argnums=2)(small[1], images, layers)


@pytest.mark.parametrize("batch_size", slow_but([None, 1, 3, 7, 50], None, 3, 50))
def test_any_batch_size_gives_the_same(small, images, wanted, batch_size):
    module, variables = small
    expected = wanted["predictions"]
    assert_alive(expected)
    for kind in (np.asarray, jnp.asarray):
        found = fzoo.predict(module, variables, kind(images), batch_size=batch_size)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        taps = fzoo.features(module, variables, kind(images), ["conv_dw_3_relu", "predictions"], batch_size=batch_size)
        np.testing.assert_allclose(taps["predictions"], expected, rtol=1e-4, atol=1e-6)
        assert taps["conv_dw_3_relu"].shape == (7, 8, 8, 32)
        np.testing.assert_allclose(taps["conv_dw_3_relu"], wanted["conv_dw_3_relu"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("count", slow_but([0, 1, 9], 0, 9))
def test_results_stay_where_images_were_computed(small, count, kind):
    """Whatever their number: committed to no device, unless the images or the variables are; split on a mesh."""
    module, variables = small
    images = random_images((9, 32, 32, 3))[:count]
    expected = np.asarray(quick(module.apply)(variables, images)) if count else np.zeros((0, 5), np.float32)
    first, second = jax.local_devices()
    found = fzoo.predict(module, variables, kind(images))
    assert not found.committed and found.devices() == {first} and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    taps = fzoo.features(module, variables, kind(images), ["conv_pw_2", "predictions"])
    assert not any(tap.committed for tap in taps.values()) and taps["conv_pw_2"].shape == (count, 8, 8, 32)
    for there in (
        fzoo.predict(module, variables, jax.device_put(kind(images), second)),
        fzoo.predict(module, jax.device_put(variables, second), kind(images)),
    ):
        assert there.committed and there.devices() == {second}
        np.testing.assert_allclose(there, expected, rtol=1e-4, atol=1e-6)
    mesh = devices.mesh()
    found = fzoo.predict(module, variables, kind(images), mesh=mesh)
    spec = PartitionSpec("batch") if count % 2 == 0 else PartitionSpec()
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("given", [None, 2])
def test_results_are_put_together_on_a_device(small, given):
    """As elsewhere than on a CPU."""
    mesh = given and devices.mesh(given)
    place = functools.partial(devices.shard, mesh=mesh) if mesh else jnp.asarray
    parts = [place(np.arange(8.0).reshape(4, 2) + 8 * i) for i in range(5)]
    for count in (17, 18, 20):
        found = join_on_device(iter(parts), count)
        np.testing.assert_array_equal(found, np.arange(40.0).reshape(20, 2)[:count])
        assert found.committed == bool(mesh)
        if mesh:
            spec = PartitionSpec("batch") if count % 2 == 0 else PartitionSpec()
            assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


def test_no_images_inside_a_jit_and_explained(small):
    module, variables = small
    none = np.zeros((0, 32, 32, 3), np.float32)
    assert quick(lambda v, x: fzoo.predict(module, v, x))(variables, none).shape == (0, 5)
    assert [part.shape for part in fzoo.explain(module, variables, none, top=2)] == [(0, 2), (0, 2), (0, 2, 1, 1)]


def test_micro_batches_are_even(small):
    """No image alone because of a count that 4 does not divide, and the fewest that fill up."""

    class Wide(type(small[0])):
        micro_batch = 4

    module, variables = Wide(alpha=0.25, classes=5, input_shape=(32, 32, 3)), small[1]

    def convolved(count):
        program: Any = compiled(run, "cpu", jnp.dtype(jnp.float32))
        text = program.lower(module, None, variables, np.zeros((count, 32, 32, 3), np.float32)).as_text()
        return {int(n) for n in re.findall(r"tensor<(\d+)x16x16x8xf32>", text)}

    assert [convolved(count) for count in (15, 16, 13, 9, 6, 5, 3)] == [{3}, {4}, {3}, {3}, {3}, {3}, {3}]
    images = random_images((13, 32, 32, 3))
    found = fzoo.predict(module, variables, images, batch_size=13)
    np.testing.assert_allclose(found, quick(module.apply)(variables, images), rtol=1e-4, atol=1e-6)


def test_the_program_is_for_its_platform_alone(small):
    """No form of another is in what `predict` compiles."""
    module, variables = small
    images = np.zeros((2, 32, 32, 3), np.float32)
    program: Any = compiled(run, "cpu", jnp.dtype(jnp.float32))
    assert "platform_index" not in str(program.trace(module, None, variables, images).jaxpr)
    assert "platform_index" in str(jax.make_jaxpr(module.apply)(variables, images))


def test_frozen_variables_everywhere(small, images, wanted, tmp_path):
    """Flax's FrozenDict."""
    module, variables = small
    frozen, expected = flax.core.freeze(variables), wanted["predictions"]
    np.testing.assert_allclose(fzoo.predict(module, frozen, images), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        fzoo.features(module, frozen, images, "predictions")["predictions"], expected, rtol=1e-4, atol=1e-6
    )
    fast, prepared = fzoo.optimize_for_inference(module, frozen)
    np.testing.assert_allclose(fzoo.predict(fast, flax.core.freeze(prepared), images), expected, rtol=1e-3, atol=1e-5)
    assert fzoo.explain(module, frozen, images[:2], top=1).heat.shape == (2, 1, 1, 1)
    for name in ("w.h5", "w.safetensors", "w.orbax"):
        fzoo.save_variables(module, frozen, tmp_path / name)
        assert_equal(fzoo.load_variables(module, tmp_path / name), variables)
    assert fzoo.export(module, frozen, tmp_path / "w.stablehlo", platforms="cpu").platforms == ("cpu",)


@pytest.mark.parametrize("name", by_model(("MobileNet", "ConvNeXtTiny", "EfficientNetB0"), quick=()))
def test_x64_changes_nothing(name, tmp_path):
    """Variables are float32 with `jax_enable_x64`: files written without are read, and the other way round."""
    module = fzoo.create(name, **small_options(name))
    before = jax.tree.map(lambda leaf: leaf.dtype, trace(module).variables)
    module, variables = network(name, **small_options(name))
    fzoo.save_variables(module, variables, tmp_path / "w.safetensors")
    pixels = images_for(module, 2)
    expected = np.asarray(fzoo.predict(module, variables, pixels))
    jax.config.update("jax_enable_x64", True)
    try:
        assert jax.tree.map(lambda leaf: leaf.dtype, trace(module).variables) == before
        loaded = fzoo.load_variables(module, tmp_path / "w.safetensors")
        fzoo.save_variables(module, loaded, tmp_path / "again.safetensors")
        found = fzoo.predict(module, loaded, pixels.astype(np.float64))
        fast = fzoo.predict(*fzoo.optimize_for_inference(module, loaded), pixels)
        _, fresh = fzoo.load(name, weights=None, **small_options(name))
    finally:
        jax.config.update("jax_enable_x64", False)
    assert found.dtype == fast.dtype == np.float32
    assert jax.tree.map(lambda leaf: leaf.dtype, fresh) == before
    assert_close(found, expected, name)
    assert_close(fast, expected, name)
    assert_equal(fzoo.load_variables(module, tmp_path / "again.safetensors"), variables)


def test_a_stream_compiles_once(small, images, compilations):
    module, variables = small
    fzoo.predict(module, variables, images, batch_size=4)
    fzoo.features(module, variables, images, "conv_pw_1", batch_size=4)
    compilations.clear()
    for count in (7, 4, 5, 1, 6):
        fzoo.predict(module, variables, images[:count], batch_size=4)
        fzoo.features(module, variables, images[:count], "conv_pw_1", batch_size=4)
    assert not compilations
    same = fzoo.create("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))
    fzoo.predict(same, variables, images, batch_size=4)  # an equal module is the same program
    assert not compilations


def test_sizes_left_open_share_few_programs(small, images, compilations):
    module, variables = small
    fzoo.predict(module, variables, images)  # 7 images go in as 8
    compilations.clear()
    fzoo.predict(module, variables, np.concatenate([images, images[:1]]))
    assert not compilations


def test_a_tap_costs_what_lies_before_it():
    """By the FLOPs of the compiled program, which XLA counts."""
    module = fzoo.create("VGG16", input_shape=(64, 64, 3))
    variables = trace(module).variables
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)

    def flops(layer):
        call = jax.jit(lambda v, x: fzoo.features(module, v, x, layer))
        return call.lower(variables, image).compile().cost_analysis()["flops"]

    nodes = {node.name: node for node in trace(module).nodes}
    assert flops("block1_conv1") < 1.1 * (nodes["block1_conv1"].flops + 2 * 64 * 64 * 64)
    whole, first = flops("predictions"), flops("block1_conv1")
    assert first < 0.02 * whole
    # XLA leaves out what padding multiplies, and Winograd's algorithm most of the products of the middle blocks.
    assert 0.4 < whole / sum(node.flops for node in nodes.values()) < 1


@pytest.mark.slow
def test_inside_a_users_jit_vmap_grad(small, images):
    module, variables = small
    expected = quick(module.apply)(variables, images)
    jitted = quick(lambda v, x: fzoo.predict(module, v, x))(variables, images)
    np.testing.assert_allclose(jitted, expected, rtol=1e-4, atol=1e-6)
    closed_over = quick(lambda: fzoo.predict(module, variables, images, batch_size=4))()
    np.testing.assert_allclose(closed_over, expected, rtol=1e-4, atol=1e-6)
    (looped,) = quick(lambda x: jax.lax.map(lambda _: fzoo.predict(module, variables, x), jnp.zeros(1)))(images)
    np.testing.assert_allclose(looped, expected, rtol=1e-4, atol=1e-6)
    assert jax.eval_shape(lambda: fzoo.predict(module, variables, images)).shape == (7, 5)
    cut = quick(lambda v, x: fzoo.predict(module, v, x, batch_size=2))(variables, images)
    np.testing.assert_allclose(cut, expected, rtol=1e-4, atol=1e-6)
    mapped = quick(jax.vmap(lambda x: module.apply(variables, x[None])[0]))(images)
    np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-6)

    def loss(x):
        return fzoo.predict(module, variables, x)[:, 2].sum()

    slope = quick(jax.grad(loss))(images)
    step = 1e-2 * slope / jnp.linalg.norm(slope)
    difference = float(quick(loss)(images + step) - quick(loss)(images - step))
    assert difference == pytest.approx(2 * float(jnp.vdot(slope, step)), rel=0.05)


def test_as_a_submodule(small, images):
    backbone, variables = small

    class Twice(nn.Module):
        backbone: nn.Module

        @nn.compact
        def __call__(self, x):
            taps = self.backbone.endpoints(x, ["conv_pw_2_relu"])
            return nn.Dense(2)(self.backbone(x)), taps["conv_pw_2_relu"].mean((1, 2))

    model = Twice(backbone)
    both = quick(model.init)(jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, both["params"]["backbone"]) == jax.tree.map(jnp.shape, variables["params"])
    for collection in ("params", "batch_stats"):
        both[collection]["backbone"] = variables[collection]
    _, tap = quick(model.apply)(both, images)
    expected = fzoo.features(backbone, variables, images, "conv_pw_2_relu")["conv_pw_2_relu"]
    np.testing.assert_allclose(tap, expected.mean((1, 2)), rtol=1e-4, atol=1e-6)


def test_bfloat16(small, images):
    module, variables = small
    half = fzoo.create("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3), dtype=jnp.bfloat16)
    assert fzoo.features(half, variables, images, "conv_pw_9")["conv_pw_9"].dtype == jnp.bfloat16
    found = fzoo.predict(half, variables, images)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, fzoo.predict(module, variables, images), atol=0.1)


@pytest.mark.slow
def test_random_variables_are_keras_initialisers():
    nasnet = {"weights": None, "input_shape": (32, 32, 3), "num_blocks": 1}
    _, variables = fzoo.load("NASNetMobile", rng=jax.random.key(3), **nasnet)
    kernel = variables["params"]["normal_conv_1_0"]["kernel"]  # he_normal
    assert float(kernel.std()) == pytest.approx((2 / kernel.shape[2]) ** 0.5, rel=0.1)
    kernel = variables["params"]["predictions"]["kernel"]  # glorot_uniform
    assert float(jnp.abs(kernel).max()) == pytest.approx((6 / sum(kernel.shape)) ** 0.5, rel=0.01)
    assert (variables["batch_stats"]["stem_bn1"]["var"] == 1).all()
    module = fzoo.create("MobileNet", alpha=0.25, input_shape=(32, 32, 3))
    flax = quick(module.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    ours = fzoo.load("MobileNet", weights=None, alpha=0.25, input_shape=(32, 32, 3))[1]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(flax), strict=True):
        assert (
            a.shape == b.shape
            and a.dtype == b.dtype
            and float(a.std()) == pytest.approx(float(b.std()), rel=0.3, abs=1e-6)
        )
    other = fzoo.load("NASNetMobile", rng=jax.random.key(4), **nasnet)[1]
    assert (other["params"]["predictions"]["kernel"] != kernel).any()


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 32, 32, 3), bool), "preprocess_input"),
        (np.full((2, 32, 32, 3), 256, np.uint16), "from 256 to 256 given: pixels from 0 to 255 expected"),
        (np.full((2, 32, 32, 3), -40, np.int32), "pixels from 0 to 255 expected"),
        (np.zeros((32, 32, 3), np.float32), r"image\[None\]"),
        (np.zeros((0, 32, 33, 3), np.float32), "32, 32, 3 expected"),
        (np.zeros((1, 32, 33, 3), np.float32), "32, 32, 3 expected"),
        (np.zeros((1, 32, 32, 4), np.float32), "32, 32, 3 expected"),
        ([1, 2], "list given"),
        (None, "NoneType given"),
    ],
)
def test_bad_images(small, images, message):
    with pytest.raises(ValueError, match=message):
        fzoo.predict(*small, images)


@pytest.mark.wrong_types
def test_bad_arguments(small, images):
    with pytest.raises(ValueError, match="did you mean conv_pw_9"):
        fzoo.features(*small, images, ["conv_pw_99"])
    with pytest.raises(ValueError, match="no layers"):
        fzoo.features(*small, images, [])
    for batch_size in (0, -1, 2.0, "2"):
        with pytest.raises(ValueError, match="batch_size="):
            fzoo.predict(*small, images, batch_size=batch_size)
    with pytest.raises(ValueError, match="str given"):
        fzoo.layer_names("VGG16")
    open_size = fzoo.create("MobileNet", alpha=0.25, classes=5)
    with pytest.raises(ValueError, match="32 x 32 at the least"):
        fzoo.predict(open_size, small[1], np.zeros((1, 31, 40, 3), np.float32))
    with pytest.raises(ValueError, match="any, any, 3 expected"):
        fzoo.predict(open_size, small[1], np.zeros((1, 40, 40, 1), np.float32))


def test_pixels_are_preprocessed_in_the_program(small):
    module, variables = small
    pixels = random_images((7, 32, 32, 3), seed=2, pixels=True).astype(np.uint8)
    expected = fzoo.predict(module, variables, fzoo.preprocess_input(pixels, "MobileNet"))
    assert_alive(expected)
    with pytest.warns(UserWarning, match="from 0 to 255 given, which MobileNet takes from -1 to 1"):
        assert np.abs(fzoo.predict(module, variables, pixels.astype(np.float32)) - expected).max() > 0.05
    for given in (pixels, jnp.asarray(pixels), pixels.astype(np.uint16), pixels.astype(np.float32)):
        for preprocess in ("MobileNet", "Xception", "tf", True):  # which are the same
            found = fzoo.predict(module, variables, given, batch_size=4, preprocess=preprocess)
            np.testing.assert_allclose(found, expected, atol=1e-5)
    for given in (pixels, jnp.asarray(pixels), pixels.astype(np.int32)):  # the network knows how it wants pixels
        np.testing.assert_allclose(fzoo.predict(module, variables, given), expected, atol=1e-5)
    inside = jax.jit(lambda v, x: fzoo.predict(module, v, x, preprocess="MobileNet"))(variables, pixels)
    np.testing.assert_allclose(inside, expected, atol=1e-5)
    taps = fzoo.features(module, variables, pixels, "predictions", preprocess="MobileNet")
    np.testing.assert_allclose(taps["predictions"], expected, atol=1e-5)
    inside = jax.jit(lambda v, x: fzoo.predict(module, v, x))(variables, pixels)
    np.testing.assert_allclose(inside, expected, atol=1e-5)
    with pytest.raises(ValueError, match="did you mean MobileNet"):
        fzoo.predict(module, variables, pixels, preprocess="Mobilnet")


def test_values_that_can_not_be(small):
    module, variables = small
    pixels = random_images((2, 32, 32, 3), seed=2, pixels=True).astype(np.uint8)
    ready = fzoo.preprocess_input(pixels, "MobileNet")
    for given in (ready, jnp.asarray(ready)):  # twice is once too often
        with pytest.raises(ValueError, match="as if they were preprocessed already"):
            fzoo.predict(module, variables, given, preprocess=True)
    with pytest.raises(ValueError, match="as if they were preprocessed already"):
        fzoo.predict(module, variables, fzoo.preprocess_input(pixels, "VGG16"), preprocess="MobileNet")
    bright = fzoo.preprocess_input(pixels // 2 + 128, "torch")  # above 0 and beyond 1
    with pytest.raises(ValueError, match="as if they were preprocessed already"):
        fzoo.predict(module, variables, bright, preprocess="MobileNet")
    with pytest.raises(ValueError, match="preprocess='VGG16' given, which is 'caffe'; MobileNet takes 'tf'"):
        fzoo.predict(module, variables, pixels, preprocess="VGG16")
    for name, options, least, most in (
        ("MobileNetV3Small", {}, 0, 1),
        ("MobileNetV3Small", {}, -120, 140),
        ("ResNet50", {"blocks": (1, 1, 1, 1)}, 0, 255),
        ("ResNet50", {"blocks": (1, 1, 1, 1)}, 0, 1),
        ("DenseNet121", {"blocks": (1, 1, 1, 1)}, 0, 255),
    ):
        other = fzoo.create(name, classes=4, input_shape=(32, 32, 3), **options)
        images = np.linspace(least, most, 32 * 32 * 3, dtype=np.float32).reshape(1, 32, 32, 3)
        with pytest.warns(UserWarning, match=f"which {type(other).__name__} takes from"):
            fzoo.predict(other, jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), trace(other).variables), images)


@pytest.mark.slow
def test_a_network_without_its_preprocessing():
    module, variables = network("MobileNetV3Small", include_preprocessing=False, classes=4, input_shape=(32, 32, 3))
    pixels = random_images((2, 32, 32, 3), seed=2, pixels=True).astype(np.uint8)
    with pytest.raises(ValueError, match="images of uint8 given, floats expected"):
        fzoo.predict(module, variables, pixels)
    with pytest.raises(ValueError, match="how MobileNetV3 wants its images is not known"):
        fzoo.predict(module, variables, pixels, preprocess=True)
    found = fzoo.predict(module, variables, pixels, preprocess="tf")
    expected = fzoo.predict(module, variables, fzoo.preprocess_input(pixels, "tf"))
    assert_alive(expected)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_default_batch_of_a_device():
    """By the pixels, where memory is what limits it."""
    for platform, sides, size in (
        ("cpu", (224, 224), 32),
        ("cpu", (600, 600), 32),
        ("cuda", (224, 224), 256),
        ("gpu", (299, 299), 128),
        ("tpu", (600, 600), 32),
        ("cuda", (2000, 2000), 32),
        ("cuda", (32, 32), 1024),
    ):
        assert default_batch(platform, (7, *sides, 3)) == size
