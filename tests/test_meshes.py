"""Networks on the axes of a mesh: every family, forward and a training step, on 8 virtual devices.

Run as a program in a process that has the devices, it prints what it finds of the networks named.
"""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import pytest
from networks import SMALL
from tiers import slow_but

EIGHT = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}

#: One of each way to convolve, and of each other form: grouped beside the families' own.
NAMES = [*SMALL, "ResNeXt50"]
QUICK = ("ResNet50",)

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def collectives(program) -> dict[str, int]:
    """Count what the devices tell each other in a compiled program."""
    names = "|".join(COLLECTIVES)
    return Counter(re.findall(rf"[)\]}}] ({names})(?:-start)?\(", program.as_text()))


def training_step(module, variables, images, labels):
    """Take a step of gradient descent: (loss, what BNs moved, parameters)."""
    import jax
    import jax.numpy as jnp

    import fzoo

    def loss_of(params):
        rngs = {"dropout": jax.random.key(0)}
        given = {**variables, "params": params}
        output, moved = module.apply(given, images, train=True, mutable=["batch_stats"], rngs=rngs)
        return fzoo.cross_entropy(jnp.log(output), labels).mean(), moved

    (loss, moved), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
    return loss, moved, jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)


def measure(name: str) -> dict:
    """Run a network on both kinds of mesh, and apart from them: what devices told each other, on each.

    A training step is compiled, but not run: virtual devices that share few cores can wait for each other for ever.
    """
    import jax
    import numpy as np
    from hurry import COMPILER_OPTIONS
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from networks import images_for, network, small_options

    options = small_options(name) if name in SMALL else {"blocks": (1, 1, 1, 1), "input_shape": (32, 32, 3)}
    module, variables = network(name, **options)
    images, labels = images_for(module, 16), np.arange(16) % 7
    apply = jax.jit(module.apply, compiler_options=COMPILER_OPTIONS)
    step = jax.jit(functools.partial(training_step, module), compiler_options=COMPILER_OPTIONS)
    apart, told = np.asarray(apply(variables, images)), {}
    for kind in AxisType.Auto, AxisType.Explicit:
        mesh = jax.make_mesh((8,), ("rows",), axis_types=(kind,))
        along, whole = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
        with jax.set_mesh(mesh):
            given, split = jax.device_put(variables, whole), jax.device_put((images, labels), along)
            forward = apply.lower(given, split[0]).compile()
            training = step.lower(given, *split).compile()
            found = forward(given, split[0])
        np.testing.assert_allclose(found, apart, atol=3e-5 * np.abs(apart).max())
        assert found.sharding.is_equivalent_to(along, found.ndim), found.sharding
        assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(training.output_shardings))
        told[str(kind)] = collectives(forward), collectives(training)
    return told


def check_predict(kinds: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
    """Predict on meshes with axes of other names, and for images that lie on one already, wherever it is set."""
    import contextlib

    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from networks import images_for, network

    import fzoo
    from fzoo.inference.batches import join_on_device

    module, variables = network("MobileNet", alpha=0.25, input_shape=(32, 32, 3), classes=7)
    images = images_for(module, 40)
    expected = np.asarray(fzoo.predict(module, variables, images))
    taps = fzoo.features(module, variables, images, "conv_pw_3")["conv_pw_3"]
    for kind, shape in itertools.product(map(AxisType.__members__.get, kinds), shapes):
        names = ("x", "y")[: len(shape)]
        mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
        along, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
        split, replicated = jax.device_put(images, along), jax.device_put(variables, whole)
        parts = [jax.device_put(expected[start : start + 8], along) for start in range(0, 40, 8)]
        uneven = 20 % mesh.size != 0
        for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
            with context:
                for count, given in ((40, images), (20, images[:20])):
                    on_mesh = fzoo.predict(module, variables, given, mesh=mesh)
                    np.testing.assert_allclose(on_mesh, expected[:count], atol=1e-5)
                    assert on_mesh.sharding.is_fully_replicated == (count == 20 and uneven)
                    np.testing.assert_allclose(join_on_device(iter(parts), count), expected[:count])
                found = fzoo.features(module, variables, images, "conv_pw_3", mesh=mesh)["conv_pw_3"]
                np.testing.assert_allclose(found, taps, atol=1e-4)
                for size in (None, 16):
                    for given in (variables, replicated):
                        own = fzoo.predict(module, given, split, batch_size=size)
                        np.testing.assert_allclose(own, expected, atol=1e-5)
                        assert own.sharding.is_equivalent_to(along, 2)
                    batches = (images[start : start + 10] for start in range(0, 40, 10))
                    streamed = list(fzoo.predict(module, variables, batches, mesh=mesh, batch_size=size))
                    np.testing.assert_allclose(np.concatenate(streamed), expected, atol=1e-5)
        if kind == AxisType.Auto and mesh.size == 2:  # what is no batch split over devices is XLA's to arrange
            by_rows = jax.device_put(images, NamedSharding(mesh, PartitionSpec(None, "x")))
            np.testing.assert_allclose(fzoo.predict(module, replicated, by_rows), expected, atol=1e-5)
            places = jax.tree.map(lambda y, split=along, whole=whole: whole if len(y) % 8 else split, variables)
            shares = jax.device_put(variables, places)
            np.testing.assert_allclose(fzoo.predict(module, shares, split), expected, atol=1e-5)


def run(*arguments: str) -> str:
    """Run this file in a process that has 8 devices."""
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **EIGHT},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", slow_but(NAMES, *QUICK))
def test_a_split_batch(name):
    """Equal to that on one device; in inference devices tell each other nothing, in training sums alone."""
    told = json.loads(run(name))
    assert len(told) == 2
    for forward, training in told.values():
        assert forward == {} and training.keys() == {"all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNet", "ResNet50"])
