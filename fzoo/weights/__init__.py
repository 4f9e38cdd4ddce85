"""Keras's weights files, in and out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

import h5py
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fzoo.files import replacing
from fzoo.layers.classifier import OF_RUNS, Classifier
from fzoo.layers.conventions import snake_case
from fzoo.layers.graph import random_variables, trace
from fzoo.layers.record import Node
from fzoo.types import DTypeLike, MutableVariables, Variables
from fzoo.weights.arrays import FileArray, keras_arrays, safetensors_arrays
from fzoo.weights.description import Description, check_same, describe, parse
from fzoo.weights.ending import check_activation, read_ending
from fzoo.weights.files import WeightsMismatch, open_layers
from fzoo.weights.formats import (
    described_orbax,
    described_safetensors,
    load_orbax,
    load_safetensors,
    save_orbax,
    save_safetensors,
    write_safetensors,
)
from fzoo.weights.graph import MODELS, Plan
from fzoo.weights.mapping import (
    PLAIN,
    Slot,
    below_top,
    check_shapes,
    check_variables,
    described_beside,
    lookup,
    match,
    own_preprocessing,
    preprocessing,
    put,
    slots,
)
from fzoo.weights.names import open_named_layers
from fzoo.weights.partial import Unmatched, match_by_name, select_layer
from fzoo.weights.rewrite import keras3_configuration, plans_of, saved_layers
from fzoo.weights.state_dict import (
    TORCH_ENDINGS,
    fit_state_dict,
    is_state_dict,
    open_torch_arrays,
    state_dict,
    variables_of_state_dict,
)
from fzoo.weights.whole import match_plan
from fzoo.weights.writers import Layout, SavedLayer, check_destination, keras_writer

__all__ = [
    "Unmatched",
    "WeightsMismatch",
    "check_fit",
    "load_keras_weights",
    "load_planned",
    "load_variables",
    "open_weights",
    "save_keras_weights",
    "save_variables",
]


def load_variables(module: Classifier, path: str | os.PathLike) -> MutableVariables:
    """Read a network's variables from a file of any kind that `save_variables` writes, strictly.

    Args:
        module: the network, from `fzoo.create`.
        path: `.safetensors`, the directory of an Orbax checkpoint, a Keras file (see `load_keras_weights`), the folder
            of a fine-tuning, or a state dict of PyTorch's by the names of timm or torchvision, as `.safetensors` or as
            a file of `torch.save` (`.pth`, `.pt`, `.bin`), of which no code is run.

    Returns:
        {"params": ..., "batch_stats": ...} for `module.apply`, arrays on the default device: float32, parameters of the
        network's `param_dtype`; those of an optimized network as they were.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ModuleNotFoundError: safetensors or PyTorch is not installed.
        ValueError: a damaged file, or one of another network: by its arrays, or by what fzoo wrote of it.
    """
    path = weights_file(path)
    if kind(path) == "keras":
        return load_keras_weights(module, path)
    if is_state_dict(path):
        slots(module)
        with open_torch_arrays(path) as arrays:
            return variables_of_state_dict(module, arrays, str(path))
    trace(module)  # before the file: what is no network of this package is not the file's fault
    description = read_description(path)
    check_same(description, module)
    load = {"safetensors": load_safetensors, "orbax": load_orbax}[kind(path)]
    if description is None or module.include_top or not description.options.get("include_top"):
        return load(module, path)
    if module.prepared:
        raise WeightsMismatch(f"{path} is of an optimized network with its top, which only a plain one can lose", [])
    whole = network_described(description, module)
    return below_top(module, whole, load(whole, path))


def read_description(path: str | os.PathLike) -> Description | None:
    """Read what a file says of its network, if `save_variables` wrote it; None otherwise.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ModuleNotFoundError: safetensors is not installed.
        ValueError: a damaged file.
    """
    path = weights_file(path)
    if kind(path) == "torch":
        return None
    if kind(path) == "safetensors":
        return parse(described_safetensors(path), str(path))
    if kind(path) == "orbax":
        return parse(described_orbax(path), str(path))
    with open_layers(path) as contents:
        return parse(contents.description, str(path))


def weights_file(path: str | os.PathLike) -> Path:
    """Find the weights at a path: of the folder of a fine-tuning, its `model.h5`; otherwise the path itself.

    Raises:
        ValueError: the fine-tuning has not finished.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        return path
    if not (path / "model.h5").exists():
        raise ValueError(f"the run in {path} has not finished: `fzoo finetune ... --out {path} --resume` goes on")
    return path / "model.h5"


