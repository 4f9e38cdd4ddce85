"""Networks as modules of Flax NNX: to_nnx, from_nnx, and what NNX's users do with a model."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from networks import SMALL, assert_alive, images_for, network, random_images
from reference import FAMILIES, assert_close, assert_equal, by_model
from test_keras_model import randomise

import fzoo
from fzoo.layers.graph import trace

LABELS = jnp.array([0, 3, 1])

#: Families that are tried by default: with many branches, with dropout, without BN.
QUICK = ("DenseNet121", "MobileNetV3Small", "VGG16")


@pytest.fixture(scope="module")
def plain():
    """A small network with BNs: the module, which gives logits, its variables, images."""
    options = {"blocks": (1, 1, 1, 1), "classes": 5, "input_shape": (32, 32, 3), "classifier_activation": None}
    module, variables = network("DenseNet121", **options)
    return module, variables, images_for(module, 3)


@pytest.fixture(scope="module")
def dropping():
    """The same with dropout."""
    head = fzoo.Head(dropout=0.4)
    options = {"blocks": (1, 1, 1, 1), "classes": 5, "input_shape": (32, 32, 3), "classifier_activation": None}
    module, variables = network("DenseNet121", head=head, **options)
    return module, variables, images_for(module, 3)


@nnx.jit
def call(model, x):
    return model(x)


def applied(module, variables, images, **options):
    """Linen's outputs, and with `mutable` its statistics."""
    return jax.jit(lambda v, x: module.apply(v, x, **options))(variables, images)


def state_of(model) -> Any:
    return fzoo.from_nnx(model)[1]


# -- the state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", by_model(FAMILIES, quick=QUICK))
def test_every_family(name):
    """Abstractly: the state is Linen's, a call gives its shapes in both modes, and trains."""
    side, options = SMALL[name]
    module = fzoo.create(name, include_top=False, pooling="avg", input_shape=(side, side, 3), **options)
    wanted = trace(module).variables
    model = nnx.eval_shape(lambda: fzoo.to_nnx(module, wanted, rngs=nnx.Rngs(0)))
    for collection, kind in (("params", nnx.Param), ("batch_stats", nnx.BatchStat)):
        found = nnx.to_pure_dict(nnx.state(model, kind)).get(collection, {})
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted.get(collection, {}))
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    expected = jax.eval_shape(module.apply, wanted, images)
    assert nnx.eval_shape(lambda model, x: model(x), model, images).shape == expected.shape
    model.train()
    assert nnx.eval_shape(lambda model, x: model(x), model, images).shape == expected.shape


