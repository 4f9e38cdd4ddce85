"""Files that are not Keras's, what `inspect_weights` says of a file, and the way from one kind to another."""

import jax
import keras
import numpy as np
import pytest
from reference import assert_equal, build, keras_model, randomise, save_weights_only, variables_of
from tiers import slow, slow_but

import fzoo
from fzoo.convert import convert

OPTIONS = {"alpha": 0.25, "input_shape": (32, 32, 3), "classes": 4}


@pytest.fixture(scope="module")
def model():
    return keras_model("MobileNet", **OPTIONS)


@pytest.fixture
def module():
    return fzoo.create("MobileNet", **OPTIONS)


@pytest.fixture
def variables(model):
    return variables_of(model)


@pytest.mark.slow
def test_every_kind_into_every_other(module, model, variables, tmp_path):
    """Round and round, bit for bit; what Keras reads in the end is what it wrote."""
    source = save_weights_only(model, tmp_path / "start.h5")
    for i, ending in enumerate((".safetensors", ".h5", ".orbax", ".keras", "", ".weights.h5", ".safetensors", ".h5")):
        named = {} if source.suffix in (".h5", ".keras") else {"model": "MobileNet", **OPTIONS}
        destination = tmp_path / f"{i}{ending}"
        assert type(convert(source, destination, **named)) is type(module)
        assert_equal(fzoo.load_variables(module, destination), variables)
        source = destination
    randomise(model, seed=3)
    model.load_weights(source)
    assert_equal(variables_of(model), variables)
    again, loaded = fzoo.load("MobileNet", weights=tmp_path / "0.safetensors", **OPTIONS)
    assert again == module
    assert_equal(loaded, variables)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["start.h5", "0.safetensors", "1.h5", "2.orbax", "3.keras", "4", "5.weights.h5", "6.safetensors", "7.h5"]
    )


