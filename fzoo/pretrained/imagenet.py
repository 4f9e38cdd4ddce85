"""The weights that were published for ImageNet: which file a network takes, and how it is known."""

from __future__ import annotations

import functools
import os
from typing import Any

from fzoo.layers.classifier import Classifier
from fzoo.weights import check_fit
from fzoo.weights.download import Proof, file_hash
from fzoo.weights.published import WeightFile
from fzoo.zoo import family_defaults, list_models, spec


def proof_of(file: WeightFile, module: Classifier) -> Proof:
    """Return what a published file is known by: its hash, or, where there is none, that it fits its network."""
    return file.hash or functools.partial(check_fit, module)


def needed(name: str) -> dict[str, Any]:
    """Return the options that all published files of a model want: EfficientNet's division by the deviation."""
    options_of_files = [file.options.items() for file in spec(name).weight_files] or [{}.items()]
    return {
        key: value for key, value in options_of_files[0] if all((key, value) in items for items in options_of_files)
    }


def is_published(name: str, path: str | os.PathLike) -> bool:
    """Tell whether a file is one that Keras published, by its hash; asked only where that makes a difference."""
    if not needed(name) or not os.path.isfile(path):
        return False
    hashes = {file.hash for file in spec(name).weight_files}
    return any(file_hash(path, algorithm) in hashes for algorithm in ("md5", "sha256"))


def published(name: str, module: Classifier) -> WeightFile:
    """Return the published file for a model created with these options.

    Raises:
        ValueError: there is none; the message says for which options, or tags, there is.
    """
    if not spec(name).weight_files:
        raise ValueError(f"the weights of {name} have tags: {', '.join(list_models(f'{name}.*'))}")
    if module.head is not None:
        raise ValueError("the ImageNet weights have no such head: fzoo.transfer starts a network with a head from them")
    if module.include_top and module.classes != 1000:
        raise ValueError(f"the ImageNet weights of {name} have 1000 classes, classes={module.classes} given")
    record = spec(name)
    defaults = {
        option: value for option, value in family_defaults(record).items() if option not in record.family.weightless
    }
    height, width, channels = module.example_shape
    if channels != 3:
        raise ValueError(
            f"the ImageNet weights of {name} are for 3 channels, {channels} given: adapt_channels='sum' makes them fit"
        )
    if module.fixed_size and module.include_top and (height, width) != (record.input_size,) * 2:
        size = f"{record.input_size} x {record.input_size}"
        raise ValueError(f"the ImageNet weights of {name} with its top are for {size}, {height} x {width} given")
    files = [f for f in record.weight_files if f.is_state_dict or f.include_top == module.include_top]
    fitting = [f for f in files if all(getattr(module, k) == f.options.get(k, v) for k, v in defaults.items())]
    if not fitting:
        given = ", ".join(f"{k}={getattr(module, k)!r}" for k in defaults)
        if record.tag:
            raise ValueError(f"no weights {name} for {given}: its options are those of their training")
        offers = dict.fromkeys(", ".join(f"{k}={v!r}" for k, v in {**defaults, **f.options}.items()) for f in files)
        raise ValueError(f"no ImageNet weights of {name} for {given}; Keras published {' | '.join(offers)}")
    # One file a size: that of the input if square and published, else that of the default size, as Keras chooses.
    exact = [f for f in fitting if f.size == height == width]
    return (exact or fitting)[0]