def kind(path: str | os.PathLike) -> str:
    """Say how what lies at a path is read: "safetensors", "torch", "orbax" by its name or what it holds, or "keras"."""
    if Path(path).suffix == ".safetensors":
        return "safetensors"
    if Path(path).suffix in TORCH_ENDINGS:
        return "torch"
    return "orbax" if Path(path, "_CHECKPOINT_METADATA").exists() else "keras"


def save_variables(
    module: Classifier,
    variables: Variables,
    path: str | os.PathLike,
    *,
    layout: Layout = "keras",
) -> None:
    """Write a network's variables; the end of the name says how. The file appears under its name when it is whole.

    It carries the network's options, by which `fzoo.load` makes the network again; an activation that is a function of
    the user's own is left out, and asked for then.

    Args:
        module: the network.
        variables: {"params": ..., "batch_stats": ...}.
        path: `.h5`, `.weights.h5` and `.keras` are Keras's (see `save_keras_weights`); `.safetensors` names its arrays
            "params.conv1_conv.kernel"; a name that ends in `.orbax` or has no ending becomes the directory of an Orbax
            checkpoint.
        layout: of a `.safetensors` file: "timm" or "torchvision" for a state dict by the library's names, which its
            `load_state_dict` takes strictly, "torch" for the one that has the network (timm where both have it). It
            says nothing of the network, whose name is given to load it. "keras" for Keras's names and layout.

    Raises:
        FileExistsError: a checkpoint is to be written over something.
        ModuleNotFoundError: safetensors is not installed.
        ValueError: another ending, variables that are not this network's, an option that no file can hold, or a layout
            that does not have this network.
        OSError: the file can't be written.
    """
    check_destination(path, layout)
    suffix = Path(path).suffix
    if layout != "keras":
        write_safetensors(state_dict(module, variables, layout), path, {"format": "pt"})
        return
    if suffix not in ("", ".orbax", ".safetensors"):
        save_keras_weights(module, variables, path)
        return
    check_shapes(module, variables)
    description = describe(module.clone(param_dtype=dtype_of_params(module, variables)))
    if suffix == ".safetensors":
        save_safetensors(variables, path, description)
    else:
        save_orbax(variables, path, description)


def dtype_of_params(module: Classifier, variables: Variables) -> DTypeLike:
    """Return the dtype of a network's parameters, which may be cast since they were made; its own where they differ."""
    dtypes = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(variables["params"])}
    (dtype, *others) = dtypes or {jnp.dtype(module.param_dtype)}
    known = not others and not module.prepared and jnp.issubdtype(dtype, jnp.floating)
    return dtype.type if known else module.param_dtype


def network_described(description: Description, module: Classifier) -> Classifier:
    """Make the network that a file describes, to be run as another of its family."""
    return type(module)(**description.options_of(type(module)) | {name: getattr(module, name) for name in OF_RUNS})


@overload
def load_keras_weights(
    module: Classifier, path: str | os.PathLike, *, layer: str | None = None, partial: Literal[False] = False
) -> MutableVariables: ...


@overload
def load_keras_weights(
    module: Classifier,
    path: str | os.PathLike,
    *,
    layer: str | None = None,
    partial: Literal[True],
    rng: jax.Array | None = None,
) -> tuple[MutableVariables, Unmatched]: ...


