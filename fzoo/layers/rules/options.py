"""How the configuration of a layer is read: the options that a class of Keras takes, and what each may be.

A rule reads a layer's configuration strictly: an option that it does not take is an error unless it can't matter. What
it reads are plain values, with which it later applies the layer by the methods of `Layers`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array

from fzoo.errors import unknown
from fzoo.layers.activations import ACTIVATIONS
from fzoo.layers.keras import Layers
from fzoo.layers.options import is_count, is_number
from fzoo.layers.steps import StepOptions
from fzoo.types import Json

#: What an option reads to: a number, a word, tuples of these, which can be hashed.
Plain = Any

#: A number, or numbers in tuples of equal lengths, to any depth.
Constant = float | tuple[Any, ...]

#: The default of an option that has none.
REQUIRED: Json = object()

#: What an option reads to that can't be honoured, and to of which the layer is not told.
UNFIT: Plain = object()
SILENT: Plain = object()

#: The largest count, size or margin that an option may be: what is beyond it is damage, and would take time or memory.
MAX_COUNT = 1 << 20

#: The largest window, step or factor.
MAX_SIZE = 1 << 10

#: How many numbers a constant in a configuration may have.
MAX_CONSTANTS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a Keras class.

    Attributes:
        parse: makes a plain value of what the configuration has, `UNFIT` of what can't be honoured.
        expected: in words, for the error and for the documentation.
        default: of the class; `REQUIRED` where it has none.
    """

    parse: Callable[[Json], Plain]
    expected: str
    default: Json = REQUIRED


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a Keras class is read and applied.

    Attributes:
        apply: applies the layer: (k, *inputs, name, **options).
        options: what it takes, by name.
        inputs: how many; None for one or more.
        operands: of an operation, the names of the arguments that may be tensors, in their order.
        function: of a layer that works on each value alone, what it computes: (x, **options).
    """

    apply: Callable[..., Array]
    options: Mapping[str, Option]
    inputs: int | None = 1
    operands: tuple[str, ...] = ()
    function: Callable[..., Array] | None = None


RULES: dict[str, Rule] = {}

#: Classes that are not taken for a reason, and what would do instead.
REFUSED: dict[str, str] = {
    "Lambda": "its Python code is in the file, and no code of a file is run; custom_objects={'Lambda': function} gives "
    "what it computes, or Keras's own layers in its place",
    "MultiHeadAttention": "attention is not taken",
    "GroupQueryAttention": "attention is not taken",
    "Attention": "attention is not taken",
    "AdditiveAttention": "attention is not taken",
    "LSTM": "recurrent layers are not taken",
    "GRU": "recurrent layers are not taken",
    "SimpleRNN": "recurrent layers are not taken",
    "RNN": "recurrent layers are not taken",
    "Bidirectional": "recurrent layers are not taken",
    "ConvLSTM2D": "recurrent layers are not taken",
    "CuDNNLSTM": "recurrent layers are not taken",
    "CuDNNGRU": "recurrent layers are not taken",
    "TimeDistributed": "it applies a layer to each step of a sequence, which is not taken",
    "Embedding": "it takes words, an image network has none",
    "QuantizeWrapper": "it is quantised for training; the model that went into quantize_apply is taken",
    "QuantizeWrapperV2": "it is quantised for training; the model that went into quantize_apply is taken",
    "QuantizeLayer": "it is quantised for training; the model that went into quantize_apply is taken",
    "PruneLowMagnitude": "tfmot.sparsity.keras.strip_pruning takes the wrapper off; save again after it",
    "SpectralNormalization": "the wrapper changes its kernel in training; save the layer inside of it",
    "RandomCrop": "it resizes in inference, too, in its own way; CenterCrop and Resizing are taken",
}


def register(kind: str, rule: Rule) -> None:
    """Make a class known, once."""
    if kind in RULES:
        raise ValueError(f"two rules for {kind}")
    RULES[kind] = rule


def rule(
    kind: str, common: Mapping[str, Option] | None = None, /, *, inputs: int | None = 1, **options: Option
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Register a function as what a Keras class does, with options of its own and those that it has in common."""

    def decorate(apply: Callable[..., Array]) -> Callable[..., Array]:
        register(kind, Rule(apply, {**(common or {}), **options}, inputs))
        return apply

    return decorate


