"""Where in an image a class is seen (Grad-CAM), and what a layer sees (its feature maps), as arrays and as pictures.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
https://arxiv.org/abs/1610.02391.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Num, UInt8
from PIL import Image, ImageDraw, ImageFont

from fzoo.errors import unknown
from fzoo.inference.batches import in_batches
from fzoo.layers.activations import activation_function
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import check_classifier, last_map, layer_names, trace
from fzoo.layers.options import is_count
from fzoo.layers.record import Node
from fzoo.types import Variables

#: Colours of heat from 0 to 1, evenly spaced.
HEAT = ((40, 30, 110), (20, 120, 190), (40, 190, 160), (250, 220, 60), (215, 40, 40))


class Explanation(NamedTuple):
    """What `explain` finds.

    Attributes:
        classes: (N, K), integers from 0.
        probabilities: (N, K), of these classes, floats.
        heat: (N, K, h, w), as from `grad_cam`.
    """

    classes: Int[Array, "n k"]
    probabilities: Float[Array, "n k"]
    heat: Float[Array, "n k h w"]


def explain(
    module: Classifier,
    variables: Variables,
    images: Num[np.ndarray | Array, "n h w c"],
    *,
    top: int = 3,
    classes: Sequence[int] | None = None,
    layer: str | None = None,
    batch_size: int | None = None,
    preprocess: str | None = None,
) -> Explanation:
    """Find the likeliest classes of each image, and where they are seen, from one compiled program.

    Args:
        module, variables, images, batch_size, preprocess: as for `fzoo.predict`.
        top: how many classes for each image, the likeliest first.
        classes: these instead, the same for all images.
        layer: as for `grad_cam`.

    Returns:
        See `Explanation`.

    Raises:
        ValueError: as for `grad_cam` and `fzoo.predict`; top that is not from 1 to the number of classes.
    """
    layer = map_layer(module, layer).name
    if classes is None and not (is_count(top) and top <= module.classes):
        raise ValueError(f"top={top!r} given, 1 to {module.classes} expected")
    chosen = top if classes is None else tuple(check_classes(module, classes, dimensions=(1,)).tolist())
    return in_batches(explained, (module, layer, chosen), variables, images, batch_size, preprocess)


def explained(
    target: tuple[Classifier, str, int | tuple[int, ...]], variables: Variables, images: Array | np.ndarray
) -> Explanation:
    """Do what `explain` does, for one batch."""
    module, layer, chosen = target
    activation, scores = split_at(module, variables, images, layer)
    logits, pull = jax.vjp(scores, activation)
    if isinstance(chosen, int):
        classes = lax.top_k(logits, chosen)[1]
    else:
        classes = jnp.broadcast_to(jnp.asarray(chosen), (len(images), len(chosen)))
    probabilities = activation_function(module.classifier_activation)(logits)
    return Explanation(
        classes, jnp.take_along_axis(probabilities, classes, 1), heat_maps(activation, pull, logits, classes)
    )


def grad_cam(
    module: Classifier,
    variables: Variables,
    images: Float[Array | np.ndarray, "n h w c"],
    classes: Sequence[int] | Int[Array | np.ndarray, " k"] | Int[Array | np.ndarray, "n k"],
    *,
    layer: str | None = None,
) -> Float[Array, "n k hm wm"]:
    """Compute heat maps of classes over a layer's feature map: where it speaks for the class.

    The feature maps, weighted by the class score's gradient (the logit's, before any softmax), averaged over the map;
    what is below zero is cut off. Pure and differentiable; works under `jax.jit` and `jax.vmap`. The network runs once,
    and backwards from its end to the layer, for each class. `explain` is the compiled form, for pixels, too.

    Args:
        module: with its top, from `fzoo.create` or `fzoo.load`.
        variables: its variables.
        images: (N, H, W, C), preprocessed.
        classes: numbers of classes: (K,) for all images, or (N, K).
        layer: a layer with a feature map; by default the last one before the top.

    Returns:
        (N, K, hm, wm), from 0, in the units of the score; (hm, wm) are those of the layer's output.

    Raises:
        ValueError: the network has no classes, is one that `optimize_for_inference` made, or has no such layer; the
            layer has no feature map; classes that are not the network's.
    """
    layer = map_layer(module, layer).name
    classes = jnp.asarray(check_classes(module, classes))
    if classes.ndim == 2 and len(classes) != len(images):
        raise ValueError(f"classes of shape {classes.shape} given for {len(images)} images, (K,) or (N, K) expected")
    activation, scores = split_at(module, variables, images, layer)
    logits, pull = jax.vjp(scores, activation)
    return heat_maps(activation, pull, logits, jnp.broadcast_to(classes, (len(images), classes.shape[-1])))


def split_at(
    module: Classifier, variables: Variables, images: Array | np.ndarray, layer: str
) -> tuple[Array, Callable[[Array], Array]]:
    """Return a layer's output for images, and the function from it to the logits."""
    network = module.clone(classifier_activation=None)
    tapped: Any = network.apply(variables, images, (layer,), method="endpoints")

    def scores(activation: Array) -> Array:
        return network.apply(variables, images, given={layer: activation}, method="run")[0]

    return tapped[layer], scores


