"""`optimize_for_inference`: what test_models.py, which compares every layer of every model, leaves."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import assert_alive, network, random_images
from reference import assert_close
from tiers import slow

import fzoo
from fzoo.inference import batches, folding, optimize
from fzoo.inference.batches import micro_batch
from fzoo.layers.record import Prepared
from fzoo.ops import convolution


@pytest.fixture(scope="module")
def small():
    return network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))


@pytest.mark.parametrize(("blocks", "tiles"), [((1, 2, 1, 1), 4), slow((3, 4, 6, 3), 13)], ids=str)
def test_kernels_prepared_for_winograd_give_the_same(blocks, tiles):
    """At the size that the network was optimised for, and at another, where some tiles are larger than the image."""
    module, variables = network("ResNet50", include_top=False, pooling="avg", input_shape=(64, 64, 3), blocks=blocks)
    module = module.clone(input_shape=None)
    fast, prepared = fzoo.optimize_for_inference(module, variables)
    assert fast.prepared and len(fast.prepared.tiles) == tiles
    for size in ((3, 112, 96, 3), (1, 37, 61, 3)):
        images = random_images(size)
        expected = np.asarray(fzoo.predict(module, variables, images))
        assert_close(fzoo.predict(fast, prepared, images), expected, f"{size}")


@pytest.mark.slow
def test_is_a_module_like_any(small):
    module, variables = small
    fast, prepared = fzoo.optimize_for_inference(module, variables)
    again, _ = fzoo.optimize_for_inference(module, variables)
    assert fast == again and hash(fast) == hash(again)  # so it compiles once
    images = random_images((5, 32, 32, 3))
    inside = jax.jit(lambda v, x: fzoo.predict(fast, v, x, batch_size=2))(prepared, images)
    assert_alive(inside)
    assert_close(inside, np.asarray(module.apply(variables, images)), "inside a jit")
    left = fzoo.layer_names(fast)
    assert "conv_dw_1" not in left and "conv_dw_1_bn" in left
    taps = fzoo.features(fast, prepared, images, ["conv_dw_1_bn", "conv_pw_13_relu"])
    wanted = fzoo.features(module, variables, images, ["conv_dw_1_bn", "conv_pw_13_relu"])
    for name, array in wanted.items():
        assert_close(taps[name], np.asarray(array), name)


def test_it_commits_nothing(small):
    """Its variables lie where the network's do."""
    module, variables = small
    _, prepared = fzoo.optimize_for_inference(module, variables)
    assert not any(leaf.committed for leaf in jax.tree.leaves(prepared))
    second, mesh = jax.local_devices()[1], fzoo.devices.mesh()
    for given, where in (
        (jax.device_put(variables, second), {second}),
        (fzoo.devices.replicate(variables, mesh), set(mesh.devices)),
    ):
        _, prepared = fzoo.optimize_for_inference(module, given)
        assert all(leaf.committed and leaf.devices() == where for leaf in jax.tree.leaves(prepared))


def test_kernels_and_computation_in_bfloat16(small):
    module, variables = small
    fast, prepared = fzoo.optimize_for_inference(module, variables, dtype=jnp.bfloat16)
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(prepared) if path[-1].key == "kernel"]
    assert {k.dtype for k in kernels} == {jnp.dtype(jnp.bfloat16)}
    images = random_images((5, 32, 32, 3))
    assert fzoo.features(fast, prepared, images, "conv_pw_3_relu")["conv_pw_3_relu"].dtype == jnp.bfloat16
    found = fzoo.predict(fast, prepared, images)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, fzoo.predict(module, variables, images), atol=0.1)


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["MobileNet", slow("MobileNetV2")])
def test_real_photographs(real, name, dtype, error):
    """The same class, and probabilities within the error that the documentation states."""
    if name == "MobileNet":
        file, options, size = "mobilenet_v1_0.5_160_imagenet.h5", {"alpha": 0.5, "input_shape": (160, 160, 3)}, 160
    else:
        file, options, size = "mobilenet_v2_imagenet.h5", {}, 224
    module, variables = fzoo.load(name, weights=real / file, **options)
    pixels = np.stack([fzoo.load_image(path, size) for path in sorted((real / "photos").iterdir())])
    expected = np.asarray(fzoo.predict(module, variables, fzoo.preprocess_input(pixels, name)))
    found = np.asarray(
        fzoo.predict(*fzoo.optimize_for_inference(module, variables, dtype=dtype), pixels, preprocess=name)
    )
    assert len(pixels) == 6
    assert (found.argmax(1) == expected.argmax(1)).all()
    assert np.abs(found - expected).max() < error


