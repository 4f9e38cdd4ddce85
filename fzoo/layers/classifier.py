"""What all networks share: their options, how they are called, a new head."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from fzoo.errors import unknown
from fzoo.layers.abstract import trace_call
from fzoo.layers.activations import ACTIVATIONS, Activation, activation_function
from fzoo.layers.keras import Layers, Training
from fzoo.layers.options import (
    COUNT,
    FLAG,
    FLOATING,
    NAME,
    RATE,
    Check,
    check_declared,
    is_count,
    one_of,
    option,
    or_none,
)
from fzoo.layers.record import Prepared
from fzoo.layers.remat import kept_nodes, remat
from fzoo.layers.steps import Graph
from fzoo.ops.shapes import Side
from fzoo.types import DTypeLike

#: What a network takes: images, or an array for each of several inputs, in their order or by their names.
Inputs = Float[Array | np.ndarray, "n h w c"] | tuple[Any, ...] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Head:
    """A new classifier for a pretrained backbone: pooling, a hidden layer if wanted, dropout, the classes.

    Keras's GlobalAveragePooling2D, Dense (relu), Dropout, and a Dense named "predictions".

    Attributes:
        pooling: "avg" or "max", over the last feature map.
        hidden: units of the hidden layer; None for no such layer.
        dropout: rate before the last layer.

    Raises:
        ValueError: one of these can't be honoured.
    """

    pooling: str = option("avg", one_of("avg", "max"))
    hidden: int | None = option(None, or_none(COUNT))
    dropout: float = option(0.0, RATE)

    def __post_init__(self):
        """Check the options."""
        check_declared(self)

    def __call__(
        self, k: Layers, x: Float[Array, "n c"], classes: int, activation: Activation
    ) -> Float[Array, "n classes"]:
        """Apply the layers after the pooling."""
        if self.hidden is not None:
            x = k.dense(x, self.hidden, activation="relu")
        if self.dropout:
            x = k.dropout(x, self.dropout)
        return k.dense(x, classes, activation=activation, name="predictions")


#: Options that say how a network is run, and nothing of which network it is.
OF_RUNS = ("dtype", "param_dtype", "precision", "remat", "plain_convolutions", "axis_name", "output_stride")


class Classifier(nn.Module):
    """An image classifier of keras.applications: images (N, H, W, C) in, class probabilities or features out.

    Called as any Flax module: `module.apply(variables, images, train=False)`. With `train=True` it needs
    `mutable=["batch_stats"]`, and `rngs={"dropout": key}` where the family drops out. `train=frozenset(names)` has
    these layers behave so, and the others as in inference: what Keras's `trainable` does to a BatchNormalization.

    Attributes:
        include_top: whether the classifier at the end is part of the network.
        classes: number of outputs of the classifier.
        pooling: without the top, what follows the last block: None for the feature map, "avg" or "max" for a vector.
        classifier_activation: of the last layer: a name of Keras's, a callable, or None for logits. The classifier's
            output is computed in float32, whatever `dtype` is.
        input_shape: (height, width, channels); height and width may be None. When given, other images are refused.
            Left out, RGB images of any size from the family's minimum up are taken (only VGG's top fixes one).
            As in Keras, a network built without the top and without a size pads for even sizes where parity matters
            (MobileNetV2): give the size for one that follows an odd input.
        dtype: of the computation.
        head: a new classifier in place of the family's own; needs the top.
        tag: which weights the network is for, as in the name of its model ("tv2_in1k" of "ResNet50.tv2_in1k"); None for
            Keras's usual ones. It changes nothing that is computed.
        preprocessing: what these weights want of pixels, a mode of `preprocess_input`; None for what Keras's of the
            family want. It changes nothing that the network computes, which gets the images when that is done.
        param_dtype: of the parameters, as they are made and loaded; statistics of BNs are float32, as in Flax.
        precision: of convolutions and products, a name of `jax.lax.Precision`'s or one of these; None for JAX's default
            (`jax.default_matmul_precision`). On a CPU all are the same.
        remat: whether a backward pass computes the layers' outputs again, part by part, so that few are kept for it:
            the same gradients in less memory, for a second forward pass. XLA's compiler for CPUs makes it without
            effect, but with its option {"xla_disable_hlo_passes": "cse_barrier_expander"}.
        plain_convolutions: whether a CPU runs XLA's own convolutions, and not the forms of `fzoo.ops`: slower, but
            compiled in less time.
        axis_name: in training, BNs take the statistics of the batches on all devices of this axis together, of a
            `jax.shard_map`, `jax.pmap` or `jax.vmap` around the call. Where a `jax.jit` is given a batch that is split
            over a mesh, they do so without it.
        output_stride: pixels of the image between two values of the last maps, for dense prediction with the same
            weights: 8 or 16, where it is 32 otherwise. Where a stride would take a map beyond it, the windows move by
            single values, and all later ones are dilated (Chen et al., DeepLab, https://arxiv.org/abs/1606.00915), so
            that every (32 / output_stride)-th value is the plain network's, and the others lie between them; only
            squeeze-and-excitation, which averages over the map, averages over other values. A convolution or a pool
            without padding stays so, and leaves out the last values of its map. It goes with a top that takes maps of
            any size.
        prepared: not an option: what `optimize_for_inference` did.

    Raises:
        ValueError: an argument, or the shape of the images, can't be honoured.
    """

    include_top: bool = option(True, FLAG)
    classes: int = option(1000, COUNT)
    pooling: str | None = option(None, one_of(None, "avg", "max"))
    classifier_activation: Activation = "softmax"
    input_shape: tuple[int | None, int | None, int] | None = None
    dtype: DTypeLike = option(jnp.float32, FLOATING)
    head: Head | None = option(None, or_none(Check("a fzoo.Head", lambda head: isinstance(head, Head))))
    tag: str | None = option(None, or_none(NAME))
    preprocessing: str | None = option(None, one_of(None, "caffe", "tf", "torch", "clip", "unit", "none"))
    param_dtype: DTypeLike = option(jnp.float32, FLOATING)
    precision: str | jax.lax.Precision | None = option(None, one_of(None, "default", "high", "highest"))
    remat: bool = option(False, FLAG)
    plain_convolutions: bool = option(False, FLAG)
    axis_name: str | None = option(None, or_none(NAME))
    output_stride: int | None = option(None, one_of(None, 8, 16))
    prepared: Prepared | None = None

    # Facts of a family; not options.
    default_size = 224
    min_size = 32
    open_step = 1  # what heights and widths that an export leaves open are multiples of
    fixed_size = False  # the top flattens, so its weights fix the size of the input
    top_pool: ClassVar[str | None] = None  # Keras's name of the pooling in the top; None where Keras numbers it
    groups_as_depthwise: ClassVar[bool] = False  # whether Keras's files keep grouped convolutions as depthwise ones
    torch_unused: ClassVar[tuple[str, ...]] = ()  # how arrays begin that PyTorch's networks have, and these not
    torch_renamed: ClassVar[tuple[tuple[str, str], ...]] = ()  # (pattern, now) of what arrays were called before
    block_ends: ClassVar[str] = ""  # a pattern of layers that end a block, where others join what is before, too
    weightless: ClassVar[tuple[str, ...]] = ()  # options that change no array, and not what arrays mean
    named_pools = False  # whether the pooling without the top is called avg_pool or max_pool, or numbered
    micro_batch = 4  # how many images a CPU computes together at best, by benchmarks/micro_batches.py
    narrow_micro_batch: ClassVar[int | None] = None  # the same in bfloat16, where that is not as many

    def __post_init__(self):
        """Check the options, so that what can't be honoured fails here and not in the middle of a trace."""
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), (list, np.ndarray)):  # a module must be hashable
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        if isinstance(self.precision, jax.lax.Precision):
            object.__setattr__(self, "precision", self.precision.name.lower())
        self.check_options()
        super().__post_init__()

    @nn.nowrap
    def check_options(self) -> None:
        """Raise ValueError for an option that can't be honoured; a family adds what its declarations don't say."""
        check_declared(self)
        check_common_options(self)

    @staticmethod
    def current_name(old: str) -> str:
        """Return today's name of a layer that older files of the family call otherwise."""
        return old

    @nn.nowrap
    def torch_names(self) -> Mapping[str, Mapping[str, str]]:
        """Return what PyTorch's libraries call the layers that have arrays, for those that have this network.

        Returns:
            For each library ("timm", "torchvision"): PyTorch's name of a layer, by a pattern that Keras's name fits as
            a whole. "{1}" in it is the pattern's first group, "{1-1}" that number less one, "{1-a}" the number of its
            letters: 0 for "a", 25 for "z", 26 for "aa".
        """
        return {}

    @property
    def torch_constants(self) -> Mapping[str, float | tuple[float, ...]]:
        """The arrays of Keras's, as "layer/array", that PyTorch's networks have not, with their values there."""
        return {}

    @property
    def kept_layers(self) -> frozenset[str]:
        """The layers whose outputs are kept for a backward pass, with `remat`."""
        return kept_nodes(trace_call(self.clone(remat=False)).nodes)

    @property
    def shared_layers(self) -> frozenset[str]:
        """The layers that are called more than once: none, in the families."""
        return frozenset()

    def forward(self, k: Layers, x: PyTree) -> PyTree:
        """Apply all layers."""
        x = self.backbone(k, k.input(x))
        if not self.include_top:
            return self.pooled(k, x, self.pooling)
        if self.head is None:
            return self.top(k, x)
        return self.head(k, self.pooled(k, x, self.head.pooling), self.classes, self.probabilities)

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply all layers up to the last feature map; what a family defines."""
        raise NotImplementedError

    def top(self, k: Layers, x: Float[Array, "n ho wo f"]) -> Float[Array, "n classes"]:
        """Classify the last feature map; most families share this one."""
        x = k.global_avg_pool(x, name=self.top_pool)
        return k.dense(x, self.classes, activation=self.probabilities, name="predictions")

    def pooled(self, k: Layers, x: Float[Array, "n ho wo f"], pooling: str | None) -> Float[Array, "n ..."]:
        """Do what takes the top's place without it; most families share this one, too."""
        if pooling == "avg":
            return k.global_avg_pool(x, name="avg_pool" if self.named_pools else None)
        if pooling == "max":
            return k.global_max_pool(x, name="max_pool" if self.named_pools else None)
        return x

    def probabilities(self, logits: Float[Array, "n ... classes"]) -> Float[Array, "n ... classes"]:
        """Apply `classifier_activation`, in float32 at least."""
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return activation_function(self.classifier_activation)(logits)

    @property
    def known_size(self) -> bool:
        """Whether Keras would know the input's height and width when it builds this network."""
        return self.own_top if self.input_shape is None else None not in self.input_shape

    @property
    def own_top(self) -> bool:
        """Whether the classifier is the family's own."""
        return self.include_top and self.head is None

    @property
    def stated_shape(self) -> tuple[int | None, int | None, int]:
        """(height, width, channels) of its images, None where none is stated."""
        return self.input_shape or (None, None, 3)

    @property
    def image_shape(self) -> tuple[int | None, int | None, int]:
        """(height, width, channels) of the images that it takes, None for any."""
        return self.example_shape if self.fixed_size and self.own_top else self.stated_shape

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image that this network takes: `input_shape`, or the family's default."""
        height, width, channels = self.stated_shape
        return height or self.default_size, width or self.default_size, channels

    @property
    def example_inputs(self) -> jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...]:
        """What a call takes, for one image, as `jax.ShapeDtypeStruct`s."""
        return jax.ShapeDtypeStruct((1, *self.example_shape), jnp.float32)

    @property
    def keras_graph(self) -> Graph | None:
        """The layers of a network that is data; None of a family's, whose layers are in its code."""
        return None

    def check_images(self, shape: tuple[Side, ...]) -> None:
        """Raise ValueError unless images of this shape, in which `jax.export` may leave sides open, can be taken."""
        expected = self.image_shape
        if len(shape) != 4 or any(w not in (None, s) for w, s in zip(expected, shape[1:], strict=True)):
            sizes = ["any" if w is None else str(w) for w in expected]
            raise ValueError(f"images of shape {shape} given, (N, H, W, C) with H, W, C = {', '.join(sizes)} expected")
        if any(side < self.min_size for side in shape[1:3]):  # of an open side, JAX asks for a constraint
            raise ValueError(
                f"images of {shape[1]} x {shape[2]} given, {type(self).__name__} takes "
                f"{self.min_size} x {self.min_size} at the least"
            )

    @nn.nowrap
    def arrange(self, inputs: PyTree) -> PyTree:
        """Put what a caller gave into the order of the network's inputs; there is one."""
        return inputs

    @nn.nowrap
    def prepare_inputs(self, x: PyTree) -> PyTree:
        """Check what a call takes, and give it the dtype of the computation."""
        self.check_images(x.shape)
        check_floats("images", x)
        return jnp.asarray(x, self.dtype)

    @nn.compact
    def run(
        self,
        x: Inputs,
        train: Training = False,
        taps: Sequence[str] = (),
        given: Mapping[str, Array] | None = None,
        record: bool = False,
    ) -> tuple[PyTree, Layers]:
        """Run the forward pass; returns its output, and the `Layers` that kept what was asked for.

        The outputs of layers that are `given` are not computed, nor what they alone need, once XLA has seen it.
        """
        inputs = self.prepare_inputs(x)
        if train and self.prepared:
            raise ValueError("train=True given, but optimize_for_inference made this network: train the plain one")
        again = self.remat and not record and not self.is_mutable_collection("params")
        k = Layers(
            train=train,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            plain_convolutions=self.plain_convolutions,
            axis_name=self.axis_name,
            known_size=self.known_size,
            taps=taps,
            given=given,
            record=record,
            prepared=self.prepared,
            shared=self.shared_layers,
            kept=self.kept_layers if again else (),
            output_stride=self.output_stride,
        )
        if again:

            def forward(module: Classifier, inputs: PyTree) -> tuple[PyTree, dict[str, Array]]:
                return module.forward(k, inputs), k.release()

            with self.at_precision():
                y, k.tapped = remat(forward, self, inputs)
        else:
            with self.at_precision():
                y = self.forward(k, inputs)
        for name in k.not_given():
            raise ValueError(unknown("layer", name, self.names(k)))
        return y, k

    @nn.nowrap
    def at_precision(self) -> contextlib.AbstractContextManager[None]:
        """Make the context in which products have the network's `precision`."""
        return contextlib.nullcontext() if self.precision is None else jax.default_matmul_precision(self.precision)

    @nn.nowrap
    def names(self, k: Layers) -> list[str]:
        """List the names of the layers that a call went through, and that are there to be tapped."""
        gone = dict(self.prepared.gone) if self.prepared else {}
        return [name for name in k.names if name not in gone]

    def __call__(self, x: Inputs, train: Training = False) -> PyTree:
        """Compute class probabilities (N, classes); without the top, features (N, H', W', F), or (N, F) if pooled."""
        return self.run(x, train)[0]

    def endpoints(self, x: Inputs, layers: Sequence[str], train: Training = False) -> dict[str, Float[Array, "n ..."]]:
        """Compute the outputs of Keras layers by name; XLA drops what none of them needs.

        `module.apply(variables, x, ("mixed8",), method="endpoints")`, or called as a submodule.

        Raises:
            ValueError: the network has no layer of that name.
        """
        gone = dict(self.prepared.gone) if self.prepared else {}
        for name in layers:
            if name in gone:
                raise ValueError(
                    f"layer {name!r} is gone: optimize_for_inference folded it with others into one, whose output is "
                    f"that of {gone[name]!r}; tap this, or the plain network"
                )
        _, k = self.run(x, train, layers)
        for name in layers:
            if name not in k.tapped:
                raise ValueError(unknown("layer", name, self.names(k)))
        return {name: k.tapped[name] for name in layers}


