"""Files that are damaged, foreign, renamed or in the way: equal weights or one clear line, never half of anything."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import zipfile

import h5py
import keras
import numpy as np
import pytest
from reference import assert_equal, build, keras_model, randomise, save_weights_only, variables_of
from tiers import slow_but

import fzoo
from fzoo.weights import WeightsMismatch
from fzoo.weights.files import read_names

OPTIONS = {"alpha": 0.25, "input_shape": (32, 32, 3), "classes": 4}


@pytest.fixture(scope="module")
def model():
    return keras_model("MobileNet", **OPTIONS)


@pytest.fixture
def module():
    return fzoo.create("MobileNet", **OPTIONS)


@pytest.fixture
def file(model, tmp_path):
    return save_weights_only(model, tmp_path / "good.h5")


def test_truncated(module, file, tmp_path):
    data = file.read_bytes()
    for part in (0, 7, 100, len(data) // 2, len(data) - 1):
        path = tmp_path / f"{part}.h5"
        path.write_bytes(data[:part])
        with pytest.raises(ValueError, match=f"{part}.h5 is not a readable Keras weights file") as error:
            fzoo.load_keras_weights(module, path)
        assert "\n" not in str(error.value)


def test_not_a_weights_file(module, tmp_path):
    (tmp_path / "text.h5").write_text("conv1/kernel")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["data"] = np.ones(3)
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with h5py.File(tmp_path / "empty.h5", "w") as empty:
        empty.attrs["layer_names"] = np.array([b"input"])
        empty.create_group("input").attrs["weight_names"] = np.array([], "S1")
    for name, message in {
        "text.h5": "neither an HDF5 file nor a .keras archive",
        "other.h5": "neither layer_names nor layers",
        "other.keras": "no model.weights.h5",
        "empty.h5": "no layers with weights",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            fzoo.load_keras_weights(module, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        fzoo.load_keras_weights(module, tmp_path / "missing.h5")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        fzoo.load_keras_weights(module, tmp_path)


def test_another_model(file):
    with pytest.raises(WeightsMismatch, match="does not fit this VGG") as error:
        fzoo.load("VGG16", weights=file, input_shape=(32, 32, 3))
    problems = "\n".join(error.value.problems)
    assert "block1_conv1/kernel (3, 3, 3, 64) is missing" in problems
    assert "conv_dw_1/conv_dw_1/kernel (3, 3, 8, 1) is left over" in problems
    assert len(str(error.value)) < 1500 and "more" in str(error.value)


def test_another_width(file):
    with pytest.raises(WeightsMismatch, match=r"conv1/kernel is float32 \(3, 3, 3, 8\) in the file, \(3, 3, 3, 16\)"):
        fzoo.load("MobileNet", weights=file, alpha=0.5, input_shape=(32, 32, 3), classes=4)


def test_missing_and_left_over_layer(module, file):
    with h5py.File(file, "r+") as f:
        names = [n for n in read_names(f, "layer_names") if n != "conv_pw_7"]
        f.attrs["layer_names"] = names
    with pytest.raises(WeightsMismatch, match=r"conv_pw_7/kernel \(1, 1, 128, 128\) is missing"):
        fzoo.load_keras_weights(module, file)
    with h5py.File(file, "r+") as f:
        f.attrs["layer_names"] = [*names, "conv_pw_7", "conv_pw_77"]
        f.copy("conv_pw_7", "conv_pw_77")
    with pytest.raises(WeightsMismatch, match=r"conv_pw_77/conv_pw_7/kernel \(1, 1, 128, 128\) is left over"):
        fzoo.load_keras_weights(module, file)


def test_a_layer_listed_twice(module, file):
    with h5py.File(file, "r+") as f:
        f.attrs["layer_names"] = [n if n != "conv_pw_8" else "conv_pw_7" for n in read_names(f, "layer_names")]
    with pytest.raises(WeightsMismatch, match="lists a layer twice"):
        fzoo.load_keras_weights(module, file)


def test_nested_models(module, model, tmp_path):
    """A model with its top as a layer of another; one too deep inside, one of another kind, two at once."""
    import keras

    def save(layers, name):
        outer = keras.Sequential([keras.Input((32, 32, 3)), *layers])
        outer.save_weights(tmp_path / f"{name}.weights.h5")
        save_weights_only(outer, tmp_path / f"{name}.h5")
        return [tmp_path / f"{name}.weights.h5", tmp_path / f"{name}.h5"]

    for path in save([model, keras.layers.Dense(2, name="own")], "nested"):
        with pytest.warns(UserWarning, match=r"was loaded; left out: own.*\(4, 2\)"):
            assert_equal(fzoo.load_keras_weights(module, path), variables_of(model))
        with pytest.raises(WeightsMismatch, match="layers with weights in the file"):
            fzoo.load("VGG16", weights=path, input_shape=(32, 32, 3))
    branches = keras.Input((32, 32, 3))
    second = keras.models.clone_model(model)
    second.name = "second"
    both = keras.Model(branches, keras.layers.add([model(branches), second(branches)]))
    both.save_weights(tmp_path / "both.weights.h5")
    with pytest.raises(WeightsMismatch, match=r"holds more than one such network: .*second"):
        fzoo.load_keras_weights(module, tmp_path / "both.weights.h5")


def test_bfloat16_file(module, tmp_path):
    import keras

    keras.config.set_dtype_policy("bfloat16")
    try:
        model = keras_model("MobileNet", **OPTIONS)
    finally:
        keras.config.set_dtype_policy("float32")
    model.save_weights(tmp_path / "half.weights.h5")
    save_weights_only(model, tmp_path / "half.h5")
    expected = {k: v["kernel"].astype(np.float32) for k, v in variables_of(model)["params"].items() if "kernel" in v}
    for path in tmp_path.iterdir():
        params = fzoo.load_keras_weights(module, path)["params"]
        assert_equal({layer: params[layer]["kernel"] for layer in expected}, expected)


def test_damaged_archive(module, tmp_path):
    with zipfile.ZipFile(tmp_path / "good.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", np.random.default_rng(0).integers(0, 9, 9999).tobytes())
    data = bytearray((tmp_path / "good.keras").read_bytes())
    data[200:240] = bytes(40)
    (tmp_path / "bad.keras").write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.keras is not a readable Keras weights file"):
        fzoo.load_keras_weights(module, tmp_path / "bad.keras")


def test_missing_array(module, file):
    with h5py.File(file, "r+") as f:
        group = f["conv_pw_7_bn"]
        group.attrs["weight_names"] = group.attrs["weight_names"][:3]
    with pytest.raises(WeightsMismatch, match="conv_pw_7_bn has 3 arrays, conv_pw_7_bn 4"):
        fzoo.load_keras_weights(module, file)
    with h5py.File(file, "r+") as f:
        del f["conv_pw_8/conv_pw_8/kernel"]
    with pytest.raises(ValueError, match="has no conv_pw_8/kernel"):
        fzoo.load_keras_weights(module, file)


def test_array_of_words(module, file):
    with h5py.File(file, "r+") as f:
        del f["conv1/conv1/kernel"]
        f["conv1/conv1/kernel"] = np.full((3, 3, 3, 8), b"word")
    with pytest.raises(WeightsMismatch, match=r"conv1/kernel is \|S4"):
        fzoo.load_keras_weights(module, file)


def test_other_names_load_by_position(model, module, file):
    """Published files call layers otherwise than Keras does today."""
    with h5py.File(file, "r+") as f:
        names = read_names(f, "layer_names")
        for i, name in enumerate(names):
            f.move(name, f"renamed_{i}")
        f.attrs["layer_names"] = [f"renamed_{i}" for i in range(len(names))]
    assert_equal(fzoo.load_keras_weights(module, file), variables_of(model))


def test_same_names_in_another_order_load_by_name(model, module, file):
    """Layers of one shape that a file lists in another order would load by position without a complaint."""
    with h5py.File(file, "r+") as f:
        names = read_names(f, "layer_names")
        a, b = names.index("conv_pw_8"), names.index("conv_pw_9")
        names[a], names[b] = names[b], names[a]
        f.attrs["layer_names"] = names
    assert_equal(fzoo.load_keras_weights(module, file), variables_of(model))


def test_outputs_of_a_depthwise_kernel(tmp_path):
    """Keras keeps them by input channel; where each channel has several, their order shows."""
    options = {"alpha": 0.25, "depth_multiplier": 2, "input_shape": (32, 32, 3), "include_top": False}
    model = randomise(build(keras.applications.MobileNet, **options))
    module, wanted = fzoo.create("MobileNet", **options), variables_of(model)
    path = save_weights_only(model, tmp_path / "keras.h5")
    assert_equal(fzoo.load_keras_weights(module, path), wanted)
    fzoo.save_keras_weights(module, wanted, tmp_path / "fzoo.h5")
    for weight in model.weights:
        weight.assign(np.zeros(weight.shape))
    model.load_weights(tmp_path / "fzoo.h5")
    assert_equal(variables_of(model), wanted)


@pytest.mark.slow
def test_old_names_of_resnet(tmp_path):
    """As Keras 1 and 2.1 wrote: "res2a_branch2a", and a block's shortcut after its third convolution."""
    options = {"include_top": False, "input_shape": (32, 32, 3)}
    model = keras_model("ResNet50", **options)
    path = save_weights_only(model, tmp_path / "old.h5")

    def old(name):
        ((stage, block, number, kind),) = re.findall(r"^conv(\d)_block(\d)_(\d)_(conv|bn)$", name)
        letter, branch = "abcdef"[int(block) - 1], ("1", "2a", "2b", "2c")[int(number)]
        return f"{'res' if kind == 'conv' else 'bn'}{stage}{letter}_branch{branch}"

    names = [layer.name for layer in model.layers if layer.weights]
    for i in range(len(names) - 1):
        if "_0_" in names[i]:
            names[i : i + 2] = names[i + 1], names[i]
    with h5py.File(path, "r+") as file:
        for name in names[2:]:
            file.move(name, old(name))
        file.move("conv1_conv", "conv1")
        file.move("conv1_bn", "bn_conv1")
        file.attrs["layer_names"] = ["conv1", "bn_conv1", *map(old, names[2:])]
    assert_equal(fzoo.load_keras_weights(fzoo.create("ResNet50", **options), path), variables_of(model))


