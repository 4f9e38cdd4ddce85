"""Networks with their variables: those that Keras published, and those of users' files."""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from fzoo.files import one_line
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import random_variables, trace
from fzoo.models.keras_model import KerasModel, keras_model, of_a_family
from fzoo.models.spec import ModelSpec
from fzoo.weights import (
    WeightsMismatch,
    check_fit,
    kind,
    load_planned,
    load_variables,
    preprocessing_in,
    read_description,
    weights_file,
)
from fzoo.weights.config import read_configuration
from fzoo.weights.description import ENDS, Description
from fzoo.weights.download import Proof, fetch, file_hash
from fzoo.weights.ending import ending_options
from fzoo.weights.graph import Plan, build_graph
from fzoo.weights.mapping import own_preprocessing
from fzoo.weights.published import WeightFile
from fzoo.zoo import VARIANTS, create, family_defaults, list_models, spec


def load(
    name: str | None = None,
    *,
    weights: str | os.PathLike | None = "imagenet",
    rng: jax.Array | None = None,
    **create_options: Any,
) -> tuple[Classifier, dict[str, Any]]:
    """Make a model's network with its variables.

    A file that fzoo wrote carries its network's options: they are taken from it, but for those that are given here. One
    that is given and makes it another network is an error; a network without its top (`include_top=False`), without the
    activation (`classifier_activation=None`) or for another size is not, nor are dropout and dtype. What a loaded
    network computes can be changed on purpose: `module.clone(classifier_activation="sigmoid")`.

    A whole model of Keras's says its classes and its classifier's activation, which are taken as well. A file of
    Keras's has no other description, but its layers show EfficientNet's division by the standard deviation
    (Keras adds it for "imagenet" alone) and a preprocessing that was left out. All of EfficientNet's published files,
    wherever they lie, come with `divide_by_std=True`, which their training wants.

    Args:
        name: Keras's name of the model. May be left out where the weights tell it.
        weights: "imagenet" for what Keras published (downloaded once into Keras's own cache), the path of a file that
            Keras or `save_variables` wrote, the folder of a fine-tuning, or None for random ones, with Keras's
            initialisers.
        rng: a `jax.random.key` for `weights=None`; key 0 by default.
        **create_options: see `create`.

    Returns:
        (module, variables), for `module.apply`, `predict` and `features`.

    Raises:
        ValueError: a bad option, no published file for these options, or a file that does not fit or is of another
            network.
        OSError: the file is not there, or can't be downloaded.
    """
    if weights is not None and rng is not None:
        raise ValueError(f"rng goes with weights=None, weights={str(weights)!r} given")
    if weights is not None and (not isinstance(weights, (str, os.PathLike)) or not os.fspath(weights)):
        raise ValueError(f"weights={weights!r} given, 'imagenet', None or a path expected")
    if weights is not None and weights != "imagenet":
        name, options = network_of(weights, name, create_options)
        module = create(name, **options)
        try:
            trace(module)
        except (ValueError, TypeError, ArithmeticError, MemoryError) as e:  # sizes that a stranger's file asks for
            raise ValueError(f"{weights}: no such network can be made: {one_line(e)}") from e
        return module, load_variables(module, weights)
    if name is None:
        raise ValueError(f"the name of a model expected with weights={weights!r}; fzoo.list_models() has them")
    if weights is None:
        module = create(name, **create_options)
        return module, random_variables(module, jax.random.key(0) if rng is None else rng)
    module = create(name, **{**needed(name), **create_options})
    file = published(name, module)
    proof = proof_of(file, module)
    path = fetch(file.url, file.name, proof, ", or pass the path of one: weights=PATH, --weights PATH")
    return module, load_variables(module, path)