def test_nothing_is_computed_or_copied(plain):
    """The very arrays are in the model, and come back."""
    module, variables, _ = plain
    variables = jax.tree.map(jnp.asarray, variables)
    model = fzoo.to_nnx(module, variables)
    back, found = fzoo.from_nnx(model)
    assert back == module
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(variables), strict=True):
        assert ours is theirs
    assert isinstance(model.params["conv1_conv"]["kernel"], nnx.Param)
    assert isinstance(model.batch_stats["conv1_bn"]["mean"], nnx.BatchStat)
    paths = {"/".join(path) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert {"params/conv1_conv/kernel", "batch_stats/conv1_bn/mean"} <= paths


def test_an_array_of_numpy_stays_the_callers(plain):
    module, variables, _ = plain
    variables = jax.tree.map(np.array, variables)
    model = fzoo.to_nnx(module, variables)
    before = np.array(model.params["conv1_conv"]["kernel"][...])
    variables["params"]["conv1_conv"]["kernel"][:] = 0
    np.testing.assert_array_equal(model.params["conv1_conv"]["kernel"][...], before)


def test_linens_variables_update_a_model(plain):
    """Whole or in part."""
    module, variables, images = plain
    zeros = jax.tree.map(jnp.zeros_like, variables)
    model = fzoo.to_nnx(module, zeros)
    nnx.update(model, variables)
    np.testing.assert_array_equal(call(model, images), applied(module, variables, images))
    nnx.update(model, {"params": zeros["params"]})
    assert_equal(state_of(model), {**variables, "params": zeros["params"]})
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == len(jax.tree.leaves(variables["params"]))
    model.params = variables["params"]
    assert_equal(state_of(model), variables)
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == len(jax.tree.leaves(variables["params"]))


def test_no_update_breaks_a_model_in_silence(plain):
    module, variables, images = plain

    def changed(change) -> Any:
        model = fzoo.to_nnx(module, variables)
        change(model)
        return model

    with pytest.raises(AttributeError, match=r"'\w+' given, which .* its state is {'params', 'batch_stats'}"):
        changed(lambda model: nnx.update(model, variables["params"]))
    with pytest.raises(AttributeError, match="'head' given, which this DenseNet has no use for"):
        changed(lambda model: setattr(model, "head", nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
    wrong = {"params": {"conv1_conv": {"kernel": jnp.zeros((3, 3))}}}
    with pytest.raises(fzoo.WeightsMismatch, match=r"params/conv1_conv/kernel is \(3, 3\), \(7, 7, 3, 64\) wanted"):
        changed(lambda model: nnx.update(model, wrong))(images)
    with pytest.raises(fzoo.WeightsMismatch, match="params/conv9/kernel is left over"):
        changed(lambda model: nnx.update(model, {"params": {"conv9": {"kernel": jnp.zeros(3)}}}))(images)
    broken = fzoo.to_nnx(module, variables)
    broken.params["conv1_conv"]["kernel"] = jnp.zeros((7, 7, 3, 64))
    for use in (fzoo.from_nnx, lambda model: model(images)):
        with pytest.raises(ValueError, match=r"model.params\['conv1_conv'\]\['kernel'\] was replaced, and is no nnx.V"):
            use(broken)


@pytest.mark.wrong_types
def test_what_is_no_network(plain):
    module, variables, _ = plain
    with pytest.raises(ValueError, match=r"a module from fzoo\.create expected, dict given"):
        fzoo.to_nnx(variables, module)
    with pytest.raises(fzoo.WeightsMismatch, match="not the variables of this DenseNet: bn/bias is left over"):
        fzoo.to_nnx(module, variables["params"])
    with pytest.raises(ValueError, match="unknown layer 'conv1_bm': did you mean conv1_bn"):
        fzoo.to_nnx(module, variables, training=frozenset(["conv1_bm"]))
    with pytest.raises(ValueError, match="training='conv1_bn' given, True or names of layers expected"):
        fzoo.to_nnx(module, variables, training="conv1_bn")
    with pytest.raises(ValueError, match=r"rngs=0 given, nnx.Rngs\(0\) or nnx.Rngs\(dropout=0\) expected"):
        fzoo.to_nnx(module, variables, rngs=0)
    with pytest.raises(ValueError, match=r"nnx.Rngs of params given, nnx.Rngs\(0\) or nnx.Rngs\(dropout=0\) expected"):
        fzoo.to_nnx(module, variables, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match="deterministic=None given, True or False expected"):
        fzoo.to_nnx(module, variables).set_attributes(deterministic=None)
    with pytest.raises(ValueError, match=r"a module from fzoo\.create expected, Linear given"):
        fzoo.to_nnx(module, variables).module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"a model from fzoo.to_nnx expected, DenseNet given$"):
        fzoo.from_nnx(module)
    with pytest.raises(ValueError, match=r"Flowers given, which has one as .backbone$"):
        fzoo.from_nnx(Flowers(fzoo.to_nnx(module, variables), 5))


# -- calls ------------------------------------------------------------------------------------------------------------


def test_inference_is_linens(plain):
    """To the bit: called, tapped, differentiated."""
    module, variables, images = plain
    model = fzoo.to_nnx(module, variables)
    expected = applied(module, variables, images)
    assert_alive(expected)
    np.testing.assert_array_equal(call(model, images), expected)
    names = ("conv3_block1_concat", "predictions")
    found = nnx.jit(lambda model, x: model.endpoints(x, names))(model, images)
    assert_equal(found, applied(module, variables, images, method="endpoints", layers=names))
    with pytest.raises(ValueError, match="unknown layer 'conv3'"):
        model.endpoints(images, ["conv3"])
    slopes = nnx.jit(nnx.grad(lambda model, x: model(x)[:, 0].sum()))(model, images)
    wanted = jax.jit(jax.grad(lambda p: module.apply({**variables, "params": p}, images)[:, 0].sum()))
    for ours, theirs in zip(jax.tree.leaves(slopes), jax.tree.leaves(wanted(variables["params"])), strict=True):
        assert_close(ours, np.asarray(theirs), "a gradient")
    assert_equal(state_of(model), variables)


def test_train_and_eval(plain):
    """Statistics move in training alone, as Linen's do."""
    module, variables, images = plain
    model = fzoo.to_nnx(module, variables)
    model.train()
    expected, moved = applied(module, variables, images, train=True, mutable=["batch_stats"])
    assert_close(call(model, images), np.asarray(expected), "in training")
    after = state_of(model)
    assert_equal(after["params"], variables["params"])
    for layer, arrays in moved["batch_stats"].items():
        for name, value in arrays.items():
            assert_close(after["batch_stats"][layer][name], np.asarray(value), f"{layer} {name}")
            assert not np.array_equal(after["batch_stats"][layer][name], variables["batch_stats"][layer][name])
    model.eval()
    np.testing.assert_array_equal(call(model, images), applied(module, after, images))
    assert_equal(state_of(model), after)
    assert np.abs(call(model, images) - expected).max() > 0.01 * np.abs(expected).max()


def moved_layers(model, images) -> set[str]:
    """The layers whose statistics a call moves; the model itself stays as it is."""
    model = nnx.clone(model)
    before = state_of(model)["batch_stats"]
    call(model, images)
    after = state_of(model)["batch_stats"]
    return {layer for layer in before if not np.array_equal(before[layer]["mean"], after[layer]["mean"])}


def test_layers_that_train(dropping):
    """Of a frozen BN's kind, and the two modes of NNX apart."""
    module, variables, images = dropping
    names = frozenset(["conv1_bn", "dropout"])
    model = fzoo.to_nnx(module, variables, rngs=nnx.Rngs(0), training=names)
    model.train()
    assert moved_layers(model, images) == {"conv1_bn"}
    model.training = frozenset(["dropout"])
    assert moved_layers(model, images) == set()
    still = nnx.view(model, deterministic=True, use_running_average=True)
    assert np.abs(call(nnx.clone(model), images) - call(still, images)).max() > 0.1
    model.training = frozenset()
    np.testing.assert_array_equal(call(model, images), call(still, images))
    model.training = True
    model.set_attributes(deterministic=True, use_running_average=False)
    assert moved_layers(model, images) == set(variables["batch_stats"])
    assert_equal(call(nnx.clone(model), images), call(nnx.clone(model), images))
    model.set_attributes(deterministic=False, use_running_average=True)
    assert moved_layers(model, images) == set()
    first, second = call(model, images), call(model, images)
    assert np.abs(first - second).max() > 0.1
    assert fzoo.training_layers(module, fzoo.trainable_mask(variables, module=module)) == {"dropout"}


def test_dropout_draws_anew(dropping):
    """From the stream of the model, as Linen does from the key."""
    module, variables, images = dropping
    model = fzoo.to_nnx(module, variables, rngs=nnx.Rngs(1, dropout=2), training=frozenset(["dropout"]))
    np.testing.assert_array_equal(call(model, images), applied(module, variables, images))
    model.train()
    stream = nnx.Rngs(1, dropout=2).dropout.fork()
    for _ in range(2):
        options = {"train": frozenset(["dropout"]), "rngs": {"dropout": stream()}}
        assert_close(call(model, images), np.asarray(applied(module, variables, images, **options)), "dropped")
    assert np.abs(call(model, images) - call(model, images)).max() > 0.1
    without = fzoo.to_nnx(module, variables)
    without.train()
    with pytest.raises(ValueError, match=r"dropout drops in training, for which to_nnx\(..., rngs=nnx.Rngs\(0\)\)"):
        without(images)
    without.rngs = nnx.Rngs(0)
    assert np.abs(call(without, images) - call(without, images)).max() > 0.1


def test_an_optimized_network(plain):
    module, variables, images = plain
    module, variables = fzoo.optimize_for_inference(module, variables)
    model = fzoo.to_nnx(module, variables)
    np.testing.assert_array_equal(call(model, images), applied(module, variables, images))
    assert_equal(state_of(model), variables)
    model.train()
    for attributes in ({}, {"deterministic": True}, {"use_running_average": True}):
        model.set_attributes(**attributes)
        with pytest.raises(ValueError, match="optimize_for_inference made this network: train the plain one"):
            model(images)
        model.train()


def test_bfloat16(plain):
    module, variables, images = plain
    module = module.clone(dtype=jnp.bfloat16)
    model = fzoo.to_nnx(module, variables)
    np.testing.assert_array_equal(call(model, images), applied(module, variables, images))
    assert model.params["conv1_conv"]["kernel"][...].dtype == jnp.float32


def test_a_network_of_a_file(tmp_path):
    """With two inputs, a layer that is called twice, and BNs: in inference and in training."""
    layers = keras.layers
    left, right = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    conv, norm = layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(name="norm")
    both = [layers.Flatten()(norm(conv(x))) for x in (left, right)]
    theirs = keras.Model([left, right], layers.Dense(3)(layers.Concatenate()(both)))
    randomise(theirs)
    theirs.save(tmp_path / "two.keras")
    module, variables = fzoo.load_model(tmp_path / "two.keras")
    images = tuple(random_images((3, 8, 8, 3), seed) for seed in (1, 2))
    model = fzoo.to_nnx(module, variables)
    expected = applied(module, variables, images)
    assert_alive(expected)
    np.testing.assert_array_equal(call(model, images), expected)
    np.testing.assert_array_equal(call(model, {"right": images[1], "left": images[0]}), expected)
    model.train()
    expected, moved = applied(module, variables, images, train=True, mutable=["batch_stats"])
    assert_close(call(model, images), np.asarray(expected), "in training")
    assert_close(
        state_of(model)["batch_stats"]["norm"]["mean"], np.asarray(moved["batch_stats"]["norm"]["mean"]), "mean"
    )
    fzoo.save_keras_weights(*fzoo.from_nnx(model), tmp_path / "back.weights.h5")
    theirs.load_weights(tmp_path / "back.weights.h5")
    model.eval()
    assert_close(call(model, images), theirs.predict(images, verbose=0), "in Keras")


# -- what NNX's users do ----------------------------------------------------------------------------------------------


class Flowers(nnx.Module):
    """A user's module around a backbone."""

    def __init__(self, backbone, features: int):
        self.backbone = backbone
        self.head = nnx.Linear(features, 5, rngs=nnx.Rngs(7))

    def __call__(self, x):
        return self.head(self.backbone(x))


def mean_loss(model, images):
    return fzoo.cross_entropy(model(images), LABELS).mean()


def test_a_step_is_that_of_train_step(plain):
    """Above a layer, with a filter from a mask, BNs moving: parameters and statistics after three steps."""
    module, variables, images = plain
    mask = fzoo.trainable_mask(variables, from_layer="conv4_block1_1_conv", module=module)
    training = fzoo.training_layers(module, mask, batch_statistics=True)
    assert "conv4_block1_1_bn" in training and "conv1_bn" not in training
    optimizer = optax.sgd(0.01, momentum=0.9)

    trained, frozen = fzoo.partition_params(variables["params"], mask["params"])
    state = fzoo.TrainState(trained, variables["batch_stats"], optimizer.init(trained))
    linen_step = jax.jit(
        lambda state, key: fzoo.train_step(module, optimizer, state, frozen, images, LABELS, key, train=training)
    )
    expected = []
    for _ in range(3):
        state, metrics = linen_step(state, jax.random.key(0))
        expected.append(float(metrics["loss"]))
    wanted = {"params": fzoo.merge_params(state.trained, frozen), "batch_stats": state.batch_stats}

    wrt = fzoo.trainable_filter(mask)
    model = fzoo.to_nnx(module, variables, training=training)
    model.train()
    chosen = nnx.Optimizer(model, optimizer, wrt=wrt)

    @nnx.jit
    def step(model, optimizer, images):
        loss, grads = nnx.value_and_grad(mean_loss, argnums=nnx.DiffState(0, wrt))(model, images)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, chosen, images)) for _ in range(3)]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    found = state_of(model)
    for kind, tree in wanted.items():
        for layer, arrays in tree.items():
            for name, value in arrays.items():
                assert_close(found[kind][layer][name], np.asarray(value), f"{kind} {layer} {name}", 1e-3)
                moves = layer in training if kind == "batch_stats" else mask["params"][layer][name]
                assert np.array_equal(found[kind][layer][name], variables[kind][layer][name]) != moves
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(nnx.state(chosen, nnx.optimizer.OptState)) if leaf.ndim)
    assert sizes == sorted(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)