def load_keras_weights(
    module: Classifier,
    path: str | os.PathLike,
    *,
    layer: str | None = None,
    partial: bool = False,
    rng: jax.Array | None = None,
) -> MutableVariables | tuple[MutableVariables, Unmatched]:
    """Read a network's variables from a file that Keras wrote.

    Strict: every array of the network must be in the file, with its shape, and nothing may be left over, except the
    top of a file with a top when the network has none. Otherwise nothing is loaded. A warning says what else the file
    has and the network lacks: the rest of a larger model, layers that preprocess.

    With `partial=True`, what fits by name and shape is taken, as by Keras's `load_weights(path, by_name=True,
    skip_mismatch=True)`, and what does not is returned. A layer of the file is that of the network with the same name,
    also where one of them is inside of a model ("backbone/conv1"). Names that Keras numbers ("conv2d_17") are compared
    as they are: those of a session that counted on lead to no layer, or to another one of the same shape; inside of a
    model, they are taken only where its other names lead to it, or `layer` names it. What fzoo wrote into the file of
    its network (a description with the options) is not compared then.

    Args:
        module: the network, from `fzoo.create` or `fzoo.load_model`.
        path: legacy `.h5` (weights or whole model), `.weights.h5` or `.keras`, or the folder of a fine-tuning. For
            `partial=True` it must have the names of its layers: an older `.weights.h5` has them in the `config.json`
            beside it alone.
        layer: the layer of the file that is the network, of a file with several: its name, or the names on the way to
            it ("outer/inner"). By default the one that fits; for `partial=True` all of the file.
        partial: whether to take what fits.
        rng: a `jax.random.key` for the initial values of the rest, with `partial=True`; key 0 by default.

    Returns:
        {"params": ..., "batch_stats": ...} for `module.apply`, float32 arrays on the default device. With
        `partial=True`, (variables, unmatched): the variables are whole, with Keras's initial values where the file has
        no array, and the record says which these are and which arrays of the file were not taken.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ValueError: not a Keras file, a damaged one, one without such a layer, or one of another network
            (`WeightsMismatch`, which names the arrays that don't fit; with `partial=True`, where none fits, or where a
            name leads to several layers).
    """
    path = weights_file(path)
    if rng is not None and not partial:
        raise ValueError("rng goes with partial=True: otherwise every array is the file's")
    slots(module)  # before the file: what is no plain network of this package is not the file's fault
    if partial:
        if kind(path) != "keras":
            raise ValueError(f"{path} is not Keras's, whose files alone are loaded in part")
        return load_matching(module, path, layer, jax.random.key(0) if rng is None else rng)
    if module.keras_graph is not None:
        return load_planned(module, plans_of(module.keras_graph.source), path, layer)
    with open_named_layers(path) as contents:
        description = parse(contents.description, str(path)) if layer is None else None  # it is of the whole file
        check_same(description, module)
        ending = read_ending(path) if description is None and layer is None and module.include_top else None
        if ending is not None and ending.classes == module.classes:
            check_activation(ending, module.classifier_activation, path)
        whole = module
        if description is not None and not module.include_top and description.options.get("head"):
            whole = network_described(description, module)  # with a head that is not the family's
        chosen = None if layer is None else select_layer(contents.layers, layer, str(path))
        matched = match(whole, contents, str(path), chosen)
        variables = variables_of(matched.pairs)
    if matched.within:
        left_out = ", ".join(matched.left_out) or "nothing"
        warnings.warn(f"{path}: its layer {layer or matched.within} was loaded; left out: {left_out}", stacklevel=2)
    warn_of_preprocessing(module, matched.preprocessing, path, stacklevel=3)
    return variables if whole is module else below_top(module, whole, variables)


def warn_of_preprocessing(module: Classifier, theirs: Counter[str] | None, path: Path, stacklevel: int) -> None:
    """Warn where a file's network preprocesses its pixels by layers that the network lacks."""
    if more := (theirs or Counter()) - own_preprocessing(module):
        layers = " and ".join(f"{number} {name} layer{'s'[: number > 1]}" for name, number in sorted(more.items()))
        warnings.warn(
            f"{path} has {layers} more than this {type(module).__name__}, left out: pixels are not preprocessed so",
            stacklevel=stacklevel,
        )


