"""RegNet: a ResNet whose widths and depths follow from a few numbers, which a search has found.

Radosavovic et al., "Designing Network Design Spaces", https://arxiv.org/abs/2003.13678, as in
keras/applications/regnet.py of Keras 2 (tf-keras today; Keras 3 has it no more), whose names of layers begin with the
model's. The preprocessing is part of the network: it takes pixels from 0 to 255.

Of Keras's file this differs in what it computes:

- Keras checks `classifier_activation` and ignores it: its networks give logits, whatever is asked for. Here it is
  honoured, and a softmax by default, as in all families. A whole model that Keras saved says that it ends in none, and
  is loaded so.
- Keras counts the names of the head's layers over all networks of a session ("2head_dense"). Here they are those of the
  first, "1_head_gap" and "1head_dense", and a file's may have any number.
- The first stage of X080 is narrower than a group, for which Keras computes 80 // 120 = 0 groups; its layers take that
  for one. Here it is said.
"""

from __future__ import annotations

import operator
import re
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.initializers import he_normal
from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, FLAG, NAME, counts, one_of, option
from fzoo.models.spec import ModelSpec, Tag, torchvision_tag
from fzoo.weights import published
from fzoo.weights.published import torchvision_file


class RegNet(Classifier):
    """RegNet.

    Attributes:
        depths: number of blocks in each of the four stages.
        widths: their channels.
        group_width: channels of a group of the 3x3 convolutions; a stage that is narrower has one group.
        block_type: "X", or "Y" for blocks that squeeze and excite, too.
        prefix: what the names of the layers begin with.
        include_preprocessing: whether pixels from 0 to 255 are taken; otherwise preprocessed values, which for Keras's
            weights are from 0 to 1.
        symmetric_padding: whether a 3x3 convolution with a stride is padded on both sides, as PyTorch does.
        default_size: height and width when `input_shape` does not say.
    """

    depths: tuple[int, ...] = option((1, 1, 4, 7), counts(4))
    widths: tuple[int, ...] = option((24, 56, 152, 368), counts(4))
    group_width: int = option(8, COUNT)
    block_type: str = option("X", one_of("X", "Y"))
    prefix: str = option("regnetx002", NAME)
    include_preprocessing: bool = option(True, FLAG)
    symmetric_padding: bool = option(False, FLAG)
    default_size: int = option(224, COUNT)

    weightless = ("prefix", "include_preprocessing", "default_size")

    @nn.nowrap
    def check_options(self) -> None:
        """Check what goes together, too."""
        super().check_options()
        for width in self.widths:
            if width % min(width, self.group_width):
                raise ValueError(
                    f"widths={self.widths} given, multiples of group_width={self.group_width} or less than it expected"
                )

    @staticmethod
    def current_name(old: str) -> str:
        """Translate the name of the classifier in a file, which counts the networks of a session."""
        return re.sub(r"\A\d+(_?head_\w+)\Z", r"1\1", old)

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return the names that both libraries have, which pad symmetrically."""
        if not self.symmetric_padding:
            return {}
        stem, block = rf"{re.escape(self.prefix)}_stem_", rf"{re.escape(self.prefix)}_Stage_(\d)_.Block_(\d+)_"
        excite = {"squeeze_and_excite_squeeze": "se.fc1", "squeeze_and_excite_excite": "se.fc2"}
        timm = {"1x1_1": "conv1.", "3x3": "conv2.", "1x1_2": "conv3."}
        timm = {f"conv_{ours}{end}": theirs + name for ours, theirs in timm.items() for end, name in CONV_BN}
        timm |= excite | {"skip_1x1": "downsample.conv", "skip_bn": "downsample.bn"}
        torchvision = {"1x1_1": "f.a.", "3x3": "f.b.", "1x1_2": "f.c."}
        torchvision = {
            f"conv_{o}{end}": t + str(i) for o, t in torchvision.items() for i, (end, _) in enumerate(CONV_BN)
        }
        torchvision |= {ours: f"f.{theirs}" for ours, theirs in excite.items()}
        torchvision |= {"skip_1x1": "proj.0", "skip_bn": "proj.1"}
        within = "trunk_output.block{1+1}.block{1+1}-{2}."
        return {
            "timm": {f"{stem}(conv|bn)": "stem.{1}", "1head_dense": "head.fc"}
            | {block + ours: "s{1+1}.b{2+1}." + theirs for ours, theirs in timm.items()},
            "torchvision": {f"{stem}conv": "stem.0", f"{stem}bn": "stem.1", "1head_dense": "fc"}
            | {block + ours: within + theirs for ours, theirs in torchvision.items()},
        }

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem and four stages; each halves the size."""
        if self.include_preprocessing:
            x = k.rescaling(x, 1 / 255, name=f"{self.prefix}_prestem_rescaling")
        x = normalised(k, self.conv3x3(k, x, 32, 2, 1, f"{self.prefix}_stem_conv"), f"{self.prefix}_stem_bn")
        x = k.relu(x, name=f"{self.prefix}_stem_relu")
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for block in range(depth):
                name = f"{self.prefix}_Stage_{stage}_{self.block_type}Block_{block}"
                x = self.block(k, x, width, 2 if block == 0 else 1, name)
        return x

    def block(
        self, k: Layers, x: Float[Array, "n h w c"], width: int, stride: int, name: str
    ) -> Float[Array, "n ho wo {width}"]:
        """Apply 1x1, 3x3 in groups, 1x1, and add the input, which is projected where there is a stride."""
        conv1x1 = partial(k.conv2d, use_bias=False, kernel_init=he_normal)
        skip, squeezed = x, x.shape[-1] // 4
        if stride != 1:
            skip = normalised(k, conv1x1(x, width, 1, stride, name=f"{name}_skip_1x1"), f"{name}_skip_bn")
        x = normalised(k, conv1x1(x, width, 1, name=f"{name}_conv_1x1_1"), f"{name}_conv_1x1_1_bn")
        x = k.relu(x, name=f"{name}_conv_1x1_1_relu")
        groups = max(1, width // self.group_width)
        x = normalised(k, self.conv3x3(k, x, width, stride, groups, f"{name}_conv_3x3"), f"{name}_conv_3x3_bn")
        x = k.relu(x, name=f"{name}_conv_3x3_relu")
        if self.block_type == "Y":
            x = squeeze_and_excite(k, x, squeezed, f"{name}_squeeze_and_excite")
        x = normalised(k, conv1x1(x, width, 1, name=f"{name}_conv_1x1_2"), f"{name}_conv_1x1_2_bn")
        return k.relu(k.operation(operator.add, x, skip), name=f"{name}_exit_relu")

    def conv3x3(
        self, k: Layers, x: Float[Array, "n h w c"], width: int, stride: int, groups: int, name: str
    ) -> Float[Array, "n ho wo {width}"]:
        """Apply a 3x3 convolution."""
        padding = "same"
        if self.symmetric_padding and stride != 1:
            x, padding = k.zero_pad(x, 1, name=f"{name}_pad"), "valid"
        return k.conv2d(x, width, 3, stride, padding, groups=groups, use_bias=False, kernel_init=he_normal, name=name)

    def top(self, k: Layers, x: Float[Array, "n ho wo f"]) -> Float[Array, "n classes"]:
        """Classify."""
        x = k.global_avg_pool(x, name="1_head_gap")
        return k.dense(x, self.classes, activation=self.probabilities, name="1head_dense")


#: How the names of a convolution and of the BN after it end, in Keras and in timm.
CONV_BN = (("", "conv"), ("_bn", "bn"))


def normalised(k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n h w c"]:
    """Apply a BN as the family has them."""
    return k.batch_norm(x, momentum=0.9, epsilon=1e-5, name=name)


def squeeze_and_excite(k: Layers, x: Float[Array, "n h w c"], squeezed: int, name: str) -> Float[Array, "n h w c"]:
    """Weigh the channels by what they hold on the average."""
    conv = partial(k.conv2d, kernel=1, kernel_init=he_normal)
    weights = k.global_avg_pool(x, keepdims=True, name=f"{name}_gap")
    weights = conv(weights, squeezed, activation="relu", name=f"{name}_squeeze")
    weights = conv(weights, x.shape[-1], activation="sigmoid", name=f"{name}_excite")
    return k.operation(operator.mul, weights, x)


def variant(
    name: str,
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    group_width: int,
    parameters: int,
    depth: int,
    top1: float | None = None,
) -> ModelSpec:
    """Make the record of a variant: "X002" is RegNetX002, of blocks of the type X.

    Keras's accuracies are what its author says in https://github.com/keras-team/keras/pull/15702; the others of his
    weights are published nowhere.
    """
    return ModelSpec(
        name=f"RegNet{name}",
        family=RegNet,
        options={
            "depths": depths,
            "widths": widths,
            "group_width": group_width,
            "block_type": name[0],
            "prefix": f"regnet{name.lower()}",
        },
        input_size=224,
        preprocessing="none",
        parameters=parameters,
        depth=depth,
        size_mb=round(4 * parameters / 1e6),
        top1=top1,
        top5=None,
        licence="Apache 2.0",
        paper="https://arxiv.org/abs/2003.13678",
        weight_files=published.REGNET[f"RegNet{name}"],
    )


RegNetX002 = variant("X002", (1, 1, 4, 7), (24, 56, 152, 368), 8, 2_705_640, 89, 0.6715)
RegNetX004 = variant("X004", (1, 2, 7, 12), (32, 64, 160, 384), 16, 5_194_184, 143, 0.7122)
RegNetX006 = variant("X006", (1, 3, 5, 7), (48, 96, 240, 528), 24, 6_229_320, 107, 0.7237)
RegNetX008 = variant("X008", (1, 3, 7, 5), (64, 128, 288, 672), 16, 7_296_968, 107, 0.7345)
RegNetX016 = variant("X016", (2, 4, 10, 2), (72, 168, 408, 912), 24, 9_233_640, 119, 0.7555)
RegNetX032 = variant("X032", (2, 6, 15, 2), (96, 192, 432, 1008), 48, 15_359_112, 161, 0.7709)
RegNetX040 = variant("X040", (2, 5, 14, 2), (80, 240, 560, 1360), 40, 22_194_312, 149, 0.7787)
RegNetX064 = variant("X064", (2, 4, 10, 1), (168, 392, 784, 1624), 56, 26_283_464, 113)
RegNetX080 = variant("X080", (2, 5, 15, 1), (80, 240, 720, 1920), 120, 39_663_112, 149)
RegNetX120 = variant("X120", (2, 5, 11, 1), (224, 448, 896, 2240), 112, 46_202_440, 125)
RegNetX160 = variant("X160", (2, 6, 13, 1), (256, 512, 896, 2048), 128, 54_389_704, 143)
RegNetX320 = variant("X320", (2, 7, 13, 1), (336, 672, 1344, 2520), 168, 107_973_576, 149)
RegNetY002 = variant("Y002", (1, 1, 4, 7), (24, 56, 152, 368), 8, 3_183_844, 115)
RegNetY004 = variant("Y004", (1, 3, 6, 6), (48, 104, 208, 440), 8, 4_371_296, 139)
RegNetY006 = variant("Y006", (1, 3, 7, 4), (48, 112, 256, 608), 16, 6_084_920, 131)
RegNetY008 = variant("Y008", (1, 3, 8, 2), (64, 128, 320, 768), 16, 6_293_056, 123)
RegNetY016 = variant("Y016", (2, 6, 17, 2), (48, 120, 336, 888), 24, 11_255_102, 227)
RegNetY032 = variant("Y032", (2, 5, 13, 1), (72, 216, 576, 1512), 24, 19_502_498, 179)
RegNetY040 = variant("Y040", (2, 6, 12, 2), (128, 192, 512, 1088), 64, 20_708_928, 187)
RegNetY064 = variant("Y064", (2, 7, 14, 2), (144, 288, 576, 1296), 72, 30_665_684, 211)
RegNetY080 = variant("Y080", (2, 4, 10, 1), (168, 448, 896, 2016), 56, 39_265_812, 147)
RegNetY120 = variant("Y120", (2, 5, 11, 1), (224, 448, 896, 2240), 112, 51_918_928, 163)
RegNetY160 = variant("Y160", (2, 4, 11, 1), (224, 448, 1232, 3024), 112, 83_712_956, 155)
RegNetY320 = variant("Y320", (2, 5, 12, 1), (232, 696, 1392, 3712), 232, 145_205_058, 171)

#: What makes timm's and torchvision's graphs.
TORCH = {"symmetric_padding": True, "include_preprocessing": False}

pycls = partial(Tag, "pycls_in1k", licence="MIT")
torchvision2 = partial(Tag, "tv2_in1k", crop=0.965, licence="BSD 3-Clause")
augmented = partial(Tag, crop=0.95)
swag_tuned = partial(
    Tag, "swag_ft_in1k", size=384, crop=1.0, licence="CC BY-NC 4.0", options=MappingProxyType({"default_size": 384})
)
swag_linear = partial(Tag, "swag_lc_in1k", crop=0.965, licence="CC BY-NC 4.0")


def torchvision1(file: str, **facts: Any) -> Tag:
    """Make the tag of torchvision's first weights, its own file, by its name after "regnet_"."""
    return torchvision_tag("tv_in1k", file=torchvision_file(f"regnet_{file}"), **facts)


def tagged(model: ModelSpec, *tags: Tag) -> tuple[ModelSpec, ...]:
    """Make the records of timm's weights: regnetx_002 is RegNetX002."""
    return model.with_tags(f"regnet{model.name[6].lower()}_{model.name[7:]}", TORCH, model.parameters, *tags)


def tagged_as_wide(model: ModelSpec, widths: tuple[int, ...], parameters: int, *tags: Tag) -> tuple[ModelSpec, ...]:
    """Make the records of torchvision's weights where its widths are others: of timm's regnetx_004_tv."""
    source = f"regnet{model.name[6].lower()}_{model.name[7:]}_tv"
    return model.with_tags(source, {**TORCH, "widths": widths}, parameters, *tags)


TAGS = (
    *tagged(RegNetX002, pycls(top1=0.68758, top5=0.88568)),
    *tagged(RegNetX004, pycls(top1=0.72482, top5=0.9084)),
    *tagged(RegNetX006, pycls(top1=0.73904, top5=0.9164)),
    *tagged(
        RegNetX008,
        pycls(top1=0.75054, top5=0.92338),
        torchvision2(top1=0.77294, top5=0.93664),
        torchvision1("x_800mf-ad17e45c", top1=0.75212, top5=0.92348),
    ),
    *tagged(
        RegNetX016,
        pycls(top1=0.76936, top5=0.93432),
        torchvision2(top1=0.7944, top5=0.94768),
        torchvision1("x_1_6gf-e3633e7f", top1=0.7704, top5=0.9344),
    ),
    *tagged(
        RegNetX032,
        pycls(top1=0.7816, top5=0.94088),
        torchvision2(top1=0.80916, top5=0.95248),
        torchvision1("x_3_2gf-f342aeae", top1=0.78364, top5=0.93992),
    ),
    *tagged(RegNetX040, pycls(top1=0.78486, top5=0.94252)),
    *tagged(RegNetX064, pycls(top1=0.79062, top5=0.94468)),
    *tagged(
        RegNetX080,
        pycls(top1=0.79214, top5=0.94542),
        torchvision2(top1=0.81552, top5=0.9554),
        torchvision1("x_8gf-03ceed89", top1=0.79344, top5=0.94686),
    ),
    *tagged(RegNetX120, pycls(top1=0.79608, top5=0.94734)),
    *tagged(
        RegNetX160,
        pycls(top1=0.79844, top5=0.94852),
        torchvision2(top1=0.82574, top5=0.96058),
        torchvision1("x_16gf-2007eb11", top1=0.80058, top5=0.94944),
    ),
    *tagged(
        RegNetX320,
        pycls(top1=0.80258, top5=0.95016),
        torchvision2(top1=0.82824, top5=0.962),
        torchvision1("x_32gf-9d47f8d0", top1=0.80622, top5=0.95248),
    ),
    *tagged(RegNetY002, pycls(top1=0.70288, top5=0.89544)),
    *tagged(
        RegNetY004,
        pycls(top1=0.74004, top5=0.91756),
        torchvision2(top1=0.75594, top5=0.92706),
        torchvision1("y_400mf-c65dace8", top1=0.74046, top5=0.91716),
    ),
    *tagged(RegNetY006, pycls(top1=0.75274, top5=0.92532)),
    *tagged(RegNetY008, pycls(top1=0.76334, top5=0.9306)),
    *tagged(
        RegNetY016,
        pycls(top1=0.7788, top5=0.93726),
        torchvision2(top1=0.80668, top5=0.95336),
        torchvision1("y_1_6gf-b11a554e", top1=0.7795, top5=0.93966),
    ),
    *tagged(
        RegNetY032,
        pycls(top1=0.78902, top5=0.94426),
        augmented("ra_in1k", top1=0.81948, top5=0.95972),
        torchvision2(top1=0.81788, top5=0.95826),
        torchvision1("y_3_2gf-b5a9779c", top1=0.78948, top5=0.94576),
    ),
    *tagged(RegNetY040, pycls(top1=0.79246, top5=0.94666), augmented("ra3_in1k", top1=0.82308, top5=0.96078)),
    *tagged(RegNetY064, pycls(top1=0.79734, top5=0.94768), augmented("ra3_in1k", top1=0.83006, top5=0.96296)),
    *tagged(RegNetY080, pycls(top1=0.79874, top5=0.94834), augmented("ra3_in1k", top1=0.83166, top5=0.9648)),
    *tagged(RegNetY120, pycls(top1=0.80382, top5=0.95104), augmented("sw_in12k_ft_in1k", top1=0.84994, top5=0.97412)),
    *tagged(
        RegNetY160,
        augmented("deit_in1k", top1=0.83, top5=0.96502),
        augmented("lion_in12k_ft_in1k", top1=0.85602, top5=0.97668),
        pycls(top1=0.80284, top5=0.94982),
        augmented("sw_in12k_ft_in1k", top1=0.85596, top5=0.97668),
        swag_tuned(top1=0.8602, top5=0.98046),
        swag_linear(top1=0.83806, top5=0.97284),
        torchvision2(top1=0.82646, top5=0.9623),
        torchvision1("y_16gf-9e6ed7dd", top1=0.80424, top5=0.9524),
    ),
    *tagged(
        RegNetY320,
        pycls(top1=0.80796, top5=0.95246),
        swag_tuned(top1=0.8683, top5=0.98362),
        swag_linear(top1=0.84654, top5=0.97492),
        torchvision2(top1=0.8317, top5=0.96416),
        torchvision1("y_32gf-4dee3f7a", top1=0.80878, top5=0.9534),
    ),
    *tagged_as_wide(
        RegNetX004,
        (32, 64, 160, 400),
        5_533_832,
        torchvision2(top1=0.74596, top5=0.9214),
        torchvision1("x_400mf-adf1edd5", top1=0.72834, top5=0.9095),
    ),
    *tagged_as_wide(
        RegNetY008,
        (64, 144, 320, 784),
        6_462_944,
        torchvision2(top1=0.78672, top5=0.9438),
        torchvision1("y_800mf-1b27b58c", top1=0.7642, top5=0.93136),
    ),
    *tagged_as_wide(
        RegNetY080,
        (224, 448, 896, 2016),
        39_468_000,
        torchvision2(top1=0.8258, top5=0.9626),
        torchvision1("y_8gf-d0d0e4a8", top1=0.80032, top5=0.95048),
    ),
)
