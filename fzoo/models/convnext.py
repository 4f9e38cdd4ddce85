"""ConvNeXt: a ResNet with the choices of a vision transformer.

Liu et al., "A ConvNet for the 2020s", https://arxiv.org/abs/2201.03545, as in keras/applications/convnext.py, whose
names of layers begin with the model's. The preprocessing is part of the network: it takes pixels from 0 to 255.
Torchvision's and timm's networks are the same, but for the preprocessing, with which their weights were trained, too.
"""

from __future__ import annotations

import operator
import re
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import FLAG, NAME, POSITIVE, RATE, counts, option, or_none
from fzoo.models.spec import ModelSpec, Tag, torchvision_tag
from fzoo.weights import published
from fzoo.weights.published import torchvision_file


class ConvNeXt(Classifier):
    """ConvNeXt.

    Attributes:
        depths: number of blocks in each of the four stages.
        projection_dims: their widths.
        prefix: what the names of the layers begin with.
        drop_path_rate: stochastic depth: how often the last block is dropped in training, those before it less.
        layer_scale_init_value: what the factors of the blocks' channels start with; None for no such factors.
        include_preprocessing: whether pixels from 0 to 255 are taken (of RGB; other channels are not touched);
            otherwise preprocessed values.
    """

    depths: tuple[int, ...] = option((3, 3, 9, 3), counts(4))
    projection_dims: tuple[int, ...] = option((96, 192, 384, 768), counts(4))
    prefix: str = option("convnext_tiny", NAME)
    drop_path_rate: float = option(0.0, RATE)
    layer_scale_init_value: float | None = option(1e-6, or_none(POSITIVE))
    include_preprocessing: bool = option(True, FLAG)

    block_ends = r".*_block_\d+_add"
    weightless = ("prefix", "drop_path_rate", "include_preprocessing")

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return the names that the libraries have; torchvision numbers what halves the size as a stage, too."""
        prefix = re.escape(self.prefix)
        stem, halve = f"{prefix}_stem/{prefix}_stem_", rf"{prefix}_downsampling_block_(\d)/{prefix}_downsampling_"
        head, block = f"{prefix}_head_layernorm|layer_normalization", rf"{prefix}_stage_(\d)_block_(\d+)_"
        timm = {
            f"{stem}conv": "stem.0",
            f"{stem}layernorm": "stem.1",
            rf"{halve}layernorm_\d": "stages.{1+1}.downsample.0",
            rf"{halve}conv_\d": "stages.{1+1}.downsample.1",
            f"{block}depthwise_conv": "stages.{1}.blocks.{2}.conv_dw",
            f"{block}layernorm": "stages.{1}.blocks.{2}.norm",
            rf"{block}pointwise_conv_([12])": "stages.{1}.blocks.{2}.mlp.fc{3}",
            f"{block}layer_scale": "stages.{1}.blocks.{2}.gamma",
            head: "head.norm",
            f"{prefix}_head_dense|predictions": "head.fc",
        }
        torchvision = {
            f"{stem}conv": "features.0.0",
            f"{stem}layernorm": "features.0.1",
            **{rf"{halve}layernorm_{i}": f"features.{2 * i + 2}.0" for i in range(3)},
            **{rf"{halve}conv_{i}": f"features.{2 * i + 2}.1" for i in range(3)},
            f"{prefix}_head_dense|predictions": "classifier.2",
            head: "classifier.0",
        }
        inside = {"depthwise_conv": "block.0", "layernorm": "block.2", "pointwise_conv_1": "block.3"}
        inside |= {"pointwise_conv_2": "block.5", "layer_scale": "layer_scale as map"}
        for stage in range(4):
            block = rf"{prefix}_stage_{stage}_block_(\d+)_"
            torchvision |= {f"{block}{ours}": f"features.{2 * stage + 1}.{{1}}.{name}" for ours, name in inside.items()}
        return {"timm": timm, "torchvision": torchvision}

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply four stages, the size halved before each but the first, which begins with a fourth of the input's."""
        if self.include_preprocessing and x.shape[-1] == 3:
            mean = [255 * m for m in (0.485, 0.456, 0.406)]
            variance = [(255 * s) ** 2 for s in (0.229, 0.224, 0.225)]
            x = k.normalization(x, mean, variance, name=f"{self.prefix}_prestem_normalization")
        rates = iter(np.linspace(0.0, self.drop_path_rate, sum(self.depths)).tolist())
        for stage, (depth, width) in enumerate(zip(self.depths, self.projection_dims, strict=True)):
            if stage == 0:
                x = k.sequential(x, partial(stem, width=width, prefix=self.prefix), name=f"{self.prefix}_stem")
            else:
                halve = partial(halved, width=width, prefix=self.prefix, number=stage - 1)
                x = k.sequential(x, halve, name=f"{self.prefix}_downsampling_block_{stage - 1}")
            for block in range(depth):
                x = self.block(k, x, next(rates), f"{self.prefix}_stage_{stage}_block_{block}")
        return x

    def block(self, k: Layers, x: Float[Array, "n h w c"], drop_rate: float, name: str) -> Float[Array, "n h w c"]:
        """Filter depthwise, expand, contract, and add the input."""
        width = x.shape[-1]
        y = k.conv2d(x, width, 7, padding="same", groups=width, name=f"{name}_depthwise_conv")
        y = k.layer_norm(y, epsilon=1e-6, name=f"{name}_layernorm")
        y = k.activation(k.dense(y, 4 * width, name=f"{name}_pointwise_conv_1"), "gelu", name=f"{name}_gelu")
        y = k.dense(y, width, name=f"{name}_pointwise_conv_2")
        if self.layer_scale_init_value is not None:
            y = k.layer_scale(y, self.layer_scale_init_value, name=f"{name}_layer_scale")
        if drop_rate:
            y = k.stochastic_depth(y, drop_rate, name=f"{name}_stochastic_depth")
        else:
            y = k.activation(y, "linear", name=f"{name}_identity")
        return k.operation(operator.add, x, y, name=f"{name}_add")

    def top(self, k: Layers, x: Float[Array, "n ho wo f"]) -> Float[Array, "n classes"]:
        """Classify."""
        x = k.global_avg_pool(x, name=f"{self.prefix}_head_gap")
        x = k.layer_norm(x, epsilon=1e-6, name=f"{self.prefix}_head_layernorm")
        return k.dense(x, self.classes, activation=self.probabilities, name=f"{self.prefix}_head_dense")

    def pooled(self, k: Layers, x: Float[Array, "n ho wo f"], pooling: str | None) -> Float[Array, "n ..."]:
        """Normalise after the pooling."""
        return k.layer_norm(super().pooled(k, x, pooling), epsilon=1e-6)