@pytest.mark.slow
def test_old_names_of_xception(tmp_path):
    """The published file's: "convolution2d_1", "batchnormalization_1"."""
    options = {"include_top": False, "input_shape": (71, 71, 3)}
    model = keras_model("Xception", **options)
    path = save_weights_only(model, tmp_path / "old.h5")
    old = {}
    for now, before in (("conv2d", "convolution2d"), ("batch_normalization", "batchnormalization")):
        old |= {now: f"{before}_1", **{f"{now}_{i}": f"{before}_{i + 1}" for i in range(1, 4)}}
    with h5py.File(path, "r+") as file:
        for now, before in old.items():
            file.move(now, before)
        file.attrs["layer_names"] = [old.get(name, name) for name in read_names(file, "layer_names")]
    assert_equal(fzoo.load_keras_weights(fzoo.create("Xception", **options), path), variables_of(model))


@pytest.mark.slow
def test_auto_numbers_from_anywhere(tmp_path):
    """A session's later models have higher numbers; in both layouts their rank is what counts."""
    options = {"input_shape": (75, 75, 3), "include_top": False}
    first = keras_model("InceptionV3", **options)
    second = build(keras.applications.InceptionV3, fresh=False, **options)
    second.set_weights(first.get_weights())
    assert second.layers[1].name == "conv2d_94"
    second.save_weights(tmp_path / "keras3.weights.h5")
    save_weights_only(second, tmp_path / "legacy.h5")
    module = fzoo.create("InceptionV3", **options)
    for path in tmp_path.iterdir():
        assert_equal(fzoo.load_keras_weights(module, path), variables_of(first))


