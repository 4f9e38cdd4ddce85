"""oneDNN's convolutions, and what they do behind their sums."""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import re
import sys
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache
from networks import SMALL, assert_alive, images_for, network, small_options
from reference import assert_close
from tiers import slow_but

import fzoo
from fzoo import ops
from fzoo.inference import batches
from fzoo.inference.batches import compiled, for_devices, output_shapes, run
from fzoo.inference.epilogues import with_epilogues
from fzoo.inference.optimize import optimize_for_inference
from fzoo.ops import convolution, onednn, processor
from fzoo.ops.platforms import traced_for
from fzoo.ops.shapes import Convolution, has_open_side

#: (shape of the images, of the kernel, strides, padding, groups, dilation)
CASES = {
    "3x3": ((2, 9, 7, 8), (3, 3, 8, 5), (1, 1), "SAME", 1, (1, 1)),
    "pointwise, apart": ((3, 8, 7, 20), (1, 1, 20, 48), (2, 2), "VALID", 1, (1, 1)),
    "a stem": ((2, 15, 17, 3), (7, 7, 3, 16), (2, 2), ((3, 3), (2, 3)), 1, (1, 1)),
    "lopsided": ((1, 11, 8, 4), (5, 2, 4, 6), (1, 3), ((0, 4), (1, 0)), 1, (1, 1)),
    "dilated": ((2, 12, 13, 6), (3, 3, 6, 7), (1, 1), ((2, 2), (3, 3)), 1, (2, 3)),
    "depthwise": ((2, 9, 9, 12), (3, 3, 1, 12), (2, 1), "SAME", 12, (1, 1)),
    "several for each channel": ((2, 6, 6, 5), (3, 3, 1, 10), (1, 1), "SAME", 5, (1, 1)),
    "groups": ((2, 7, 6, 12), (3, 3, 4, 9), (1, 1), "SAME", 3, (1, 1)),
}


@pytest.fixture
def there():
    if not onednn.has_onednn():
        pytest.skip("this jaxlib has no oneDNN that is known")


@pytest.fixture
def chosen(there, monkeypatch):
    """Have oneDNN chosen on any processor, and in small networks, too."""
    monkeypatch.setattr(convolution, "has_wide_vectors", lambda: True)
    monkeypatch.setattr(convolution, "LARGE_CALL", 0)
    compiled.cache_clear()
    yield
    compiled.cache_clear()


