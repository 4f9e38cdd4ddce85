"""ResNeXt beside Keras Applications 1.0.8, which alone had it, run on today's Keras."""

import types

import jax
import keras
import numpy as np
import pytest
from hurry import COMPILER_OPTIONS
from keras_applications import resnet_common
from networks import assert_alive, images_for, random_variables
from reference import assert_close, assert_equal, save_weights_only

import fzoo
from fzoo.weights.mapping import slots

OPTIONS = {"blocks": (1, 2, 1, 1), "classes": 7, "input_shape": (64, 64, 3)}

#: What it takes from Keras, as far as Keras 3 has it elsewhere.
BACKEND = types.SimpleNamespace(
    image_data_format=keras.backend.image_data_format,
    is_keras_tensor=lambda x: isinstance(x, keras.KerasTensor),
    int_shape=lambda x: tuple(x.shape),
    backend=keras.backend.backend,
)


@pytest.fixture(scope="module")
def network():
    keras_modules = {"layers": keras.layers, "models": keras.models, "utils": keras.utils}
    resnet_common.backend = BACKEND

    def stages(x):
        for stage, blocks in enumerate(OPTIONS["blocks"], 2):
            stride = {"stride1": 1} if stage == 2 else {}
            x = resnet_common.stack3(x, 32 << stage, blocks, name=f"conv{stage}", **stride)
        return x

    return resnet_common.ResNet(
        stages,
        False,
        False,
        "resnext50",
        weights=None,
        input_shape=OPTIONS["input_shape"],
        classes=7,
        backend=BACKEND,
        **keras_modules,
    )


def test_resnext(network, tmp_path):
    """Names, shapes in its file, outputs; a file of fzoo's in there, and one of its own in fzoo."""
    module = fzoo.create("ResNeXt50", **OPTIONS)
    variables = random_variables(module)
    assert [layer.name for layer in network.layers if layer.weights] == [*list(slots(module))[:-1], "probs"]
    fzoo.save_keras_weights(module, variables, tmp_path / "ours.h5")
    network.load_weights(tmp_path / "ours.h5")
    kernel = network.get_layer("conv3_block1_2_conv").get_weights()[0]
    assert kernel.shape == (3, 3, 256, 8)
    images = images_for(module)
    theirs = network.predict(images, verbose=0)
    assert_alive(theirs)
    ours = jax.jit(module.apply, compiler_options=COMPILER_OPTIONS)(variables, images)
    assert_close(ours, theirs, "ResNeXt50")
    save_weights_only(network, tmp_path / "theirs.h5")
    for file in ("ours.h5", "theirs.h5"):
        assert_equal(fzoo.load("ResNeXt50", weights=tmp_path / file, **OPTIONS)[1], variables)


def test_a_grouped_kernel_is_a_depthwise_one():
    """Group by group, in NumPy."""
    module = fzoo.create("ResNeXt50", **OPTIONS)
    (slot,) = [s for s in slots(module)["conv4_block1_2_conv"] if s.array == "kernel"]
    depthwise = np.random.default_rng(0).normal(size=slot.keras_shape).astype(np.float32)
    kernel = slot.from_keras(depthwise)
    assert kernel.shape == (3, 3, 16, 512) and slot.groups == 32
    for group, i, m in ((0, 0, 0), (3, 5, 7), (31, 15, 14)):
        np.testing.assert_array_equal(kernel[:, :, i, 16 * group + m], depthwise[:, :, 16 * group + i, m])
    np.testing.assert_array_equal(slot.to_keras(kernel), depthwise)
