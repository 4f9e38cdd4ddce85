"""What a file says of the network whose weights it holds: its family and all options, as JSON.

An option may change what a network computes and no array (a division in front, an activation at the end), so arrays
alone don't tell whether they are read as they were meant.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import jax.numpy as jnp

from fzoo.layers.activations import ACTIVATIONS
from fzoo.layers.classifier import Classifier, Head
from fzoo.layers.options import RATE
from fzoo.layers.record import FUSIONS, Prepared
from fzoo.types import Json, Options
from fzoo.weights.files import WeightsMismatch

#: Which form of the description this is; a later fzoo may have others. An optimized network's is a form of its own.
FORMAT, OPTIMIZED = 1, 2

#: The most characters of a description: HDF5's limit for an attribute, less what else is in its header.
MOST = 60_000

#: Fields of a module that say nothing of its weights.
NO_OPTIONS = ("parent", "name", "prepared", "precision", "remat", "plain_convolutions", "axis_name")

#: Options that older versions don't know: a file has them only where they are not the default.
LATER = ("param_dtype", "output_stride")

#: What belongs to the end of a network, which a caller may ask for in another form than the file's.
ENDS = ("include_top", "classes", "head", "pooling", "classifier_activation")

#: Options that never change what a network with given weights computes in inference, beside rates of dropout, or how
#: densely alone.
FREE = ("dtype", "param_dtype", "output_stride", "default_size", "prefix", "layer_scale_init_value", "tag")


@dataclasses.dataclass(frozen=True)
class Description:
    """A file's network.

    Attributes:
        source: the file, for messages.
        family: the name of its class.
        options: all of them but `unsaid`, as JSON has them.
        unsaid: options that no file can hold: a function of the user's own as the activation, a graph.
        prepared: how the network differs, where `optimize_for_inference` made it.
    """

    source: str
    family: str
    options: Mapping[str, Json]
    unsaid: tuple[str, ...]
    prepared: Prepared | None = None

    def options_of(self, family: type[Classifier]) -> dict[str, Any]:
        """Return the options as the family's fields have them.

        Raises:
            WeightsMismatch: this is no such network, or the description is damaged.
        """
        fields = {field.name: field for field in dataclasses.fields(family)}
        unknown = [name for name in (*self.options, *self.unsaid) if name not in fields or name in NO_OPTIONS]
        if unknown:
            raise WeightsMismatch(
                f"{self.source} says {unknown[0]!r} of its {self.family}, which has no such option", []
            )
        try:
            return {name: from_json(name, value, fields[name].default) for name, value in self.options.items()}
        except (TypeError, ValueError, AttributeError, OverflowError) as e:
            raise WeightsMismatch(f"{self.source}: what it says of its network is damaged: {e}", []) from e


def describe(module: Classifier) -> str:
    """Return a network's family and options as JSON, the same for equal networks in every process.

    Raises:
        ValueError: an option that JSON can't hold.
    """
    options, unsaid = {}, []
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name in NO_OPTIONS or (field.name in LATER and value == field.default):
            continue
        if field.name == "classifier_activation" and callable(value):
            names = [name for name, function in ACTIVATIONS.items() if function is value]
            if not names:
                unsaid.append(field.name)
                continue
            value = names[0]
        try:
            options[field.name] = to_json(field.name, value)
        except ValueError:
            unsaid.append(field.name)
    content = {"format": FORMAT, "family": type(module).__name__, "options": options, "unsaid": unsaid}
    if module.prepared:
        content |= {"format": OPTIMIZED, "prepared": prepared_to_json(module.prepared)}
    text = json.dumps(content)
    if len(text) > MOST:
        raise ValueError(f"the options of this {type(module).__name__} take {len(text)} characters, more than {MOST}")
    return text


def parse(text: str | None, source: str) -> Description | None:
    """Read what `describe` wrote; None gives None.

    Raises:
        WeightsMismatch: it is damaged, or of a later fzoo.
    """
    if text is None:
        return None
    try:
        fields = json.loads(text) if len(text) <= MOST else None
    except (ValueError, RecursionError) as e:
        raise WeightsMismatch(f"{source}: what it says of its network is damaged: no JSON", []) from e
    if not isinstance(fields, dict) or not isinstance(fields.get("format"), int):
        raise WeightsMismatch(f"{source}: what it says of its network is damaged: no format", [])
    if fields["format"] not in (FORMAT, OPTIMIZED):
        raise WeightsMismatch(f"{source} describes its network in format {fields['format']}: a later fzoo reads it", [])
    family, options, unsaid = fields.get("family"), fields.get("options"), fields.get("unsaid", [])
    if not isinstance(family, str) or not isinstance(options, dict) or not isinstance(unsaid, list):
        raise WeightsMismatch(f"{source}: what it says of its network is damaged: family, options or unsaid", [])
    prepared = None
    if fields["format"] == OPTIMIZED:
        try:
            prepared = prepared_from_json(fields["prepared"])
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise WeightsMismatch(f"{source}: what it says of its network is damaged: prepared", []) from e
    return Description(source, family[:80], options, tuple(str(name)[:80] for name in unsaid), prepared)


def prepared_to_json(prepared: Prepared) -> dict[str, Json]:
    """Return how an optimized network differs, as JSON holds it, in an order of its own."""
    sets = ("biased", "folded", "scaled")
    lists = ("tiles", "gone", *(["forms"] if prepared.forms else []))  # where it was tuned
    rows = {name: [list(row) for row in getattr(prepared, name)] for name in lists}
    tuned = {} if prepared.fusions is None else {"fusions": prepared.fusions}
    return {name: sorted(getattr(prepared, name)) for name in sets} | rows | tuned


def prepared_from_json(value: Mapping[str, Json]) -> Prepared:
    """Return what `prepared_to_json` got; a ValueError, KeyError or TypeError for what it can't have given."""
    biased, folded, scaled = (frozenset(value[name]) for name in ("biased", "folded", "scaled"))
    tiles, gone = (tuple((one, other) for one, other in value[name]) for name in ("tiles", "gone"))
    forms = tuple((layer, form) for layer, form in value.get("forms", ()))
    fusions = value.get("fusions")
    texts = [*biased, *folded, *scaled, *itertools.chain(*gone, *forms), *(name for name, _ in tiles)]
    if not all(isinstance(text, str) for text in texts) or not all(tile in (2, 4) for _, tile in tiles):
        raise ValueError("no names of layers, or no tiles")
    if fusions is not None and fusions not in FUSIONS:
        raise ValueError("another choice of what YNNPACK gets")
    return Prepared(biased, folded, scaled, tiles, gone, forms, fusions)