def network_of(
    weights: str | os.PathLike, name: str | None = None, given: Mapping[str, Any] = MappingProxyType({})
) -> tuple[str, dict[str, Any]]:
    """Find out which network a file's weights are of.

    Args:
        weights: a file, or the folder of a fine-tuning.
        name: of the model; may be left out where the file tells it.
        given: options of the caller's, which come before the file's.

    Returns:
        (name, options for `create`).

    Raises:
        ValueError: it is of another model, or does not tell; a damaged file.
        OSError: it is not there.
    """
    if name is not None:
        spec(name)
    described, path = of_a_family(read_description(weights)), weights_file(weights)
    if described is not None:
        name, options = described_network(described, name)
        if "include_top" in given and given["include_top"] != options["include_top"]:
            options = {key: value for key, value in options.items() if key not in ENDS}
        unsaid = [option for option in described.unsaid if option not in given and given.get("include_top", True)]
        if unsaid:
            raise WeightsMismatch(f"{weights} ends in a function that no file can hold: {unsaid[0]}=... expected", [])
        return name, {**options, **given}
    if name is None and kind(path) == "keras" and read_configuration(path):
        raise ValueError(
            f"{weights} holds a model of its own: fzoo.load_model(path) makes it; or the name of one of fzoo"
        )
    if name is None:
        raise ValueError(f"{weights} does not tell which model it is of: the name of one expected")
    if is_published(name, weights):
        return name, {**needed(name), **given}
    given = {**(ending_options(path, given) if kind(path) == "keras" else {}), **given}
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


def described_network(described: Description, name: str | None = None) -> tuple[str, dict[str, Any]]:
    """Find the model, and all options, of a file that fzoo wrote; raises as `network_of`."""
    family = [record for record in map(spec, list_models()) if record.family.__name__ == described.family]
    if not family:
        raise WeightsMismatch(f"{described.source} is of {described.family!r}, which is none of fzoo's families", [])
    options = described.options_of(family[0].family)
    try:
        create(family[0].name, **options)
    except (TypeError, ValueError, ArithmeticError) as e:
        raise ValueError(f"{described.source}: what it says of its network can't be: {one_line(e)}") from e

    def nearness(record: ModelSpec) -> tuple[int, int]:
        """How many of its options the file has, and of models alike in that the smallest."""
        return sum(options.get(key) == value for key, value in record.options.items()), -record.parameters

    def is_exact(record: ModelSpec) -> bool:
        free = record.family.weightless
        return all(options.get(key) == value for key, value in record.options.items() if key not in free)

    models = [record.name for record in family if is_exact(record)]
    models = models or [record.name for record in sorted(family, key=nearness, reverse=True)]  # a size of one's own
    if name is not None and (spec(name) not in family or (name not in models)):
        raise WeightsMismatch(f"{described.source} is of {models[0]}, not of {name}", [])
    return name or models[0], options


#: Options of families that show by layers which need no array.
SHOWN = frozenset({"divide_by_std", "include_preprocessing"})