@pytest.mark.wrong_types
def test_what_it_does_not_do_is_said(small):
    module, variables = small
    fast, prepared = fzoo.optimize_for_inference(module, variables)
    images = np.zeros((1, 32, 32, 3), np.float32)
    with pytest.raises(ValueError, match="train the plain one"):
        fast.apply(prepared, images, train=True)
    for wrong in (
        lambda: fzoo.optimize_for_inference(fast, prepared),
        lambda: fzoo.save_keras_weights(fast, prepared, "x.h5"),
        lambda: fzoo.load_keras_weights(fast, "x.h5"),
    ):
        with pytest.raises(ValueError, match="optimize_for_inference made this network; the plain one"):
            wrong()
    with pytest.raises(ValueError, match=r"not the variables of this MobileNet: .*conv1/kernel is missing"):
        fzoo.optimize_for_inference(module, {"params": {}, "batch_stats": {}})
    with pytest.raises(ValueError, match="floating dtype"):
        fzoo.optimize_for_inference(module, variables, dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"a module from fzoo\.create expected"):
        fzoo.optimize_for_inference(lambda x: x, variables)


def test_bfloat16_without_units_is_said(small, monkeypatch):
    """Once it is asked for on a CPU; a processor that has them says nothing, nor does another platform."""
    monkeypatch.setattr(optimize.sys, "platform", "linux")
    for units, platform, warns in ((False, "cpu", True), (True, "cpu", False), (False, "cuda", False)):
        monkeypatch.setattr(optimize, "has_bfloat16", lambda units=units: units)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fzoo.optimize_for_inference(*small, dtype=jnp.bfloat16, platform=platform)
        assert [str(each.message)[:18] for each in caught] == ["bfloat16 asked for"] * warns


def test_large_maps_of_bfloat16_are_computed_in_float32(monkeypatch, tmp_path):
    """By Winograd's algorithm, with kernels of float32, which keeps all digits; in a file, too. Where oneDNN is not."""
    monkeypatch.setattr(folding, "LARGE", 0)
    module, variables = network(
        "ResNet50", include_top=False, pooling="avg", input_shape=(64, 64, 3), blocks=(1, 2, 1, 1)
    )
    for is_there in (True, False):
        monkeypatch.setattr(folding, "has_onednn", lambda is_there=is_there: is_there)
        monkeypatch.setattr(convolution, "has_wide_vectors", lambda: True)
        fast, _ = fzoo.optimize_for_inference(module, variables, dtype=jnp.bfloat16)
        assert fast.prepared and bool(fast.prepared.tiles) != is_there
    fast, prepared = fzoo.optimize_for_inference(module, variables, dtype=jnp.bfloat16)
    assert fast.prepared and fast.prepared.tiles
    dtypes = {str(prepared["params"][name]["kernel"].dtype) for name, _ in fast.prepared.tiles}
    assert dtypes == {"float32"} and prepared["params"]["conv1_conv"]["kernel"].dtype == jnp.bfloat16
    images = random_images((2, 64, 64, 3))
    expected = np.asarray(fzoo.predict(module, variables, images))
    found = np.asarray(fzoo.predict(fast, prepared, images), np.float32)
    assert_close(found, expected, "bfloat16", 0.05)
    fzoo.save_variables(fast, prepared, tmp_path / "fast.safetensors")
    again, arrays = fzoo.load(weights=tmp_path / "fast.safetensors", dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, arrays, prepared)
    np.testing.assert_array_equal(fzoo.predict(again, arrays, images), fzoo.predict(fast, prepared, images))


def test_micro_batches_of_bfloat16(small, monkeypatch):
    """ResNets compute fewer together, as measured; others as many as in float32. By oneDNN, all take twice as many."""
    module, _ = network("ResNet50", include_top=False, input_shape=(32, 32, 3), blocks=(1, 1, 1, 1))
    assert [micro_batch(module.clone(dtype=dtype)) for dtype in (jnp.float32, jnp.bfloat16)] == [4, 2]
    assert micro_batch(small[0].clone(dtype=jnp.bfloat16)) == micro_batch(small[0])
    for wide, there, expected in ((True, True, [4, 8]), (False, True, [4, 2]), (True, False, [4, 2])):
        monkeypatch.setattr(batches, "has_wide_vectors", lambda wide=wide: wide)
        monkeypatch.setattr(batches, "has_onednn", lambda there=there: there)
        prepared = [module.clone(dtype=dtype, prepared=Prepared()) for dtype in (jnp.float32, jnp.bfloat16)]
        assert [micro_batch(one) for one in prepared] == expected
