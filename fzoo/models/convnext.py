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

    depths: tuple[int, ...] = (3, 3, 9, 3)
    projection_dims: tuple[int, ...] = (96, 192, 384, 768)
    prefix: str = "convnext_tiny"
    drop_path_rate: float = 0.0
    layer_scale_init_value: float | None = 1e-6
    include_preprocessing: bool = True

    weightless = ("prefix", "drop_path_rate", "include_preprocessing")

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n h//32 w//32 f"]:
        """Four stages, the size halved before each but the first, which begins with a fourth of the input's."""
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
        """Filter depthwise, expand, contract, added to the input."""
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
        """The classifier."""
        x = k.global_avg_pool(x, name=f"{self.prefix}_head_gap")
        x = k.layer_norm(x, epsilon=1e-6, name=f"{self.prefix}_head_layernorm")
        return k.dense(x, self.classes, activation=self.probabilities, name=f"{self.prefix}_head_dense")

    def pooled(self, k: Layers, x: Float[Array, "n ho wo f"], pooling: str | None) -> Float[Array, "n ..."]:
        """Normalised after the pooling."""
        return k.layer_norm(super().pooled(k, x, pooling), epsilon=1e-6)


def stem(k: Layers, x: Float[Array, "n h w c"], width: int, prefix: str) -> Float[Array, "n h//4 w//4 width"]:
    """Patches of 4 x 4 pixels."""
    x = k.conv2d(x, width, 4, 4, name=f"{prefix}_stem_conv")
    return k.layer_norm(x, epsilon=1e-6, name=f"{prefix}_stem_layernorm")


def halved(
    k: Layers, x: Float[Array, "n h w c"], width: int, prefix: str, number: int
) -> Float[Array, "n h//2 w//2 width"]:
    """Patches of 2 x 2."""
    x = k.layer_norm(x, epsilon=1e-6, name=f"{prefix}_downsampling_layernorm_{number}")
    return k.conv2d(x, width, 2, 2, name=f"{prefix}_downsampling_conv_{number}")