def elementwise(kind: str, **options: Option) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Register a function of an array as what a Keras class does; it may stand where an activation is expected."""

    def decorate(function: Callable[..., Array]) -> Callable[..., Array]:
        def apply(k: Layers, x: Array, *, name: str, **values: Any) -> Array:
            return k.apply(kind, functools.partial(function, **values), x, name=name)

        register(kind, Rule(apply, options, function=function))
        return function

    return decorate


@dataclasses.dataclass(frozen=True)
class LayerActivation:
    """A layer that stands where an activation is expected: hashable, and equal to one with the same options."""

    kind: str
    options: StepOptions

    def __call__(self, x: Array) -> Array:
        """Apply it."""
        function = RULES[self.kind].function
        assert function is not None
        return function(x, **dict(self.options))


# -- what an option may be --------------------------------------------------------------------------------------------


def is_fitting_count(value: Json, most: int = MAX_COUNT) -> bool:
    """Tell whether this is a positive integer that is not absurd."""
    return is_count(value) and int(value) <= most


def is_finite(value: Json) -> bool:
    """Tell whether this is a finite number that float32 can hold."""
    return is_number(value) and abs(value) < 1e38


def count(default: Json = REQUIRED) -> Option:
    """Make an option that is a positive integer."""
    return Option(lambda value: int(value) if is_fitting_count(value) else UNFIT, "a positive integer", default)


def number(default: Json = REQUIRED) -> Option:
    """Make an option that is a number."""
    return Option(lambda value: float(value) if is_finite(value) else UNFIT, "a number", default)


def positive_number(default: Json = REQUIRED) -> Option:
    """Make an option that is a number above zero."""
    return Option(
        lambda value: float(value) if is_finite(value) and value > 0 else UNFIT, "a number above zero", default
    )


def rate() -> Option:
    """Make an option that is a share of what is dropped."""
    return Option(
        lambda value: float(value) if is_number(value) and 0 <= value < 1 else UNFIT, "a number from 0 to less than 1"
    )


def number_or_none() -> Option:
    """Make an option that is a number, or null."""
    return Option(lambda value: None if value is None else number().parse(value), "a number or null", None)


def flag(default: bool) -> Option:
    """Make an option that is on or off."""
    return Option(lambda value: value if isinstance(value, bool) else UNFIT, "true or false", default)


def choice(*values: str, default: Json = REQUIRED) -> Option:
    """Make an option that is one of some words, however they are capitalised."""

    def parse(value: Json) -> Plain:
        return value.lower() if isinstance(value, str) and value.lower() in values else UNFIT

    return Option(parse, " or ".join(map(repr, values)), default)


def sizes(default: Json = REQUIRED, axes: int = 2, least: int = 1) -> Option:
    """Make an option that is an integer for each of the axes of an image, or one for all; `least` or more."""

    def parse(value: Json) -> Plain:
        values = [value] * axes if type(value) is int else list(value) if isinstance(value, (list, tuple)) else []
        fits = len(values) == axes and all(type(n) is int and least <= n <= MAX_SIZE for n in values)
        return tuple(values) if fits else UNFIT

    numbers, kind = {1: "one", 2: "two"}[axes], "a positive integer" if least else "an integer"
    return Option(parse, f"{kind} or {numbers} in a list", default)


def integers_read(value: Json, least: int = -8, most: int = MAX_COUNT) -> Plain:
    """Read an integer or a list of integers as a tuple."""
    values = [value] if type(value) is int else value
    fits = isinstance(values, (list, tuple)) and len(values) <= 8
    return tuple(values) if fits and all(type(n) is int and least <= n <= most for n in values) else UNFIT


def integers(default: Json = REQUIRED, least: int = -8) -> Option:
    """Make an option that is an integer or a list of them; a tuple when it is read."""
    return Option(functools.partial(integers_read, least=least), "an integer or a list of integers", default)


def integer(default: Json = REQUIRED) -> Option:
    """Make an option that is an integer, which may be negative; also alone in a list."""

    def parse(value: Json) -> Plain:
        values = integers_read(value)
        return values[0] if values is not UNFIT and len(values) == 1 else UNFIT

    return Option(parse, "an integer", default)


def or_none(option: Option) -> Option:
    """Make of an option one that may be null, too, which is its default."""
    return Option(lambda value: None if value is None else option.parse(value), f"{option.expected}, or null", None)


def margins(axes: int = 2, default: Json = 1) -> Option:
    """Make an option that is what is added or cut: a number, (height, width) or ((top, bottom), (left, right))."""

    def both(value: Json) -> list[Json]:
        return [value, value] if type(value) is int else list(value) if isinstance(value, (list, tuple)) else []

    def parse(value: Json) -> Plain:
        sides = [value] if axes == 1 else both(value)
        pairs = [both(side) for side in sides]
        numbers = [number for pair in pairs for number in pair]
        fits = [len(pair) for pair in pairs] == [2] * axes
        fits = fits and all(type(n) is int and 0 <= n <= MAX_COUNT for n in numbers)
        return tuple(map(tuple, pairs)) if fits else UNFIT

    return Option(parse, "margins that are not negative", default)


def constants(default: Json = REQUIRED) -> Option:
    """Make an option that is a number or a list of numbers, in lists of equal lengths to any depth up to 4."""

    def parse(value: Json, depth: int = 4) -> Plain:
        if is_finite(value):
            return float(value)
        if not isinstance(value, (list, tuple)) or not depth or not 0 < len(value) <= MAX_CONSTANTS:
            return UNFIT
        items = [parse(item, depth - 1) for item in value]
        shapes = {shape_of(item) for item in items if item is not UNFIT}
        fits = (
            UNFIT not in items and len(shapes) == 1 and math.prod((len(items), *shapes.copy().pop())) <= MAX_CONSTANTS
        )
        return tuple(items) if fits else UNFIT

    return Option(parse, "a number or a list of numbers", default)


def shape_of(value: Constant) -> tuple[int, ...]:
    """Return the shape of nested tuples of numbers."""
    return (len(value), *shape_of(value[0])) if isinstance(value, tuple) else ()


def activation(default: str = "linear") -> Option:
    """Make an option that is the name of one of Keras's activations, or a layer that works on each value alone."""

    def parse(value: Json) -> Plain:
        value = "linear" if value is None else value
        if isinstance(value, str):
            return value if value in ACTIVATIONS else UNFIT
        if not isinstance(value, Mapping):
            return UNFIT
        kind, config = value.get("class_name"), value.get("config")
        if kind == "function":  # how Keras 3 writes one that has a name
            return config if isinstance(config, str) and config in ACTIVATIONS else UNFIT
        if not isinstance(kind, str) or kind not in RULES or RULES[kind].function is None:
            return UNFIT
        try:
            return LayerActivation(kind, read_options(kind, config)) if isinstance(config, Mapping) else UNFIT
        except ValueError:
            return UNFIT

    return Option(parse, "an activation of Keras's", default)


