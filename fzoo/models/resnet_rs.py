"""ResNet-RS: ResNet with a stem of 3x3 convolutions and squeeze-and-excitation, as deep as the images are large.

Bello et al., "Revisiting ResNets: Improved Training and Scaling Strategies", https://arxiv.org/abs/2103.07579, as in
keras/applications/resnet_rs.py of Keras 2 (tf-keras today; Keras 3 has it no more). The preprocessing is part of the
network: it takes pixels from 0 to 255.

Keras published weights for one to three sizes of images of each model. Without a tag a model has those for the largest,
and takes 224 x 224 by default, as Keras has it whatever they were trained at; no accuracy is known for that. With a tag
("ResNetRS152.i192", Keras's weights="imagenet-i192") it has those that are named, and their size.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.initializers import VarianceScaling
from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, FLAG, RATE, counts, option
from fzoo.models.spec import ModelSpec, Tag
from fzoo.weights import published

CONV_INIT = VarianceScaling(2.0, "fan_out", "truncated_normal")


class ResNetRS(Classifier):
    """ResNet-RS.

    Attributes:
        blocks: number of blocks in each of the four stages.
        dropout_rate: before the classifier.
        drop_connect_rate: stochastic depth: how often blocks of the last stage are dropped in training; those of the
            first 2/5 as often, of the second 3/5, of the third 4/5.
        default_size: height and width when `input_shape` does not say.
        include_preprocessing: whether pixels from 0 to 255 are taken (of RGB; other channels are only divided by 255);
            otherwise preprocessed values.
    """

    blocks: tuple[int, ...] = option((3, 4, 6, 3), counts(4))
    dropout_rate: float = option(0.25, RATE)
    drop_connect_rate: float = option(0.0, RATE)
    default_size: int = option(224, COUNT)
    include_preprocessing: bool = option(True, FLAG)

    top_pool = "avg_pool"
    named_pools = True
    weightless = ("dropout_rate", "drop_connect_rate", "default_size", "include_preprocessing")

    @staticmethod
    def current_name(old: str) -> str:
        """Translate the names of the stem in a file, which count the networks of a session, to those of the first."""
        return re.sub(r"\Astem_\d+_stem_", "stem_1_stem_", old)

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return timm's names."""
        block = r"BlockGroup(\d)__block_(\d+)_"
        within = "layer{1-1}.{2}."
        return {
            "timm": {
                "stem_1_stem_conv_1": "conv1.0",
                "stem_1_stem_batch_norm_1": "conv1.1",
                "stem_1_stem_conv_2": "conv1.3",
                "stem_1_stem_batch_norm_2": "conv1.4",
                "stem_1_stem_conv_3": "conv1.6",
                "stem_1_stem_batch_norm_3": "bn1",
                "stem_1_stem_conv_4": "maxpool.0",
                "stem_1_stem_batch_norm_4": "maxpool.1",
                rf"{block}_projection_conv": f"{within}downsample.1",
                rf"{block}_projection_batch_norm": f"{within}downsample.2",
                rf"{block}_conv_(\d)": f"{within}conv{{3}}",
                rf"{block}_?batch_norm_(\d)": f"{within}bn{{3}}",
                rf"{block}_se_se_reduce": f"{within}se.fc1",
                rf"{block}_se_se_expand": f"{within}se.fc2",
                "predictions": "fc",
            }
        }

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem, which leaves a fourth of the size, and four stages."""
        if self.include_preprocessing:
            x = k.rescaling(x, 1 / 255)
            if x.shape[-1] == 3:
                x = k.normalization(x, (0.485, 0.456, 0.406), (0.229**2, 0.224**2, 0.225**2))
        for number, (filters, stride) in enumerate(((32, 2), (32, 1), (64, 1), (64, 2)), 1):
            x = conv(k, x, filters, 3, stride, f"stem_1_stem_conv_{number}")
            x = k.activation(
                normalised(k, x, f"stem_1_stem_batch_norm_{number}"), "relu", name=f"stem_1_stem_act_{number}"
            )
        for stage, blocks in enumerate(self.blocks, 2):
            for i in range(blocks):
                stride = 2 if i == 0 and stage > 2 else 1
                rate = self.drop_connect_rate * stage / 5
                x = bottleneck(k, x, 16 << stage, stride, i == 0, rate, f"BlockGroup{stage}__block_{i}_")
        return x

    def top(self, k: Layers, x: Float[Array, "n ho wo f"]) -> Float[Array, "n classes"]:
        """Classify."""
        x = k.global_avg_pool(x, name=self.top_pool)
        if self.dropout_rate:
            x = k.dropout(x, self.dropout_rate, name="top_dropout")
        return k.dense(x, self.classes, activation=self.probabilities, name="predictions")


def bottleneck(
    k: Layers, x: Float[Array, "n h w c"], filters: int, stride: int, first: bool, drop_rate: float, name: str
) -> Float[Array, "n ho wo {4*filters}"]:
    """Apply 1x1, 3x3, 1x1, squeeze and excite, and add the input, which a stage's first block projects to its width."""
    shortcut = x
    if first:
        if stride == 2:
            shortcut = k.avg_pool(x, 2, 2, "same", name=f"{name}_projection_pooling")
        shortcut = conv(k, shortcut, 4 * filters, 1, 1, f"{name}_projection_conv")
        shortcut = normalised(k, shortcut, f"{name}_projection_batch_norm")
    x = normalised(k, conv(k, x, filters, 1, 1, f"{name}_conv_1"), f"{name}batch_norm_1")
    x = k.activation(x, "relu", name=f"{name}_act_1")
    x = normalised(k, conv(k, x, filters, 3, stride, f"{name}_conv_2"), f"{name}_batch_norm_2")
    x = k.activation(x, "relu", name=f"{name}_act_2")
    x = normalised(k, conv(k, x, 4 * filters, 1, 1, f"{name}_conv_3"), f"{name}_batch_norm_3")
    x = squeeze_and_excite(k, x, filters, f"{name}_se_se")
    if drop_rate:
        x = k.dropout(x, drop_rate, images=True, name=f"{name}_drop")
    return k.activation(k.add([x, shortcut]), "relu", name=f"{name}_output_act")


