"""Options of a computation, which change no weights: dtypes, precision, what is computed again; and what is refused."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import images_for, random_variables, small_options
from reference import assert_close as close
from tiers import slow, slow_but

import fzoo
from fzoo.cli.options import parse_phase
from fzoo.inference.compiler import BARRIERS, compiler_options, known_options
from fzoo.layers.graph import trace
from fzoo.layers.remat import kept_nodes

TINY = {"alpha": 0.25, "input_shape": (32, 32, 3), "classes": 5}

FAMILIES = ["MobileNet", "MobileNetV2", "ConvNeXtTiny", "DenseNet121", "ResNet50"]


@pytest.fixture(scope="module")
def tiny():
    module = fzoo.create("MobileNet", **TINY)
    return module, random_variables(module)


def close_to(ours, theirs):
    close(ours, np.asarray(theirs, np.float32), "ours")


def is_equal(a, b):
    """Whether two trees have the same bits."""
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return jax.tree.all(same)


def narrowed(variables):
    """These variables with parameters of bfloat16."""
    return {**variables, "params": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), variables["params"])}


# -- parameters --------------------------------------------------------------------------------------------------------


ENDINGS = ("safetensors", "keras", "orbax", "h5", "weights.h5")


@pytest.mark.parametrize("ending", slow_but(ENDINGS, "safetensors"))
def test_bfloat16_parameters_come_back(ending, tiny, tmp_path):
    """Bit for bit, by a network of theirs; widened by one of float32; and what is of float32 is narrowed."""
    module, variables = tiny
    given, path = narrowed(variables), tmp_path / f"x.{ending}"
    fzoo.save_variables(module, given, path)
    loaded, there = fzoo.load(weights=path)
    assert loaded.param_dtype == jnp.bfloat16 and is_equal(there, given)
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), given)
    assert is_equal(fzoo.load_variables(module, path), wide)
    assert is_equal(fzoo.load(weights=path, param_dtype=jnp.float32)[1], wide)
    fzoo.save_variables(module, variables, tmp_path / f"y.{ending}")
    assert is_equal(fzoo.load(weights=tmp_path / f"y.{ending}", param_dtype="bfloat16")[1], given)
    backbone, below = fzoo.load(weights=path, include_top=False)
    assert backbone.param_dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(below["params"])} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", slow_but(FAMILIES, "MobileNet", "ResNet50"))
def test_parameters_are_made_so(name):
    """By Flax's init and by `load`, BN's statistics being float32 as Flax's are; and the network computes with them."""
    module, variables = fzoo.load(name, weights=None, param_dtype=jnp.bfloat16, **small_options(name))
    made = jax.eval_shape(module.init, jax.random.key(0), module.example_inputs)
    for tree in (variables, made):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree["params"])} == {jnp.dtype(jnp.bfloat16)}
        assert {leaf.dtype for leaf in jax.tree.leaves(tree.get("batch_stats", {}))} <= {jnp.dtype(jnp.float32)}
    if name in ("DenseNet121", "ResNet50"):  # the same layers as of the others
        return
    plain = module.clone(param_dtype=jnp.float32)
    alive, images = narrowed(random_variables(plain)), images_for(plain)
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), alive)
    found = fzoo.predict(module, alive, images)
    assert found.dtype == jnp.float32
    close_to(found, fzoo.predict(plain, wide, images))
    close_to(fzoo.predict(*fzoo.optimize_for_inference(module, alive), images), found)


def test_a_file_of_float32_says_nothing_new(tiny, tmp_path):
    """So that older versions read it."""
    told = json.loads(fzoo.weights.description.describe(tiny[0].clone(remat=True, precision="high")))
    assert (
        told["format"] == 1 and not {"param_dtype", "remat", "precision", "plain_convolutions"} & told["options"].keys()
    )


# -- memory ------------------------------------------------------------------------------------------------------------


