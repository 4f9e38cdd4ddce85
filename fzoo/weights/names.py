"""The names of layers in a file that keeps them by class alone, from the configuration of its model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from fzoo.layers.conventions import snake_case
from fzoo.types import Json
from fzoo.weights.config import read_configuration
from fzoo.weights.files import Contents, FileLayer, by_number, open_layers
from fzoo.weights.graph import layer_entries


@contextlib.contextmanager
def open_named_layers(path: str | os.PathLike) -> Iterator[Contents]:
    """Open a Keras file as `open_layers` does; layers that it has no names for get those of its configuration.

    Where it has no configuration that tells them, they stay without.
    """
    with open_layers(path) as contents:
        yield dataclasses.replace(contents, layers=name_layers(contents.layers, path))


def are_named(layers: Sequence[FileLayer]) -> bool:
    """Tell whether all layers have names of their own, those inside of models too."""
    return all(layer.has_name and are_named(layer.parts) for layer in layers)


def name_layers(layers: list[FileLayer], path: str | os.PathLike) -> list[FileLayer]:
    """Give layers their names by the configuration in a file or beside it; the same layers where it tells none."""
    if are_named(layers):
        return layers
    try:
        configuration = read_configuration(path)
        if configuration is None:
            return layers
        return name_by_class(layers, configuration.model["class_name"], configuration.model["config"])
    except ValueError:  # the configuration is damaged, or of another model: the arrays may be read without
        return layers


def name_by_class(layers: Sequence[FileLayer], kind: str, config: Json) -> list[FileLayer]:
    """Give the layers of a model, which its file has by class, their names in its configuration.

    Raises:
        ValueError: the configuration is not this model's, or does not tell which layers of a class have arrays.
    """
    entries: dict[str, list[tuple[str, Mapping[str, Json]]]] = {}
    for name, entry in layer_entries(kind, config).items():
        entries.setdefault(snake_case(entry["class_name"].rpartition(">")[2]), []).append((name, entry))
    renamed = []
    for group in dict.fromkeys(layer.kind for layer in layers):
        theirs, known = [layer for layer in layers if layer.kind == group], entries.get(str(group), [])
        if not all(layer.has_name for layer in theirs) and len(known) != len(theirs):  # some may have no arrays
            numbers = [by_number(layer.name)[1] if re.search(r"_\d+$", layer.name) else 0 for layer in theirs]
            if max(numbers) >= len(known):
                raise ValueError(f"its configuration has {len(known)} layers of the class {group}")
            known = [known[number] for number in numbers]
        for layer, (name, entry) in zip(theirs, known, strict=True):
            parts = name_by_class(layer.parts, entry["class_name"], entry["config"]) if layer.parts else ()
            renamed.append(dataclasses.replace(layer, name=name, parts=tuple(parts), has_name=True))
    return renamed
