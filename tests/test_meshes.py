"""Networks on the axes of a mesh: every family, forward and a training step, on 8 virtual devices.

Run as a program in a process that has the devices, it prints what it finds of the networks named.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from networks import SMALL

EIGHT = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}

#: One of each way to convolve, and of each other form: grouped beside the families' own.
NAMES = [*SMALL, "ResNeXt50"]
QUICK = ("ResNet50",)

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def collectives(program) -> dict[str, int]:
    """Count what the devices tell each other in a compiled program."""
    names = "|".join(COLLECTIVES)
    return Counter(re.findall(rf"[)\]}}] ({names})(?:-start)?\(", program.as_text()))


def measure(name: str) -> dict:
    """Run a network on both kinds of mesh, and apart from them: what devices told each other, on each."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from hurry import COMPILER_OPTIONS
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from networks import images_for, network, small_options

    import fzoo

    options = small_options(name) if name in SMALL else {"blocks": (1, 1, 1, 1), "input_shape": (32, 32, 3)}
    module, variables = network(name, **options)
    images = images_for(module, 16)
    labels = np.arange(16) % 7
    apart = np.asarray(jax.jit(module.apply, compiler_options=COMPILER_OPTIONS)(variables, images))

    def loss_of(params, variables, images, labels):
        output = module.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return fzoo.cross_entropy(jnp.log(output[0]), labels).mean(), output[1]

    def step(variables, images, labels):
        (loss, moved), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"], variables, images, labels)
        return loss, moved, jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)

    expected, _, _ = jax.jit(step, compiler_options=COMPILER_OPTIONS)(variables, images, labels)
    told = {}
    for kind in AxisType.Auto, AxisType.Explicit:
        mesh = jax.make_mesh((8,), ("rows",), axis_types=(kind,))
        along, whole = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
        with jax.set_mesh(mesh):
            given, split = jax.device_put(variables, whole), jax.device_put((images, labels), along)
            forward = jax.jit(module.apply, compiler_options=COMPILER_OPTIONS).lower(given, split[0]).compile()
            training = jax.jit(step, compiler_options=COMPILER_OPTIONS).lower(given, *split).compile()
            found, (loss, *kept) = forward(given, split[0]), training(given, *split)
        np.testing.assert_allclose(found, apart, atol=1e-5 * np.abs(apart).max())
        np.testing.assert_allclose(loss, expected, rtol=1e-3)
        assert found.sharding.is_equivalent_to(along, found.ndim), found.sharding
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(kept))
        told[str(kind)] = collectives(forward), collectives(training)
    return told


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_a_split_batch(name):
    """Equal to that on one device; in inference devices tell each other nothing, in training sums alone."""
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, name],
        capture_output=True,
        text=True,
        env={**os.environ, **EIGHT},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told) == 2
    for forward, training in told.values():
        assert forward == {} and training.keys() == {"all-reduce"}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
