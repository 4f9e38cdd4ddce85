"""A model, its weights and the names of its classes, as the options of a command say."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fzoo.cli.console import complain
from fzoo.cli.options import Network, Reading, parse_options

if TYPE_CHECKING:
    from fzoo.jobs.loading import LoadedNetwork
    from fzoo.layers.classifier import Classifier
    from fzoo.types import Options


def load_network(network: Network, reading: Reading, include_top: bool = True, pixels: bool = True) -> LoadedNetwork:
    """Load the network of a command, and say on standard error what was found out of it.

    Args:
        network, reading: the options of the command.
        include_top: whether a model by its name has its classifier.
        pixels: whether the network is given pixels, so that it must be known how it wants them.

    Raises:
        ValueError: these do not go together, or do not fit the weights.
    """
    from fzoo.jobs import loading

    loaded = loading.load_network(
        loading.Request(
            network.weights,
            network.model,
            functools.partial(parse_options, options=network.option),
            f"--option {network.option[0]}" if network.option else "",
            network.classes,
            network.preprocess,
            reading.size,
            reading.changes(),
            include_top,
            pixels,
            write_option,
        )
    )
    for note in loaded.notes:
        complain(note)
    return loaded


def write_option(name: str, value: object = ...) -> str:
    """Write an option as on the command line."""
    option = f"--{name.replace('_', '-')}"
    return option if value is ... else f"--no-{option[2:]}" if value is False else f"{option} {value}"


def report_taken(weights: str, model: str, options: Options, module: Classifier) -> None:
    """Say on standard error which options of a network were taken from a file; arguments as for `taken_options`."""
    from fzoo.jobs.loading import taken_options

    if taken := taken_options(weights, model, options, module):
        complain(taken)


@functools.cache  # a pipe can be read once
def class_names(labels: Path | None, classes: int | None) -> Sequence[tuple[str, str]]:
    """Return (WordNet ID, label) of each class: ImageNet's, those of a file, or the bare number."""
    if labels is not None:
        from fzoo.jobs.loading import parse_labels

        return parse_labels(labels.read_bytes(), str(labels), classes)
    if classes not in (None, 1000):
        return [("-", str(i)) for i in range(classes)]
    from fzoo.images.labels import class_index

    return class_index()


def join_processes(distributed: str | None) -> tuple[int, int]:
    """Join the processes of a run: (number of this process, how many there are)."""
    from fzoo.inference.devices import start_distributed

    return (0, 1) if distributed is None else start_distributed(distributed)