def stem(k: Layers, x: Float[Array, "n h w c"], width: int, prefix: str) -> Float[Array, "n ho wo width"]:
    """Cut into patches of 4 x 4 pixels."""
    x = k.conv2d(x, width, 4, 4, name=f"{prefix}_stem_conv")
    return k.layer_norm(x, epsilon=1e-6, name=f"{prefix}_stem_layernorm")


def halved(
    k: Layers, x: Float[Array, "n h w c"], width: int, prefix: str, number: int
) -> Float[Array, "n ho wo width"]:
    """Put patches of 2 x 2 together."""
    x = k.layer_norm(x, epsilon=1e-6, name=f"{prefix}_downsampling_layernorm_{number}")
    return k.conv2d(x, width, 2, 2, name=f"{prefix}_downsampling_conv_{number}")


variant = partial(
    ModelSpec,
    family=ConvNeXt,
    input_size=224,
    preprocessing="none",
    licence="MIT (Meta)",
    paper="https://arxiv.org/abs/2201.03545",
)

ConvNeXtTiny = variant(
    name="ConvNeXtTiny",
    parameters=28_589_128,
    depth=96,
    size_mb=109,
    top1=0.813,
    top5=None,
    options={"depths": (3, 3, 9, 3), "projection_dims": (96, 192, 384, 768), "prefix": "convnext_tiny"},
    weight_files=published.CONVNEXT["ConvNeXtTiny"],
)

ConvNeXtSmall = variant(
    name="ConvNeXtSmall",
    parameters=50_223_688,
    depth=186,
    size_mb=192,
    top1=0.824,
    top5=None,
    options={"depths": (3, 3, 27, 3), "projection_dims": (96, 192, 384, 768), "prefix": "convnext_small"},
    weight_files=published.CONVNEXT["ConvNeXtSmall"],
)

ConvNeXtBase = variant(
    name="ConvNeXtBase",
    parameters=88_591_464,
    depth=186,
    size_mb=339,
    top1=0.854,
    top5=None,
    options={"depths": (3, 3, 27, 3), "projection_dims": (128, 256, 512, 1024), "prefix": "convnext_base"},
    weight_files=published.CONVNEXT["ConvNeXtBase"],
)

