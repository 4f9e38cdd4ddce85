"""Training and validation data from what a user gave."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import numpy as np

from fzoo.images.preprocessing import check_range
from fzoo.training.config import FinetuneConfig
from fzoo.training.data import Arrays, Batches, Broken, Files, check_labels, read_folder, with_classes
from fzoo.training.splits import hold_out, report_data, train_and_validation
from fzoo.zoo import preprocessing_mode

#: A folder of images, (images, labels), or an iterable of batches of such.
Data = str | os.PathLike | Iterable[Any]


def sources(
    data: Data, validation: Data | None, config: FinetuneConfig, broken: Broken, report: Callable[[str], None]
) -> tuple[Files | Arrays | Batches, Files | Arrays | Batches | None]:
    """Make (training data, validation data or None) of what the user gave, and report what was found.

    Raises:
        ValueError: it is none of what `finetune` takes, or does not go with an option.
    """
    train, held_out = training_data(data, validation is None, config, broken, report)
    if validation is not None:
        held_out = validation_data(validation, train, config, broken)
    if isinstance(held_out, Files):
        held_out = dataclasses.replace(held_out, recipe=dataclasses.replace(held_out.recipe, augment=False))
    if not isinstance(train, Batches):
        report_data(train, None if isinstance(held_out, Batches) else held_out, report)
    return train, held_out


def training_data(
    data: Data, with_held_out: bool, config: FinetuneConfig, broken: Broken, report: Callable[[str], None]
) -> tuple[Files | Arrays | Batches, Files | Arrays | None]:
    """Return (what to train on, what was split off)."""
    share = config.validation_split if with_held_out else None
    if isinstance(data, (str, os.PathLike)):
        if config.options.get("include_preprocessing") is False:
            raise ValueError(
                "include_preprocessing=False given, which goes with float images that you have preprocessed, "
                "not with a folder"
            )
        files, held_out = train_and_validation(data, config.recipe(), broken, share, config.seed, report)
        if config.classes not in (None, len(files.class_names)):
            raise ValueError(f"classes={config.classes} given, {data} has {len(files.class_names)} class folders")
        return files, held_out
    if config.augment:
        raise ValueError("augment=True given, which goes with a folder: arrays and batches are taken as they are")
    if is_arrays(data):
        return hold_out(arrays(data, config.classes, config), share or 0, config.seed)
    if not isinstance(data, Iterable) or hasattr(data, "shape"):
        raise ValueError(f"data of {type(data).__name__} given, a folder, arrays or an iterable of batches expected")
    if config.classes is None:
        raise ValueError("classes expected: an iterable does not tell how many there are")
    return Batches(data, config.classes, config.steps_per_epoch, pixel_check(config)), None


def validation_data(
    validation: Data, train: Files | Arrays | Batches, config: FinetuneConfig, broken: Broken
) -> Files | Arrays | Batches:
    """Return what the user gave to validate on, its labels those of the training data."""
    count = train.classes if isinstance(train, Batches) else len(train.class_names)
    if not isinstance(validation, (str, os.PathLike)):
        if is_arrays(validation):
            return arrays(validation, count, config)
        return Batches(validation, count, check=pixel_check(config))
    files = read_folder(validation, config.recipe(), broken)
    if not isinstance(train, Files):
        return with_classes(files, tuple(map(str, range(count))), numbered=True)
    odd = sorted(set(files.class_names) ^ set(train.class_names))
    if odd:
        raise ValueError(f"{validation} has other classes than the training images: {', '.join(odd[:5])}")
    return with_classes(files, train.class_names)


def is_arrays(data: object) -> TypeGuard[tuple[Any, ...]]:
    """Tell whether these are images and labels, and not an iterable of such."""
    try:
        return isinstance(data, tuple) and len(data) > 0 and np.ndim(data[0]) == 4
    except ValueError:  # a batch, whose images and labels make no array
        return False


def pixel_check(config: FinetuneConfig) -> Callable[[Any], None]:
    """Return what raises ValueError for images that the model can't be meant to take."""
    own = config.options.get("include_preprocessing") is not False
    return functools.partial(
        check_range, mode=preprocessing_mode(config.pixels_for) if own else None, name=config.model
    )


def arrays(data: tuple[Any, ...], classes: int | None, config: FinetuneConfig) -> Arrays:
    """Take (images, labels) that are in memory."""
    if len(data) != 2:
        raise ValueError(f"a tuple of {len(data)} given, (images, labels) expected: weights of images are not taken")
    images, labels = np.asarray(data[0]), check_labels(data[1], classes)
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels given, as many of both expected")
    pixel_check(config)(images)
    count = classes or int(labels.max()) + 1
    if count < 2:
        raise ValueError("labels of one class given, two or more expected")
    missing = sorted(set(range(count)) - set(labels.tolist()))
    if classes is None and missing:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} given, but none is {missing[0]}: numbers from 0 without a "
            "gap expected, or classes=... too"
        )
    return Arrays(images, labels, tuple(map(str, range(count))))