def random(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def text_of(module, variables, images) -> str:
    """The program that `predict` compiles."""
    call: Any = for_devices(run, module, variables, images, None)[0]
    call = call.jitted if isinstance(call, onednn.Uncached) else call
    return call.lower(module, None, variables, images).as_text()


def behind_in(text: str) -> list[tuple[str, ...]]:
    """What comes behind each convolution of oneDNN in a program."""
    configurations = re.findall(r'@"?__onednn\$convolution"?\(.*?backend_config = "((?:[^"\\]|\\.)*)"', text)
    configurations += re.findall(r'call_target_name = "__onednn.*?backend_config = "((?:[^"\\]|\\.)*)"', text)
    whole = [json.loads(text.replace("\\22", '"').replace('\\"', '"')) for text in configurations]
    return [tuple(each["onednn_conv_config"]["fusions"]["ops"]) for each in whole]


def test_it_is_there_for_what_is_tested():
    """On Linux on x86 with the jaxlibs that the tests run with, so that none of these is skipped there."""
    release = ".".join(importlib.metadata.version("jaxlib").split(".")[:2])
    expected = sys.platform == "linux" and platform.machine() == "x86_64" and release in onednn.RELEASES
    assert onednn.has_onednn() == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_convolutions(there, case, dtype):
    images, kernel, strides, padding, groups, dilation = CASES[case]
    conv = Convolution.of(images, kernel, strides, padding, groups, dtype, dilation)
    if not onednn.computes(conv):
        assert dtype == "bfloat16" and not processor.has_bfloat16()
        pytest.skip("no units for bfloat16")
    x, weights = random(0, *images, dtype=dtype), random(1, *kernel, dtype=dtype)
    expected = ops.plain(conv, *(a.astype(jnp.float32) for a in (x, weights)), feature_group_count=groups)
    found = onednn.Uncached(lambda x, w: onednn.convolve(conv, x, w))(x, weights)
    assert found.dtype == dtype and found.shape == expected.shape
    assert_close(np.asarray(found, np.float32), np.asarray(expected), case, 1e-5 if dtype == "float32" else 1e-2)


def test_what_it_does_not_compute(there, monkeypatch):
    """It aborts the process over some of these."""
    conv = Convolution.of((2, 8, 8, 4), (3, 3, 4, 4), (1, 1), "SAME")
    replace = functools.partial(dataclasses.replace, conv)
    assert onednn.computes(conv)
    assert not onednn.computes(replace(pads=((-1, 0), (0, 0))))
    assert not onednn.computes(replace(pads=((0, 3), (0, 0))))
    assert not onednn.computes(replace(height=2, pads=((0, 0), (0, 0))))
    assert not onednn.computes(replace(images=0))
    for dtype in ("float16", "float64"):
        assert not onednn.computes(replace(dtype=np.dtype(dtype)))
    (side,) = jax.export.symbolic_shape("side")
    assert has_open_side(side) and not onednn.computes(replace(width=side))
    monkeypatch.setattr(onednn, "has_bfloat16", lambda: False)
    assert not onednn.computes(replace(dtype=jnp.dtype(jnp.bfloat16)))


def test_it_is_asked_for_where_it_is_known_alone(monkeypatch):
    """A jaxlib of another release may read the call in other words."""
    onednn.has_onednn.cache_clear()
    monkeypatch.setattr(onednn, "RELEASES", ())
    monkeypatch.setattr(onednn, "convolves_rightly", lambda: pytest.fail("tried all the same"))
    assert not onednn.has_onednn()
    onednn.has_onednn.cache_clear()


def test_where_it_is_chosen(monkeypatch):
    """In bfloat16 for all; in float32 for what whole networks were faster with."""
    chosen = {
        "a large stem": ((4, 224, 224, 3), (7, 7, 3, 64), 2, 1, True),
        "a small stem": ((2, 224, 224, 3), (3, 3, 3, 32), 2, 1, False),
        "large, of one pixel": ((4, 14, 14, 1024), (1, 1, 1024, 256), 1, 1, True),
        "small, of one pixel": ((2, 14, 14, 64), (1, 1, 64, 384), 1, 1, False),
        "what is Winograd's": ((4, 28, 28, 128), (3, 3, 128, 128), 1, 1, False),
        "what is too small for Winograd": ((2, 14, 14, 128), (3, 3, 128, 32), 1, 1, True),
        "depthwise": ((4, 56, 56, 96), (3, 3, 1, 96), 1, 96, False),
        "depthwise 7x7": ((4, 56, 56, 96), (7, 7, 1, 96), 1, 96, True),
        "depthwise 5x5, apart": ((4, 56, 56, 96), (5, 5, 1, 96), 2, 96, False),
    }
    for wide in (True, False):
        monkeypatch.setattr(convolution, "has_wide_vectors", lambda wide=wide: wide)
        for name, (images, kernel, stride, groups, expected) in chosen.items():
            conv = Convolution.of(images, kernel, (stride, stride), "SAME", groups)
            assert ops.is_fast_in_onednn(conv) == (wide and expected), name
            assert ops.is_fast_in_onednn(dataclasses.replace(conv, dtype=jnp.dtype(jnp.bfloat16))) == wide, name


ACTIVATIONS = {
    "nothing": (lambda y: y, []),
    "relu": (jax.nn.relu, ["RELU"]),
    "relu by hand": (lambda y: jnp.maximum(0, y), ["RELU"]),
    "relu6": (jax.nn.relu6, ["RELU6"]),
    "clipped at 6": (lambda y: jnp.clip(y, 0, 6), ["RELU6"]),
    "clipped at 5": (lambda y: jnp.clip(y, 0, 5), ["RELU"]),
    "at the most 6": (lambda y: jnp.minimum(y, 6), []),
    "above one": (lambda y: jnp.maximum(y, 1), []),
    "silu": (jax.nn.silu, ["SWISH"]),
    "its own gate": (lambda y: y * jax.nn.sigmoid(2 * y), []),
    "a late bias": (lambda y: jax.nn.relu(y) + jnp.arange(8.0).reshape(1, 1, 1, 8), ["RELU"]),
    "gate read again": (lambda y: (lambda g: y * g + g)(jax.nn.sigmoid(y)), []),
}


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_comes_behind(there, name, residual):
    """A bias, an image that is added, an activation."""
    activation, words = ACTIVATIONS[name]
    conv = Convolution.of((2, 6, 5, 4), (3, 3, 4, 8), (1, 1), "SAME")
    x, weights, bias, added = random(0, 2, 6, 5, 4), random(1, 3, 3, 4, 8), random(2, 8), random(3, 2, 6, 5, 8)

    def layer(convolve, x, weights, bias, added):
        y = convolve(x, weights) + jnp.reshape(bias, (1, 1, 1, -1))
        return activation(added + y if residual else y)

    run = onednn.Uncached(with_epilogues(lambda *a: layer(lambda x, w: onednn.convolve(conv, x, w), *a)))
    expected = layer(lambda x, w: ops.plain(conv, x, w), x, weights, bias, added)
    assert_close(run(x, weights, bias, added), np.asarray(expected), name)
    text = run.jitted.lower(x, weights, bias, added).as_text()
    assert behind_in(text) == [("BIAS", *(["BINARY_ADD"] if residual else []), *words)]


def test_what_others_read_stays(there):
    """An output that is returned, or read by two, is the convolution's own."""
    conv = Convolution.of((1, 4, 4, 3), (1, 1, 3, 3), (1, 1), "VALID")
    x, weights = random(0, 1, 4, 4, 3), random(1, 1, 1, 3, 3)

    def returned(x, weights):
        y = onednn.convolve(conv, x, weights)
        return y, jax.nn.relu(y)

    def read_twice(x, weights):
        y = onednn.convolve(conv, x, weights)
        return jax.nn.relu(y) + jnp.sin(y)

    def doubled(x, weights):
        y = onednn.convolve(conv, x, weights)
        return y + y

    def both(x, weights):
        return onednn.convolve(conv, x, weights) + onednn.convolve(conv, x + 1, weights)

    for function, expected in ((returned, [()]), (read_twice, [()]), (doubled, [()]), (both, [(), ("BINARY_ADD",)])):
        program = onednn.Uncached(with_epilogues(function))
        found, plain = program(x, weights), onednn.Uncached(function)(x, weights)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
            assert_close(ours, np.asarray(theirs), function.__name__)
        assert sorted(behind_in(program.jitted.lower(x, weights).as_text())) == expected, function.__name__


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", slow_but(SMALL, "MobileNetV2", "ResNet50", "EfficientNetB0"))
def test_networks(chosen, monkeypatch, name, dtype):
    """An optimized network calls it, with what comes behind; outputs are the plain network's, as near as without it."""
    module, variables = network(name, **small_options(name))
    images = images_for(module)  # of which some go through together
    expected = np.asarray(fzoo.predict(module, variables, images))
    fast, left = optimize_for_inference(module, variables, dtype=dtype)
    behind = behind_in(text_of(fast, left, images))
    assert len(behind) > 2
    assert any(len(words) > 1 for words in behind) or name in ("ConvNeXtTiny", "DenseNet121")
    found = np.asarray(fzoo.predict(fast, left, images))
    assert_alive(found, 0.01)
    monkeypatch.setattr(batches, "has_onednn", lambda: False)
    compiled.cache_clear()
    assert onednn.TARGET not in text_of(fast, left, images)
    without = np.asarray(fzoo.predict(fast, left, images))
    if dtype == "float32":
        assert_close(found, expected, name)
    else:
        errors = [np.abs(outputs - expected).max() for outputs in (found, without)]
        assert errors[0] <= 1.5 * errors[1] + 0.01, errors


def test_who_does_not_call_it(chosen):
    """A plain network, whose programs are kept in JAX's cache; a caller's own jit; what is split by XLA."""
    module, variables = network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))
    fast, left = optimize_for_inference(module, variables)
    images = jnp.asarray(images_for(module, 2))
    assert onednn.TARGET in text_of(fast, left, images)
    assert onednn.TARGET not in text_of(module, variables, images)
    assert onednn.TARGET not in jax.jit(fast.apply).lower(left, images).as_text()
    with traced_for("cpu"):
        assert onednn.TARGET not in jax.jit(lambda v, x: fast.apply(v, x)).lower(left, images).as_text()
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:2]).reshape(1, 2), ("batch", "model"))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    assert onednn.TARGET not in text_of(fast, left, jax.device_put(images, rows))
    along = fzoo.devices.shard(images, fzoo.devices.mesh())
    assert onednn.TARGET in text_of(fast, left, along)  # each device has a program of its own
    assert_close(fzoo.predict(fast, left, along), np.asarray(fzoo.predict(fast, left, images)), "split")


