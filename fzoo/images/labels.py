"""ImageNet's class names."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Num

from fzoo.weights.download import cache_dir, fetch

CLASS_INDEX_URL = "https://storage.googleapis.com/download.tensorflow.org/data/imagenet_class_index.json"


CLASS_INDEX_HASH = "md5:c2c37ea517e94d9795004a39431a14cb"


def decode_predictions(
    probabilities: Num[np.ndarray | jax.Array, "n 1000"], top: int = 5
) -> list[list[tuple[str, str, float]]]:
    """Name the likeliest ImageNet classes.

    Args:
        probabilities: (N, 1000), from a classifier of ImageNet's classes.
        top: how many classes for each image.

    Returns:
        For each image [(WordNet ID, label, probability), ...], the likeliest first.

    Raises:
        ValueError: an array of another shape or that is not finite, or top not from 1 to 1000.
        OSError: the class index is neither in the cache nor to be downloaded.
    """
    p = np.asarray(probabilities).astype(np.float32)
    if p.ndim != 2 or p.shape[1] != 1000:
        raise ValueError(f"probabilities of shape {p.shape} given, (N, 1000) expected: ImageNet has 1000 classes")
    if not np.isfinite(p).all():
        raise ValueError("probabilities that are not finite given: the network's output is NaN or infinite")
    if not isinstance(top, Integral) or not 1 <= top <= 1000:
        raise ValueError(f"top={top!r} given, 1 to 1000 expected")
    names = class_index()
    order = np.argsort(-p, axis=1, kind="stable")[:, :top]
    return [[(*names[i], float(row[i])) for i in best] for row, best in zip(p, order, strict=True)]


def class_index() -> Sequence[tuple[str, str]]:
    """Return (WordNet ID, label) of ImageNet's 1000 classes.

    From Keras's cache, or downloaded into it.

    Raises:
        OSError: there is no such file, and no network.
    """
    local = cache_dir() / "imagenet_class_index.json"
    path = local if local.is_file() else fetch(CLASS_INDEX_URL, local.name, CLASS_INDEX_HASH)
    return _read(path, path.stat().st_mtime_ns)


@functools.lru_cache
def _read(path: Path, changed: int) -> Sequence[tuple[str, str]]:
    """Parse Keras's class index: {"0": ["n01440764", "tench"], ...}."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return tuple((str(index[str(i)][0]), str(index[str(i)][1])) for i in range(1000))
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise ValueError(f"{path} is not Keras's class index of 1000 classes: remove it, or replace it") from e
