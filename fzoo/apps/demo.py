"""The main job on data that needs no network: train, save for Keras, load back, classify, look inside.

A MobileNet of a quarter's width learns scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

import fzoo
from fzoo.inference.explain import feature_sheet
from fzoo.layers.classifier import Classifier
from fzoo.types import MutableVariables, Variables

SIZE = 32  # the digits are enlarged to what MobileNet takes at the least


TAP = "conv_pw_2_relu"


SETTLING_STEPS = 600


class Digits(NamedTuple):
    """Images (N, 32, 32, 3), uint8, and their labels, for training and held out."""

    train_images: UInt8[np.ndarray, "n 32 32 3"]
    train_labels: Int[np.ndarray, " n"]
    test_images: UInt8[np.ndarray, "m 32 32 3"]
    test_labels: Int[np.ndarray, " m"]


class Result(NamedTuple):
    """What the demo reached and wrote."""

    accuracy: float
    weights: Path
    picture: Path
    examples: list[Path]


def load_digits(seed: int = 0) -> Digits:
    """Load scikit-learn's digits, enlarged, a fifth of them held out.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message says how to.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'fzoo[demo]'") from e
    data: Any = load_digits()
    small = (data.images * (255 / 16)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(i).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for i in small])
    images = np.repeat(images[..., None], 3, axis=-1)
    order = np.random.default_rng(seed).permutation(len(images))
    test, train = np.split(order, [len(images) // 5])
    return Digits(images[train], data.target[train], images[test], data.target[test])


def train(
    module: Classifier,
    variables: Variables,
    images: Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    *,
    epochs: int,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> MutableVariables:
    """Train every parameter by Adam with a cosine schedule, on shifted images; returns the new variables.

    Keras's BN keeps 0.99 of its moving statistics at each step, so after a few hundred steps the initial variance of 1
    still weighs in, while this network's own are down to a thousandth. Forward passes alone settle them at the end.
    """
    steps = len(images) // batch_size
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, epochs * steps))

    def loss_fn(params, batch_stats, x, y, key):
        logits, updates = module.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates["batch_stats"]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, y, key):
        params, batch_stats, opt_state = state
        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch_stats, x, y, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

    @jax.jit
    def settle(params, batch_stats, x, key):
        return loss_fn(params, batch_stats, x, jnp.zeros(len(x), int), key)[1]

    params, batch_stats = jax.tree.map(jnp.copy, (variables["params"], variables["batch_stats"]))
    state = (params, batch_stats, optimizer.init(params))
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    for epoch in range(epochs):
        losses = []
        for batch in rng.permutation(len(images))[: steps * batch_size].reshape(steps, batch_size):
            key, dropout_key = jax.random.split(key)
            state, loss = step(state, shifted(images[batch], rng), labels[batch], dropout_key)
            losses.append(loss)
        report(epoch + 1, float(np.mean(losses)))
    params, batch_stats, _ = state
    for _ in range(SETTLING_STEPS):
        batch_stats = settle(params, batch_stats, images[rng.choice(len(images), batch_size)], key)
    return {"params": params, "batch_stats": batch_stats}


def shifted(
    images: Float[np.ndarray, "n h w c"], rng: np.random.Generator, by: int = 2
) -> Float[np.ndarray, "n h w c"]:
    """Move each image by up to `by` pixels; its border is repeated."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (by, by), (by, by), (0, 0)), mode="edge")
    corners = rng.integers(0, 2 * by + 1, (len(images), 2))
    return np.stack([p[y : y + height, x : x + width] for p, (y, x) in zip(padded, corners, strict=True)])


def run(
    out: Path, *, epochs: int = 20, seed: int = 0, report: Callable[[int, float], None] = lambda epoch, loss: None
) -> Result:
    """Run the whole demo; writes the weights, a few of the held-out digits and a picture of the results to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    digits = load_digits(seed)

    def scaled(images):
        return fzoo.preprocess_input(images, "MobileNet")

    options = {"alpha": 0.25, "classes": 10, "input_shape": (SIZE, SIZE, 3)}
    trainee, variables = fzoo.load(
        "MobileNet", weights=None, rng=jax.random.key(seed), classifier_activation=None, **options
    )
    images = scaled(digits.train_images)
    variables = train(trainee, variables, images, digits.train_labels, epochs=epochs, seed=seed, report=report)

    weights = out / "mobilenet_digits.h5"
    # The file says how its network ends: in probabilities, of which the training had the logits.
    fzoo.save_keras_weights(trainee.clone(classifier_activation="softmax"), variables, weights)
    module, variables = fzoo.load("MobileNet", weights=weights, **options)
    test = scaled(digits.test_images)
    probabilities = np.asarray(fzoo.predict(module, variables, test, batch_size=64))
    accuracy = float(np.mean(probabilities.argmax(1) == digits.test_labels))
    tap = np.asarray(fzoo.features(module, variables, test[:1], TAP)[TAP][0])

    examples = []
    for digit in range(10):
        path = out / f"digit_{digit}.png"
        Image.fromarray(digits.test_images[np.argmax(digits.test_labels == digit)]).save(path)
        examples.append(path)
    picture = out / "digits.png"
    contact_sheet(digits.test_images, digits.test_labels, probabilities, tap, accuracy).save(picture)
    return Result(accuracy, weights, picture, examples)


def contact_sheet(
    images: UInt8[np.ndarray, "n h w 3"],
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n 10"],
    tap: Float[np.ndarray, "ht wt c"],
    accuracy: float,
    columns: int = 10,
    rows: int = 4,
    tile: int = 72,
) -> Image.Image:
    """Draw digits with what was predicted, the mistakes first, and the channels of a tap of the first digit."""
    predicted, gap, text, head = probabilities.argmax(1), 6, 16, 30
    shown = np.argsort(predicted == labels, kind="stable")[: columns * rows]
    side = (columns * (tile + gap) - gap) // (2 * columns) - 2
    liveliest = min(2 * columns, tap.shape[-1])
    channels = np.asarray(feature_sheet(tap, channels=liveliest, columns=liveliest, tile=side))
    width = columns * (tile + gap) + gap
    top = head + rows * (tile + text + gap)
    sheet = Image.new("RGB", (width, top + head + side + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font, title = ImageFont.load_default(12), ImageFont.load_default(15)

    wrong = int((predicted != labels).sum())
    draw.text((gap, 7), f"{len(labels)} held-out digits, {accuracy:.1%} right, {wrong} wrong (first)", "black", title)
    for i, index in enumerate(shown):
        x, y = gap + i % columns * (tile + gap), head + i // columns * (tile + text + gap)
        sheet.paste(Image.fromarray(images[index]).resize((tile, tile)), (x, y))
        right = predicted[index] == labels[index]
        color = "#1a7f37" if right else "#cf222e"
        draw.rectangle((x - 1, y - 1, x + tile, y + tile), outline=color, width=1 if right else 3)
        caption = f"{predicted[index]}  {probabilities[index].max():.0%}" + ("" if right else f" (is {labels[index]})")
        draw.text((x + 2, y + tile + 1), caption, color, font)

    draw.text((gap, top + 5), f"{TAP}, its {liveliest} liveliest channels for the first digit", "black", title)
    sheet.paste(Image.fromarray(channels), (gap, top + head))
    return sheet