def test_a_new_head(plain):
    """The head alone, then some of the backbone too; the user's train() and eval() reach the backbone."""
    module, variables, images = plain
    module = module.clone(include_top=False, pooling="avg", classes=1000, classifier_activation="softmax")
    variables = {
        kind: {layer: variables[kind][layer] for layer in tree} for kind, tree in trace(module).variables.items()
    }
    model = Flowers(fzoo.to_nnx(module, variables), trace(module).nodes[-1].shape[-1])
    mask = fzoo.trainable_mask(variables, pattern="conv5_*", module=module)
    moved = []
    for wrt in (nnx.PathContains("head"), nnx.Any(fzoo.trainable_filter(mask), nnx.PathContains("head"))):
        before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)

        @nnx.jit
        def step(model, optimizer, images, wrt=wrt):
            loss, grads = nnx.value_and_grad(mean_loss, argnums=nnx.DiffState(0, wrt))(model, images)
            optimizer.update(model, grads)
            return loss

        losses = [float(step(model, optimizer, images)) for _ in range(3)]
        assert losses[-1] < losses[0]
        after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        same = jax.tree.map(np.array_equal, before, after)
        assert not any(jax.tree.leaves(same["head"]))
        moved.append({name for name, tree in same["backbone"]["params"].items() if not all(jax.tree.leaves(tree))})
    assert moved == [set(), {name for name in variables["params"] if name.startswith("conv5_")}]
    assert_equal(state_of(model.backbone)["batch_stats"], variables["batch_stats"])
    model.train()
    call(model, images)
    after = state_of(model.backbone)["batch_stats"]
    assert not np.array_equal(after["conv1_bn"]["mean"], variables["batch_stats"]["conv1_bn"]["mean"])
    model.eval()
    call(model, images)
    assert_equal(state_of(model.backbone)["batch_stats"], after)


