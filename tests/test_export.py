"""A network as one file: for all platforms, of any batch, run by a process that has no fzoo."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hurry import COMPILER_OPTIONS
from networks import SMALL, assert_alive, images_for, network, random_images, random_variables, small_options
from reference import FAMILIES, assert_close, by_model
from stored import small_network
from tiers import slow_but

import fzoo
from fzoo import ops
from fzoo.inference import export
from fzoo.layers.graph import trace

ALL = ("cpu", "cuda", "tpu")

#: How a file is called on a CPU, as the docstring of `fzoo.export` has it.
SAFE = {"xla_cpu_experimental_ynn_fusion_type": ""}


@pytest.fixture(scope="module")
def small():
    return network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))


@pytest.fixture(scope="module")
def images():
    return random_images((3, 32, 32, 3))


def read(path, **options):
    """What a file does, for a user of it."""
    call = jax.export.deserialize(bytearray(Path(path).read_bytes())).call
    return jax.jit(call, compiler_options={**SAFE, **options})


def lowered(module, variables, images, **options):
    """A network for all platforms together, of any number of images; no arithmetic is done."""
    (batch,) = jax.export.symbolic_shape("batch", **options)
    images = jax.ShapeDtypeStruct((batch, *images), jnp.float32)
    exported = jax.export.export(jax.jit(module.apply), platforms=ALL)(variables, images)
    assert exported.platforms == ALL
    (out,) = exported.out_avals
    assert str(out.shape[0]) == "batch"
    return out.shape[1:]


@pytest.mark.parametrize("name", by_model(FAMILIES, quick=("MobileNetV2", "VGG16")))
def test_every_family_for_all_platforms_and_any_batch(name):
    """At its default size."""
    module = fzoo.create(name)
    assert lowered(module, trace(module).variables, module.example_shape) == (1000,)


@pytest.mark.parametrize("name", by_model(SMALL, quick=("MobileNetV3Small", "ResNet50V2")))
def test_every_family_optimized(name):
    module = fzoo.create(name, **small_options(name))
    module, variables = fzoo.optimize_for_inference(module, random_variables(module, statistics={}))
    assert lowered(module, variables, module.example_shape) == trace(module).nodes[-1].shape


def test_an_open_batch_is_lowered_as_one_image():
    """In any scope of symbols; what is chosen for a number of images is as it was."""
    for constraints in ((), ("batch <= 64",)):
        (batch,) = jax.export.symbolic_shape("batch", constraints=constraints)
        for images in ((28, 28, 64), (7, 7, 64), (112, 112, 128)):
            shapes = (3, 3, images[-1], images[-1]), (1, 1), "SAME"
            conv = ops.Convolution.of((batch, *images), *shapes)
            assert conv == ops.Convolution.of((1, *images), *shapes)
            assert ops.Convolution.of((8, *images), *shapes) == dataclasses.replace(conv, images=8)
    module = fzoo.create("VGG16", input_shape=(32, 32, 3), include_top=False)
    for constraints in ((), ("batch <= 64",)):
        lowered(module, trace(module).variables, module.example_shape, constraints=constraints)


def test_a_training_step_of_any_batch():
    module = fzoo.create("ResNet50", include_top=False, input_shape=(32, 32, 3), blocks=(1, 1, 1, 1))
    variables = trace(module).variables

    def loss(variables, images):
        out, _ = module.apply(variables, images, train=True, mutable=["batch_stats"])
        return jnp.square(out).mean()

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=ALL)(variables, images)
    assert jax.tree.map(jnp.shape, exported.out_avals) == jax.tree.map(jnp.shape, tuple(jax.tree.leaves(variables)))


@pytest.mark.parametrize("optimized", slow_but([False, True], True))
def test_a_file_gives_what_predict_gives(small, images, optimized, tmp_path):
    """For one image and for three, from one file; also with JAX's own compiler options."""
    module, variables = fzoo.optimize_for_inference(*small) if optimized else small
    exported = fzoo.export(module, variables, tmp_path / "net.stablehlo")
    assert exported.platforms == ALL
    call = read(tmp_path / "net.stablehlo")
    expected = np.asarray(fzoo.predict(*small, images))
    for count in (1, 3):
        assert_close(call(images[:count]), expected[:count], f"{count} images")
    plain = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
    assert_close(jax.jit(plain.call)(images), expected, "JAX's options")


