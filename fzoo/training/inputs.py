"""Training and validation data from what a user gave."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from fzoo.images.recipe import Recipe
from fzoo.training.data import (
    Arrays,
    Batches,
    Broken,
    Files,
    check_labels,
    hold_out,
    read_folder,
    train_and_validation,
)


def sources(
    data: Any,
    validation: Any,
    recipe: Recipe,
    broken: Broken,
    share: float,
    seed: int,
    classes: int | None,
    steps: int | None,
) -> tuple[Files | Arrays | Batches, Files | Arrays | Batches | None]:
    """(training data, validation data or None) from what the user gave."""
    plain = dataclasses.replace(recipe, augment=False)
    if isinstance(data, (str, os.PathLike)):
        if validation is None:
            train, held_out = train_and_validation(data, recipe, broken, share, seed)
            return train, held_out and dataclasses.replace(held_out, recipe=plain)
        train, _ = train_and_validation(data, recipe, broken, 0, seed)
        names: tuple[str, ...] | None = train.class_names
    elif is_pair_of_arrays(data):
        train = arrays(data, classes)
        if validation is None:
            return hold_out(train, share, seed)
        names = None
    elif isinstance(data, Iterable):
        if classes is None:
            raise ValueError("classes expected: an iterable does not tell how many there are")
        train, names = Batches(data, classes, steps), None
    else:
        raise ValueError(f"data of {type(data).__name__} given, a folder, arrays or an iterable of batches expected")
    if validation is None:
        return train, None
    if isinstance(validation, (str, os.PathLike)):
        held_out = read_folder(validation, plain, broken)
        if held_out.class_names != (names or held_out.class_names):
            raise ValueError(f"{validation} has other classes than {data}")
        return train, held_out
    count = train.classes if isinstance(train, Batches) else len(train.class_names)
    if is_pair_of_arrays(validation):
        return train, arrays(validation, count)
    return train, Batches(validation, count)


def is_pair_of_arrays(data: Any) -> bool:
    """Whether this is (images, labels) and not an iterable of such."""
    return isinstance(data, tuple) and len(data) == 2 and np.ndim(data[0]) == 4 and np.ndim(data[1]) == 1


def arrays(data: tuple[Any, Any], classes: int | None) -> Arrays:
    """(images, labels) that are in memory."""
    images, labels = np.asarray(data[0]), check_labels(data[1], classes)
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels given, as many of both expected")
    count = classes or int(labels.max()) + 1
    if count < 2:
        raise ValueError("labels of one class given, two or more expected")
    return Arrays(images, labels, tuple(map(str, range(count))))