@pytest.mark.parametrize("case", ["3x3", "groups", "lopsided"])
def test_it_is_derived(chosen, case):
    """By XLA's own convolutions, whatever the groups."""
    images, kernel, strides, padding, groups, dilation = CASES[case]
    x, weights = random(0, *images), random(1, *kernel)

    def loss(x, weights):
        options = {"rhs_dilation": dilation, "feature_group_count": groups}
        return jnp.sum(jnp.sin(ops.conv_general_dilated(x, weights, strides, padding, **options)))

    expected = jax.grad(loss, (0, 1))(x, weights)
    with traced_for("cpu", alone=True):
        program = onednn.Uncached(jax.grad(loss, (0, 1)))
        found = program(x, weights)
        assert onednn.TARGET in program.jitted.lower(x, weights).as_text()
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, np.asarray(theirs), case, 1e-5)


def test_nothing_is_written_to_jaxs_cache(chosen):
    """Which can't keep such a program, and would warn; the setting is as it was, whoever else computes."""
    module, variables = network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))
    fast, left = optimize_for_inference(module, variables)
    before = getattr(jax.config, onednn.LEAST)
    inside, go = threading.Barrier(3), threading.Event()

    def enter():
        with onednn.uncached():
            inside.wait(10)
            go.wait(10)

    threads = [threading.Thread(target=enter) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        inside.wait(10)
        with onednn.uncached():  # which others are in still
            pass
        assert getattr(jax.config, onednn.LEAST) > 1e9
        go.set()
        for thread in threads:
            thread.join(10)
        assert getattr(jax.config, onednn.LEAST) == before
        for device in jax.local_devices()[:2]:  # for the second, there is nothing to trace
            fzoo.predict(fast, jax.device_put(left, device), images_for(module, 3))
    assert getattr(jax.config, onednn.LEAST) == before


@pytest.mark.parametrize("first", ["shapes", "lowered"])
def test_what_was_traced_before_is_not_written(chosen, monkeypatch, first):
    """A program whose shapes were asked for first, as a job does, is not traced again."""
    module, variables = network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))
    fast, left = optimize_for_inference(module, variables)
    images = jnp.asarray(images_for(module, 3))
    kept = []
    monkeypatch.setattr(compilation_cache, "put_executable_and_time", lambda *a: kept.append(a[1]))
    if first == "shapes":
        output_shapes(fast, left, jax.ShapeDtypeStruct(images.shape, images.dtype), None)
    else:
        text_of(fast, left, images)
    fzoo.predict(fast, left, images)
    assert "jit_program" not in kept


