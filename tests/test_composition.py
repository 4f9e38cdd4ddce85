"""The networks inside what users build with Flax and JAX; test_inference.py has `predict` and `features` there."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import COMPILER_OPTIONS, assert_close, by_model

import fzoo
from fzoo.layers import Classifier, trace

#: Each family with as few layers and channels as its options allow.
SMALLEST: dict[str, dict[str, Any]] = {
    "ConvNeXtTiny": {"depths": (1, 1, 1, 1), "projection_dims": (8, 16, 24, 32)},
    "DenseNet121": {"blocks": (2, 2, 2, 2)},
    "EfficientNetB0": {"width_coefficient": 0.3, "depth_coefficient": 0.3},
    "EfficientNetV2B0": {"width_coefficient": 0.3, "depth_coefficient": 0.3},
    "InceptionResNetV2": {},
    "InceptionV3": {},
    "MobileNet": {"alpha": 0.25},
    "MobileNetV2": {"alpha": 0.35},
    "MobileNetV3Small": {"alpha": 0.5},
    "NASNetMobile": {"penultimate_filters": 96, "num_blocks": 1, "stem_block_filters": 8},
    "ResNet50": {"blocks": (1, 1, 1, 1)},
    "ResNet50V2": {"blocks": (1, 1, 1, 1)},
    "VGG16": {"convs": (1, 1, 1, 1, 1)},
    "Xception": {},
}

#: Those, as parameters of a test; the one that no option makes small is left to `-m slow`.
SMALL = [
    pytest.param(
        *each.values, marks=[*each.marks, *([pytest.mark.slow] if "InceptionResNetV2" in each.values else [])]
    )
    for each in by_model(SMALLEST)
]


class Parent(nn.Module):
    """A user's module around a backbone."""

    backbone: Classifier
    remat: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        apply = (
            nn.remat(lambda backbone, x: backbone(x, train)) if self.remat else lambda backbone, x: backbone(x, train)
        )
        return nn.Dense(2, name="head")(apply(self.backbone, x))

    def endpoints(self, x, layers: Sequence[str], train: bool = False):
        return self.backbone.endpoints(x, layers, train)


@pytest.fixture(scope="module", params=SMALL)
def network(request) -> tuple[Classifier, dict[str, Any], Any]:
    """A network, and the shapes of its variables and of two images."""
    size = fzoo.spec(request.param).min_size
    options = {"include_top": False, "pooling": "avg", "input_shape": (size, size, 3)}
    module = fzoo.create(request.param, **options, **SMALLEST[request.param])
    return module, trace(module).variables, jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)


def shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


def test_as_a_submodule(network):
    """Variables under its name, `train` passed on, taps from the parent."""
    backbone, variables, images = network
    parent = Parent(backbone)
    made = jax.eval_shape(parent.init, jax.random.key(0), images)
    assert made["params"].keys() == {"backbone", "head"}
    for collection, tree in variables.items():
        assert shapes(made[collection]["backbone"]) == shapes(tree)

    def train(variables, images):
        rngs = {"dropout": jax.random.key(0)}
        return parent.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)

    out, moved = jax.eval_shape(train, made, images)
    assert out.shape == (2, 2)
    assert shapes(moved.get("batch_stats", {}).get("backbone", {})) == shapes(variables.get("batch_stats", {}))
    layers = fzoo.layer_names(backbone)
    names = (layers[1], layers[len(layers) // 2], layers[-1])
    taps = jax.eval_shape(lambda v, x: parent.apply(v, x, names, method="endpoints"), made, images)
    nodes = {node.name: node.shape for node in trace(backbone).nodes}
    assert shapes(taps) == {name: (2, *nodes[name]) for name in names}


def test_under_vmap_and_remat(network):
    """Of two sets of weights; with a forward pass that is computed again for a gradient."""
    module, variables, images = network
    both = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), variables)
    out = jax.eval_shape(jax.vmap(jax.checkpoint(module.apply), (0, None)), both, images)
    assert out.shape == (2, *jax.eval_shape(module.apply, variables, images).shape)


@pytest.mark.slow  # half a minute for the largest
def test_under_grad_of_remat_in_training(network):
    module, variables, images = network
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), variables)

    def loss(params, images):
        call = jax.checkpoint(training(module, rngs={"dropout": jax.random.key(0)}))
        return jnp.square(call({**variables, "params": params}, images)[0]).sum()

    slopes = jax.eval_shape(jax.grad(loss), variables["params"], images)
    assert shapes(slopes) == shapes(variables["params"])


def merged(variables: dict[str, Any]) -> dict[str, Any]:
    """Variables as NNX has them: those of a layer together, of whichever kind."""
    layers: dict[str, Any] = {}
    for tree in variables.values():
        for name, arrays in tree.items():
            layers.setdefault(name, {}).update(arrays)
    return layers