def untuned(prepared: Prepared | None) -> Prepared | None:
    """Leave out what changes no array: where a network was tuned, how its convolutions are computed."""
    return None if prepared is None else dataclasses.replace(prepared, forms=(), fusions=None)


def check_same(description: Description | None, module: Classifier) -> None:
    """Raise WeightsMismatch where a file's network computes something else than this one would with its arrays.

    A network without the top takes a file with one; without the activation, or without the pooling, it gives what comes
    before. What changes nothing in inference is not compared, nor the size of images where any will do.
    """
    if description is None:
        return
    if description.family not in (parent.__name__ for parent in type(module).__mro__):
        raise WeightsMismatch(f"{description.source} is of {description.family}, not of {type(module).__name__}", [])
    if untuned(description.prepared) != untuned(module.prepared):
        theirs = "an optimized network" if description.prepared else "a plain network"
        ours = "a plain one" if not module.prepared else "another" if description.prepared else "an optimized one"
        raise WeightsMismatch(f"{description.source} is of {theirs}, {ours} given: fzoo.load makes the file's", [])
    usual = {field.name: field.default for field in dataclasses.fields(module) if field.name not in NO_OPTIONS}
    before = {name: value for name, value in usual.items() if name not in description.unsaid}  # there was the option
    theirs = before | description.options_of(type(module))
    for name, value in theirs.items():
        ours = getattr(module, name)
        if is_other(name, value, ours, theirs, module):
            hint = " or include_top=False" if name in ENDS and module.include_top else ""
            raise WeightsMismatch(
                f"{description.source} is of {description.family} with {name}={value!r}, {name}={ours!r} given: "
                f"the file's{hint} would do",
                [],
            )


def is_other(name: str, theirs: Any, ours: Any, options: Options, module: Classifier) -> bool:
    """Tell whether an option of a network makes it another than the file's."""
    (field,) = (candidate for candidate in dataclasses.fields(module) if candidate.name == name)
    if name in FREE or name == "include_top" or field.metadata.get("check") is RATE:
        return False  # a top that is missing is missed among the arrays
    if name == "pooling":
        return None not in (theirs, ours) and theirs != ours
    if name in ENDS and not (module.include_top and options.get("include_top")):
        return False
    if name == "classifier_activation":
        return ours is not None and theirs != ours and not (callable(ours) and ACTIVATIONS.get(theirs) is ours)
    if name == "head":
        return without_dropout(theirs) != without_dropout(ours)
    if name == "input_shape":
        fixed = module.fixed_size and module.own_top
        there = module.clone(input_shape=theirs).example_shape
        return there != module.example_shape if fixed else there[2] != module.example_shape[2]
    return theirs != ours


def without_dropout(head: Head | None) -> Head | None:
    """Return a head as it computes in inference."""
    return head and dataclasses.replace(head, dropout=0.0)


def to_json(name: str, value: Any) -> Json:
    """Return an option as JSON holds it."""
    if name in ("dtype", "param_dtype"):
        return jnp.dtype(value).name
    if isinstance(value, Head):
        return dataclasses.asdict(value)
    if isinstance(value, (list, tuple)):
        return [to_json("", item) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise ValueError(f"{name}={value!r} can't be written into a file of weights: a plain value expected")


def from_json(name: str, value: Json, default: Any) -> Any:
    """Return what `to_json` got."""
    if name in ("dtype", "param_dtype"):
        if not jnp.issubdtype(jnp.dtype(value), jnp.floating):
            raise ValueError(f"dtype {value!r}")
        return getattr(jnp, value)
    if name == "head" and value is not None:
        return Head(**value)
    if not isinstance(value, list):
        return value
    if isinstance(default, tuple) and default and isinstance(default[0], tuple):  # rows of a table
        return tuple(type(default[0])(*row) for row in value)
    return tuple(value)
