"""How often a classifier is right."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from fzoo.inference.predict import predict
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import check_classifier
from fzoo.training.data import check_labels
from fzoo.training.results import Evaluation, NotFinite
from fzoo.training.steps import StepInputs, logits_of
from fzoo.types import Variables


def evaluate(
    module: Classifier,
    variables: Variables,
    batches: Iterable[tuple[StepInputs, Int[np.ndarray, " n"]]],
    *,
    preprocess: str | None = None,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Count how often a classifier is right.

    Args:
        module, variables: the classifier, with a softmax at its end or without.
        batches: (images (N, H, W, 3), labels (N,)) of any N: preprocessed floats, or pixels of integers.
        preprocess: the model, or the mode, whose `preprocess_input` the pixels need.
        batch_size: how many go through at once.
        mesh: of the devices that each batch is spread over, from `fzoo.devices.mesh`; one by default.

    Returns:
        See `Evaluation`.

    Raises:
        ValueError: no images, labels that the classifier has not, or an output that is NaN (`index` is the image's).
    """
    check_classifier(module)
    if module.classes < 2:
        raise ValueError("a network with one output given, one for each class expected")
    if module.keras_graph is not None and module.keras_graph.classifier is None:
        raise ValueError("a network that ends in none of Dense, Activation and Softmax given: its logits are not known")
    module = module.clone(classifier_activation=None)
    confusion = np.zeros((module.classes, module.classes), np.int64)
    loss, top5, seen = 0.0, 0, 0
    for images, labels in batches:
        labels = check_labels(labels, module.classes)
        logits = np.array(outputs(module, variables, images, preprocess, batch_size, mesh), np.float64)
        if len(logits) != len(labels):
            raise ValueError(f"{len(logits)} images and {len(labels)} labels given, as many of both expected")
        true, largest = (np.arange(len(labels)), labels), logits.max(1)
        right = logits[true]
        with np.errstate(invalid="ignore"):  # of NaN, which comes out as NaN
            losses = largest + np.log(np.exp(logits - largest[:, None]).sum(1)) - right
        if np.isnan(losses).any():
            raise NotFinite(seen + int(np.isnan(losses).argmax()))
        seen, loss = seen + len(labels), loss + float(losses.sum())
        logits[true] = -np.inf  # what is left are the others
        top5 += int(((logits >= right[:, None]).sum(1) < 5).sum())
        predicted = np.where(right > logits.max(1), labels, logits.argmax(1))
        np.add.at(confusion, (labels, predicted), 1)
    if not seen:
        raise ValueError("no images to evaluate on")
    return Evaluation(confusion, loss, top5)


def outputs(
    module: Classifier,
    variables: Variables,
    inputs: StepInputs,
    preprocess: str | None,
    batch_size: int,
    mesh: Mesh | None,
) -> Array:
    """Compute logits for images, or for the outputs of a frozen part."""
    if not isinstance(inputs, Mapping):
        pixels = np.issubdtype(inputs.dtype, np.integer)
        options = {"batch_size": batch_size, "preprocess": preprocess if pixels else None, "mesh": mesh}
        return predict(module, variables, inputs, **options)
    count = len(next(iter(inputs.values())))
    full = {name: np.pad(x, ((0, batch_size - count), *((0, 0),) * (x.ndim - 1))) for name, x in inputs.items()}
    return above(module, variables, full)[:count]


@functools.partial(jax.jit, static_argnums=0)
def above(
    module: Classifier, variables: Variables, given: Mapping[str, Array | np.ndarray]
) -> Float[Array, "n classes"]:
    """Run the part of a network above its frozen part."""
    return logits_of(module, variables, given)[0]