def ignored(reason: str) -> Option:
    """Make an option that changes nothing in what a layer computes, for the reason given."""
    return Option(lambda given: SILENT, f"anything: {reason}", None)


def exactly(value: Json, expected: str, *others: Json) -> Option:
    """Make an option of which one value alone is honoured (or those that mean the same); a layer is not told of it."""
    return Option(lambda given: SILENT if given in (value, *others) else UNFIT, expected, value)


PADDING = choice("valid", "same", default="valid")
LAST = exactly("channels_last", "'channels_last'", None)

# -- reading ----------------------------------------------------------------------------------------------------------

#: Options that play no part in what a layer computes in inference.
INERT = frozenset(
    (
        *("name", "trainable", "dtype", "batch_input_shape", "batch_shape", "input_dtype", "input_shape", "sparse"),
        *("ragged", "seed", "autocast", "build_config", "input_spec", "optional", "synchronized", "fused", "input_dim"),
        *("force_generator", "batch_size", "value_range", "bounding_box_format"),
    )
)

#: Endings of such options.
INERT_ENDINGS = ("_initializer", "_regularizer", "_constraint")

#: Options that are honoured where they ask for nothing.
NOTHING = (None, False, [], {})


def read_options(kind: str, config: Mapping[str, Json]) -> StepOptions:
    """Read the configuration of a layer.

    Raises:
        ValueError: its class, an option of it, or an option's value can't be honoured.
    """
    if kind in REFUSED:
        raise ValueError(REFUSED[kind])
    if kind not in RULES:
        raise ValueError(
            f"{unknown('class of Keras', kind, public_kinds())} custom_objects={{{kind!r}: function}} gives what "
            "a class of your own computes"
        )
    options = RULES[kind].options
    for key, value in config.items():
        inert = key in INERT or key.endswith(INERT_ENDINGS)
        if key not in options and not inert and value not in NOTHING:
            raise ValueError(f"{key}={value!r:.80}, which is not known of {kind}")
    pairs = []
    for key, option in options.items():
        value = config.get(key, option.default)
        if value is REQUIRED:
            raise ValueError(f"{key} is missing")
        value = option.parse(value)
        if value is UNFIT:
            raise ValueError(f"{key}={config.get(key)!r:.80} given, {option.expected} expected")
        if value is not SILENT:
            pairs.append((key, value))
    return tuple(pairs)


def public_kinds() -> list[str]:
    """List the classes that a user may write."""
    return [kind for kind in RULES if "." not in kind and kind not in ("Model", "Custom")]


def check_rank(x: Array, *ranks: int) -> None:
    """Raise ValueError unless a tensor has so many axes, the batch's among them."""
    if x.ndim not in ranks:
        raise ValueError(f"a tensor of shape (N, {', '.join(map(str, x.shape[1:]))}) given, {ranks[0]} axes expected")


def table() -> list[tuple[str, str]]:
    """Return (class, its options in words) of all that is taken, operations by the names of `keras.ops` after these."""
    rows = []
    for kind in [*sorted(public_kinds()), *sorted(kind for kind in RULES if kind.startswith("ops."))]:
        words = [f"`{name}`: a tensor or numbers" for name in RULES[kind].operands]
        words += [f"`{name}`: {option.expected}" for name, option in RULES[kind].options.items()]
        rows.append((kind, "; ".join(words)))
    return rows
