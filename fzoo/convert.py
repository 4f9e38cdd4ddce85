"""What a file of weights is, and the way from one kind of file to another."""

from __future__ import annotations

import dataclasses
import itertools
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fzoo.files import one_line
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.models.keras_model import KerasModel, of_a_family
from fzoo.pretrained import load, load_model
from fzoo.pretrained.comparison import compare
from fzoo.pretrained.options import described_network, shown_options, variants
from fzoo.pretrained.whole import WholeFile, make_network
from fzoo.recognition import recognize_backbone
from fzoo.types import Options
from fzoo.weights import kind, read_description, save_variables, weights_file
from fzoo.weights.config import read_configuration
from fzoo.weights.description import Description, parse
from fzoo.weights.ending import ending_options
from fzoo.weights.files import Contents, FileLayer, array_path
from fzoo.weights.mapping import Match, match, pair_up, regrouped, slots
from fzoo.weights.names import open_named_layers
from fzoo.weights.state_dict import StateDict, fit_state_dict, is_state_dict, nearest_network, open_torch_arrays
from fzoo.weights.whole import match_plan
from fzoo.weights.writers import Layout, check_destination
from fzoo.zoo import create, list_models, spec


@dataclasses.dataclass(frozen=True)
class Fit:
    """A model that a file fits.

    Attributes:
        model: its name.
        options: for `fzoo.create(model, **options)`.
        within: the layer of the file that it is, if the file is of a larger model; otherwise None.
        arrays: (array in the file, path of the variable, shape), in Keras's order.
        left_out: what else the file holds.
        difference: how the file's own model differs from it, so that the file is not loaded by its name; "" where it
            does not, or where the file has weights alone.
    """

    model: str
    options: Options
    within: str | None
    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]
    left_out: tuple[str, ...]
    difference: str = ""

    def __str__(self) -> str:
        """Write it as the call that creates it."""
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f'fzoo.create("{self.model}"{options})' + (f", the layer {self.within}" if self.within else "")

    def call(self, path: Path) -> str:
        """Write it as the call that loads it from a file."""
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"fzoo.load({self.model!r}, weights={str(path)!r}{options})"


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """The model that a file describes beside its weights, whatever it is built of.

    Attributes:
        layers: how many, those of models inside of it among them.
        inputs: the shape of each input for one image; None for what is left open.
        outputs: the shape of each output for one image.
        activation: that it ends with, where it ends with one.
        backbone: the model whose family it begins as, by its layers' names; None for none of fzoo's.
    """

    layers: int
    inputs: tuple[tuple[int | None, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    activation: str | None
    backbone: str | None

    def __str__(self) -> str:
        """Say it in words."""
        takes, gives = (
            " and ".join(" x ".join("any" if side is None else str(side) for side in shape) for shape in shapes)
            for shapes in (self.inputs, self.outputs)
        )
        gives = f"{gives} classes" if len(self.outputs) == len(self.outputs[0]) == 1 else gives
        ends = "" if self.activation in (None, "linear") else f" by {self.activation}"
        built_on = "" if self.backbone is None else f", built on {self.backbone} or its like"
        return f"a whole model of {self.layers} layers, from {takes} to {gives}{ends}{built_on}"


@dataclasses.dataclass(frozen=True)
class WeightsReport:
    """What a file of weights is.

    Attributes:
        path: of the file.
        layout: "legacy h5", "Keras 3 .weights.h5", ".keras archive" or "PyTorch's state dict".
        arrays: (layer, array, shape, dtype) of all that it holds.
        fits: the model it fits; several where several models are nested in it, and none where none fits.
        whole: the model that it describes; None where it has weights alone.
        problem: what keeps `fzoo.load_model` from the model that it describes; "" for nothing.
    """

    path: Path
    layout: str
    arrays: tuple[tuple[str, str, tuple[int, ...], str], ...]
    fits: tuple[Fit, ...]
    whole: WholeModel | None = None
    problem: str = ""

    @property
    def parameters(self) -> int:
        """The number of values in all arrays."""
        return sum(int(np.prod(shape)) for _, _, shape, _ in self.arrays)

    @property
    def calls(self) -> tuple[str, ...]:
        """The calls that load it: first that of all that it holds, then those of models that are a part of it."""
        whole = () if self.whole is None else (f"fzoo.load_model({str(self.path)!r})",)
        return *whole, *(fit.call(self.path) for fit in self.fits if not fit.difference)

    def __str__(self) -> str:
        """Say on a line what it is, and what loads it."""
        words = [] if self.whole is None else [f"{self.whole}: {self.calls[0]}"]
        words += [f"its model can't be loaded: {self.problem}"] if self.problem else []
        words += [
            f"has the arrays of {fit}, but {fit.difference}" if fit.difference else f"fits {fit}: {fit.call(self.path)}"
            for fit in self.fits
        ]
        return "; ".join(words or ["has weights alone, which fit no model of fzoo list with its published options"])


def inspect_weights(path: str | os.PathLike) -> WeightsReport:
    """Find out what a file of weights is: its layout, its arrays, its own model, and the models that it fits.

    No array is read. A whole model is what `fzoo.load_model` makes of it. A file that fzoo wrote says its model and
    options. Otherwise a model is found with its published variants (`alpha`, `minimalistic`), for any number of classes
    and channels, with what its layers show (`divide_by_std`, `include_preprocessing`), and also as a layer of a larger
    model; not with other options of its family. A state dict of PyTorch's fits all tags of its graph alike.

    Args:
        path: legacy `.h5` (weights or whole model), `.weights.h5` or `.keras`, the folder of a fine-tuning, or a state
            dict as `.safetensors` or as a file of `torch.save`.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ModuleNotFoundError: safetensors or PyTorch is not installed.
        ValueError: not such a file (the message says what it is, and what would do), or a damaged one.
    """
    path = weights_file(path)
    if is_state_dict(path):
        return inspect_state_dict(path)
    if kind(path) != "keras":
        raise ValueError(f"{path} is not Keras's or PyTorch's, whose files are inspected; fzoo.load reads it")
    with open_named_layers(path) as contents:
        layers = contents.layers
        layout = "legacy h5" if layers[0].kind is None else "Keras 3 .weights.h5"
        arrays = tuple(
            (layer.name, array_path(array), array.shape, str(array.dtype))
            for layer in layers
            for array in layer.all_arrays()
        )
        description = of_a_family(parse(contents.description, str(path)))
        if description is not None:
            whole, problem, fits = None, "", (as_described(description, contents, path),)
        else:
            file = whole_file(contents, path)
            fits = tuple(compared(fit, contents, path, file) for fit in find_fits(contents, path))
            whole, problem = None if file.module is None else whole_model(file.module), file.problem
    return WeightsReport(path, ".keras archive" if zipfile.is_zipfile(path) else layout, arrays, fits, whole, problem)


def inspect_state_dict(path: Path) -> WeightsReport:
    """Do what `inspect_weights` does, of a state dict of PyTorch's."""
    with open_torch_arrays(path) as state_dict:
        arrays = {name: (tuple(np.shape(array)), str(array.dtype)) for name, array in state_dict.items()}
        layers = {name.rpartition(".")[0] for name in arrays}
        torch_models = [name for name in list_models(tagged=True) if spec(name).is_torch]
        # An array that is a layer's alone (LayerScale's) counts as none here, and a top has up to 4 layers.
        likely = [n for n in torch_models if -4 <= spec(n).depth - len(layers) <= spec(n).depth // 4 + 4]
        fits = tuple(fit for name in likely if (fit := fitting_state_dict(name, state_dict, path)) is not None)
    listed = tuple((name.rpartition(".")[0], name, *facts) for name, facts in arrays.items())
    return WeightsReport(path, "PyTorch's state dict", listed, fits)


def fitting_state_dict(name: str, arrays: StateDict, path: Path) -> Fit | None:
    """Find how a model with a tag fits a state dict, with its top or without; None if it does not."""
    for include_top in (True, False):
        options: dict[str, Any] = {} if include_top else {"include_top": False}
        module = create(name, **options).clone(tag=None, preprocessing=None)  # which share what is traced
        places = nearest_network(module, set(arrays))[2]
        biases = [key for key, place in places.items() if place.slot.array == "bias" and key in arrays]
        if include_top and biases and (classes := np.shape(arrays[biases[-1]])[-1:]) not in ((), (0,), (1000,)):
            options["classes"] = int(classes[0])
        if options.get("classes") == 1:
            options["classifier_activation"] = "sigmoid"  # of one class, a softmax says nothing
        try:
            fit = fit_state_dict(module.clone(**options), arrays, str(path))
        except ValueError:
            continue
        matched = tuple((key, "/".join(place.slot.path), place.shape) for key, place in fit.places.items())
        return Fit(name, options, None, matched, tuple(key for key in arrays if key not in fit.places))
    return None


def whole_file(contents: Contents, path: Path) -> WholeFile:
    """Make the model that a file holds beside its weights, whose arrays fit; without a problem where it holds none."""
    try:
        configuration = read_configuration(path)
        if configuration is None:
            return WholeFile(None)
        module, plans = make_network(configuration, path)
        match_plan(module, plans, contents.layers, str(path))
        return WholeFile(module, plans)
    except ValueError as e:
        return WholeFile(None, problem=one_line(e).removeprefix(f"{path}: "))


def whole_model(module: KerasModel) -> WholeModel:
    """Describe the model of a file."""
    traced, activation = trace(module), module.classifier_activation
    given = jax.eval_shape(module.apply, traced.variables, module.example_inputs)
    outputs = tuple(tuple(y.shape[1:]) for y in jax.tree.leaves(given))
    name = activation if isinstance(activation, str) else None
    return WholeModel(len(traced.layers), module.graph.inputs, outputs, name, recognize_backbone(module))


def compared(fit: Fit, contents: Contents, path: Path, file: WholeFile) -> Fit:
    """Add to a fit how the file's own model differs from it."""
    if file.module is None:
        return fit
    comparison = compare(create(fit.model, **fit.options), contents, str(path), file.module, file.plans)
    return dataclasses.replace(fit, difference=comparison.difference)


def as_described(description: Description, contents: Contents, path: Path) -> Fit:
    """Find how a file that fzoo wrote fits the network that it describes, with the options that are not the model's."""
    model, options = described_network(description)
    usual = create(model)
    given = {option: value for option, value in options.items() if value != getattr(usual, option)}
    return fit_of(model, given, match(create(model, **options), contents, str(path)))


def fit_of(model: str, options: Options, result: Match) -> Fit:
    """Say a match in words."""
    matched = tuple((array_path(array), "/".join(slot.path), array.shape) for slot, array in result.pairs)
    return Fit(model, options, result.within, matched, tuple(result.left_out))


def find_fits(contents: Contents, path: Path) -> Iterator[Fit]:
    """Find the model that a file's layers fit, and those that the models nested among them fit, one for each."""
    layers = contents.layers
    for parts in (layers, *(parts for layer in layers if (parts := layer.unfolded()))):
        size = sum(int(np.prod(array.shape)) for part in parts for array in part.all_arrays())
        nearest = sorted(list_models(tagged=False), key=lambda name: abs(spec(name).parameters - size))
        candidates = [(name, options) for name in nearest for options in variants(name)]
        # A top has up to 3 layers; a nested ConvNeXt has 4 more (see `regrouped`), a minimalistic network 20 fewer.
        likely = [(n, o) for n, o in candidates if abs(spec(n).depth - len(parts)) <= (20 if o else 4)]
        yield from itertools.islice(filter(None, (fitting(n, o, parts, contents, path) for n, o in likely)), 1)


def fitting(name: str, options: Options, parts: list[FileLayer], contents: Contents, path: Path) -> Fit | None:
    """Find how a model fits some of a file's layers, with its top or without; None if it does not."""
    for include_top in (True, False):
        given = {**options, **({} if include_top else {"include_top": False})}
        module = create(name, **given)
        inside = regrouped(module, parts)
        if len(inside) != len(slots(module)):
            continue
        try:
            pairs = pair_up(module, inside, "")
            ours = [pairs[layer].all_arrays() for layer in slots(module)]
            kernels, (*_, last) = [array for arrays in ours for array in arrays if array.ndim == 4], ours[-1]
            if include_top and last.shape[-1] != 1000:
                given["classes"] = int(last.shape[-1])
            if include_top and parts is contents.layers:
                given |= ending_options(path, given)
            if given.get("classes") == 1 and "classifier_activation" not in given:
                given["classifier_activation"] = "sigmoid"  # of one class, a softmax says nothing
            if kernels[0].shape[2] != 3:
                given["input_shape"] = (*module.example_shape[:2], int(kernels[0].shape[2]))
            result = match(create(name, **given), contents, str(path))
        except (ValueError, IndexError):  # it does not fit, or has numbers of classes and channels that can't be
            continue
        return fit_of(name, given | shown_options(name, result.preprocessing, given), result)
    return None


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    model: str | None = None,
    layout: Layout = "keras",
    **create_options: Any,
) -> Classifier:
    """Write a network's weights as another kind of file; the names' ends say which kinds.

    Args:
        source: a Keras file, `.safetensors`, the directory of an Orbax checkpoint, or the folder of a fine-tuning.
        destination: see `fzoo.save_variables`; it appears when it is whole.
        model: name of the model. Without it, a file that fzoo wrote says it, and a Keras file is inspected: a whole
            model that is none of fzoo's is written as it is, one with weights alone must fit exactly one.
        layout: of a `.safetensors` file that is written, see `fzoo.save_variables`.
        **create_options: what the model was created with, where the file does not say it.

    Returns:
        The network whose weights these are.

    Raises:
        ValueError: the file does not fit the model, or, without one, fits none or several.
        OSError: a file can't be read or written.
    """
    check_destination(destination, layout)
    if model is None and of_a_family(read_description(source)) is None:
        if create_options:
            raise ValueError(f"options without a model given: {', '.join(create_options)}")
        if kind(source) != "keras" and not is_state_dict(Path(source)):
            raise ValueError(f"{source} does not tell its model, as fzoo's and Keras's do: name it (--model NAME)")
        report = inspect_weights(source)
        fits = report.fits
        if report.whole is not None and (len(fits) != 1 or fits[0].within or fits[0].difference):
            module, variables = load_model(source)
            save_variables(module, variables, destination, layout=layout)
            return module
        if len(fits) != 1 or fits[0].difference:
            several = "; ".join(map(str, fits)) or "none"
            why = f"; {report.problem}" if report.problem else ""
            raise ValueError(f"{source} does not tell which model it is of (it fits {several}{why}): name one")
        model, create_options = fits[0].model, dict(fits[0].options)
    module, variables = load(model, weights=source, **create_options)
    save_variables(module, variables, destination, layout=layout)
    return module
