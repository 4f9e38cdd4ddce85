"""A model, its weights and the names of its classes, as the options of a command say."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fzoo.cli.options import parse_options


class Opened(NamedTuple):
    """A network, and how it wants its images.

    Attributes:
        module, variables: the network.
        model: the name for `preprocess_input`.
        names: (WordNet ID or "-", label) of the classes, where the weights tell.
        reading: "size", "interpolation" and "crop" for `load_image`.
    """

    module: Any
    variables: Any
    model: str
    names: Sequence[tuple[str, str]] | None
    reading: dict[str, Any]


def opened(
    model: str,
    weights: str,
    size: int | None,
    interpolation: str | None,
    crop: float | None,
    *,
    usual: Mapping[str, Any] | None = None,
    **options: Any,
) -> Opened:
    """What `load_model` gives, or what a fine-tuning made, with its own classes and recipe.

    Args:
        usual: how images are read where neither the user nor a fine-tuning says it; as Keras's `load_img` by default.
        model, weights, size, interpolation, crop, **options: of the command.
    """
    from fzoo.training.runs import is_run, load_run

    names, reading = None, dict(usual or {"interpolation": "nearest", "crop": None})
    if is_run(weights):
        run = load_run(weights)
        module, variables, model = run.module, run.variables, run.model
        if size is not None and (size, size) != run.recipe.size:
            raise ValueError(
                f"--size {size} given, {weights} was trained on {run.recipe.size[0]} x {run.recipe.size[1]}"
            )
        names = [("-", name) for name in run.class_names]
        reading = {"size": run.recipe.size, "interpolation": run.recipe.interpolation, "crop": run.recipe.crop}
    else:
        module, variables, side = load_model(model, weights, size, **options)
        reading["size"] = (side, side)
    given = {"interpolation": interpolation, "crop": crop}
    reading |= {name: value or None for name, value in given.items() if value is not None}  # a crop of 0 squeezes
    return Opened(module, variables, model, names, reading)


def load_model(
    model: str,
    weights: str,
    size: int | None,
    *,
    option: Sequence[str] | None,
    include_top: bool = True,
    classes: int = 1000,
) -> tuple[Any, Any, int]:
    """(module, variables, size of its images)."""
    import fzoo

    size = fzoo.spec(model).input_size if size is None else size
    options = {
        "input_shape": (size, size, 3),
        "include_top": include_top,
        "classes": classes,
        **parse_options(model, option),
    }
    return *fzoo.load(model, weights=weights, **options), size


@functools.cache
def class_names(labels: Path | None, classes: int) -> Sequence[tuple[str, str]]:
    """(WordNet ID, label) of each class: ImageNet's, those of a file, or the bare number."""
    if labels is not None:
        try:
            names = [line.strip() for line in labels.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise ValueError(f"{labels} is not a text file, one name a line expected") from None
        if len(names) != classes:
            raise ValueError(f"{labels} has {len(names)} names, {classes} expected, one a line")
        return [("-", name) for name in names]
    if classes != 1000:
        return [("-", str(i)) for i in range(classes)]
    from fzoo.images.labels import class_index

    return class_index()


def join_processes(distributed: str | None) -> tuple[int, int]:
    """(number of this process, how many there are)."""
    from fzoo.inference.devices import start_distributed

    return (0, 1) if distributed is None else start_distributed(distributed)
