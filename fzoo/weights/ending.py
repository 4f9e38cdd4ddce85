"""How the model that a file describes ends: its classes, and the activation that gives their probabilities."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from fzoo.layers.activations import ACTIVATIONS, Activation, activation_function
from fzoo.types import Json, Options
from fzoo.weights.config import Configuration, read_configuration
from fzoo.weights.dialects import translate
from fzoo.weights.files import MAX_DEPTH, WeightsMismatch
from fzoo.weights.graph import MODELS, connections, layer_entries

#: Layers between the last with weights and the end, which change no number.
PASSING = ("Reshape", "Flatten", "Dropout")


class Ending(NamedTuple):
    """How a classifier ends.

    Attributes:
        classes: how many.
        activation: Keras's name; None for none.
    """

    classes: int
    activation: str | None


def classifier_ending(configuration: Configuration) -> Ending | None:
    """Find how the classifier ends that a configuration describes.

    Only what decides the end is looked at, so that a layer that is not known elsewhere does no harm.

    Returns:
        None where the model does not end as a classifier does, in an activation that has a name, or where it holds
        another network, of which its end is none.
    """
    try:
        return ending_of(configuration.model["class_name"], configuration.model["config"], configuration.version, 0)
    except (ValueError, LookupError, TypeError, AttributeError):  # of a damaged configuration, which others refuse
        return None


def ending_of(kind: str, config: Json, version: tuple[int, int], depth: int) -> Ending | None:
    """Find the ending of a model, perhaps inside of a model."""
    if kind not in MODELS or depth > MAX_DEPTH:
        return None
    entries = layer_entries(kind, config)
    calls, outputs = connections(kind, config, entries, version)
    if len(outputs) != 1:
        return None
    name, activation = outputs[0].layer, None
    others = [other for other, entry in entries.items() if entry["class_name"] in ("Functional", "Model")]
    if any(other != name for other in others):
        return None
    for _ in entries:
        entry = entries[name]
        if entry["class_name"] in MODELS:
            inner = ending_of(entry["class_name"], entry["config"], version, depth + 1)
            return inner if activation is None else None
        layer, options = translate(entry["class_name"], entry["config"], version)
        if layer in ("Dense", "Conv2D"):
            return last_layer(layer, options, activation)
        if layer in ("Activation", "Softmax") and activation is None and options.get("axis", -1) == -1:
            activation = options.get("activation", "softmax")
        elif layer not in PASSING:
            return None
        (call,) = calls[name]
        (tensor,) = call.inputs
        name = tensor.layer
    return None


def last_layer(layer: str, options: Mapping[str, Json], activation: Json) -> Ending | None:
    """Read the layer with weights that a classifier ends with, and the activation, which may come after it."""
    classes, own = options.get("units" if layer == "Dense" else "filters"), options.get("activation") or "linear"
    if activation is not None and own != "linear":
        return None
    activation = own if activation is None else activation
    if not isinstance(activation, str) or activation not in ACTIVATIONS or type(classes) is not int or classes < 1:
        return None
    return Ending(classes, None if activation == "linear" else activation)


def read_ending(path: str | os.PathLike) -> Ending | None:
    """Read how the classifier of a Keras file ends; None where the file does not tell."""
    try:
        configuration = read_configuration(path)
    except ValueError:  # what beside weights is damaged, or not a model's, says nothing of them
        return None
    return None if configuration is None else classifier_ending(configuration)


def ending_options(path: str | os.PathLike, given: Options) -> dict[str, Any]:
    """Read what a Keras file says of its classifier that the caller does not: options of `fzoo.create`.

    Args:
        path: of the file.
        given: options of the caller's.

    Raises:
        WeightsMismatch: the caller gives another activation than the file's.
    """
    ending = read_ending(path) if given.get("include_top", True) else None
    if ending is None:
        return {}
    if "classifier_activation" in given:
        check_activation(ending, given["classifier_activation"], path)
    options = {"classes": ending.classes, "classifier_activation": ending.activation}
    usual = {"classes": 1000, "classifier_activation": "softmax"}
    return {name: value for name, value in options.items() if name not in given and value != usual[name]}


def check_activation(ending: Ending, activation: Activation, path: str | os.PathLike) -> None:
    """Raise WeightsMismatch where an activation is not a file's; None, which gives what comes before it, may be."""
    if activation in (None, "linear") or activation_function(activation) is activation_function(ending.activation):
        return
    raise WeightsMismatch(
        f"{path} ends in {ending.activation or 'no activation'}, classifier_activation={activation!r} given: the "
        "file's would do; module.clone(classifier_activation=...) changes a loaded network on purpose",
        [],
    )
