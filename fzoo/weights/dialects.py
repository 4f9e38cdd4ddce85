"""How the versions of Keras wrote the same thing: names of options, calls of layers, activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

#: (layer, the number of its call, the number of the output).
Reference = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a layer.

    Attributes:
        inputs: the tensors that it takes.
        arguments: what else it is called with, by name or position.
    """

    inputs: tuple[Reference, ...]
    arguments: Mapping[Any, Any]


#: Arguments of a call that play no part where they are these.
INERT_ARGUMENTS = {"training": (None, False), "mask": (None,), "name": None}


def calls_of(name: str, entry: Mapping[str, Any]) -> list[Call]:
    """Return the calls of a layer; one without inputs, of an input, is one, too."""
    nodes = entry.get("inbound_nodes") or []
    if not isinstance(nodes, list):
        raise ValueError(f"{name}: its connections can't be read")
    return [call_of(name, node) for node in nodes] or [Call((), {})]


def call_of(name: str, node: Any) -> Call:
    """Read a call as Keras 3 writes it, {"args": ..., "kwargs": ...}, or as those before, [[layer, 0, 0, {}], ...]."""
    inputs: list[Reference] = []
    arguments: dict[Any, Any] = {}
    if isinstance(node, Mapping):
        for position, value in enumerate(node.get("args") or []):
            found = tensors_in(value)
            inputs += found
            if not found:
                arguments[position] = value
        keywords = node.get("kwargs") or {}
    elif isinstance(node, list):
        items = node if all(isinstance(item, list) for item in node) else [node]
        inputs, keywords = references(items), {}
        for item in items:
            keywords |= item[3] if len(item) > 3 and isinstance(item[3], dict) else {}
    else:
        raise ValueError(f"{name}: its connections can't be read")
    for key, value in keywords.items():
        inert = INERT_ARGUMENTS.get(key, ())
        if inert is not None and value not in inert:
            arguments[key] = value
    return Call(tuple(inputs), arguments)


def tensors_in(value: Any) -> list[Reference]:
    """Return the tensors that an argument of Keras 3 is: one, a list of them, or none."""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        return [reference for each in value for reference in tensors_in(each)]
    if isinstance(value, Mapping) and value.get("class_name") == "__keras_tensor__":
        config = value.get("config")
        return references([config.get("keras_history")] if isinstance(config, Mapping) else [None])
    return []


def references(listed: Any) -> list[Reference]:
    """Read a list of [layer, call, output]; Keras 3 writes a single one without the list around it."""
    if isinstance(listed, list) and len(listed) == 3 and isinstance(listed[0], str):
        listed = [listed]
    if not isinstance(listed, list):
        raise ValueError("the connections of its layers can't be read")
    found = []
    for item in listed:
        fits = isinstance(item, list) and len(item) >= 3 and isinstance(item[0], str)
        if not fits or not all(type(n) is int and n >= 0 for n in item[1:3]):
            raise ValueError(f"{item!r:.80} is not the output of a layer")
        found.append((item[0], item[1], item[2]))
    return found


def translate(kind: str, config: Mapping[str, Any], version: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """Return a layer's class and options as today's Keras would write them."""
    return kind, dict(config)