def as_nnx(module: Classifier, images: Any) -> Any:
    """The network as an NNX module, its variables abstract (`lazy_init` alone compiles each operation)."""
    return nnx.eval_shape(lambda x: nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0, dropout=1)).lazy_init(x), images)


def test_as_an_nnx_module(network):
    module, variables, images = network
    model = as_nnx(module, images)
    params, stats = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))
    assert shapes(params) == shapes(variables["params"])
    assert shapes(stats) == shapes(variables.get("batch_stats", {}))


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A small DenseNet: the module, its variables, images, and the output for them."""
    options = {"blocks": (1, 1, 1, 1), "classes": 5, "input_shape": (32, 32, 3)}
    module, variables = fzoo.load("DenseNet121", weights=None, **options)
    images = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
    return module, variables, images, np.asarray(run(module.apply, variables, images))


def run(function, *arguments):
    return jax.jit(function, compiler_options=COMPILER_OPTIONS)(*arguments)


def training(module, **options):
    """A call that gives (output, batch statistics after it)."""
    return lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"], **options)


def test_numbers_as_a_submodule(small):
    plain, variables, images, _ = small
    module = plain.clone(include_top=False, classes=1000, pooling="avg")
    trunk = {
        kind: {k: v for k, v in tree.items() if k in trace(module).variables[kind]} for kind, tree in variables.items()
    }
    expected, moved = run(training(module), trunk, images)
    nested = {kind: {"backbone": tree} for kind, tree in trunk.items()}
    nested["params"]["head"] = {"kernel": jnp.eye(trace(module).nodes[-1].shape[-1], 2), "bias": jnp.zeros(2)}
    for remat in (False, True):
        parent = Parent(module, remat=remat)
        found, updates = run(training(parent), nested, images)
        assert_close(found, np.asarray(expected)[:, :2], "the output in training")
        for ours, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(moved), strict=True):
            assert_close(ours, np.asarray(theirs), "batch statistics")
    taps = run(lambda v, x: parent.apply(v, x, ("conv3_block1_concat",), method="endpoints"), nested, images)
    wanted = run(lambda v, x: module.apply(v, x, ("conv3_block1_concat",), method="endpoints"), trunk, images)
    assert_close(taps["conv3_block1_concat"], np.asarray(wanted["conv3_block1_concat"]), "a tap")


def test_numbers_under_vmap(small):
    """Over sets of weights; test_inference.py maps over images."""
    module, variables, images, expected = small
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.9 * leaf]), variables)
    found = run(jax.vmap(module.apply, (0, None)), both, images)
    assert_close(found[0], expected, "first weights")
    other = run(module.apply, jax.tree.map(lambda leaf: 0.9 * leaf, variables), images)
    assert_close(found[1], np.asarray(other), "second weights")


def test_numbers_of_gradients(small):
    """Of all weights, by a step along them; recomputed, they are the same."""
    module, variables, images, _ = small
    logits = module.clone(classifier_activation=None)

    def loss(params, images):
        return jnp.square(logits.apply({**variables, "params": params}, images)).sum()

    def both(params, images):
        return jax.value_and_grad(loss)(params, images), jax.grad(jax.remat(loss))(params, images)

    (value, slopes), again = run(both, variables["params"], images)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(slopes), strict=True):
        assert_close(ours, np.asarray(theirs), "a gradient, recomputed")
    squares = sum(float(jnp.vdot(slope, slope)) for slope in jax.tree.leaves(slopes))
    step = 0.01 * float(value) / squares  # so that 1 % of the loss is gone, to first order
    moved = jax.tree.map(lambda p, slope: p - step * slope, variables["params"], slopes)
    assert float(value - run(loss, moved, images)) == pytest.approx(0.01 * float(value), rel=0.1)


def test_numbers_as_an_nnx_module(small):
    """Called, tapped, trained (statistics move in the module), differentiated."""
    module, variables, images, expected = small
    model = as_nnx(module, images)
    nnx.update(model, merged(variables))
    model.to_nnx__rngs = nnx.Rngs(0)

    @nnx.jit
    def every_way(model, images):
        slopes = nnx.grad(lambda model: model(images)[:, 0].sum())(model)
        return model(images), model.endpoints(images, ("predictions",)), slopes

    called, tapped, slopes = every_way(model, images)
    assert_close(called, expected, "called")
    assert_close(tapped["predictions"], expected, "tapped")
    wanted = run(jax.grad(lambda p: module.apply({**variables, "params": p}, images)[:, 0].sum()), variables["params"])
    assert_close(slopes["conv1_conv"]["kernel"][...], np.asarray(wanted["conv1_conv"]["kernel"]), "differentiated")
    nnx.jit(lambda model, x: model(x, train=True, mutable=["batch_stats"]))(model, images)
    _, moved = run(training(module), variables, images)
    found = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    for layer, arrays in moved["batch_stats"].items():
        for array, value in arrays.items():
            assert_close(found[layer][array], np.asarray(value), f"trained, {layer} {array}")
            assert not np.array_equal(found[layer][array], variables["batch_stats"][layer][array])