def test_a_training_step_on_explicit_axes(name):
    """Equal to that on one device: BNs see the whole batch, and gradients are summed over it."""
    import jax
    import numpy as np
    from hurry import COMPILER_OPTIONS
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from networks import images_for, network, small_options

    import fzoo

    module, variables = network(name, **small_options(name))
    images, labels = images_for(module, 8), np.arange(8) % 7
    step = jax.jit(functools.partial(training_step, module), compiler_options=COMPILER_OPTIONS)
    loss, moved, params = step(variables, images, labels)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Explicit,))
    along, whole = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        found = step(jax.device_put(variables, whole), *jax.device_put((images, labels), along))
    np.testing.assert_allclose(found[0], loss, rtol=1e-4)
    for ours, apart in zip(jax.tree.leaves(found[1]), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(ours, apart, rtol=1e-3, atol=1e-4)
    head = fzoo.layer_names(module)[-1 if name == "ResNet50" else -3]
    for ours, apart, before in zip(
        *(jax.tree.leaves(tree[head]) for tree in (found[2], params, variables["params"])), strict=True
    ):
        assert np.abs(apart - before).max() > 1e-3
        np.testing.assert_allclose(ours, apart, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("over", slow_but(["shard_map", "pmap", "vmap"], "shard_map"))
def test_statistics_over_an_axis(over):
    """With `axis_name`, BNs of each part of a batch take the whole batch's statistics; without, their own."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from networks import images_for, network, small_options

    module, variables = network("MobileNet", **small_options("MobileNet"))
    images = images_for(module, 8)

    def train(module, images):
        output, moved = module.apply(variables, images, train=frozenset(["conv1_bn"]), mutable=["batch_stats"])
        return output, moved["batch_stats"]["conv1_bn"]

    whole, expected = train(module, images)

    def in_parts(module):
        part = functools.partial(train, module)
        if over == "shard_map":
            mesh, rows, none = jax.make_mesh((2,), ("i",)), PartitionSpec("i"), PartitionSpec()
            call = jax.shard_map(part, mesh=mesh, in_specs=rows, out_specs=(rows, none), check_vma=False)
            return jax.jit(call)(jax.device_put(images, NamedSharding(mesh, rows)))
        parts = images.reshape(2, 4, *images.shape[1:])
        output, moved = jax.pmap(part, "i")(parts) if over == "pmap" else jax.vmap(part, axis_name="i")(parts)
        return output.reshape(8, -1), jax.tree.map(lambda array: array[0], moved)

    output, moved = in_parts(module.clone(axis_name="i"))
    np.testing.assert_allclose(output, whole, atol=1e-5)
    for ours, apart in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, apart, rtol=1e-4, atol=1e-6)
    assert np.abs(in_parts(module)[0] - whole).max() > 1e-3


def test_an_axis_that_is_not_there():
    from networks import images_for, network, small_options

    module, variables = network("MobileNet", **small_options("MobileNet"))
    with pytest.raises(ValueError, match=r"axis_name='i' given, but the call is inside of no jax\.shard_map"):
        module.clone(axis_name="i").apply(variables, images_for(module, 2), train=True, mutable=["batch_stats"])


def test_predict_on_explicit_axes():
    check_predict(["Explicit"], [(2,)])


@pytest.mark.slow
def test_predict_on_two_devices():
    check_predict(["Auto"], [(2,)])


@pytest.mark.slow
def test_predict_on_any_mesh():
    assert run() == ""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        check_predict(["Auto", "Explicit"], [(8,), (4, 2)])
