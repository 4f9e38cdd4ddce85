"""Which network of the families a file's weights are of, and with which options."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fzoo.files import one_line
from fzoo.models.keras_model import of_a_family
from fzoo.models.spec import ModelSpec
from fzoo.pretrained.imagenet import is_published, needed
from fzoo.pretrained.whole import WholeFile
from fzoo.types import Options
from fzoo.weights import (
    WeightsMismatch,
    kind,
    preprocessing_in,
    read_description,
    weights_file,
)
from fzoo.weights.description import ENDS, Description
from fzoo.weights.ending import Ending, check_activation, ending_options
from fzoo.weights.mapping import match, own_preprocessing
from fzoo.weights.names import open_named_layers
from fzoo.zoo import create, family_defaults, list_models, spec


def network_of(
    weights: str | os.PathLike,
    name: str | None = None,
    given: Options = MappingProxyType({}),
    whole: WholeFile | None = None,
) -> tuple[str, Options]:
    """Find out which network a file's weights are of.

    Args:
        weights: a file, or the folder of a fine-tuning.
        name: of the model; may be left out where the file tells it.
        given: options of the caller's, which come before the file's.
        whole: what the file describes, if it is a whole model of Keras's.

    Returns:
        (name, options for `create`).

    Raises:
        ValueError: it is of another model, or does not tell; a damaged file.
        OSError: it is not there.
    """
    if name is not None:
        spec(name)
    description, path = of_a_family(read_description(weights)), weights_file(weights)
    if description is not None:
        name, options = described_network(description, name)
        if "include_top" in given and given["include_top"] != options["include_top"]:
            options = {key: value for key, value in options.items() if key not in ENDS}
        unsaid = [option for option in description.unsaid if option not in given and given.get("include_top", True)]
        if unsaid:
            raise WeightsMismatch(f"{weights} ends in a function that no file can hold: {unsaid[0]}=... expected", [])
        return name, {**options, **given}
    if name is None and whole is not None:
        raise ValueError(
            f"{weights} holds a model of its own: fzoo.load_model(path) makes it; or the name of one of fzoo"
        )
    if name is None:
        raise ValueError(f"{weights} does not tell which model it is of: the name of one expected")
    if is_published(name, weights):
        return name, {**needed(name), **given}
    if whole is not None:
        given = {**options_of_file(name, path, whole, given), **given}
    if kind(path) != "keras" or not SHOWN.intersection(family_defaults(spec(name))):
        return name, dict(given)
    preprocessing = preprocessing_in(create(name, **given), path)
    for option in needed(name):
        if preprocessing is None and option not in given:
            raise ValueError(
                f"{path} does not list the layers without arrays, by which {option} is known: give {option}=True if "
                "Keras's own weights were the network's start, otherwise False"
            )
    try:
        return name, {**shown_options(name, preprocessing, given), **given}
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def options_of_file(name: str, path: Path, whole: WholeFile, given: Options) -> dict[str, Any]:
    """Read the options of a model that a whole model of Keras's shows: its size, its end, and a published variant.

    Args:
        name: of the model.
        path: of the file.
        whole: what it describes.
        given: options of the caller's, which it need not show.

    Raises:
        WeightsMismatch: the caller gives another activation than the file's.
    """
    options: list[dict[str, Any]] = [ending_options(path, given)]
    nested = any(plan.kind in ("Functional", "Model") for plan in whole.plans)
    if nested and whole.module is not None and given.get("include_top", True):  # a backbone, and a head, perhaps ours
        options += [{"classes": whole.module.classes, "classifier_activation": whole.module.classifier_activation}]
    if whole.module is not None and len(whole.module.graph.inputs) == 1 and (not nested or len(options) > 1):
        usual = create(name, **{**options[-1], **given, "input_shape": given.get("input_shape")})
        if whole.module.image_shape != (usual.example_shape if usual.known_size else (None, None, 3)):
            options[-1]["input_shape"] = whole.module.image_shape
    with open_named_layers(path) as contents:
        for option, variant in itertools.product(reversed(options), variants(name)):
            if variant.keys() & given.keys():
                continue
            try:
                within = match(create(name, **{**option, **variant, **given}), contents, str(path)).within
            except ValueError:
                continue
            if option is options[0]:
                return {**option, **variant}
            if within is None:
                ending = Ending(option["classes"], option["classifier_activation"])
                check_activation(ending, given.get("classifier_activation"), path)
                return {**option, **variant}
    return options[0]


def variants(name: str) -> Sequence[Options]:
    """List options of a model's published files, as far as they change its arrays; the default ones, {}, come first."""
    defaults = family_defaults(spec(name))
    changes = [{}]
    for file in spec(name).weight_files:
        changed = {k: v for k, v in file.options.items() if k != "divide_by_std" and defaults[k] != v}
        if changed not in changes:
            changes.append(changed)
    return changes


def described_network(description: Description, name: str | None = None) -> tuple[str, Options]:
    """Find the model, and all options, of a file that fzoo wrote; raises as `network_of`."""
    family = [record for record in map(spec, list_models()) if record.family.__name__ == description.family]
    if not family:
        raise WeightsMismatch(
            f"{description.source} is of {description.family!r}, which is none of fzoo's families", []
        )
    options = description.options_of(family[0].family)
    try:
        create(family[0].name, **options)
    except (TypeError, ValueError, ArithmeticError) as e:
        raise ValueError(f"{description.source}: what it says of its network can't be: {one_line(e)}") from e

    def nearness(record: ModelSpec) -> tuple[int, int]:
        """Count how many of its options the file has; of models alike in that, the smallest is the nearest."""
        usual = family_defaults(record)
        return sum(options.get(key, value) == value for key, value in usual.items()), -record.parameters

    def is_exact(record: ModelSpec) -> bool:
        free = record.family.weightless
        return all(options.get(key) == value for key, value in record.options.items() if key not in free)

    same_tag = [record for record in family if record.tag == options.get("tag")]
    models = [record.name for record in same_tag if is_exact(record)]
    models = models or [
        record.name for record in sorted(same_tag or family, key=nearness, reverse=True)
    ]  # a size of one's own
    if name is not None and (spec(name) not in family or (name not in models)):
        raise WeightsMismatch(f"{description.source} is of {models[0]}, not of {name}", [])
    return name or models[0], options


#: Options of families that show by layers which need no array.
SHOWN = frozenset({"divide_by_std", "include_preprocessing"})


def shown_options(name: str, preprocessing: Counter[str] | None, given: Options) -> dict[str, Any]:
    """Return what a Keras file's layers show of its network, beyond its arrays, where that is not the default.

    Args:
        name: of the model.
        preprocessing: how many layers of each kind the file has; None if it doesn't tell.
        given: options of the caller's.

    Raises:
        ValueError: they show other than what is given.
    """
    defaults = {option: value for option, value in family_defaults(spec(name)).items() if option in SHOWN}
    if preprocessing is None or not defaults:
        return {}
    values = itertools.product((True, False), repeat=len(defaults))
    choices = [dict(zip(defaults, combination, strict=True)) for combination in values]
    fitting = [c for c in choices if own_preprocessing(create(name, **{**given, **c})) == preprocessing]
    differing = [c for c in fitting if any(given.get(option, value) != value for option, value in c.items())]
    if fitting and differing == fitting:
        shown = ", ".join(f"{option}={value}" for option, value in fitting[0].items())
        raise ValueError(f"the file's layers show that it is of {name} with {shown}: leave the option out")
    return {k: v for choice in fitting[:1] for k, v in choice.items() if v != defaults[k]}