def heat_maps(
    activation: Array, pull: Callable[[Array], tuple[Array]], logits: Array, classes: Int[Array, "n k"]
) -> Float[Array, "n k h w"]:
    """Compute Grad-CAM of a layer's output, by the pullback of the logits to it."""
    ones = jax.nn.one_hot(classes.T, logits.shape[-1], dtype=logits.dtype)
    (gradients,) = jax.vmap(pull)(ones)
    weights = jnp.mean(gradients.astype(jnp.float32), (2, 3))
    return jax.nn.relu(jnp.einsum("nhwc,knc->nkhw", activation.astype(jnp.float32), weights))


def map_layer(module: Classifier, name: str | None) -> Node:
    """Return the layer of this name, or the last one before the top; raises as `grad_cam` does."""
    traced = trace(module)
    if module.prepared:
        raise ValueError("optimize_for_inference made this network, whose layers are not all there: give the plain one")
    if not module.include_top:
        raise ValueError("include_top=True expected: without its top, this network has no classes")
    check_classifier(module)
    by_name = {part.name: part for node in traced.nodes for part in (*node.parts, node)}
    likely = last_map(traced)
    if name is None:
        if likely is None:
            raise ValueError("layer=NAME expected: there is no last map over the image that everything passes")
        return by_name[likely]
    if name not in by_name:
        raise ValueError(unknown("layer", name, layer_names(module)))
    if len(by_name[name].shape) != 3:
        raise ValueError(
            f"layer {name!r} has an output of shape {by_name[name].shape}, which is no map over the image; "
            "(height, width, channels) expected" + (f", e.g. {likely!r}" if likely else "")
        )
    return by_name[name]


def check_classes(module: Classifier, classes: object, dimensions: tuple[int, ...] = (1, 2)) -> Array | np.ndarray:
    """Return numbers of classes as an array, or raise ValueError; those that are traced can't be looked at."""
    given = classes if isinstance(classes, Tracer) else np.asarray(classes)
    if given.ndim not in dimensions or not jnp.issubdtype(given.dtype, jnp.integer) or not given.size:
        shapes = " or ".join(("(K,)", "(N, K)")[n - 1] for n in dimensions)
        raise ValueError(f"classes={classes!r} given, whole numbers expected, of shape {shapes}")
    if isinstance(given, np.ndarray) and not (given.min() >= 0 and given.max() < module.classes):
        raise ValueError(f"classes={classes!r} given, 0 to {module.classes - 1} expected")
    return given