def load_matching(
    module: Classifier, path: Path, layer: str | None, rng: jax.Array
) -> tuple[MutableVariables, Unmatched]:
    """Read the arrays of a file that fit a network by name and shape; the rest of the variables is initialised."""
    plans = () if module.keras_graph is None else plans_of(module.keras_graph.source)
    with open_named_layers(path) as contents:
        pairs, unmatched = match_by_name(module, plans, contents, str(path), layer)
        taken = variables_of(pairs)
        theirs = preprocessing(contents.listed)
    warn_of_preprocessing(module, theirs, path, stacklevel=4)
    variables = random_variables(module, rng)
    for keys, array in jax.tree_util.tree_leaves_with_path(taken):
        *above, last = (step.key for step in keys)
        lookup(variables, above)[last] = array
    return variables, unmatched


def load_planned(
    module: Classifier, plans: Sequence[Plan], path: str | os.PathLike, layer: str | None = None
) -> MutableVariables:
    """Read the variables of a network from the file whose configuration describes it, or from a layer of a file."""
    slots(module)
    if layer is None:
        with open_layers(path) as contents:
            return variables_of(match_plan(module, plans, contents.layers, str(path)))
    with open_named_layers(path) as contents:
        chosen = select_layer(contents.layers, layer, str(path))
        if not chosen.parts:  # a legacy file, which has the arrays of a model in one list
            chosen = dataclasses.replace(chosen, name="")
            plans = (Plan("", "", MODELS[0], True, parts=tuple(plans)),)
        pairs = match_plan(module, plans, chosen.parts or (chosen,), f"{layer} in {path}")
        left_out = ", ".join(described_beside(chosen, contents.layers))
        variables = variables_of(pairs)
    warnings.warn(f"{path}: its layer {layer} was loaded; left out: {left_out or 'nothing'}", stacklevel=3)
    return variables


@contextlib.contextmanager
def open_weights(path: str | os.PathLike) -> Iterator[Mapping[str, FileArray]]:
    """Open a file of weights as a read-only mapping from the full path of an array in it to the array.

    An array is read when it is asked for its values, `np.asarray(arrays[name])` or `arrays[name][...]`, while the file
    is open; its `shape` and `dtype` are known without.

    Args:
        path: a Keras file, whose paths are those of `inspect_weights`, of warnings and of `Unmatched`
            ("conv1/conv1/kernel:0"; in a `.weights.h5` and a `.keras` "layers/conv2d/vars/0"); `.safetensors`, whose
            names they are; or the folder of a fine-tuning.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        KeyError: the file has no such array.
        ModuleNotFoundError: safetensors is not installed.
        ValueError: not a file of weights, a damaged one, or an Orbax checkpoint; and where an array is read after the
            file was closed, or its values were never written.
    """
    path = weights_file(path)
    if kind(path) == "orbax":
        raise ValueError(f"{path} is an Orbax checkpoint, .h5, .keras or .safetensors expected: fzoo.load_variables")
    if kind(path) == "torch":
        raise ValueError(f"{path} is a file of PyTorch's, .h5, .keras or .safetensors expected: torch.load reads it")
    with {"keras": keras_arrays, "safetensors": safetensors_arrays}[kind(path)](path) as arrays:
        yield arrays


def variables_of(pairs: Iterable[tuple[Slot, h5py.Dataset]]) -> MutableVariables:
    """Read the arrays of a file into a tree of variables, on the default device."""
    variables: MutableVariables = {"params": {}}
    for slot, array in pairs:
        put(variables, slot, read_variable(array, slot))
    return jax.device_put(variables)


