"""A network as data: the steps of a Keras graph, each a call of a layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from fzoo.errors import unknown

#: (name, value) of what a layer is asked for beyond the defaults of its class: plain values, which can be hashed.
StepOptions = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """A call of a layer.

    Attributes:
        name: the layer's; of a layer inside of a model inside of the network, the path: "mobilenetv2/Conv1".
        kind: its Keras class, a key of `rules.RULES`.
        options: (name, value) of what was asked for beyond the defaults of the class.
        inputs: the numbers of the steps whose outputs it takes.
        call: which of the layer's calls it is, as Keras counts them, from 0.
    """

    name: str
    kind: str
    options: StepOptions
    inputs: tuple[int, ...]
    call: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """The steps of a network in an order of execution: each after those it takes its inputs from.

    Two graphs are equal if their steps are.

    Attributes:
        steps: the calls of its layers.
        outputs: the numbers of the steps whose outputs are the network's.
        inputs: the shape of each input without the batch, None for what is left open, in the order of its InputLayers
            among the steps.
        layers: the names of its layers in Keras's order, those of a model inside before that model's own.
        source: the configuration that it was made of, as JSON: (version of Keras, configuration).
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    inputs: tuple[tuple[int | None, ...], ...]
    layers: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self):
        # Once: a module is hashed at each call of a compiled function.
        object.__setattr__(self, "_hash", hash((self.steps, self.outputs, self.inputs)))

    def __hash__(self) -> int:
        return self._hash  # pyright: ignore[reportAttributeAccessIssue]

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how it is made anew in another process, where texts have other hashes."""
        return Graph, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        mine = (self.steps, self.outputs, self.inputs)
        return isinstance(other, Graph) and mine == (other.steps, other.outputs, other.inputs)

    def __repr__(self) -> str:
        """Write it in short: a module's repr has it."""
        return f"Graph({len(self.steps)} steps)"

    @functools.cached_property
    def classifier(self) -> int | None:
        """The number of the step whose activation the network ends with; None where it ends otherwise.

        That activation is the module's `classifier_activation`, so that a copy of the module can do without.
        """
        if len(self.outputs) != 1:
            return None
        number = self.outputs[0]
        while self.steps[number].kind == "Model":
            (number,) = self.steps[number].inputs
        ends = self.steps[number].kind in ("Dense", "Activation", "Softmax")
        alone = sum(step.name == self.steps[number].name for step in self.steps) == 1
        return number if ends and alone else None

    def number(self, name: str) -> int:
        """Find the step of a call by its name: "dense", and "dense:1" for the second call of that layer."""
        layer, _, call = name.rpartition(":")
        for key in (name, 0), (layer, int(call) if call.isdecimal() else -1):
            for number, step in enumerate(self.steps):
                if (step.name, step.call) == key:
                    return number
        raise ValueError(unknown("layer", name, [step.name for step in self.steps]))

    @functools.cached_property
    def input_names(self) -> tuple[str, ...]:
        """The names of its inputs."""
        return tuple(step.name for step in self.steps if step.kind == "InputLayer")

    @functools.cached_property
    def shared(self) -> frozenset[str]:
        """Names of the layers that are called more than once."""
        seen: set[str] = set()
        return frozenset(step.name for step in self.steps if step.name in seen or seen.add(step.name))
