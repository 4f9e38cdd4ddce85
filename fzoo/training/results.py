"""What evaluation and fine-tuning return."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from fzoo.layers.classifier import Classifier
from fzoo.types import MutableVariables


class NotFinite(ValueError):
    """Raised where a network's output for an image is no number.

    Args:
        index: which of the images, from 0.
        image: its name, if there is one.
    """

    def __init__(self, index: int, image: object = None):
        super().__init__(
            f"the network's output for {image or f'image {index}'} is not finite: damaged weights, or the image is "
            "not preprocessed as they want"
        )
        self.index = index


class Evaluation(NamedTuple):
    """How a classifier did. An image whose true class ties with another is not right.

    Attributes:
        confusion: (classes, classes), integers: images by (true class, predicted class); where the likeliest tie, one
            that is not true is predicted.
        loss: the sum of the images' softmax cross-entropies, in nats.
        in_top5: how many had the true class among the five likeliest: fewer than five others are as likely or more.
    """

    confusion: Int[np.ndarray, "classes classes"]
    loss: float
    in_top5: int

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """The share whose likeliest class was right."""
        return float(np.trace(self.confusion)) / max(self.images, 1)

    @property
    def top5(self) -> float:
        """The share with the true class among the five likeliest."""
        return self.in_top5 / max(self.images, 1)

    @property
    def mean_loss(self) -> float:
        """Cross-entropy an image."""
        return self.loss / max(self.images, 1)

    @property
    def recall(self) -> np.ndarray:
        """For each class the share of its images that was found; NaN where there is none."""
        totals = self.confusion.sum(1)
        return np.divide(np.diag(self.confusion), totals, where=totals > 0, out=np.full(len(totals), np.nan))


class Finetuned(NamedTuple):
    """What `finetune` gives.

    Attributes:
        module, variables: the network, with a softmax at its end.
        class_names: of its outputs; numbers where the data has no names.
        history: for each epoch {"phase", "epoch", "loss", "accuracy", "seconds", and with validation images
            "val_loss", "val_accuracy"}.
        evaluation: of the validation images at the end, if there are any.
        broken: images that could not be read.
    """

    module: Classifier
    variables: MutableVariables
    class_names: tuple[str, ...]
    history: list[dict[str, float]]
    evaluation: Evaluation | None
    broken: tuple[Path, ...]