def gradient(module, variables, images):
    """Of a sum of squares of the logits, with the new statistics, as a jitted function's arguments."""

    def loss(params, stats, images):
        given = {"params": params, "batch_stats": stats}
        options = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(7)}}
        logits, changed = module.apply(given, images, train=True, **options)
        return jnp.square(logits).mean(), changed

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return step, (variables["params"], variables.get("batch_stats", {}), images)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("MobileNet", 0.7), ("MobileNetV2", 0.7), ("ResNet50", 1)])
def test_remat(name, share):
    """The same loss, gradients, statistics and dropout from less memory; a small ResNet's is mostly its gradients'."""
    options = {**small_options(name), "input_shape": (64, 64, 3), "plain_convolutions": True}
    module = fzoo.create(name, classifier_activation=None, **options)
    variables, images = random_variables(module, statistics={}), jnp.asarray(images_for(module, 8))
    found, memory = [], []
    for network in (module, module.clone(remat=True)):
        step, arguments = gradient(network, variables, images)
        program = step.lower(*arguments).compile(known_options(BARRIERS))
        memory.append(program.memory_analysis().temp_size_in_bytes)
        found.append(program(*arguments))
    (loss, changed), gradients = found[0]
    assert loss > 0 and changed["batch_stats"]
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[0]), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * max(largest, float(jnp.abs(theirs).max()))
    assert memory[1] < share * memory[0]


@pytest.mark.slow
def test_remat_inside_of_a_module_and_of_transformations(tiny):
    """As a submodule, with taps, under vmap and without a gradient."""
    module, variables = tiny[0].clone(plain_convolutions=True), tiny[1]
    again, images = module.clone(remat=True), jnp.asarray(images_for(module, 2))
    layers = ("conv_pw_3_relu",)

    def total(variables, network):
        return sum(y.sum() for y in network.apply(variables, images, layers, method="endpoints").values())

    plain, rematerialised = (jax.jit(jax.grad(total), static_argnums=1)(variables, n) for n in (module, again))
    for ours, theirs in zip(jax.tree.leaves(rematerialised), jax.tree.leaves(plain), strict=True):
        if np.abs(theirs).max() > 0:  # what comes after the tap has no gradient
            close_to(ours, theirs)
        else:
            assert not np.abs(ours).max()
    stacked = jax.jit(jax.vmap(lambda x: again.apply(variables, x[None])[0]))(images)
    close_to(stacked, jax.jit(module.apply)(variables, images))
    made = [jax.eval_shape(network.init, jax.random.key(0), images) for network in (module, again)]
    assert made[0] == made[1]
    assert fzoo.layer_names(again) == fzoo.layer_names(module)


LEAKS = """
import jax, fzoo
options = {"alpha": 0.35, "input_shape": (32, 32, 3), "remat": True, "weights": None}
module, variables = fzoo.load("MobileNetV2", **options)
images = jax.numpy.ones((1, 32, 32, 3))
with jax.checking_leaks():
    jax.eval_shape(jax.grad(lambda variables: module.apply(variables, images).sum()), variables)
"""