def test_safetensors_names(module, variables, tmp_path):
    """Another program finds the tree, its keys joined by dots."""
    from safetensors.numpy import load_file

    fzoo.save_variables(module, variables, tmp_path / "w.safetensors")
    arrays = load_file(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(arrays["params.conv1.kernel"], variables["params"]["conv1"]["kernel"])
    assert len(arrays) == len(jax.tree.leaves(variables))


def test_a_checkpoint_that_orbax_itself_wrote(module, variables, tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", variables)
    assert_equal(fzoo.load_variables(module, tmp_path / "checkpoint"), variables)


@pytest.mark.parametrize("ending", [".safetensors", ".orbax"])
def test_what_does_not_fit_is_refused(module, variables, ending, tmp_path, caplog):
    path = tmp_path / f"w{ending}"
    fzoo.save_variables(module, variables, path)
    for name, options, message in (
        ("VGG16", {"include_top": False}, "is of MobileNet, not of VGG16"),
        ("MobileNet", {**OPTIONS, "classes": 5}, "with classes=4, classes=5 given: the file's or include_top=False"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            fzoo.load(name, weights=path, **options)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    if ending == ".orbax":
        with pytest.raises(FileExistsError, match="exists"):
            fzoo.save_variables(module, variables, path)
        for part in ("manifest.ocdbt", "_METADATA"):
            (path / part).write_bytes(b"nonsense")
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"w{ending} is not a") as error:
        fzoo.load_variables(module, path)
    assert "\n" not in str(error.value) and not caplog.records
    with pytest.raises(ValueError, match=rf"w{ending} is not (Keras's|a readable safetensors file)"):
        fzoo.inspect_weights(path)
    with pytest.raises(FileNotFoundError):
        fzoo.load_variables(module, tmp_path / f"missing{ending}")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        fzoo.save_variables(module, variables, tmp_path / "nowhere" / f"w{ending}")
    del variables["params"]["conv1"]
    with pytest.raises(ValueError, match="params/conv1/kernel is missing"):
        fzoo.save_variables(module, variables, tmp_path / f"half{ending}")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_other_programs_files_do_not_tell_their_model(module, variables, tmp_path):
    """And are checked by their arrays."""
    from safetensors.numpy import load_file, save_file

    fzoo.save_variables(module, variables, tmp_path / "w.safetensors")
    arrays = load_file(tmp_path / "w.safetensors")
    save_file(arrays, tmp_path / "w.safetensors")
    assert fzoo.load("MobileNet", weights=tmp_path / "w.safetensors", **OPTIONS)[0] == module
    for wrong in (
        lambda: convert(tmp_path / "w.safetensors", tmp_path / "w.h5"),
        lambda: fzoo.load(weights=tmp_path / "w.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"w\.safetensors does not tell .*name"):
            wrong()
    with pytest.raises(ValueError, match=r"conv_preds/kernel is \(1, 1, 256, 4\), \(1, 1, 256, 5\) wanted"):
        fzoo.load("MobileNet", weights=tmp_path / "w.safetensors", **{**OPTIONS, "classes": 5})


def test_a_tree_of_nonsense(module, tmp_path):
    from safetensors.numpy import save_file

    for arrays in ({"a": np.ones(3), "a.b": np.ones(3)}, {"a.b": np.ones(3), "a": np.ones(3)}, {"": np.ones(2)}, {}):
        save_file(arrays, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"w\.safetensors"):
            fzoo.load_variables(module, tmp_path / "w.safetensors")


@pytest.mark.parametrize("ending", slow_but([".h5", ".weights.h5", ".keras"], ".h5", ".keras"))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MobileNet", {"alpha": 0.25, "classes": 4}),
        ("MobileNetV3Small", {"minimalistic": True, "classes": 3}),
        ("MobileNetV2", {"include_top": False, "input_shape": (224, 224, 1)}),
        slow("EfficientNetB0", {"include_top": False}),
        ("ConvNeXtTiny", {"classes": 2}),
        ("VGG16", {"include_top": False}),
    ],
)
def test_inspect_finds_the_model(name, options, ending, tmp_path):
    module, variables = fzoo.load(name, weights=None, **options)
    path = tmp_path / f"w{ending}"
    fzoo.save_keras_weights(module, variables, path)
    report = fzoo.inspect_weights(path)
    (fit,) = report.fits
    assert (fit.model, fit.options, fit.within, fit.left_out) == (name, options, None, ())
    assert (
        report.layout == {".h5": "legacy h5", ".weights.h5": "Keras 3 .weights.h5", ".keras": ".keras archive"}[ending]
    )
    assert report.parameters == sum(leaf.size for leaf in jax.tree.leaves(variables))
    found = {variable: shape for _, variable, shape in fit.arrays}
    assert len(found) == len(report.arrays) == len(jax.tree.leaves(variables))
    assert f'fzoo.create("{name}"' in str(fit)


def test_inspect_finds_what_is_nested(tmp_path):
    backbone = build(keras.applications.MobileNet, alpha=0.25, include_top=False, input_shape=(32, 32, 3))
    pool, head = keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2, name="own")
    outer = keras.Sequential([keras.Input((32, 32, 3)), backbone, pool, head])
    save_weights_only(outer, tmp_path / "w.h5")
    outer.save_weights(tmp_path / "w.weights.h5")
    for path in tmp_path.iterdir():
        (fit,) = fzoo.inspect_weights(path).fits
        assert (fit.model, fit.options) == ("MobileNet", {"alpha": 0.25, "include_top": False})
        assert fit.within == backbone.name and len(fit.left_out) == 2
        with pytest.warns(UserWarning, match="left out: own"):
            fzoo.load(fit.model, weights=path, **fit.options)


def test_inspect_of_no_model(tmp_path):
    outer = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Dense(2)])
    outer.save_weights(tmp_path / "w.weights.h5")
    report = fzoo.inspect_weights(tmp_path / "w.weights.h5")
    assert report.fits == () and len(report.arrays) == 4
    with pytest.raises(ValueError, match="does not tell which model"):
        convert(tmp_path / "w.weights.h5", tmp_path / "w.h5")
    assert not (tmp_path / "w.h5").exists()
    for missing in (tmp_path / "missing.h5", tmp_path):
        with pytest.raises(OSError, match=str(missing)):
            fzoo.inspect_weights(missing)
