"""What of a file fits a network, beside Keras's `by_name=True, skip_mismatch=True`; a file as a mapping."""

import json
import re
import warnings
import zipfile

import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from keras import layers as L
from networks import SMALL, random_variables, small_options
from reference import assert_equal, save_weights_only
from test_hostile import KERNEL, Tiny, tiny, tiny_variables
from test_keras_model import randomise

import fzoo
from fzoo.layers.graph import random_variables as initial_variables
from fzoo.weights.files import read_names
from fzoo.weights.mapping import slots

MOBILENET = {"alpha": 0.25, "input_shape": (32, 32, 3)}


def network(classes=3, stem=3, more=(), less=(), name=None):
    """A small network; `more` and `less` are layers that it has or has not, `stem` is the side of its first kernel."""
    x = image = keras.Input((12, 12, 3))
    for layer in (
        L.Conv2D(4, stem, name="stem"),
        L.BatchNormalization(name="stem_bn"),
        L.SeparableConv2D(5, 3, name="middle"),
        *more,
        L.Conv2D(6, 1, name="last"),
        L.GlobalAveragePooling2D(name="pool"),
        L.Dense(classes, name="classes"),
    ):
        x = x if layer.name in less else layer(x)
    return keras.Model(image, x, name=name)


def backbone(name, kernel=3, inner="inner"):
    """A model for the inside of others, with numbered names, one of which counts on, and a model inside of its own."""
    x = image = keras.Input((12, 12, 3))
    x = L.BatchNormalization(name="bn")(L.Conv2D(4, kernel, padding="same", name="conv")(x))
    x = keras.Sequential([keras.Input((12, 12, 4)), L.Conv2D(3, 1, name="deep"), L.PReLU(name="slope")], name=inner)(x)
    return keras.Model(image, L.Conv2D(3, 1)(x), name=name)


def around(*backbones, classes=3):
    image = keras.Input((12, 12, 3))
    maps = [model(image) for model in backbones]
    x = L.Add(name="sum")(maps) if len(maps) > 1 else maps[0]
    return keras.Model(image, L.Dense(classes, name="head")(L.GlobalAveragePooling2D(name="pool")(x)))


