"""A network as a file of ONNX, run by ONNX Runtime: the same numbers, any batch, a graph that a person can read."""

import importlib.util
import sys
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import stored_tf_keras
import torch_cases
from networks import SMALL, assert_alive, images_for, network, random_images, random_variables, small_options
from reference import assert_close, by_model
from test_keras_model import randomise

import fzoo
from fzoo.layers.graph import trace

has_onnx = all(map(importlib.util.find_spec, ("onnx", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not has_onnx, reason="onnx and onnxruntime are not installed")

#: Where an ulp of one image moves the output by more than rounding alone: what is beside it is fzoo's forms on a CPU.
TOLERANCE = {"InceptionV3": 5e-4, "EfficientNetV2B0": 5e-5, "InceptionResNetV2": 5e-5, "ResNet50V2": 5e-5}


def session(path):
    """ONNX Runtime's, of a file that ONNX's own checker takes."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(path, full_check=True)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path, images):
    """What a file gives for images, by the names of its outputs."""
    runtime = session(path)
    (taken,) = runtime.get_inputs()
    assert taken.name == "images" and taken.shape[0] == "batch"
    return dict(
        zip([output.name for output in runtime.get_outputs()], runtime.run(None, {"images": images}), strict=True)
    )


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


def assert_same(module, variables, path, name, tolerance=1e-5):
    """For one image and for three, as it is and optimised: what `predict` gives."""
    images = images_for(module)
    expected = np.asarray(fzoo.predict(module, variables, images))
    assert_alive(expected, 0.01)
    for form in ("plain", "optimized"):
        if form == "optimized":
            module, variables = fzoo.optimize_for_inference(module, variables, platform="cuda")
        model = fzoo.export(module, variables, path)
        for count in (1, 3):
            (found,) = run(path, images[:count]).values()
            assert_close(found, expected[:count], f"{name}, {form}, {count} images", tolerance)
        most = {"ConvNeXtTiny": 20, "VGG11_BN.tv_in1k": 2}.get(name, 1)  # LayerNormalization, and Flatten of a map
        assert operators(model)["Transpose"] <= most, operators(model)
        assert not {"If", "Loop", "Expand", "Identity", "Shape"} & set(operators(model))


@needs_onnx
@pytest.mark.parametrize("name", by_model(SMALL, quick=("MobileNetV3Small",)))
def test_every_family(name, tmp_path):
    assert_same(*network(name, **small_options(name)), tmp_path / "net.onnx", name, TOLERANCE.get(name, 1e-5))


@needs_onnx
@pytest.mark.parametrize("name", by_model(stored_tf_keras.SMALL, quick=()))
def test_families_that_keras_has_no_more(name, tmp_path):
    assert_same(*stored_tf_keras.small_network(name), tmp_path / "net.onnx", name)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNeXt50.tv2_in1k", "ResNet34.a1_in1k", "VGG11_BN.tv_in1k"])
def test_others_weights(name, tmp_path):
    case = next(case for case in torch_cases.CASES.values() if case.model == name)
    module = case.create(classifier_activation="softmax")
    assert_same(module, random_variables(module), tmp_path / "net.onnx", name, 5e-5)  # Winograd's own error is 1e-5


@pytest.fixture(scope="module")
def small():
    return network("MobileNetV2", alpha=0.35, classes=5, input_shape=(32, 32, 3))


@pytest.mark.slow
@needs_onnx
def test_a_graph_to_read(small, tmp_path):
    """The operators and names that Keras's layers suggest; batch normalisation folded where it was."""
    module, variables = fzoo.optimize_for_inference(*small, platform="cuda")
    model = fzoo.export(module, variables, tmp_path / "net.onnx")
    layers = Counter(node.kind for node in trace(module).layers)
    found = operators(model)
    assert found["Conv"] == layers["Conv2D"] + layers["DepthwiseConv2D"]
    assert found["Clip"] == layers["ReLU"] and found["MatMul"] == 1 and found["Softmax"] == 1
    once = {"Transpose", "GlobalAveragePool", "Reshape", "MatMul", "Softmax"}  # and no Pad, no Mul
    assert set(found) == once | {"Conv", "Clip", "Add"} and all(found[operator] == 1 for operator in once)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and {"Conv1/Conv", "block_1_depthwise/Conv", "predictions/MatMul"} <= set(
        names
    )
    arrays = {array.name for array in model.graph.initializer}
    assert {"Conv1/kernel", "Conv1/bias", "predictions/kernel"} <= arrays
    (output,) = model.graph.output
    assert output.name == "probabilities"
    assert [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] == ["batch", 5]
    size = (tmp_path / "net.onnx").stat().st_size
    assert size < 1.1 * sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(variables)) + 60_000


@pytest.mark.slow
@needs_onnx
def test_pixels_and_a_fixed_batch(small, tmp_path):
    pixels = random_images((2, 32, 32, 3), pixels=True).astype(np.uint8)
    for mode in ("tf", "caffe", "torch"):
        module = small[0].clone(preprocessing=mode)
        path = tmp_path / f"{mode}.onnx"
        fzoo.export(module, small[1], path, preprocess=mode)
        expected = np.asarray(fzoo.predict(module, small[1], pixels, preprocess=mode))
        assert_close(run(path, pixels)["probabilities"], expected, mode, 3e-5)
    model = fzoo.export(*small, tmp_path / "fixed.onnx", batch_size=2)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


@pytest.mark.slow
@needs_onnx
def test_layers_and_features(small, tmp_path):
    module, variables = small
    images = images_for(module, 3)
    layers = ["block_1_project_BN", "Conv1_relu", "out_relu"]
    fzoo.export(module, variables, tmp_path / "layers.onnx", layers=layers)
    found = run(tmp_path / "layers.onnx", images)
    assert list(found) == layers
    for name, expected in fzoo.features(module, variables, images, layers).items():
        assert_close(found[name], np.asarray(expected), name, 1e-5)
    for options, name in (({"include_top": False}, "features"), ({"classifier_activation": None}, "logits")):
        module, variables = network("MobileNetV2", alpha=0.35, input_shape=(32, 32, 3), **options)
        fzoo.export(module, variables, tmp_path / "net.onnx")
        found = run(tmp_path / "net.onnx", images)
        assert_close(found[name], np.asarray(fzoo.predict(module, variables, images)), name, 1e-5)

    exported = fzoo.export(*small, tmp_path / "net.stablehlo", layers="out_relu", platforms="cpu")
    assert {*jax.jit(exported.call)(images)} == {"out_relu"}


@pytest.mark.slow
@needs_onnx
def test_a_growing_concatenation_and_a_module_of_the_user(small, tmp_path):
    class Logits(nn.Module):
        backbone: nn.Module

        @nn.compact
        def __call__(self, x):
            return {"twice": 2 * self.backbone(x), "sorted": jnp.argmax(self.backbone(x), -1)}

    module, variables = small
    nested = {kind: {"backbone": tree} for kind, tree in variables.items()}
    fzoo.export(Logits(module), nested, tmp_path / "net.onnx", image_shape=(32, 32, 3))
    images = images_for(module, 3)
    expected = np.asarray(fzoo.predict(module, variables, images))
    found = run(tmp_path / "net.onnx", images)
    assert_close(found["twice"], 2 * expected, "twice", 1e-5)
    assert found["sorted"].tolist() == expected.argmax(-1).tolist()


def keras_network():
    """With much that no family has."""
    layers = keras.layers
    image = keras.Input((16, 16, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = layers.Conv2D(8, 3, dilation_rate=2, padding="same", activation="gelu", name="dilated")(x)
    x = layers.LayerNormalization()(x)
    a = layers.Conv2DTranspose(8, 3, strides=2, padding="same")(layers.MaxPooling2D(padding="same")(x))
    b = layers.UpSampling2D()(layers.AveragePooling2D(3, 2, padding="same")(layers.PReLU(shared_axes=(1, 2))(x)))
    x = layers.Concatenate()([a, layers.LeakyReLU()(b), layers.SeparableConv2D(8, 3, padding="same")(x)])
    x = layers.GroupNormalization(4)(x)
    y = layers.Reshape((1, 1, 24))(layers.GlobalAveragePooling2D()(x))
    x = layers.Multiply()([x, layers.Conv2D(24, 1, activation="hard_sigmoid")(y)])
    x = layers.Conv1D(8, 3, activation="silu")(layers.Reshape((64, 96))(x))
    x = layers.Permute((2, 1))(x)
    x = layers.Dense(7, activation="tanh")(layers.Flatten()(x))
    return keras.Model(image, [layers.Dense(5, activation="softmax", name="classes")(x), layers.Softmax(name="own")(x)])


@needs_onnx
def test_a_network_of_a_keras_file(tmp_path):
    model = randomise(keras_network())
    model.save(tmp_path / "net.keras")
    module, variables = fzoo.load_model(tmp_path / "net.keras")
    fzoo.export(module, variables, tmp_path / "net.onnx")
    images = random_images((3, 16, 16, 3), pixels=True)
    found, expected = run(tmp_path / "net.onnx", images), fzoo.predict(module, variables, images)
    assert list(found) == ["classes", "own"]
    for name, theirs in zip(found, expected, strict=True):
        assert_close(found[name], np.asarray(theirs), name, 1e-5)


class Sorted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.sort(x, axis=1)


@pytest.mark.slow
@needs_onnx
def test_what_is_refused_in_one_line(small, tmp_path):
    module, variables = small
    path = tmp_path / "net.onnx"
    prepared = fzoo.optimize_for_inference(
        *network("VGG16", include_top=False, input_shape=(32, 32, 3)), platform="cpu"
    )
    for arguments, options, message in (
        ((module.clone(dtype=jnp.bfloat16), variables), {}, "computes in bfloat16 given, float32 expected for ONNX"),
        ((module, variables), {"platforms": "cpu"}, "platforms='cpu' given with .*ONNX is for all"),
        ((module, variables), {"layers": ["Conv9"]}, "unknown layer 'Conv9'"),
        ((module, {"params": {}}), {}, "not the variables of this MobileNetV2"),
        ((Sorted(), {}), {"image_shape": (32, 32, 3)}, "needs JAX's sort, which can't be written as ONNX"),
        ((Sorted(), {}), {"image_shape": (32, 32, 3), "layers": "a"}, "a network of fzoo has layers"),
        (prepared, {}, 'platform="cuda"'),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            fzoo.export(*arguments, path, **options)
        assert "\n" not in str(raised.value) or "variables" in message
        assert not path.exists()
    with pytest.raises(ValueError, match=r"net.tflite: a name that ends in .stablehlo or .onnx expected"):
        fzoo.export(*small, tmp_path / "net.tflite")


@pytest.mark.slow
def test_without_onnx(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx is not installed: pip install 'fzoo\[onnx\]'"):
        fzoo.export(*small, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.slow
@needs_onnx
def test_the_command(small, tmp_path, command_line):
    fzoo.save_keras_weights(*small, tmp_path / "net.weights.h5")
    options = ["-w", tmp_path / "net.weights.h5", "-o", "alpha=0.35", "--classes", "5", "--size", "32"]
    code, (row,), errors = command_line("export", "MobileNetV2", tmp_path / "net.onnx", *options, "--pixels")
    assert (code, errors) == (0, [])
    _, takes, gives, platforms, _ = row.split("\t")
    expected = ("images: uint8[batch,32,32,3]", "probabilities: float32[batch,5]", "any")
    assert (takes, gives, platforms) == expected
    pixels = random_images((3, 32, 32, 3), pixels=True).astype(np.uint8)
    ours = np.asarray(fzoo.predict(*small, pixels))
    assert_close(run(tmp_path / "net.onnx", pixels)["probabilities"], ours, "pixels", 1e-4)
    taps = ["--layer", "out_relu", "--layer", "Conv1_relu"]
    code, (row,), errors = command_line("export", "MobileNetV2", tmp_path / "taps.onnx", *options, *taps)
    assert (code, errors) == (0, [])
    assert row.split("\t")[2] == "out_relu: float32[batch,1,1,1280]; Conv1_relu: float32[batch,16,16,16]"
    code, _, errors = command_line("export", "MobileNetV2", tmp_path / "n.onnx", *options, "--platform", "cpu")
    assert code == 2 and len(errors) == 1 and "ONNX is for all" in errors[0]