ConvNeXtLarge = variant(
    name="ConvNeXtLarge",
    parameters=197_767_336,
    depth=186,
    size_mb=755,
    top1=0.864,
    top5=None,
    options={"depths": (3, 3, 27, 3), "projection_dims": (192, 384, 768, 1536), "prefix": "convnext_large"},
    weight_files=published.CONVNEXT["ConvNeXtLarge"],
)

ConvNeXtXLarge = variant(
    name="ConvNeXtXLarge",
    parameters=350_196_968,
    depth=186,
    size_mb=1310,
    top1=0.867,
    top5=None,
    options={"depths": (3, 3, 27, 3), "projection_dims": (256, 512, 1024, 2048), "prefix": "convnext_xlarge"},
    weight_files=published.CONVNEXT["ConvNeXtXLarge"],
)

#: The preprocessing with which the weights were trained is the network's own.
tag = partial(Tag, preprocessing="none")


#: Of weights that began as CLIP's, whose statistics of pixels the network's own preprocessing has not.
clip = partial(Tag, preprocessing="clip", options=MappingProxyType({"include_preprocessing": False}))


def torchvision(file: str, **facts: Any) -> Tag:
    """Make the tag of torchvision's own file, by its name after "convnext_"."""
    return torchvision_tag("tv_in1k", preprocessing="none", file=torchvision_file(f"convnext_{file}"), **facts)


TAGS = (
    *ConvNeXtTiny.with_tags(
        "convnext_tiny",
        {},
        28_589_128,
        tag("in12k_ft_in1k", top1=0.84192, top5=0.97132, crop=0.95),
        tag("in12k_ft_in1k_384", top1=0.85154, top5=0.97634, size=384, crop=None),
        tag("fb_in22k_ft_in1k", top1=0.829, top5=0.96616),
        tag("fb_in22k_ft_in1k_384", top1=0.84098, top5=0.97138, size=384, crop=None),
        tag("fb_in1k", top1=0.82066, top5=0.95854),
        torchvision("tiny-983f1562", crop=0.949, top1=0.8252, top5=0.96146),
    ),
    *ConvNeXtSmall.with_tags(
        "convnext_small",
        {},
        50_223_688,
        tag("in12k_ft_in1k", top1=0.85164, top5=0.97502, crop=0.95),
        tag("in12k_ft_in1k_384", top1=0.86186, top5=0.9792, size=384, crop=None),
        tag("fb_in22k_ft_in1k", top1=0.84582, top5=0.97414),
        tag("fb_in22k_ft_in1k_384", top1=0.85752, top5=0.97878, size=384, crop=None),
        tag("fb_in1k", top1=0.83144, top5=0.96432),
        torchvision("small-0c510722", crop=0.974, top1=0.83616, top5=0.9665),
    ),
    *ConvNeXtBase.with_tags(
        "convnext_base",
        {},
        88_591_464,
        clip("clip_laion2b_augreg_ft_in12k_in1k", top1=0.86378, top5=0.97976, size=256, crop=1.0),
        clip("clip_laion2b_augreg_ft_in12k_in1k_384", top1=0.87144, top5=0.98228, size=384, crop=None),
        tag("fb_in22k_ft_in1k", top1=0.85814, top5=0.97856),
        tag("fb_in22k_ft_in1k_384", top1=0.86826, top5=0.98244, size=384, crop=None),
        tag("fb_in1k", top1=0.83838, top5=0.96746),
        torchvision("base-6075fbad", crop=0.966, top1=0.84062, top5=0.9687),
    ),
    *ConvNeXtLarge.with_tags(
        "convnext_large",
        {},
        197_767_336,
        tag("fb_in22k_ft_in1k", top1=0.86612, top5=0.98036),
        tag("fb_in22k_ft_in1k_384", top1=0.87456, top5=0.9838, size=384, crop=None),
        tag("fb_in1k", top1=0.84304, top5=0.96892),
        torchvision("large-ea097f82", crop=0.966, top1=0.84414, top5=0.96976),
    ),
    *ConvNeXtXLarge.with_tags(
        "convnext_xlarge",
        {},
        350_196_968,
        tag("fb_in22k_ft_in1k", top1=0.8697, top5=0.98204),
        tag("fb_in22k_ft_in1k_384", top1=0.87764, top5=0.98552, size=384, crop=None),
    ),
)