def saved(model, path):
    with warnings.catch_warnings(action="ignore"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("absl.logging.warning", lambda *args: None)  # that h5 is a legacy format
        model.save_weights(path) if path.name.endswith(".weights.h5") else model.save(path)
    return path


def by_path(tree):
    return {path: np.asarray(array) for path, array in flatten_dict(tree, sep="/").items()}


def compare_with_keras(target, source, folder):
    """Load the file of a model into another; return what was not matched, after all is as Keras has it."""
    module, before = fzoo.load_model(saved(target, folder / "target.keras"))
    files = [saved(source, folder / "whole.h5"), save_weights_only(source, folder / "weights.h5")]
    with warnings.catch_warnings(action="ignore"):
        target.load_weights(files[0], by_name=True, skip_mismatch=True)
    before, after = by_path(before), by_path(fzoo.load_model(saved(target, folder / "loaded.keras"))[1])
    taken = {path for path, array in after.items() if not np.array_equal(array, before[path])}
    initial = by_path(initial_variables(module, jax.random.key(0)))
    unmatched = None
    for file in files:
        variables, unmatched = fzoo.load_keras_weights(module, file, partial=True)
        ours = by_path(variables)
        assert ours.keys() == before.keys() == taken | unmatched.missing.keys()
        assert not taken & unmatched.missing.keys()
        for path, array in ours.items():
            np.testing.assert_array_equal(array, after[path] if path in taken else initial[path], err_msg=path)
        with fzoo.open_weights(file) as arrays:  # each array of the file is in one of both
            assert {path: arrays[path].shape for path in unmatched.unused} == unmatched.unused
            held = sum(array.size for array in arrays.values())
        given = sum(int(np.prod(shape)) for shape in unmatched.unused.values())
        assert held == given + sum(after[path].size for path in taken)
    return unmatched


@pytest.mark.parametrize(
    ("options", "missing", "unused"),
    [
        ({"classes": 5}, {"params/classes/kernel", "params/classes/bias"}, {"classes/kernel", "classes/bias"}),
        ({"stem": 5}, {"params/stem/kernel"}, {"stem/kernel"}),  # the bias fits
        ({"more": [L.Conv2D(5, 3, name="new")]}, {"params/new/kernel", "params/new/bias"}, set()),
        ({"less": ["middle"]}, {"params/last/kernel"}, {"middle/depthwise_kernel", "middle/pointwise_kernel",
                                                        "middle/bias", "last/kernel"}),
        ({"less": ["stem_bn"]}, set(), {"stem_bn/gamma", "stem_bn/beta", "stem_bn/moving_mean",
                                        "stem_bn/moving_variance"}),
        ({"more": [L.BatchNormalization(name="new", scale=False)]}, {"params/new/bias", "batch_stats/new/mean",
                                                                    "batch_stats/new/var"}, set()),
    ],
    ids=["classes", "kernel", "layer more", "layer less", "norm less", "norm more"],
)  # fmt: skip
def test_as_keras(options, missing, unused, tmp_path):
    found = compare_with_keras(randomise(network(**options), 1), randomise(network()), tmp_path)
    assert found.missing.keys() == missing
    assert {path.partition("/")[2] for path in found.unused} == unused


def test_arrays_of_a_layer_are_as_many_or_none_is_taken(tmp_path):
    """Keras takes a layer's arrays by their order; a BN with one less has other ones at these places."""
    source = network(more=[L.BatchNormalization(name="new")])
    found = compare_with_keras(
        randomise(network(more=[L.BatchNormalization(name="new", scale=False)]), 1), randomise(source), tmp_path
    )
    assert found.missing.keys() == {"params/new/bias", "batch_stats/new/mean", "batch_stats/new/var"}
    assert set(found.missing.values()) == {"new has 4 arrays in the file, 3 in the network"}
    assert len(found.unused) == 4


def test_a_model_inside_as_keras(tmp_path):
    """It is a layer for Keras, whatever the numbers of the layers in it."""
    found = compare_with_keras(
        randomise(around(backbone("a"), classes=5), 1), randomise(around(backbone("a"))), tmp_path
    )
    assert found.missing == {
        "params/head/kernel": "head/kernel is float32 (3, 3) in the file, (3, 5) wanted",
        "params/head/bias": "head/bias is float32 (3,) in the file, (5,) wanted",
    }
    found = compare_with_keras(
        randomise(around(backbone("a", kernel=1)), 1), randomise(around(backbone("a"))), tmp_path
    )
    assert found.missing.keys() == {"params/a/conv/kernel"}


@pytest.mark.parametrize("ending", [".h5", ".weights.h5", ".keras"])
def test_a_backbone_of_its_own_and_in_a_model(ending, tmp_path):
    """A name that someone gave leads to the layer through models on either side; a numbered one from the same model."""
    alone, nested = randomise(backbone("one")), randomise(around(backbone("a"), classes=2), 1)
    files = {model: saved(model, tmp_path / f"{model.name}{ending}") for model in (alone, nested)}
    modules = {model: fzoo.load_model(saved(model, tmp_path / f"{model.name}.keras")) for model in (alone, nested)}
    # Of the numbered names, one counted on, and leads nowhere: it is conv2d in the first, and conv2d_1 in the second.
    numbered = [next(re.findall(r"conv2d\w*$", layer.name) for layer in model._flatten_layers()
                     if layer.name.startswith("conv2d")) for model in (alone, nested)]  # fmt: skip
    assert numbered[0] != numbered[1]
    for target, source, above in ((nested, alone, "a/"), (alone, nested, "")):
        module, _ = modules[target]
        theirs = by_path(modules[source][1])
        variables, unmatched = fzoo.load_keras_weights(module, files[source], partial=True)
        left = {path.split("/")[-2] for path in unmatched.missing}
        assert left == {*numbered[target is nested], *(["head"] if target is nested else [])}
        for path, array in by_path(variables).items():
            if path not in unmatched.missing:
                other = path.replace("/a/", "/") if above else path.replace("/", "/a/", 1)
                np.testing.assert_array_equal(array, theirs[other], err_msg=path)


@pytest.mark.parametrize("ending", [".h5", ".weights.h5"])
def test_numbered_names_inside_of_a_model(ending, tmp_path):
    """They are taken where other names lead to that model, or where it is named; alone they lead nowhere."""
    target, files = [], []
    for named in (True, False):
        keras.utils.clear_session(free_memory=False)
        x = image = keras.Input((12, 12, 3))
        for layer in (L.Conv2D(3, 1), L.Conv2D(3, 1, name="named" if named else None), L.Conv2D(3, 1)):
            x = layer(x)
        inside = randomise(keras.Model(image, x, name="a"))
        target.append(fzoo.load_model(saved(inside, tmp_path / f"{named}.keras")))
        files.append(saved(around(inside), tmp_path / f"{named}{ending}"))
    variables, unmatched = fzoo.load_keras_weights(target[0][0], files[0], partial=True)
    assert not unmatched.missing
    assert_equal(variables, target[0][1])
    with pytest.raises(fzoo.WeightsMismatch, match=r"^nothing in .*; layer='a' takes that layer's$"):
        fzoo.load_keras_weights(target[1][0], files[1], partial=True)
    variables, unmatched = fzoo.load_keras_weights(target[1][0], files[1], partial=True, layer="a")
    assert not unmatched.missing
    assert_equal(variables, target[1][1])


@pytest.mark.parametrize("ending", [".h5", ".weights.h5", ".keras"])
def test_two_equal_backbones(ending, tmp_path):
    """They are told apart by the layer's name, strictly and in part, and one inside of them by the way to it."""
    keras.utils.clear_session(free_memory=False)
    single = backbone("one")
    module, _ = fzoo.load_model(saved(single, tmp_path / "one.keras"))
    keras.utils.clear_session(free_memory=False)
    first = backbone("a")
    keras.utils.clear_session(free_memory=False)
    second = backbone("b")
    both = randomise(around(first, second))
    path = saved(both, tmp_path / f"both{ending}")
    with pytest.raises(fzoo.WeightsMismatch, match=r"^.* has conv more than once, a/conv and b/conv: layer='a' takes"):
        fzoo.load_keras_weights(module, path, partial=True)
    for layer, model in (("a", first), ("b", second)):
        wanted = fzoo.load_model(saved(model, tmp_path / f"{layer}.keras"))[1]
        with pytest.warns(UserWarning, match=rf"its layer {layer} was loaded; left out: .*head") as warned:
            assert_equal(fzoo.load_keras_weights(module, path, layer=layer), wanted)
        variables, unmatched = fzoo.load_keras_weights(module, path, layer=layer, partial=True)
        assert_equal(variables, wanted)
        assert not unmatched.missing and len(unmatched.unused) == 11 + 2
        assert all(f"{name} {shape}" in str(warned[0].message) for name, shape in unmatched.unused.items())
    inside = keras.Sequential([keras.Input((12, 12, 4)), *(L.Conv2D(3, 1, name="deep"), L.PReLU(name="slope"))])
    module, _ = fzoo.load_model(saved(inside, tmp_path / "inside.keras"))
    with pytest.warns(UserWarning, match="its layer b/inner was loaded"):
        variables = fzoo.load_keras_weights(module, path, layer="b/inner")
    deep = second.get_layer("inner").get_layer("deep")
    np.testing.assert_array_equal(variables["params"]["deep"]["kernel"], deep.kernel)
    with pytest.raises(ValueError, match=r"unknown layer 'bb': did you mean b\?"):
        fzoo.load_keras_weights(module, path, layer="bb")
    with pytest.raises(ValueError, match=r"the layer head is no model, one that is expected: a, b$"):
        fzoo.load_keras_weights(module, path, layer="head", partial=True)


@pytest.mark.parametrize("name", ["ConvNeXtTiny", "MobileNet"])
@pytest.mark.parametrize("ending", [".h5", ".weights.h5", ".keras"])
def test_a_family(name, ending, tmp_path):
    """All but the classifier, of a file with another number of classes; a Sequential in it is one layer."""
    options = small_options(name)
    module = fzoo.create(name, **options)
    variables = random_variables(module, statistics={})
    path = tmp_path / f"w{ending}"
    fzoo.save_variables(module, variables, path)
    other = fzoo.create(name, **{**options, "classes": 3})
    found, unmatched = fzoo.load_keras_weights(other, path, partial=True, rng=jax.random.key(5))
    last = list(slots(other))[-1]
    assert unmatched.missing.keys() == {f"params/{last}/kernel", f"params/{last}/bias"}
    assert len(unmatched.unused) == 2
    variables["params"][last] = initial_variables(other, jax.random.key(5))["params"][last]
    assert_equal(found, variables)
    headless = fzoo.create(name, **{**options, "classes": 1000}, include_top=False)
    found, unmatched = fzoo.load_keras_weights(headless, path, partial=True)
    renamed = {"layer_normalization"} if name == "ConvNeXtTiny" else set()  # Keras's, where there is no top
    assert {path.split("/")[1] for path in unmatched.missing} == renamed
    assert_equal(
        found["params"],
        {layer: (found if layer in renamed else variables)["params"][layer] for layer in found["params"]},
    )


@pytest.mark.parametrize("ending", [".h5", ".weights.h5"])
def test_a_family_inside_of_a_model(ending, tmp_path):
    """A nested ConvNeXt, whose Sequentials a legacy file has layer by layer, and two of them."""
    from reference import set_variables, small_keras_model

    module = fzoo.create("ConvNeXtTiny", **SMALL["ConvNeXtTiny"][1], include_top=False, input_shape=(64, 64, 3))
    options = {**SMALL["ConvNeXtTiny"][1], "include_top": False, "input_shape": (64, 64, 3)}
    models, trees = [], [random_variables(module, seed, statistics={}) for seed in range(2)]
    for name, tree in zip("ab", trees, strict=True):
        models.append(set_variables(small_keras_model("ConvNeXtTiny", options), tree))
        models[-1].name = name
    image = keras.Input((64, 64, 3))
    for layers in (models, models[:1]):
        maps = [model(image) for model in layers]
        x = L.Add(name="sum")(maps) if len(maps) > 1 else maps[0]
        path = saved(keras.Model(image, L.Conv2D(2, 1, name="end")(x)), tmp_path / f"{len(layers)}{ending}")
        for model, tree in zip(layers, trees, strict=False):
            variables, unmatched = fzoo.load_keras_weights(module, path, layer=model.name, partial=True)
            assert not unmatched.missing
            assert_equal(variables, tree)
    variables, unmatched = fzoo.load_keras_weights(module, path, partial=True)
    assert not unmatched.missing and len(unmatched.unused) == 2
    assert_equal(variables, trees[0])


def old(path, folder, configured):
    """The file as Keras wrote it before layers had their names in it; the configuration in or beside it, or not."""
    folder.mkdir()
    with zipfile.ZipFile(path) as archive:
        (folder / "w.weights.h5").write_bytes(archive.read("model.weights.h5"))
        config = archive.read("config.json")
    with h5py.File(folder / "w.weights.h5", "r+") as file:
        file.visititems(lambda _, item: item.attrs.pop("name", None) and None)
    if configured:
        (folder / "config.json").write_bytes(config)
    return folder / "w.weights.h5"


def test_files_without_names(tmp_path):
    """The configuration tells them; where there is none, partial loading has nothing to go by."""
    branch = keras.Sequential([keras.Input((12, 12, 3)), L.ReLU()], name="without")  # no arrays, before the other
    image = keras.Input((12, 12, 3))
    models = [randomise(network(name=name), seed) for seed, name in enumerate("ab")]
    x = L.Add(name="sum")([models[0](branch(image)), models[1](keras.Sequential([L.Conv2D(3, 1, name="own")])(image))])
    path = saved(keras.Model(image, x), tmp_path / "model.keras")
    module, _ = fzoo.load_model(saved(network(), tmp_path / "target.keras"))
    told, untold = old(path, tmp_path / "told", True), old(path, tmp_path / "untold", False)
    wanted = fzoo.load_model(saved(models[1], tmp_path / "b.keras"))[1]
    assert_equal(fzoo.load_keras_weights(module, told, layer="b", partial=True)[0], wanted)
    with pytest.warns(UserWarning, match="its layer functional_1 was loaded"):
        assert_equal(fzoo.load_keras_weights(module, untold, layer="functional_1"), wanted)
    with pytest.raises(ValueError, match=r"has its layers by class, without names.*: a legacy \.h5, a \.keras file or"):
        fzoo.load_keras_weights(module, untold, partial=True)
    config = json.loads((told.parent / "config.json").read_text())
    for text in ("{", json.dumps({**config, "config": {**config["config"], "layers": []}})):  # of no or another model
        (told.parent / "config.json").write_text(text)
        with pytest.raises(ValueError, match="has its layers by class, without names"):
            fzoo.load_keras_weights(module, told, partial=True)


def test_refused(tmp_path):
    module = fzoo.create("MobileNet", **MOBILENET, classes=3)
    path = saved(randomise(network()), tmp_path / "w.h5")
    with pytest.raises(fzoo.WeightsMismatch) as error:
        fzoo.load_keras_weights(module, path, partial=True)
    assert str(error.value) == (
        f"nothing in {path} fits this MobileNet by name and shape: its layers are stem, stem_bn, middle, ..., "
        "those of the network conv1, conv1_bn, conv_dw_1, ..."
    )
    with pytest.raises(ValueError, match=r"^rng goes with partial=True"):
        fzoo.load_keras_weights(module, path, rng=jax.random.key(0))  # pyright: ignore
    fzoo.save_variables(module, initial_variables(module, jax.random.key(0)), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors is not Keras's, whose files alone"):
        fzoo.load_keras_weights(module, tmp_path / "w.safetensors", partial=True)
    with h5py.File(path, "r+") as file:
        names = read_names(file["model_weights"], "layer_names")
        file["model_weights"].attrs["layer_names"] = [*names[:-1], "stem"]
    with pytest.raises(fzoo.WeightsMismatch, match="lists the layer stem twice"):
        fzoo.load_keras_weights(module, path, partial=True)


def test_equal_strict_networks_name_the_way_out(tmp_path):
    """What the strict loading of a family's backbone says of two, does."""
    module = fzoo.create("MobileNet", **MOBILENET, include_top=False)
    image = keras.Input((32, 32, 3))
    models = [keras.applications.MobileNet(**MOBILENET, include_top=False, weights=None, name=name) for name in "ab"]
    both = keras.Model(image, L.Add(name="sum")([model(image) for model in models]))
    path = saved(both, tmp_path / "w.weights.h5")
    with pytest.raises(fzoo.WeightsMismatch, match=r"more than one such network: a, b; .*layer='a'\) takes that one"):
        fzoo.load_keras_weights(module, path)
    with pytest.warns(UserWarning, match="its layer b was loaded"):
        variables = fzoo.load_keras_weights(module, path, layer="b")
    np.testing.assert_array_equal(variables["params"]["conv1"]["kernel"], models[1].get_layer("conv1").kernel)


def test_layers_that_are_built_of_others_are_listed(tmp_path):
    """The reader has no place for their arrays, but what was not taken is told; random states are no weights."""
    x = image = keras.Input((12, 12, 3))
    x = L.Dropout(0.5)(L.Conv2D(4, 3, name="stem")(x))
    x = L.Flatten()(L.TimeDistributed(L.Dense(2), name="each")(x))
    path = saved(keras.Model(image, x), tmp_path / "w.weights.h5")
    module, _ = fzoo.load_model(saved(network(), tmp_path / "target.keras"))
    _, unmatched = fzoo.load_keras_weights(module, path, partial=True)
    each = "layers/time_distributed/layer/vars"
    assert unmatched.unused == {f"{each}/0": (4, 2), f"{each}/1": (2,)}


def test_a_rescaling_that_the_network_lacks(tmp_path):
    image = keras.Input((12, 12, 3))
    path = saved(keras.Model(image, network(name="a")(L.Rescaling(2.0)(image))), tmp_path / "w.weights.h5")
    module, _ = fzoo.load_model(saved(network(), tmp_path / "target.keras"))
    with pytest.warns(UserWarning, match="1 rescaling layer more than this KerasModel"):
        fzoo.load_keras_weights(module, path, partial=True)


# -- a file as a mapping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".h5", ".weights.h5", ".keras", ".safetensors"])
def test_open_weights(ending, tmp_path):
    path = tmp_path / f"w{ending}"
    fzoo.save_variables(tiny(), tiny_variables(), path)
    listed = sorted(slot.keras_shape for layer in slots(tiny()).values() for slot in layer)
    with fzoo.open_weights(path) as arrays:
        assert len(arrays) == len(list(arrays)) == len(listed)
        shapes = sorted(array.shape for array in arrays.values())
        assert len(shapes) == len(listed) and (ending == ".safetensors" or shapes == listed)
        name = KERNEL.get({".h5": "legacy.h5"}.get(ending, "keras3.weights.h5"), "")
        name = "params.conv_a.kernel" if ending == ".safetensors" else name
        kernel = arrays[name]
        assert (kernel.shape, kernel.dtype, kernel.ndim, len(kernel)) == ((3, 3, 3, 4), np.float32, 4, 3)
        wanted = tiny_variables()["params"]["conv_a"]["kernel"]
        np.testing.assert_array_equal(np.asarray(kernel), wanted)
        np.testing.assert_array_equal(kernel[0, ..., 1:], wanted[0, ..., 1:])
        np.testing.assert_array_equal(jnp.asarray(np.asarray(kernel, np.float64)), wanted)
        assert name in str(arrays[name]) and "(3, 3, 3, 4)" in str(arrays[name])
        with pytest.raises(KeyError, match=r"unknown array .*did you mean"):
            arrays[f"{name}s"]
        assert arrays.get("nothing") is None and "nothing" not in arrays
        with pytest.raises(TypeError):
            arrays[name] = wanted  # pyright: ignore
    assert kernel.shape == (3, 3, 3, 4)
    with pytest.raises(ValueError, match=rf"^{path} is closed: {name} can be read inside of"):
        np.asarray(kernel)
    with pytest.raises(RuntimeError, match="the user's own"), fzoo.open_weights(path):
        raise RuntimeError("the user's own")
    with pytest.raises(ValueError, match=r"^the user's own"), fzoo.open_weights(path):
        raise ValueError("the user's own")


def test_paths_are_those_of_the_report(tmp_path):
    for ending in (".h5", ".weights.h5", ".keras"):
        path = saved(around(backbone("a")), tmp_path / f"w{ending}")
        with fzoo.open_weights(path) as arrays:
            assert [name for _, name, _, _ in fzoo.inspect_weights(path).arrays] == list(arrays)


def test_open_weights_reads_nothing_unasked(tmp_path):
    """A file whose array would have 64 TB: it has a shape, and no values."""
    path = tmp_path / "w.h5"
    fzoo.save_variables(tiny(), tiny_variables(), path)
    with h5py.File(path, "r+") as file:
        del file[KERNEL["legacy.h5"]]
        file.create_dataset(KERNEL["legacy.h5"], (1 << 22, 1 << 22), "f", chunks=(64, 64))
    with fzoo.open_weights(path) as arrays:
        assert arrays[KERNEL["legacy.h5"]].shape == (1 << 22, 1 << 22)
        with pytest.raises(ValueError, match=r"conv_a/conv_a/kernel can't be read: .*never written"):
            np.asarray(arrays[KERNEL["legacy.h5"]])
        assert arrays["conv_a/conv_a/bias"][...].shape == (4,)
    _, unmatched = fzoo.load_keras_weights(tiny(), path, partial=True)
    assert list(unmatched.missing) == ["params/conv_a/kernel"]


def test_bfloat16(tmp_path):
    with h5py.File(tmp_path / "w.weights.h5", "w") as file:
        own = file.create_group("layers/conv2d/vars")
        own["0"] = np.arange(4, dtype=jnp.bfloat16).view("V2")
    with fzoo.open_weights(tmp_path / "w.weights.h5") as arrays:
        assert arrays["layers/conv2d/vars/0"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(arrays["layers/conv2d/vars/0"], np.float32), np.arange(4))


def words(file):
    del file["conv_a/conv_a/kernel"]
    file.create_dataset("conv_a/conv_a/kernel", (2,), h5py.string_dtype())


def link(file):
    file["conv_a/conv_a/more"] = h5py.ExternalLink("/etc/passwd", "/")


def soft_link(file):
    file["conv_a/conv_a/more"] = h5py.SoftLink("/")


def circle(file):
    file["conv_a/conv_a/more"] = file["conv_a"]


def wide_circles(file):
    for i in range(50):
        file[f"conv_a/conv_a/more{i}"] = file["conv_a"]


def no_shape(file):
    file["conv_a/conv_a/more"] = h5py.Empty("f4")


def filtered(file):
    file.create_dataset("conv_a/conv_a/more", data=np.zeros(9), compression="gzip")


HOSTILE = {
    link: "link to elsewhere",
    soft_link: "link to elsewhere",
    circle: "path in it is longer than|holds more than",
    wide_circles: "path in it is longer than|holds more than",
    no_shape: "is no array",
    filtered: "compressed or filtered",
}


@pytest.mark.parametrize("trick", HOSTILE, ids=lambda trick: trick.__name__)
def test_hostile_files(trick, tmp_path):
    """What lies beside the listed arrays is looked at as these are."""
    path = tmp_path / "w.h5"
    fzoo.save_variables(tiny(), tiny_variables(), path)
    with h5py.File(path, "r+") as file:
        trick(file)
    for load in (
        lambda: fzoo.open_weights(path).__enter__(),
        lambda: fzoo.load_keras_weights(tiny(), path, partial=True),
    ):
        with pytest.raises(
            ValueError, match=f"^{path} is not a readable Keras weights file: .*({HOSTILE[trick]})"
        ) as e:
            load()
        assert str(e.value).isprintable() and len(str(e.value)) < 1500


def test_words_are_not_read(tmp_path):
    """HDF5 would follow each to a heap."""
    path = tmp_path / "w.h5"
    fzoo.save_variables(tiny(), tiny_variables(), path)
    with h5py.File(path, "r+") as file:
        words(file)
    with fzoo.open_weights(path) as arrays, pytest.raises(ValueError, match="it is object, numbers expected"):
        np.asarray(arrays["conv_a/conv_a/kernel"])


def test_open_weights_refuses(tmp_path):
    (tmp_path / "w.h5").write_bytes(b"")
    (tmp_path / "w.safetensors").write_bytes(b"12345678")
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        fzoo.open_weights(tmp_path / "none.h5").__enter__()
    for name in ("w.h5", "w.safetensors"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable"):
            fzoo.open_weights(tmp_path / name).__enter__()
    fzoo.save_variables(tiny(), tiny_variables(), tmp_path / "w.orbax")
    with pytest.raises(ValueError, match=r"w\.orbax is an Orbax checkpoint, \.h5, \.keras or \.safetensors expected"):
        fzoo.open_weights(tmp_path / "w.orbax").__enter__()


def test_another_network_of_a_file_with_a_description(tmp_path):
    """What fzoo wrote of the network is of the file's; partial loading is for another."""

    class Other(Tiny):
        pass

    fzoo.save_variables(tiny(), tiny_variables(), tmp_path / "w.h5")
    with pytest.raises(fzoo.WeightsMismatch):
        fzoo.load_keras_weights(fzoo.create("MobileNet", **MOBILENET), tmp_path / "w.h5")
    other = Other(include_top=False, input_shape=(8, 8, 3))
    variables, unmatched = fzoo.load_keras_weights(other, tmp_path / "w.h5", partial=True)
    assert_equal(variables, tiny_variables())
    assert not unmatched.missing and not unmatched.unused