@pytest.mark.parametrize("name", by_model(("ConvNeXtTiny", "EfficientNetB0", "InceptionV3", "VGG16"), quick=()))
def test_every_file_gives_what_predict_gives(name, tmp_path):
    """As it is loaded, and optimised."""
    module, variables = small_network(name)
    images = images_for(module)
    expected = np.asarray(fzoo.predict(module, variables, images))
    assert_alive(expected)
    for form in ("plain", "optimized"):
        if form == "optimized":
            module, variables = fzoo.optimize_for_inference(module, variables)
        path = tmp_path / f"{form}.stablehlo"
        fzoo.export(module, variables, path)
        call = read(path)
        for count in (1, 3):  # one image and three sum in another order: an ulp of one moves InceptionV3 by 1.7e-4
            assert_close(call(images[:count]), expected[:count], f"{name}, {form}, {count} images", 5e-4)


@pytest.mark.parametrize("name", by_model(SMALL, quick=("MobileNetV2",)))
def test_images_of_any_size(name, tmp_path):
    """From one file: of odd sides, which a network pads otherwise than even ones."""
    bare = {"input_shape": None, "include_top": False, "pooling": "avg", "classes": 1000}
    module = fzoo.create(name, **small_options(name) | bare)
    variables = random_variables(module)
    prepared = fzoo.optimize_for_inference(module, variables, platform="cuda")
    exported = fzoo.export(*prepared, tmp_path / "net.stablehlo", image_shape=(None, None, 3), preprocess=name)
    assert [str(side) for side in exported.in_avals[0].shape[1:3]] == (
        ["32*height", "32*width"] if name.startswith("NASNet") else ["height", "width"]
    )
    call = read(tmp_path / "net.stablehlo")
    size = (96, 128) if name.startswith("NASNet") else (103, 81)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    expected = np.asarray(fzoo.predict(module, variables, images, preprocess=name))
    assert_alive(expected)
    assert_close(call(images), expected, f"{name} at {size}")
    with pytest.raises(ValueError, match=r"(refining|polymorphic) shapes"):
        call(np.zeros((2, module.min_size // 2, 96, 3), np.uint8))


def test_tiles_of_a_known_size(tmp_path):
    prepared = fzoo.optimize_for_inference(*network("VGG16", include_top=False, input_shape=(None, None, 3)))
    with pytest.raises(ValueError, match=r"prepared for tiles of a known size: .*platform=\"cuda\"\) prepares for any"):
        fzoo.export(*prepared, tmp_path / "net.stablehlo", image_shape=(None, None, 3))
    assert not list(tmp_path.iterdir())


def test_kernels_prepared_for_winograd_in_a_file(images, tmp_path):
    """Which are in it where it is made for CPUs, and not where it is made for others."""
    options = {"include_top": False, "pooling": "avg", "input_shape": (32, 32, 3), "convs": (1, 1, 1, 1, 1)}
    module = fzoo.create("VGG16", **options)
    variables = random_variables(module, statistics={})
    expected = np.asarray(fzoo.predict(module, variables, images))
    assert_alive(expected)
    fast, prepared = fzoo.optimize_for_inference(module, variables, platform="cpu")
    assert fast.prepared and fast.prepared.tiles
    other = fzoo.optimize_for_inference(module, variables, platform="cuda")[0].prepared
    assert other and not other.tiles
    fzoo.export(fast, prepared, tmp_path / "net.stablehlo", platforms="cpu")
    call = read(tmp_path / "net.stablehlo", **COMPILER_OPTIONS)
    assert_close(call(images), expected, "Winograd")


def test_a_fixed_batch_of_pixels(small, tmp_path):
    pixels = random_images((2, 32, 32, 3), pixels=True).astype(np.uint8)
    exported = fzoo.export(
        *small, tmp_path / "net.stablehlo", platforms=["cpu", "cpu"], batch_size=2, preprocess="MobileNet"
    )
    assert exported.platforms == ("cpu",)
    assert [(a.shape, a.dtype) for a in exported.in_avals] == [((2, 32, 32, 3), np.uint8)]
    call = read(tmp_path / "net.stablehlo", **COMPILER_OPTIONS)
    assert_close(call(pixels), np.asarray(fzoo.predict(*small, pixels, preprocess="MobileNet")), "pixels")
    with pytest.raises(ValueError, match="hape"):
        call(pixels[:1])


def test_a_module_of_the_user(small, images, tmp_path):
    class Logits(nn.Module):
        backbone: nn.Module

        @nn.compact
        def __call__(self, x):
            return {"twice": 2 * self.backbone(x), "last": self.backbone.endpoints(x, ("conv_pw_13_relu",))}

    module, variables = small
    nested = {kind: {"backbone": tree} for kind, tree in variables.items()}
    path = tmp_path / "net.stablehlo"
    fzoo.export(Logits(module), nested, path, image_shape=(32, 32, 3), platforms="cpu")
    found = read(path, **COMPILER_OPTIONS)(images)
    assert_close(found["twice"], 2 * np.asarray(fzoo.predict(module, variables, images)), "twice")
    assert found["last"]["conv_pw_13_relu"].shape == (3, 1, 1, 256)
    with pytest.raises(ValueError, match=r"image_shape=None given, \(height, width, channels\) expected"):
        fzoo.export(Logits(module), nested, path)


FRESH = """
import sys
import jax, jax.export, numpy as np
exported = jax.export.deserialize(bytearray(open("net.stablehlo", "rb").read()))
call = jax.jit(exported.call, compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""})
pixels = np.load("pixels.npy")
np.savez("out.npz", one=call(pixels[:1]), three=call(pixels))
assert not {"fzoo", "flax", "keras"} & set(sys.modules)
"""


@pytest.fixture
def from_the_command(small, tmp_path, monkeypatch, command_line):
    """(pixels, what comes out); in the folder with net.stablehlo, of the network behind its preprocessing."""
    monkeypatch.chdir(tmp_path)
    fzoo.save_keras_weights(*small, "weights.weights.h5")
    arguments = ["MobileNet", "net.stablehlo", "-w", "weights.weights.h5", "-o", "alpha=0.25", "--classes", "5"]
    code, (row,), _ = command_line("export", *arguments, "--size", "32", "--pixels")
    cells = row.split("\t")
    assert code == 0
    assert cells[:4] == ["net.stablehlo", "uint8[batch,32,32,3]", "float32[batch,5]", "cpu, cuda, tpu"]
    pixels = random_images((3, 32, 32, 3), pixels=True).astype(np.uint8)
    return pixels, np.asarray(fzoo.predict(*small, pixels, preprocess="MobileNet"))


def test_the_command(from_the_command):
    pixels, expected = from_the_command
    assert_close(read("net.stablehlo", **COMPILER_OPTIONS)(pixels), expected, "three images")


@pytest.mark.slow
def test_a_process_without_fzoo(from_the_command):
    pixels, expected = from_the_command
    np.save("pixels.npy", pixels)
    subprocess.run([sys.executable, "-W", "error", "-c", FRESH], check=True, timeout=120)
    with np.load("out.npz") as found:
        assert_close(found["one"], expected[:1], "one image")
        assert_close(found["three"], expected, "three images")


def test_the_command_without_a_top(small, tmp_path, monkeypatch, command_line):
    monkeypatch.chdir(tmp_path)
    fzoo.save_keras_weights(*without_top(small), "no_top.weights.h5")
    arguments = ["MobileNet", "top.stablehlo", "-w", "no_top.weights.h5", "-o", "alpha=0.25", "--size", "32"]
    code, (row,), _ = command_line(
        "export", *arguments, "--no-top", "--no-optimize", "--platform", "cuda", "--batch", "4"
    )
    cells = row.split("\t")
    assert code == 0
    assert cells[:4] == ["top.stablehlo", "float32[4,32,32,3]", "float32[4,1,1,256]", "cuda"]
    code, (row,), _ = command_line("export", *arguments[:-2], "--no-top", "--any-size")
    assert code == 0
    assert row.split("\t")[1:3] == ["float32[batch,height,width,3]", "float32[batch,?,?,256]"]


def without_top(small):
    module, variables = small
    module = module.clone(include_top=False, classes=1000)
    wanted = trace(module).variables
    return module, {kind: {name: variables[kind][name] for name in tree} for kind, tree in wanted.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MobileNet", "net.h5"], "net.h5: a name that ends in .stablehlo or .onnx expected"),
        (["MobileNet", "net.stablehlo", "--platform", "gpu"], "unknown platform 'gpu': cpu, cuda, rocm, tpu expected"),
        (["MobileNet", "net.stablehlo", "--batch", "0"], "Invalid value for '--batch'"),
        (["MobilNet", "net.stablehlo"], "did you mean MobileNet"),
        (["MobileNet", "net.stablehlo", "-w", "missing.h5"], "no such weights file: missing.h5"),
        (["missing.keras", "net.stablehlo"], "no such file: missing.keras"),
        (["MobileNet"], "Missing argument"),
        (["MobileNet", "no/net.stablehlo"], "no such directory: no"),
        (["MobileNet", "folder.stablehlo"], "folder.stablehlo is a directory, the name of a file expected"),
    ],
)
def test_bad_arguments_of_the_command(small, arguments, message, tmp_path, monkeypatch, command_line):
    monkeypatch.chdir(tmp_path)
    Path("folder.stablehlo").mkdir()
    if "folder" in arguments[-1] or "no/" in arguments[-1]:
        fzoo.save_keras_weights(*small, "weights.h5")
        arguments = [*arguments, "-w", "weights.h5", "-o", "alpha=0.25", "--classes", "5", "--size", "32"]
    code, output, (error,) = command_line("export", *arguments)
    assert (code, output) == (2, [])
    assert error.startswith("fzoo: error: ") and message in error
    assert not list(tmp_path.glob("*net.stablehlo*"))


@pytest.mark.wrong_types
def test_what_can_not_be_written_is_said_and_leaves_the_file(small, tmp_path, monkeypatch):
    module, variables = small
    path = tmp_path / "net.stablehlo"
    path.write_text("before")
    for options, message in (
        ({"platforms": ()}, "no platforms given"),
        ({"platforms": "metal"}, "unknown platform 'metal'"),
        ({"batch_size": 0}, "batch_size=0 given"),
        ({"batch_size": True}, "batch_size=True given"),
        ({"preprocess": "Mobilnet"}, "did you mean MobileNet"),
        ({"image_shape": (32, 32)}, r"image_shape=\(32, 32\) given"),
        ({"image_shape": (40, 40, 3)}, "32, 32, 3 expected"),
        (
            {"image_shape": (None, 32, 3)},
            r"this network was created for 32 x 32: one of any size has input_shape=\(None",
        ),
        ({"image_shape": (32, 32, None)}, "the height and the width may be None, not the channels"),
    ):
        with pytest.raises(ValueError, match=message):
            fzoo.export(module, variables, path, **options)
    for wrong in (
        {},
        {"params": {}},
        {**variables, "params": {**variables["params"], "conv1": {"kernel": jnp.ones(3)}}},
    ):
        with pytest.raises(ValueError, match="these are not the variables of this MobileNet: ") as caught:
            fzoo.export(module, wrong, path)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fzoo\[export\]'"):
        fzoo.export(module, variables, path)
    monkeypatch.setattr(export, "MOST", 1000)
    with pytest.raises(ValueError, match="GiB given, less than"):
        fzoo.export(module, variables, path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


#: Convolutions that a layer of a kind is made of; a Sequential is one of ConvNeXt's, with a normalisation.
CONVOLUTIONS = {"Conv2D": 1, "DepthwiseConv2D": 1, "SeparableConv2D": 2, "Sequential": 1}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", by_model(SMALL, quick=("MobileNetV2", "ResNet50")))
def test_accelerators_get_plain_convolutions(name, platform):
    """Those of bfloat16, and nothing that only a CPU wants: its libraries' own is what a GPU or TPU is fast at."""
    plain = fzoo.create(name, **small_options(name))
    layers = [node.kind for node in trace(plain).nodes]
    variables = random_variables(plain, statistics={})
    module, variables = fzoo.optimize_for_inference(plain, variables, dtype=jnp.bfloat16, platform=platform)
    assert module.prepared and not module.prepared.tiles
    images = jax.ShapeDtypeStruct((4, *module.example_shape), jnp.bfloat16)
    exported = jax.export.export(jax.jit(module.apply), platforms=[platform])(variables, images)
    text = exported.mlir_module()
    convolutions = re.findall(r"stablehlo\.convolution.*", text)
    called = re.findall(r"call @(_by_platform\w*)", text)  # a function for each shape, which holds one
    functions = len(set(called))
    assert len(convolutions) - functions + len(called) == sum(CONVOLUTIONS.get(kind, 0) for kind in layers)
    assert all(line.count("xbf16>") == 3 for line in convolutions), convolutions
    assert text.count("stablehlo.dot_general") == layers.count("Dense")
    assert "stablehlo.optimization_barrier" not in text  # which the forms for a CPU have
