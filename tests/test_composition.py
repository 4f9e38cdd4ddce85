"""The networks inside what users build with Flax and JAX; test_inference.py has `predict` and `features` there."""

import gc
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hurry import COMPILER_OPTIONS
from networks import SMALL, assert_alive, images_for
from networks import network as alive
from reference import FAMILIES, assert_close, by_model
from stored import small_network

import fzoo
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.layers.record import OPERATION


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


#: Families whose composition is tried by default: without BN, with a name for all, with numbered layers, with branches.
QUICK = ("ConvNeXtTiny", "DenseNet121", "MobileNetV2", "MobileNetV3Small", "VGG16")


@pytest.fixture(scope="module", params=by_model(FAMILIES, quick=QUICK))
def network(request) -> tuple[Classifier, dict[str, Any], Any]:
    """A network, and the shapes of its variables and of two images."""
    side, options = SMALL[request.param]
    module = fzoo.create(request.param, include_top=False, pooling="avg", input_shape=(side, side, 3), **options)
    return module, trace(module).variables, jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)


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


@pytest.mark.parametrize("network", by_model(QUICK, quick=()), indirect=True)  # half a minute for the largest
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


# -- what is given in place of a layer's output ------------------------------------------------------------------------


def cuts(module: Classifier) -> list[str]:
    """The layers that all of the network's output goes through, from the input on, without those two."""
    nodes = trace(module).nodes
    place = {node.name: i for i, node in enumerate(nodes)}
    readers = {node.name: max((place[n.name] for n in nodes if node.name in n.inputs), default=0) for node in nodes}
    furthest = [max((readers[node.name] for node in nodes[:i]), default=0) for i in range(len(nodes))]
    return [node.name for i, node in enumerate(nodes[1:-1], 1) if furthest[i] <= i and node.kind != OPERATION]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *(
            pytest.param(*p.values, 3, marks=p.marks)
            for p in by_model(("MobileNetV3Small", "ResNet50"), quick=("ResNet50",))
        ),
        *(pytest.param(*p.values, None, marks=p.marks) for p in by_model(FAMILIES, quick=("DenseNet121",))),
    ],
)
def test_what_is_given_for_a_layer_is_all_that_counts(name, most):
    """The rest of a network, from the output of a layer that cuts it, gives what the network gives, for any image."""
    module, variables = small_network(name)
    images, layers = images_for(module, 2), cuts(module)
    if most is not None:
        layers = layers[:: -(-len(layers) // most)]
    last = fzoo.layer_names(module)[-1]
    # Without a jit, as each layer makes another program of the rest.
    found = module.apply(variables, images, (*layers, last), method="endpoints")
    expected, nothing = np.asarray(found[last]), np.zeros_like(images)
    assert_alive(expected)
    assert np.abs(module.apply(variables, nothing) - expected).max() > 0.01
    for layer in layers:
        given = {layer: found[layer]}
        rest, _ = module.apply(variables, nothing, given=given, method="run")
        assert_close(rest, expected, f"{name} from {layer} on", 1e-5)


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A small DenseNet: the module, its variables, images, and the output for them."""
    module, variables = alive("DenseNet121", blocks=(1, 1, 1, 1), classes=5, input_shape=(32, 32, 3))
    images = images_for(module, 3)
    return module, variables, images, np.asarray(run(module.apply, variables, images))


def run(function, *arguments):
    return jax.jit(function, compiler_options=COMPILER_OPTIONS)(*arguments)


def training(module, **options):
    """A call that gives (output, batch statistics after it)."""
    return lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"], **options)


@pytest.mark.slow
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


@pytest.mark.slow
def test_numbers_under_vmap(small):
    """Over sets of weights; test_inference.py maps over images."""
    module, variables, images, expected = small
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.9 * leaf]), variables)
    found = run(jax.vmap(module.apply, (0, None)), both, images)
    assert_close(found[0], expected, "first weights")
    other = run(module.apply, jax.tree.map(lambda leaf: 0.9 * leaf, variables), images)
    assert_close(found[1], np.asarray(other), "second weights")


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_record_keeps_no_array_of_its_trace():
    """That of the classifier's activation, a method of the module that was traced, would keep them all."""
    module = fzoo.create(
        "MobileNet", alpha=0.25, classes=11, input_shape=(32, 32, 3), classifier_activation=jax.nn.relu
    )

    def tracers():
        gc.collect()
        return sum(isinstance(each, jax.core.Tracer) for each in gc.get_objects())

    before = tracers()
    assert trace(module).layers[-1].config["activation"] == "custom"
    assert tracers() == before


def test_records_differ_with_x64():
    module = fzoo.create("MobileNet", alpha=0.25, classes=12, input_shape=(32, 32, 3))
    with jax.enable_x64(True):
        trace(module)
    assert {leaf.dtype for leaf in jax.tree.leaves(trace(module).variables)} == {np.dtype(np.float32)}


def test_what_no_layer_made():
    """Is no input of one, and says what would do."""

    class Broken(Classifier):
        def backbone(self, k, x):
            return k.conv2d(x + 1, 8, 3)

    with pytest.raises(ValueError, match="conv2d: its input was made by no layer; `operation` makes a step"):
        trace(Broken(include_top=False))