@pytest.mark.slow
def test_remat_leaks_nothing():
    """In a process whose calls are not checked, since these checks hold on to arguments."""
    done = subprocess.run([sys.executable, "-c", LEAKS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_remat_keeps():
    """A few layers through which everything passes, far apart."""
    nodes = fzoo.layers.trace(fzoo.create("ResNet50")).nodes
    kept = kept_nodes(nodes)
    assert 2 <= len(kept) <= 12
    assert all(name.endswith(("_out", "_add", "_relu", "_pool", "_pad")) for name in kept), kept
    chain = fzoo.layers.trace(fzoo.create("VGG16")).nodes
    assert 1 <= len(kept_nodes(chain)) < len(chain) / 2


# -- precision, and plain convolutions ---------------------------------------------------------------------------------


def lowered(module, variables, images, platform):
    """The text of a gradient's program for a platform."""
    step, arguments = gradient(module, variables, images)
    return step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("precision", ["highest", slow(jax.lax.Precision.HIGH)])
def test_precision_of_every_product(precision):
    """In both passes: of the convolutions, whatever a CPU does instead of them, and of the classifier."""
    module = fzoo.create("MobileNetV2", alpha=0.35, input_shape=(32, 32, 3), classes=5)
    variables = trace(module).variables
    images = jnp.zeros((2, 32, 32, 3))
    text = lowered(module.clone(precision=precision), variables, images, "tpu")
    word = str(getattr(precision, "name", precision)).upper()
    products = [
        line for line in text.splitlines() if "stablehlo.convolution" in line or "stablehlo.dot_general" in line
    ]
    assert len(products) > 60 and all(line.count(word) >= 2 for line in products)
    assert "HIGH" not in lowered(module, variables, images, "tpu")


def test_plain_convolutions(tiny):
    """XLA's own are in the program of a CPU, and not the forms; the numbers are the same."""
    module, variables = tiny
    plain, images = module.clone(plain_convolutions=True), jnp.asarray(images_for(module, 2))
    texts = [lowered(network, variables, images, "cpu") for network in (plain, module)]
    assert texts[0].count("stablehlo.convolution") > 2 * texts[1].count("stablehlo.convolution")
    assert len(texts[0]) < 0.8 * len(texts[1])  # 0.66 or 0.7, by version of JAX
    close_to(fzoo.predict(plain, variables, images), fzoo.predict(module, variables, images))
    assert not fzoo.optimize_for_inference(plain, variables)[0].prepared.tiles


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"param_dtype": jnp.int8}, "param_dtype=.*int8.* given, a floating dtype such as jnp.bfloat16 expected"),
        ({"precision": "best"}, "precision='best' given, None, 'default', 'high' or 'highest' expected"),
        ({"remat": 1}, "remat=1 given, True or False expected"),
        ({"plain_convolutions": "no"}, "plain_convolutions='no' given, True or False expected"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.wrong_types
def test_options_that_cannot_be_honoured(options, said):
    with pytest.raises(ValueError, match=said):
        fzoo.create("MobileNetV2", **options)


# -- optimized networks in files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "orbax"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("ResNet50", jnp.float32), ("DenseNet121", jnp.bfloat16)], ids=["tiles", "factors"]
)
def test_an_optimized_network_comes_back(ending, name, dtype, tmp_path):
    module = fzoo.create(name, **{**small_options(name), "input_shape": (64, 64, 3)})
    fast, prepared = fzoo.optimize_for_inference(module, random_variables(module, statistics={}), dtype=dtype)
    assert fast.prepared and (fast.prepared.tiles if name == "ResNet50" else fast.prepared.scaled)
    fzoo.save_variables(fast, prepared, tmp_path / f"x.{ending}")
    loaded, variables = fzoo.load(weights=tmp_path / f"x.{ending}")
    assert loaded == fast and is_equal(variables, prepared)


def test_an_optimized_network_is_no_plain_one(tiny, tmp_path):
    module, variables = tiny
    fast, prepared = fzoo.optimize_for_inference(module, variables)
    fzoo.save_variables(fast, prepared, tmp_path / "fast.safetensors")
    fzoo.save_variables(module, variables, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"fast.* is of an optimized network, a plain one given: fzoo\.load"):
        fzoo.load_variables(module, tmp_path / "fast.safetensors")
    with pytest.raises(ValueError, match=r"plain.* is of a plain network, an optimized one given"):
        fzoo.load_variables(fast, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="an optimized network with its top"):
        fzoo.load(weights=tmp_path / "fast.safetensors", include_top=False)
    for ending in ("h5", "weights.h5", "keras"):
        with pytest.raises(ValueError, match=r"an optimized network goes into \.safetensors or \.orbax"):
            fzoo.save_variables(fast, prepared, tmp_path / f"fast.{ending}")
    with pytest.raises(ValueError, match="is left over"):
        fzoo.save_variables(fast, variables, tmp_path / "other.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fast.safetensors", "plain.safetensors"]


