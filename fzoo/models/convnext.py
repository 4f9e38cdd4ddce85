"""ConvNeXt: a ResNet with the choices of a vision transformer.

Liu et al., "A ConvNet for the 2020s", https://arxiv.org/abs/2201.03545, as in keras/applications/convnext.py, whose
names of layers begin with the model's. The preprocessing is part of the network: it takes pixels from 0 to 255.
"""

from __future__ import annotations

import operator
from functools import partial

import numpy as np
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import FLAG, NAME, POSITIVE, RATE, counts, option, or_none
from fzoo.models.spec import ModelSpec
from fzoo.weights import published


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

    weightless = ("prefix", "drop_path_rate", "include_preprocessing")

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n h//32 w//32 f"]:
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
        return k.operation(operator.add, x, y)

    def top(self, k: Layers, x: Float[Array, "n ho wo f"]) -> Float[Array, "n classes"]:
        """Classify."""
        x = k.global_avg_pool(x, name=f"{self.prefix}_head_gap")
        x = k.layer_norm(x, epsilon=1e-6, name=f"{self.prefix}_head_layernorm")
        return k.dense(x, self.classes, activation=self.probabilities, name=f"{self.prefix}_head_dense")

    def pooled(self, k: Layers, x: Float[Array, "n ho wo f"], pooling: str | None) -> Float[Array, "n ..."]:
        """Normalise after the pooling."""
        return k.layer_norm(super().pooled(k, x, pooling), epsilon=1e-6)


def stem(k: Layers, x: Float[Array, "n h w c"], width: int, prefix: str) -> Float[Array, "n h//4 w//4 width"]:
    """Cut into patches of 4 x 4 pixels."""
    x = k.conv2d(x, width, 4, 4, name=f"{prefix}_stem_conv")
    return k.layer_norm(x, epsilon=1e-6, name=f"{prefix}_stem_layernorm")


def halved(
    k: Layers, x: Float[Array, "n h w c"], width: int, prefix: str, number: int
) -> Float[Array, "n h//2 w//2 width"]:
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