def test_links_are_not_followed(module, file, tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as secret:
        secret["kernel"] = np.ones((3, 3, 3, 8), np.float32)
    for link in (h5py.ExternalLink(tmp_path / "secret.h5", "/kernel"), h5py.SoftLink("/conv1_bn")):
        with h5py.File(file, "r+") as f:
            if f.get("conv1/conv1/kernel", getlink=True) is not None:
                del f["conv1/conv1/kernel"]
            f["conv1/conv1/kernel"] = link
        with pytest.raises(ValueError, match="link to elsewhere"):
            fzoo.load_keras_weights(module, file)
    with h5py.File(tmp_path / "linked.h5", "w") as f:
        f["model_weights"] = h5py.ExternalLink(file, "/")
    with pytest.raises(ValueError, match="link to elsewhere"):
        fzoo.load_keras_weights(module, tmp_path / "linked.h5")
    with h5py.File(file, "r+") as f:
        del f["conv1/conv1/kernel"]
        f["conv1/conv1"].create_dataset("kernel", (3, 3, 3, 8), "f", external=str(file))
    with pytest.raises(ValueError, match="outside of the file"):
        fzoo.load_keras_weights(module, file)


@pytest.mark.wrong_types
def test_saving_refuses(module, model, tmp_path):
    variables = variables_of(model)
    for name in ("weights.h6", "weights.safetensors", "weights"):
        with pytest.raises(ValueError, match=r"ends in \.weights\.h5, \.h5, \.hdf5, \.keras expected"):
            fzoo.save_keras_weights(module, variables, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        fzoo.save_keras_weights(module, variables, tmp_path / "nowhere" / "w.h5")
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(IsADirectoryError):
        fzoo.save_keras_weights(module, variables, tmp_path / "folder.h5")
    del variables["params"]["conv_pw_3"]
    with pytest.raises(WeightsMismatch, match="params/conv_pw_3/kernel is missing"):
        fzoo.save_keras_weights(module, variables, tmp_path / "w.h5")
    variables = variables_of(model)
    variables["params"]["extra"] = {"kernel": np.ones(3)}
    with pytest.raises(WeightsMismatch, match="params/extra/kernel is left over"):
        fzoo.save_keras_weights(module, variables, tmp_path / "w.h5")
    with pytest.raises(WeightsMismatch, match="is missing"):
        fzoo.save_keras_weights(module, None, tmp_path / "w.h5")
    with pytest.raises(ValueError, match=r"fzoo\.create expected"):
        fzoo.save_keras_weights(model, variables, tmp_path / "w.h5")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.h5"]


@pytest.mark.parametrize("ending", slow_but([".h5", ".weights.h5", ".keras", ".safetensors"], ".h5"))
def test_a_killed_save_leaves_the_old_file(module, model, ending, tmp_path):
    """The process is killed at the last moment, before the new file gets its name."""
    file = tmp_path / f"w{ending}"
    fzoo.save_variables(module, variables_of(model), file)
    old = file.read_bytes()
    script = f"""
        import os, signal, sys, fzoo
        module, variables = fzoo.load("MobileNet", weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=4)
        def killed(event, args):  # all is written, and nothing has its name yet
            if event == "os.rename":
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(killed)
        fzoo.save_variables(module, variables, {str(file)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == -signal.SIGKILL
    assert file.read_bytes() == old
    assert_equal(fzoo.load_variables(module, file), variables_of(model))


def test_a_save_killed_in_the_middle_of_writing(module, file):
    old = file.read_bytes()
    script = f"""
        import os, signal, h5py, fzoo
        module, variables = fzoo.load("MobileNet", weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=4)
        create_group, count = h5py.Group.create_group, 0
        def killed(self, *args, **kwargs):
            global count
            count += 1
            if count == 40:
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return create_group(self, *args, **kwargs)
        h5py.Group.create_group = killed
        fzoo.save_keras_weights(module, variables, {str(file)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == -signal.SIGKILL
    assert file.read_bytes() == old


def test_permissions_follow_the_umask(module, model, tmp_path):
    """Whatever writes the file."""
    umask = os.umask(0)
    os.umask(umask)
    for name in ("w.h5", "w.keras", "w.safetensors"):
        fzoo.save_variables(module, variables_of(model), tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask, name