def test_a_damaged_description_of_an_optimized_network(tiny):
    module, variables = tiny
    text = fzoo.weights.description.describe(fzoo.optimize_for_inference(module, variables)[0])
    for change in ({"tiles": [["conv1", 3]]}, {"gone": [["x"]]}, {"biased": [1]}, {"folded": 5}):
        told = json.loads(text)
        told["prepared"] |= change
        with pytest.raises(ValueError, match="x: what it says of its network is damaged: prepared"):
            fzoo.weights.description.parse(json.dumps(told), "x")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.wrong_types
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.bool_])
def test_pixels_that_nothing_preprocessed(dtype, tiny):
    module, variables = tiny
    pixels = np.zeros((1, 32, 32, 3), dtype)
    for call in (
        module.apply,
        jax.jit(module.apply),
        functools.partial(module.apply, layers=("conv1",), method="endpoints"),
    ):
        with pytest.raises(
            ValueError, match=r"images of (u?int\d+|bool) given, floats expected: fzoo\.preprocess_input"
        ):
            call(variables, pixels)
    assert fzoo.predict(module, variables, np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 5)


# -- transformations ---------------------------------------------------------------------------------------------------


def test_random_variables_of_traced_keys():
    """Under jit, vmap and eval_shape, the numbers that each key gives outside."""
    options = {**TINY, "weights": None}

    def variables(key):
        return fzoo.load("MobileNet", rng=key, **options)[1]

    keys = jax.random.split(jax.random.key(3), 2)
    with jax.checking_leaks():
        stacked = jax.jit(jax.vmap(variables))(keys)
    for i in range(2):
        assert is_equal(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), variables(keys[i]))
    assert not is_equal(variables(keys[0]), variables(keys[1]))
    assert jax.tree.leaves(jax.eval_shape(variables, keys[0]))[0].shape
    with pytest.raises(ValueError, match=r"rng of shape \(2,\) given, one key expected: jax\.vmap takes several"):
        variables(keys)


# -- channels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "channels"), [slow("sum", 1), ("sum", 4), slow("repeat", 6)])
def test_adapted_channels(way, channels, tiny, tmp_path):
    """Channels that are equal give what a grey image gives, and those that differ something else."""
    module, variables = tiny
    fzoo.save_variables(module, variables, tmp_path / "x.h5")
    shape = (32, 32, channels)
    adapted, there = fzoo.load(weights=tmp_path / "x.h5", input_shape=shape, adapt_channels=way)
    grey = images_for(module, 2)[..., :1]
    ours = fzoo.predict(adapted, there, np.repeat(grey, channels, -1))
    close_to(ours, fzoo.predict(module, variables, np.repeat(grey, 3, -1)))
    assert adapted.image_shape == shape and there["params"]["conv1"]["kernel"].shape[2] == channels
    fzoo.save_variables(adapted, there, tmp_path / "y.h5")
    assert fzoo.load(weights=tmp_path / "y.h5")[0] == adapted
    whole, _ = fzoo.transfer(
        "MobileNet", weights=tmp_path / "x.h5", classes=2, input_shape=shape, adapt_channels=way, alpha=0.25
    )
    assert whole.image_shape == shape and whole.classes == 2


def test_channels_in_turn(tiny, tmp_path):
    module, variables = tiny
    fzoo.save_variables(module, variables, tmp_path / "x.h5")
    _, there = fzoo.load(weights=tmp_path / "x.h5", input_shape=(32, 32, 4), adapt_channels="repeat")
    kernel = np.asarray(variables["params"]["conv1"]["kernel"])
    close_to(there["params"]["conv1"]["kernel"], kernel[:, :, [0, 1, 2, 0]] * 0.75)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapt_channels": "mean", "input_shape": (32, 32, 1)}, "unknown adapt_channels 'mean': did you mean"),
        ({"adapt_channels": "sum"}, r"adapt_channels='sum' goes with input_shape=\(height, width, channels\)"),
        ({"adapt_channels": "sum", "input_shape": (32, 32, 3)}, "the weights are for 3 channels: leave it out"),
        ({"adapt_channels": "sum", "input_shape": (32, 32, 1), "weights": None}, "goes with weights that there are"),
    ],
    ids=["way", "shape", "three", "none"],
)
def test_channels_that_cannot_be_adapted(options, said, tiny, tmp_path):
    fzoo.save_variables(*tiny, tmp_path / "x.h5")
    with pytest.raises(ValueError, match=said):
        fzoo.load("MobileNet", **{"weights": tmp_path / "x.h5", **options})