def shown_options(name: str, preprocessing: Counter[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a Keras file's layers show of its network, beyond its arrays, where that is not the default.

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
    choices = [dict(zip(defaults, each, strict=True)) for each in values]
    fitting = [c for c in choices if own_preprocessing(create(name, **{**given, **c})) == preprocessing]
    differing = [c for c in fitting if any(given.get(option, value) != value for option, value in c.items())]
    if fitting and differing == fitting:
        shown = ", ".join(f"{option}={value}" for option, value in fitting[0].items())
        raise ValueError(f"the file's layers show that it is of {name} with {shown}: leave the option out")
    return {k: v for choice in fitting[:1] for k, v in choice.items() if v != defaults[k]}


def load_model(
    path: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    custom_objects: Mapping[str, Callable[..., Any]] | None = None,
) -> tuple[KerasModel, dict[str, Any]]:
    """Make the network that a Keras file holds, whatever a user built of Keras's layers, with its variables.

    Args:
        path: a whole model as Keras saved it: `.keras`, a legacy `.h5` of any version, or a `.weights.h5` with its
            `config.json` beside it. No code of the file is run.
        dtype: of the computation; parameters are float32.
        custom_objects: what classes compute that are not Keras's, by their names: a function (k, x, config) for each,
            of a `fzoo.layers.Layers`, of the array that the layer takes (or a list of them) and of its configuration,
            in which "name" is its name in the network. A layer of `k` with weights has those of the file if it is
            given that name; the module is equal to another if the functions are the same objects.

    Returns:
        (module, variables), for all that takes a network of `load`. Layers of models inside of the model are named by
        their paths ("mobilenetv2/Conv1"), in `variables`, too; the later calls of a layer that is called more than
        once are named "dense:1". What takes several inputs is called with a tuple of arrays in the file's order, or a
        mapping by their names; what has several outputs gives a tuple.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ValueError: it has no model in it, a damaged one, or one with a layer that is not known; the message names the
            layer and its class.
    """
    module, plans = network_in(path, dtype, custom_objects)
    return module, load_planned(module, plans, path)


def network_in(
    path: str | os.PathLike, dtype: Any = jnp.float32, custom_objects: Mapping[str, Callable[..., Any]] | None = None
) -> tuple[KerasModel, tuple[Plan, ...]]:
    """Make the network that a Keras file holds, and the plan of its weights, of which none is read.

    Raises as `load_model`.
    """
    configuration = read_configuration(path)
    if configuration is None:
        raise ValueError(f"{path} has weights alone, without the model they belong to: fzoo.load(NAME, weights=...)")
    try:
        graph, plans = build_graph(configuration, custom_objects)
        return keras_model(graph, dtype), plans
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def is_whole_model(name: Any) -> bool:
    """Tell whether this is the path of a file, and not the name of a model."""
    return isinstance(name, (str, os.PathLike)) and name not in VARIANTS and os.path.isfile(name)


def proof_of(file: WeightFile, module: Classifier) -> Proof:
    """Return what a published file is known by: its hash, or, where there is none, that it fits its network."""
    return file.hash or functools.partial(check_fit, module)


def needed(name: str) -> dict[str, Any]:
    """Return the options that all published files of a model want: EfficientNet's division by the deviation."""
    wanted = [file.options.items() for file in spec(name).weight_files]
    return {key: value for key, value in wanted[0] if all((key, value) in items for items in wanted)}


def is_published(name: str, path: str | os.PathLike) -> bool:
    """Tell whether a file is one that Keras published, by its hash; asked only where that makes a difference."""
    if not needed(name) or not os.path.isfile(path):
        return False
    hashes = {file.hash for file in spec(name).weight_files}
    return any(file_hash(path, algorithm) in hashes for algorithm in ("md5", "sha256"))


def published(name: str, module: Classifier) -> WeightFile:
    """Return the published file for a model created with these options.

    Raises:
        ValueError: Keras published none; the message says for which options it did.
    """
    if module.head is not None:
        raise ValueError("the ImageNet weights have no such head: fzoo.transfer starts a network with a head from them")
    if module.include_top and module.classes != 1000:
        raise ValueError(f"the ImageNet weights of {name} have 1000 classes, classes={module.classes} given")
    record = spec(name)
    defaults = {
        option: value for option, value in family_defaults(record).items() if option not in record.family.weightless
    }
    height, width, channels = module.example_shape
    if channels != 3:
        raise ValueError(f"the ImageNet weights of {name} are for 3 channels, {channels} given")
    if module.fixed_size and module.include_top and (height, width) != (record.input_size,) * 2:
        size = f"{record.input_size} x {record.input_size}"
        raise ValueError(f"the ImageNet weights of {name} with its top are for {size}, {height} x {width} given")
    files = [file for file in record.weight_files if file.include_top == module.include_top]
    fitting = [f for f in files if all(getattr(module, k) == f.options.get(k, v) for k, v in defaults.items())]
    if not fitting:
        given = ", ".join(f"{k}={getattr(module, k)!r}" for k in defaults)
        offers = dict.fromkeys(", ".join(f"{k}={v!r}" for k, v in {**defaults, **f.options}.items()) for f in files)
        raise ValueError(f"no ImageNet weights of {name} for {given}; Keras published {' | '.join(offers)}")
    # One file a size: that of the input if square and published, else that of the default size, as Keras chooses.
    exact = [f for f in fitting if f.size == height == width]
    return (exact or fitting)[0]
