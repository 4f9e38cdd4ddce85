"""A model, its weights and the names of its classes, as the options of a command say."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fzoo.cli.options import Network, Reading, parse_options


class LoadedNetwork(NamedTuple):
    """A network, and how it wants its images.

    Attributes:
        module, variables: the network.
        model: the name for `preprocess_input`.
        names: (WordNet ID or "-", label) of the classes, where the weights tell.
        recipe: how an image becomes its input.
    """

    module: Any
    variables: Any
    model: str
    names: Sequence[tuple[str, str]] | None
    recipe: Any


def load_network(network: Network, reading: Reading, **options: Any) -> LoadedNetwork:
    """Load the network of a command, or what a fine-tuning made, with its own classes and recipe.

    Args:
        network, reading: the options of the command.
        **options: beyond those, for `load_model`.
    """
    import fzoo
    from fzoo.images.recipe import change_recipe
    from fzoo.training.runs import is_run, load_run

    if is_run(network.weights):
        run, size = load_run(network.weights), reading.size
        if size is not None and (size, size) != run.recipe.size:
            raise ValueError(
                f"--size {size} given, {network.weights} was trained on {run.recipe.size[0]} x {run.recipe.size[1]}"
            )
        names = [("-", name) for name in run.class_names]
        recipe = change_recipe(run.recipe, {**reading.changes(), "augment": False})
        return LoadedNetwork(run.module, run.variables, run.model, names, recipe)
    module, variables, side = load_model(
        network.model, network.weights, reading.size, option=network.option, classes=network.classes, **options
    )
    recipe = change_recipe(fzoo.recipe(network.model, side), reading.changes())
    return LoadedNetwork(module, variables, network.model, None, recipe)


def load_model(
    model: str,
    weights: str,
    size: int | None,
    *,
    option: Sequence[str] | None,
    include_top: bool = True,
    classes: int | None = None,
) -> tuple[Any, Any, tuple[int, int]]:
    """Load a network; what the command leaves out is what the weights say, or the model's default.

    Returns:
        (module, variables, height and width of its images).
    """
    import fzoo
    from fzoo.weights import read_description

    usual = fzoo.spec(model).input_size
    options = parse_options(model, option)
    if not include_top:
        options["include_top"] = False
    if classes is not None:
        options["classes"] = classes
    described = None if weights == "imagenet" else read_description(weights)
    shape = described.options.get("input_shape") if described and size is None else None
    if not shape or None in shape:
        options["input_shape"] = (size or usual, size or usual, 3)
    module, variables = fzoo.load(model, weights=weights, **options)
    return module, variables, module.example_shape[:2]


@functools.cache
def class_names(labels: Path | None, classes: int | None) -> Sequence[tuple[str, str]]:
    """(WordNet ID, label) of each class: ImageNet's, those of a file, or the bare number."""
    if labels is not None:
        try:
            names = [line.strip() for line in labels.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise ValueError(f"{labels} is not a text file, one name a line expected") from None
        if classes is not None and len(names) != classes:
            raise ValueError(f"{labels} has {len(names)} names, {classes} expected, one a line")
        return [("-", name) for name in names]
    if classes not in (None, 1000):
        return [("-", str(i)) for i in range(classes)]
    from fzoo.images.labels import class_index

    return class_index()


def join_processes(distributed: str | None) -> tuple[int, int]:
    """(number of this process, how many there are)."""
    from fzoo.inference.devices import start_distributed

    return (0, 1) if distributed is None else start_distributed(distributed)