@pytest.mark.parametrize("name", ["ConvNeXtTiny", "EfficientNetB0", "EfficientNetV2B0"])
def test_networks_that_preprocess_are_not_adapted(name, tmp_path):
    """A mean of each colour would be lost."""
    module = fzoo.create(name, **small_options(name))
    fzoo.save_variables(module, random_variables(module, statistics={}), tmp_path / "x.h5")
    shape = (*module.example_shape[:2], 1)
    with pytest.raises(ValueError, match=r"more than a kernel of .* depends on the channels: include_preprocessing="):
        fzoo.load(weights=tmp_path / "x.h5", input_shape=shape, adapt_channels="sum")


@pytest.mark.slow
def test_nothing_leaks(tiny):
    module, variables = tiny
    images = images_for(module, 2)
    with jax.checking_leaks():
        made, fresh = fzoo.load("MobileNet", weights=None, **{**TINY, "classes": 6})
        jax.eval_shape(functools.partial(fzoo.predict, made), fresh, images)
        step, arguments = gradient(module, variables, jnp.asarray(images))
        jax.eval_shape(step, *arguments)


def test_options_of_a_run_in_a_fine_tuning():
    """They are taken, but for a dtype in which small steps are lost; its programs keep the barriers of remat."""
    config = fzoo.FinetuneConfig(model="MobileNetV2", options={"remat": True, "precision": "highest"})
    module, _ = fzoo.transfer("MobileNetV2", classes=2, weights=None, input_shape=(32, 32, 3), **config.options)
    assert module.remat and module.precision == "highest"
    with pytest.raises(ValueError, match=r"param_dtype=.* given, float32 is trained, whose small steps others lose"):
        fzoo.FinetuneConfig(model="MobileNetV2", options={"param_dtype": jnp.bfloat16})
    assert compiler_options("cpu", jnp.float32, True) == {**(compiler_options("cpu") or {}), **known_options(BARRIERS)}
    assert compiler_options("cuda", jnp.float32, True) is None


def test_several_patterns(tiny):
    """The layers of each; one that matches none is named."""
    _, variables = tiny
    mask = fzoo.trainable_mask(variables["params"], pattern=["conv_pw_13*", "conv_preds*"])
    trained = {layer for layer, marks in mask.items() if any(jax.tree.leaves(marks))}
    assert trained == {"conv_pw_13", "conv_pw_13_bn", "conv_preds"}
    assert fzoo.Phase(pattern=["a*", "b*"]) == fzoo.Phase(pattern=("a*", "b*"))
    with pytest.raises(ValueError, match=r"unknown layer pattern 'zzz\*'"):
        fzoo.trainable_mask(variables, pattern=["conv_pw_13*", "zzz*"])
    with pytest.raises(ValueError, match=r"pattern=\(\) given, a pattern of layers' names or several expected"):
        fzoo.Phase(pattern=())


def test_patterns_on_the_command_line():
    phase = parse_phase("pattern=conv4_* pattern=conv5_* epochs=2")
    assert phase.pattern == ("conv4_*", "conv5_*") and phase.epochs == 2
    assert parse_phase("pattern=conv5_*").pattern == "conv5_*"
    with pytest.raises(ValueError, match="gives epochs twice"):
        parse_phase("epochs=2 epochs=3")