@pytest.mark.parametrize(
    "duplicate",
    [
        nnx.clone,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: nnx.merge(*nnx.split(model), copy=True),
        lambda model: nnx.merge(*nnx.split(model, nnx.Param, nnx.BatchStat, ...), copy=True),
    ],
    ids=["clone", "deepcopy", "pickle", "split", "split in three"],
)
def test_duplicates(dropping, duplicate):
    """They are as the first, draw as it does, and change apart from it."""
    module, variables, images = dropping
    model = fzoo.to_nnx(module, variables, rngs=nnx.Rngs(0))
    model.train()
    second = duplicate(model)
    assert nnx.graphdef(second) == nnx.graphdef(model) and hash(nnx.graphdef(second)) == hash(nnx.graphdef(model))
    np.testing.assert_array_equal(call(second, images), call(nnx.clone(model), images))
    assert_equal(state_of(model), variables)
    assert not np.array_equal(
        state_of(second)["batch_stats"]["conv1_bn"]["mean"], variables["batch_stats"]["conv1_bn"]["mean"]
    )


def test_orbax(dropping, tmp_path):
    """Saved in the middle of training, and restored into an abstract model: it goes on as the first."""
    module, variables, images = dropping
    model = fzoo.to_nnx(module, variables, rngs=nnx.Rngs(0))
    model.train()
    call(model, images)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        zeros = jax.tree.map(jnp.zeros_like, variables)
        second = fzoo.to_nnx(module, zeros, rngs=nnx.Rngs(3))
        second.train()
        nnx.update(second, checkpointer.restore(tmp_path / "state", nnx.state(second)))
    assert_equal(state_of(second), state_of(model))
    np.testing.assert_array_equal(call(second, images), call(model, images))