def conv(
    k: Layers, x: Float[Array, "n h w c"], filters: int, kernel: int, stride: int, name: str
) -> Float[Array, "n ho wo {filters}"]:
    """Apply a convolution; with a stride, the padding is on both sides."""
    padding = "same"
    if stride > 1:
        x, padding = k.zero_pad(x, kernel // 2), "valid"
    return k.conv2d(x, filters, kernel, stride, padding, use_bias=False, kernel_init=CONV_INIT, name=name)


def normalised(k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n h w c"]:
    """Apply a BN as the family has them: with Keras's momentum of zero its statistics are those of the last batch."""
    return k.batch_norm(x, momentum=0.0, epsilon=1e-5, name=name)


def squeeze_and_excite(k: Layers, x: Float[Array, "n h w c"], squeezed: int, name: str) -> Float[Array, "n h w c"]:
    """Weigh the channels by what they hold on the average."""
    conv = partial(k.conv2d, kernel=1, padding="same", kernel_init=CONV_INIT)
    weights = k.reshape(k.global_avg_pool(x, name=f"{name}_squeeze"), (1, 1, x.shape[-1]), name=f"{name}_reshape")
    weights = conv(weights, squeezed, activation="relu", name=f"{name}_reduce")
    weights = conv(weights, x.shape[-1], activation="sigmoid", name=f"{name}_expand")
    return k.multiply([x, weights], name=f"{name}_excite")


def variant(
    name: str,
    blocks: tuple[int, ...],
    parameters: int,
    depth: int,
    largest: int,
    drop_connect_rate: float = 0.1,
    dropout_rate: float = 0.25,
) -> ModelSpec:
    """Make the record of a model, whose weights are those for images of the largest size."""
    return ModelSpec(
        name=name,
        family=ResNetRS,
        options={"blocks": blocks, "drop_connect_rate": drop_connect_rate, "dropout_rate": dropout_rate},
        input_size=224,
        preprocessing="none",
        parameters=parameters,
        depth=depth,
        size_mb=round(4 * parameters / 1e6),
        top1=None,
        top5=None,
        licence="Apache 2.0",
        paper="https://arxiv.org/abs/2103.07579",
        weight_files=published.RESNET_RS[f"{name}.i{largest}"],
    )


def trained_at(model: ModelSpec, size: int, top1: float, top5: float) -> ModelSpec:
    """Make the record of Keras's weights for images of a size.

    Accuracies are of Keras's files, in
    https://github.com/sebastian-sz/resnet-rs-keras/blob/main/imagenet_evaluation/README.md.
    """
    return dataclasses.replace(
        model,
        name=f"{model.name}.i{size}",
        options={**model.options, "tag": f"i{size}", "default_size": size},
        input_size=size,
        top1=top1,
        top5=top5,
        weight_files=published.RESNET_RS[f"{model.name}.i{size}"],
    )


ResNetRS50 = variant("ResNetRS50", (3, 4, 6, 3), 35_745_288, 145, 160, 0.0)
ResNetRS101 = variant("ResNetRS101", (3, 4, 23, 3), 63_724_296, 281, 192, 0.0)
ResNetRS152 = variant("ResNetRS152", (3, 8, 36, 3), 86_773_256, 417, 256, 0.0)
ResNetRS200 = variant("ResNetRS200", (3, 24, 36, 3), 93_386_248, 545, 256)
ResNetRS270 = variant("ResNetRS270", (4, 29, 53, 4), 130_104_520, 737, 256)
ResNetRS350 = variant("ResNetRS350", (4, 36, 72, 4), 164_268_360, 945, 320, dropout_rate=0.4)
ResNetRS420 = variant("ResNetRS420", (4, 44, 87, 4), 192_262_216, 1129, 320, dropout_rate=0.4)


def tagged(model: ModelSpec, top1: float, top5: float, size: int, crop: float) -> tuple[ModelSpec, ...]:
    """Make the record of the weights in timm, which are TensorFlow's as Keras's are, measured at another size.

    The network does what PyTorch's preprocessing would: it divides by 255, and takes ImageNet's mean and deviation.
    """
    tag = Tag("tf_in1k", top1, top5, size, crop, preprocessing="none", options={"default_size": size})
    return model.with_tags(model.name.lower(), {}, model.parameters, tag)


TAGS = (
    trained_at(ResNetRS50, 160, 0.789, 0.943),
    trained_at(ResNetRS101, 160, 0.803, 0.95),
    trained_at(ResNetRS101, 192, 0.813, 0.956),
    trained_at(ResNetRS152, 192, 0.821, 0.959),
    trained_at(ResNetRS152, 224, 0.829, 0.962),
    trained_at(ResNetRS152, 256, 0.83, 0.963),
    trained_at(ResNetRS200, 256, 0.834, 0.965),
    trained_at(ResNetRS270, 256, 0.838, 0.967),
    trained_at(ResNetRS350, 256, 0.84, 0.968),
    trained_at(ResNetRS350, 320, 0.843, 0.968),
    trained_at(ResNetRS420, 320, 0.844, 0.968),
    *tagged(ResNetRS50, 0.79934, 0.94972, 224, 0.91),
    *tagged(ResNetRS101, 0.82288, 0.96, 288, 0.94),
    *tagged(ResNetRS152, 0.8371, 0.96614, 320, 1.0),
    *tagged(ResNetRS200, 0.84448, 0.97074, 320, 1.0),
    *tagged(ResNetRS270, 0.84438, 0.96972, 352, 1.0),
    *tagged(ResNetRS350, 0.8471, 0.96992, 384, 1.0),
    *tagged(ResNetRS420, 0.8501, 0.9711, 416, 1.0),
)