def check_floats(name: str, x: Array | np.ndarray) -> None:
    """Raise ValueError for integers: a network would take pixels that nothing preprocessed for what it wants."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} of {x.dtype} given, floats expected: fzoo.preprocess_input makes them of pixels, and fzoo.predict "
            "calls it; `.astype(float)` for a network that does so itself"
        )


def check_common_options(module: Classifier) -> None:
    """Raise ValueError for options of every family that don't go together, or that no single check can tell."""
    shape, family = module.input_shape, type(module).__name__
    if module.head is not None and not module.include_top:
        raise ValueError("head goes with include_top=True: it is the classifier")
    if module.pooling and module.include_top:
        raise ValueError(f"pooling={module.pooling!r} goes with include_top=False: the top pools already")
    if module.output_stride is not None and module.keras_graph is not None:
        raise ValueError(
            f"output_stride={module.output_stride} given, which goes with the families of list_models(), not with the "
            "network of a file"
        )
    if module.output_stride is not None and module.fixed_size and module.own_top:
        raise ValueError(
            f"output_stride={module.output_stride} goes with include_top=False or a fzoo.Head: the top of {family} "
            "takes maps of one size"
        )
    if module.default_size < module.min_size:
        raise ValueError(f"default_size={module.default_size} given, {module.min_size} or more expected")
    if getattr(module, "include_preprocessing", False) and module.preprocessing not in (None, "none"):
        raise ValueError(
            f"preprocessing={module.preprocessing!r} goes with include_preprocessing=False: {family} does its own"
        )
    constant = (ACTIVATIONS["softmax"], ACTIVATIONS["log_softmax"])
    own_end = module.include_top and module.keras_graph is None  # a file's runs as it is
    if own_end and module.classes == 1 and activation_function(module.classifier_activation) in constant:
        raise ValueError(
            f"classes=1 with classifier_activation={module.classifier_activation!r} given, which is the same for every "
            "image: 'sigmoid' or classes=2 would do"
        )
    activation_function(module.classifier_activation)
    if shape is None:
        return
    three = isinstance(shape, tuple) and len(shape) == 3 and is_count(shape[2])
    if not three or not all(n is None or isinstance(n, Integral) for n in shape):
        raise ValueError(f"input_shape={shape!r} given, (height, width, channels) expected")
    if any(n is not None and n < module.min_size for n in shape[:2]):
        least = f"{module.min_size} x {module.min_size}"
        raise ValueError(f"input_shape={shape} given, {least} is the least that {family} takes")
    if module.fixed_size and module.own_top and None in shape:
        raise ValueError(f"input_shape={shape} given, {family} with its top needs a fixed size")