def check_fit(module: Classifier, path: str | os.PathLike) -> None:
    """Look whether a file of Keras's or a state dict holds a network's arrays, by number and shapes; none is read.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: as `load_variables`.
    """
    slots(module)
    if kind(path) != "keras":
        with open_torch_arrays(Path(path)) as arrays:
            fit_state_dict(module, arrays, str(path))
        return
    with open_named_layers(path) as contents:
        match(module, contents, str(path))


def preprocessing_in(module: Classifier, path: str | os.PathLike) -> Counter[str] | None:
    """Count the layers that preprocess ("rescaling", "normalization") that a Keras file of a fitting network lists.

    None if it doesn't list layers without arrays, as for a model in a model in a legacy h5.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: as `load_keras_weights`.
    """
    with open_named_layers(path) as contents:
        return match(module, contents, str(path)).preprocessing


def read_variable(array: h5py.Dataset, slot: Slot) -> np.ndarray | np.generic:
    """Read an array of a file as its variable."""
    value = np.asarray(array)
    if value.dtype == "V2":  # what HDF5 makes of Keras's bfloat16
        value = value.view(jnp.bfloat16)
    with np.errstate(all="ignore"):  # any bits may be in a file
        if np.issubdtype(slot.dtype, np.integer):  # a count of images, which no result depends on
            value = np.clip(np.nan_to_num(value.astype(np.float64)), 0, np.iinfo(slot.dtype).max)
        return slot.from_keras(value.astype(slot.dtype, copy=False))


def save_keras_weights(module: Classifier, variables: Variables, path: str | os.PathLike) -> None:
    """Write a network's variables as a file that Keras reads by `model.load_weights(path)`.

    A network from `load_model`, or one that `transfer` made of it, is written with its configuration, where the layout
    has one: `keras.models.load_model` opens it, whatever wrote the file that it came from. Regularizers, constraints
    and initialisers are kept only if that was Keras 3.

    The file appears under its name when it is whole: a kill or a full disk leaves what was there before.

    Args:
        module: the network.
        variables: {"params": ..., "batch_stats": ...}.
        path: its end says the layout: `.weights.h5` for Keras 3's, `.h5` for the legacy one that Keras 2 reads, too,
            `.keras` for an archive, which holds weights alone if the network is from `create` or `load`
            (`load_weights` takes it, `keras.models.load_model` does not).

    Raises:
        ValueError: another ending, variables that are not this network's, or a layer that Keras 3 does not have.
        OSError: the file can't be written.
    """
    write = keras_writer(path)
    if isinstance(module, Classifier) and module.prepared:
        raise ValueError(f"{path}: an optimized network goes into .safetensors or .orbax; {PLAIN}")
    arrays: dict[str, dict[Slot, np.ndarray]] = {}
    for slot, value in check_variables(module, variables):
        arrays.setdefault(slot.layer, {})[slot] = to_keras(value, slot)
    description = describe(module.clone(param_dtype=dtype_of_params(module, variables)))
    configuration = ""
    if module.keras_graph is None:
        layers = [saved(node, arrays.get(node.name, {})) for node in trace(module).layers]
    else:
        model = keras3_configuration(module, module.keras_graph)
        layers, configuration = saved_layers(plans_of(module.keras_graph.source), arrays), json.dumps(model)
    with replacing(path) as temporary:
        write(temporary, layers, description, configuration)


def saved(node: Node, arrays: dict[Slot, np.ndarray]) -> SavedLayer:
    """Return a layer as it is written."""
    parts = tuple(
        SavedLayer(part.name, snake_case(part.kind), {s.array: a for s, a in arrays.items() if s.part == part.name})
        for part in node.parts
    )
    by_name = {slot.name: array for slot, array in arrays.items()}
    random = node.kind == "Dropout" and node.config["rate"] > 0
    return SavedLayer(node.name, snake_case(node.kind), by_name, parts, random)


def to_keras(value: ArrayLike, slot: Slot) -> np.ndarray:
    """Return a variable as Keras keeps it."""
    dtype = np.int32 if np.issubdtype(slot.dtype, np.integer) else np.float32
    return slot.to_keras(np.asarray(value, dtype))