@pytest.mark.wrong_types
def test_predict_takes_what_from_nnx_gives():
    module, variables = fzoo.load("MobileNet", weights=None, alpha=0.25, input_shape=(32, 32, 3))
    model = fzoo.to_nnx(module, variables)
    with pytest.raises(ValueError, match=r"NNXClassifier given; of a model from fzoo\.to_nnx: \*fzoo\.from_nnx"):
        fzoo.predict(model, variables, np.zeros((1, 32, 32, 3), np.float32))


def test_under_vmap(plain):
    """Over two sets of weights."""
    module, variables, images = plain
    other = jax.tree.map(lambda leaf: 0.9 * leaf, variables)
    graph, first = nnx.split(fzoo.to_nnx(module, variables))
    _, second = nnx.split(fzoo.to_nnx(module, other))
    both = nnx.merge(graph, jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second))
    found = nnx.jit(nnx.vmap(lambda model, x: model(x), in_axes=(0, None)))(both, images)
    for ours, tree in zip(found, (variables, other), strict=True):
        assert_close(ours, np.asarray(applied(module, tree, images)), "one set of weights")


@pytest.mark.wrong_types
def test_filters(plain):
    module, variables, _ = plain
    mask = fzoo.trainable_mask(variables, pattern="conv1_*", module=module)
    wrt = fzoo.trainable_filter(mask)
    assert wrt == fzoo.trainable_filter(mask["params"]) and hash(wrt) == hash(fzoo.trainable_filter(mask["params"]))
    found = nnx.to_pure_dict(nnx.state(fzoo.to_nnx(module, variables), wrt))
    assert found.keys() == {"params"} and found["params"].keys() == {"conv1_conv", "conv1_bn"}
    with pytest.raises(ValueError, match="a mask that marks nothing given"):
        fzoo.trainable_filter(jax.tree.map(lambda _: False, mask))
    with pytest.raises(ValueError, match=r"a tree with .*Array.* given, one of bool expected"):
        fzoo.trainable_filter(jax.tree.map(jnp.asarray, variables))
    with pytest.raises(ValueError, match="str given, a mask expected"):
        fzoo.trainable_filter("conv1_*")
    with pytest.raises(ValueError, match="a mask of another tree given"):
        fzoo.partition_params(variables["params"], mask)
