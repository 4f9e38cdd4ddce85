"""The layers at each stride, beside what timm calls the same, and what is computed there."""

import importlib.util
import re

import numpy as np
import pytest
from networks import SMALL, images_for, network, small_options
from stored_torch import small_torch_network
from tiers import slow, slow_but
from torch_cases import CASES

import fzoo
from fzoo.weights.state_dict import state_dict

#: For each network what timm has of it, and the channels of its maps at strides 4, 8, 16 and 32.
TIMM = {
    "ConvNeXtTiny": ("convnext_tiny", (96, 192, 384, 768)),
    "DenseNet121": ("densenet121", (256, 512, 1024, 1024)),
    "EfficientNetB0": ("efficientnet_b0", (24, 40, 112, 320)),
    "EfficientNetV2B0": ("tf_efficientnetv2_b0", (32, 48, 112, 192)),
    "EfficientNetV2S": ("tf_efficientnetv2_s", (48, 64, 160, 256)),
    "InceptionResNetV2": ("inception_resnet_v2", (192, 320, 1088, 1536)),
    "InceptionV3": ("inception_v3", (192, 288, 768, 2048)),
    "MobileNet": ("mobilenetv1_100", (128, 256, 512, 1024)),
    "MobileNetV2": ("mobilenetv2_100", (24, 32, 96, 320)),
    "MobileNetV3Large": ("mobilenetv3_large_100", (24, 40, 112, 960)),
    "MobileNetV3Small": ("mobilenetv3_small_100", (16, 24, 48, 576)),
    "NASNetLarge": ("nasnetalarge", (168, 1008, 2016, 4032)),
    "RegNetX002": ("regnetx_002", (24, 56, 152, 368)),
    "RegNetY002": ("regnety_002", (24, 56, 152, 368)),
    "ResNeXt50": ("resnext50_32x4d", (256, 512, 1024, 2048)),
    "ResNet18": ("resnet18", (64, 128, 256, 512)),
    "ResNet50": ("resnet50", (256, 512, 1024, 2048)),
    "ResNet50V2": ("resnetv2_50", (256, 512, 1024, 2048)),
    "ResNetRS50": ("resnetrs50", (256, 512, 1024, 2048)),
    "VGG16": ("vgg16", (256, 512, 512, 512)),
    "Xception": ("legacy_xception", (128, 256, 728, 2048)),
}

LAYERS = {
    "ConvNeXtTiny": "convnext_tiny_stage_{0_block_2,1_block_2,2_block_8,3_block_2}_add",
    "DenseNet121": "{conv2_block6_concat,conv3_block12_concat,conv4_block24_concat,relu}",
    "EfficientNetB0": "{block2b_add,block3b_add,block5c_add,block7a_project_bn}",
    "InceptionV3": "{activation_4,mixed2,mixed7,mixed10}",
    "MobileNetV2": "{block_2_add,block_5_add,block_12_add,block_16_project_BN}",
    "NASNetLarge": "{reduction_concat_stem_1,normal_concat_5,normal_concat_12,activation_259}",
    "ResNet50": "{conv2_block3,conv3_block4,conv4_block6,conv5_block3}_out",
    "ResNet50V2": "{conv2_block2_out,conv3_block3_out,conv4_block5_out,post_relu}",
    "VGG16": "{block3_conv3,block4_conv3,block5_conv3,block5_pool}",
    "Xception": "{add,add_1,add_10,block14_sepconv2_act}",
}

#: Networks that take long to trace.
DEEP = ("DenseNet121", "EfficientNetV2S", "NASNetLarge")

has_timm = importlib.util.find_spec("timm") is not None


@pytest.mark.parametrize("name", [slow(name) if name in DEEP else name for name in TIMM])
def test_channels_are_timms(name):
    found = fzoo.stages(fzoo.create(name))
    assert list(found) == [4, 8, 16, 32]
    assert tuple(end.channels for end in found.values()) == TIMM[name][1]


@pytest.mark.slow
@pytest.mark.skipif(not has_timm, reason="timm is not installed")
@pytest.mark.parametrize("name", TIMM)
def test_what_timm_says(name):
    import timm

    info = timm.create_model(TIMM[name][0], features_only=True).feature_info
    channels = dict(zip(info.reduction(), info.channels(), strict=True))
    assert tuple(channels[stride] for stride in (4, 8, 16, 32)) == TIMM[name][1]