def overlay(
    image: UInt8[np.ndarray | Array, "h w 3"], heat: Float[np.ndarray | Array, "hm wm"], *, strength: float = 0.7
) -> UInt8[Array, "h w 3"]:
    """Lay heat over an image, as colours from blue to red; where there is none, the image is darker.

    Pure; works under `jax.jit`.

    Args:
        image: (H, W, 3), uint8.
        heat: (h, w), of any size, from 0; its largest value gets the hottest colour.
        strength: how much of the hottest place is colour, from 0 to 1.

    Returns:
        (H, W, 3), uint8.
    """
    heat = jnp.asarray(heat) / jnp.maximum(jnp.max(jnp.asarray(heat)), 1e-12)
    heat = jax.image.resize(heat, image.shape[:2], "bilinear").clip(0, 1)[..., None]
    at = jnp.linspace(0, 1, len(HEAT))
    color = jnp.concatenate(
        [jnp.interp(heat, at, jnp.asarray(channel, jnp.float32)) for channel in zip(*HEAT, strict=True)], -1
    )
    share = strength * (0.25 + 0.75 * heat)
    return jnp.round(jnp.asarray(image, jnp.float32) * (1 - share) + color * share).astype(jnp.uint8)


def feature_sheet(
    activation: Float[np.ndarray | Array, "h w c"],
    *,
    channels: int = 64,
    columns: int | None = None,
    tile: int | None = None,
    gap: int = 2,
) -> UInt8[Array, "hs ws"]:
    """Draw the liveliest channels of a feature map, those that differ most from place to place, side by side in grey.

    Pure; works under `jax.jit` (with the options static). Each channel goes from black, its least value, to white.

    Args:
        activation: (h, w, c), a layer's output for one image.
        channels: how many, the liveliest first.
        columns: of the sheet; by default as many as rows, or a few more.
        tile: height of a channel in pixels, its width in proportion; by default the map's own, or its least multiple
            from 56 up.
        gap: white pixels between the channels.

    Returns:
        (height, width) of the sheet, uint8.

    Raises:
        ValueError: this is no feature map of one image.
    """
    if activation.ndim != 3 or 0 in activation.shape:
        raise ValueError(f"an activation of shape {activation.shape} given, (height, width, channels) expected")
    height, width, depth = activation.shape
    count = min(channels, depth)
    columns = columns or math.ceil(math.sqrt(count))
    tall = tile or height * math.ceil(56 / height)
    x = jnp.asarray(activation, jnp.float32)
    x = jnp.take(x, jnp.argsort(-jnp.std(x, (0, 1)))[:count], -1)
    low, high = jnp.min(x, (0, 1), keepdims=True), jnp.max(x, (0, 1), keepdims=True)
    x = 255 * (x - low) / jnp.maximum(high - low, 1e-6)
    x = jax.image.resize(x, (tall, max(1, round(width * tall / height)), count), "nearest")
    rows = math.ceil(count / columns)
    x = jnp.pad(x, ((0, gap), (0, gap), (0, rows * columns - count)), constant_values=255)
    x = x.reshape(*x.shape[:2], rows, columns).transpose(2, 0, 3, 1).reshape(rows * x.shape[0], -1)
    return x[: x.shape[0] - gap, : x.shape[1] - gap].astype(jnp.uint8)


def side_by_side(panels: Sequence[tuple[np.ndarray, str]], gap: int = 8, text: int = 15) -> Image.Image:
    """Put pictures of one height in a row, each with a line below."""
    font = ImageFont.load_default(text)
    widths = [max(pixels.shape[1], math.ceil(font.getlength(caption))) for pixels, caption in panels]
    height = panels[0][0].shape[0]
    sheet = Image.new("RGB", (sum(widths) + gap * (len(panels) + 1), height + text + 3 * gap), "white")
    draw, x = ImageDraw.Draw(sheet), gap
    for (pixels, caption), width in zip(panels, widths, strict=True):
        sheet.paste(Image.fromarray(pixels), (x, gap))
        draw.text((x, gap + height + gap // 2), caption, "black", font)
        x += width + gap
    return sheet