def test_a_layer_that_was_traced_before_is_not_written(chosen, monkeypatch):
    """Of another program, by whose trace JAX knows the layer."""
    kept = []
    monkeypatch.setattr(compilation_cache, "put_executable_and_time", lambda *a: kept.append(a[1]))

    def layer(x, weights):
        with traced_for("cpu", alone=True):
            return ops.conv_general_dilated(x, weights, (1, 1), "SAME")

    def other(x, weights):
        return layer(x, weights) * 2

    x, weights = random(0, 1, 9, 9, 8), random(1, 3, 3, 8, 8)
    for function in (layer, other):
        program = onednn.Uncached(with_epilogues(function))
        program(x, weights)
        assert behind_in(program.jitted.lower(x, weights).as_text()) == [()]
        assert f"jit_{function.__name__}" not in kept


def test_what_does_not_call_it_is_written_to_jaxs_cache(there, monkeypatch):
    """Of an optimized network, too, of which oneDNN computes nothing."""
    module, variables = network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))
    fast, left = optimize_for_inference(module, variables)
    # Another test may have written the same program.
    monkeypatch.setattr(compilation_cache, "get_executable_and_time", lambda *a, **options: (None, None))
    for wide, written in ((False, True), (True, False)):
        monkeypatch.setattr(convolution, "has_wide_vectors", lambda wide=wide: wide)
        monkeypatch.setattr(convolution, "LARGE_CALL", 0)
        compiled.cache_clear()
        kept = []
        monkeypatch.setattr(compilation_cache, "put_executable_and_time", lambda *a, kept=kept: kept.append(a[1]))
        fzoo.predict(fast, left, images_for(module, 5 + wide))
        assert ("jit_program" in kept) == written
    compiled.cache_clear()