@pytest.mark.slow
@pytest.mark.skipif(not has_timm, reason="timm is not installed")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.library == "timm"])
def test_maps_are_timms(name):
    """Of the same random arrays, loaded strictly: what `feature_info` says is at each stride has these values."""
    import torch

    module, variables = small_torch_network(name)
    theirs = CASES[name].build().eval()
    arrays = {key: torch.from_numpy(value) for key, value in state_dict(module, variables, "timm").items()}
    theirs.load_state_dict(arrays, strict=not module.torch_unused)
    maps = {}
    for info in theirs.feature_info:
        inside = theirs.get_submodule(info["module"])
        inside.register_forward_hook(lambda _, __, found, stride=info["reduction"]: maps.update({stride: found}))
    images = images_for(module, 2)
    with torch.no_grad():
        theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    strides = tuple(stride for stride in (4, 8, 16, 32) if stride in maps)  # a small version may end before
    assert len(strides) >= 3
    for stride, found in fzoo.pyramid(module, variables, images, strides=strides).items():
        expected = maps[stride].numpy().transpose(0, 2, 3, 1)
        assert np.ptp(expected, axis=0).max() > 0
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=f"stride {stride}"
        )


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    before, inside, after = re.fullmatch(r"(.*)\{(.*)\}(.*)", LAYERS[name]).groups()
    expected = [f"{before}{part}{after}" for part in inside.split(",")]
    assert [end.layer for end in fzoo.stages(fzoo.create(name)).values()] == expected


@pytest.mark.parametrize("name", slow_but(["ConvNeXtTiny", "NASNetMobile", "MobileNetV3Small"], "MobileNetV3Small"))
def test_a_pyramid(name):
    """Maps of a fourth, an eighth, ... of the image, those of the layers; of the network with its top as without."""
    module, variables = network(name, **small_options(name))
    images, side = images_for(module, 3), SMALL[name][0]
    found = fzoo.pyramid(module, variables, images, strides=(4, 8, 16, 32))
    for stride, maps in found.items():
        assert maps.shape[:3] == (3, -(-side // stride), -(-side // stride)), stride
        assert np.ptp(maps, axis=0).max() > 0.01
    ends = fzoo.stages(module)
    tapped = fzoo.features(module, variables, images, ends[8].layer)[ends[8].layer]
    np.testing.assert_allclose(tapped, found[8], rtol=1e-3, atol=1e-4)
    assert {stride: end.channels for stride, end in ends.items()} == {s: m.shape[-1] for s, m in found.items()}
    assert fzoo.stages(fzoo.create(name, include_top=False, **{**small_options(name), "classes": 1000})) == ends
    streamed = fzoo.pyramid(module, variables, iter([images[:2], images[2:]]), strides=(32, 8))
    for batch, start, end in zip(streamed, (0, 2), (2, 3), strict=True):
        assert list(batch) == [32, 8]
        np.testing.assert_allclose(batch[8], found[8][start:end], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_optimized_network():
    """The same layers, though what is computed for them differs."""
    module, variables = network("MobileNetV2", **small_options("MobileNetV2"))
    images = images_for(module, 2)
    found = fzoo.pyramid(module, variables, images, strides=(32,))[32]
    folded = fzoo.optimize_for_inference(module, variables)
    assert fzoo.stages(folded[0]) == fzoo.stages(module)
    np.testing.assert_allclose(fzoo.pyramid(*folded, images, strides=(32,))[32], found, rtol=1e-3, atol=1e-4)


def test_sizes():
    """Of any layer, at any size, without running it."""
    module = fzoo.create("ResNet50", include_top=False)
    shapes = fzoo.layer_shapes(module, size=(512, 256))
    assert list(shapes) == fzoo.layer_names(module)
    assert shapes["conv4_block6_out"] == (32, 16, 1024)
    assert fzoo.layer_shapes(module, 96)["conv5_block3_out"] == (3, 3, 2048)
    assert fzoo.layer_shapes(module)["conv5_block3_out"] == (7, 7, 2048)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fzoo.stages(fzoo.create("ConvNeXtTiny"), (2, 4)), "stride 2 given, this ConvNeXt .* 4, 8, 16, 32"),
        (lambda: fzoo.layer_shapes(fzoo.create("ResNet50"), 16), "images of 16 x 16 given, ResNet takes 32 x 32"),
        (lambda: fzoo.layer_shapes(fzoo.create("VGG16"), 64), r"H, W, C = 224, 224, 3 expected"),
    ],
)
def test_what_is_not_there(call, message):
    with pytest.raises(ValueError, match=message):
        call()
