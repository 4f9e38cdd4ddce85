"""A network with its weights and how it wants its images, as a user names them: by a model's name or a file."""

from __future__ import annotations

import dataclasses
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fzoo.files import one_line
from fzoo.images.preprocessing import MODES, MODES_IN_WORDS, RGB_MODES, Mode
from fzoo.images.reading import check_size
from fzoo.images.recipe import Recipe, change_recipe
from fzoo.layers.classifier import Classifier
from fzoo.models.keras_model import KerasModel, of_a_family
from fzoo.pretrained import load, load_model
from fzoo.pretrained.options import described_network
from fzoo.pretrained.whole import own_configuration
from fzoo.recognition import KnownPreprocessing, recognize_preprocessing, require_preprocessing, usual_recipe
from fzoo.training.runs import is_run, load_run
from fzoo.types import MutableVariables, Options
from fzoo.weights import kind, read_description
from fzoo.weights.config import read_configuration
from fzoo.weights.description import NO_OPTIONS
from fzoo.weights.files import member
from fzoo.weights.foreign import names_in_zip
from fzoo.zoo import create, preprocessing_mode, preprocessing_of, spec
from fzoo.zoo import recipe as model_recipe


class LoadedNetwork(NamedTuple):
    """A network, and how it wants its images.

    Attributes:
        module, variables: the network.
        preprocess: the name or mode for `preprocess_input`; None where no pixels are to be given.
        names: (WordNet ID or "-", label) of the classes, where the weights tell.
        recipe: how an image becomes its input.
        model: the name of the model whose published accuracies its own may be held against; None for a fine-tuned one
            and a user's.
        notes: what was found out, and not said by the user, a line each.
    """

    module: Classifier
    variables: MutableVariables
    preprocess: str | None
    names: Sequence[tuple[str, str]] | None
    recipe: Recipe
    model: str | None = None
    notes: tuple[str, ...] = ()


def write_argument(name: str, value: object = ...) -> str:
    """Write an argument as in Python, for messages."""
    return f"{name}=..." if value is ... else f"{name}={value!r}"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        weights: "imagenet", a file, or the folder of a fine-tuning.
        model: the name of the model; None for what the weights say.
        options: returns the options of the model's family that were given, by the name of the model.
        first_option: how the user wrote the first of these; empty for none.
        classes: how many.
        preprocess: a mode, or the model whose it is.
        size: height and width, or one number for both.
        changes: fields of the recipe, which differ from that of the weights.
        include_top: whether a model by its name has its classifier.
        pixels: whether the network is given pixels, so that it must be known how it wants them.
        write: how the user writes an argument by its name, with a value or without; for messages.
    """

    weights: str = "imagenet"
    model: str | None = None
    options: Callable[[str], dict[str, Any]] = lambda model: {}
    first_option: str = ""
    classes: int | None = None
    preprocess: str | None = None
    size: int | tuple[int, int] | None = None
    changes: Options = dataclasses.field(default_factory=dict)
    include_top: bool = True
    pixels: bool = True
    write: Callable[..., str] = write_argument

    @property
    def sides(self) -> tuple[int, int] | None:
        """(height, width), where they are asked for."""
        return None if self.size is None else check_size(self.size)


def load_network(request: Request) -> LoadedNetwork:
    """Load the network that is asked for: a model by its name, what a fine-tuning made, or a user's whole model.

    Raises:
        ValueError: what is asked for does not go together, or does not fit the weights.
        OSError: a file is not there, or can't be downloaded.
    """
    if is_run(request.weights) and (request.include_top or request.model is None):
        return load_own_run(request)
    model = request.model or model_of(request.weights, request.write("model", "NAME"))
    if model is not None:
        return load_of_family(request, model)
    if not request.include_top or request.first_option:
        given = request.first_option or request.write("include_top", False)
        name = request.write("model", "NAME")
        raise ValueError(f"{given} goes with {name}, {request.weights} is a whole model without options")
    return load_whole(request)


def load_own_run(request: Request) -> LoadedNetwork:
    """Load what a fine-tuning made, whose folder says what it is.

    Raises:
        ValueError: the request says something else.
    """
    folder, write, run = request.weights, request.write, load_run(request.weights)
    if request.sides not in (None, run.recipe.size):
        size = write("size", request.size)
        raise ValueError(f"{size} given, {folder} was trained on {run.recipe.size[0]} x {run.recipe.size[1]}")
    for given, fits, theirs in (
        (write("model", request.model), request.model in (None, run.model), f"began with {run.model}"),
        (write("classes", request.classes), request.classes in (None, run.module.classes), f"has {run.module.classes}"),
        (request.first_option, not request.first_option, "says its own"),
        (write("include_top", False), request.include_top, "has its head"),
    ):
        if not fits:
            raise ValueError(f"{given} given, {folder} {theirs}: leave it out")
    names = [("-", name) for name in run.class_names]
    recipe = change_recipe(run.recipe, {**request.changes, "augment": False})
    preprocess = chosen_preprocessing(request, run.module, run.model) if request.pixels else None
    return LoadedNetwork(run.module, run.variables, preprocess, names, recipe)


def load_of_family(request: Request, model: str) -> LoadedNetwork:
    """Load a model by its name; what the request leaves out is what the weights say, or the model's default."""
    weights, sides, usual = request.weights, request.sides, spec(model).input_size
    options = request.options(model)
    if not request.include_top:
        options["include_top"] = False
    if request.classes is not None:
        options["classes"] = request.classes
    description = None if weights == "imagenet" else read_description(weights)
    shape = description.options.get("input_shape") if description and sides is None else None
    whole = weights != "imagenet" and sides is None and own_configuration(weights) is not None
    if not whole and (not shape or None in shape):
        options["input_shape"] = (*(sides or (usual, usual)), 3)
    module, variables = load(model, weights=weights, **options)
    if module.input_shape is None:  # a whole model for images of any size
        module = module.clone(input_shape=(usual, usual, 3))
    taken = "" if weights == "imagenet" or description is not None else taken_options(weights, model, options, module)
    recipe = change_recipe(model_recipe(model, module.example_shape[:2]), request.changes)
    preprocess = chosen_preprocessing(request, module, model) if request.pixels else None
    return LoadedNetwork(module, variables, preprocess, None, recipe, model, (taken,) if taken else ())


def model_of(weights: str, way_out: str = "--model NAME") -> str | None:
    """Find the name of the model whose weights these are; None for a whole model, which needs none.

    Args:
        weights: a file, or "imagenet".
        way_out: what would do where they do not tell, for the message.

    Raises:
        ValueError: they do not tell.
        OSError: the file is not there.
    """
    if weights == "imagenet":
        return "MobileNetV2"
    if teachable_members(weights):
        return None
    description = of_a_family(read_description(weights))
    if description is not None:
        return described_network(description)[0]
    if kind(weights) != "keras" or read_configuration(weights) is None:
        raise ValueError(f"{weights} has weights alone, and does not tell whose: {way_out} expected")
    return None


def load_whole(request: Request) -> LoadedNetwork:
    """Load the whole model of a file; the note says how its images are read, or what it takes.

    Raises:
        ValueError: it is no such model, or one that wants what the request is not or can't give.
    """
    weights, write, pixels = request.weights, request.write, request.pixels
    module, variables, names = read_whole(weights)
    if request.classes not in (None, module.classes):
        raise ValueError(f"{write('classes', request.classes)} given, {weights} has {module.classes}")
    if len(module.graph.inputs) > 1:
        raise ValueError(f"{weights} takes {len(module.graph.inputs)} inputs, a network of one image expected")
    height, width, channels = module.image_shape
    if pixels and channels not in (1, 3):
        raise ValueError(f"{weights} takes images of {channels} channels, 3 (RGB) or 1 (grey) expected")
    sides = request.sides
    if sides is not None and any(own not in (None, side) for own, side in zip((height, width), sides, strict=True)):
        raise ValueError(f"{write('size', request.size)} given, {weights} takes {height} x {width}: leave it out")
    if sides is not None:
        module = module.clone(input_shape=(*sides, channels))
    recipe = change_recipe(usual_recipe(module), request.changes)
    if request.preprocess is not None:
        preprocessing = KnownPreprocessing(mode_of(request), f"as {write('preprocess').removesuffix('=...')} says")
        if channels == 1 and preprocessing.mode in RGB_MODES:
            raise ValueError(f"{write('preprocess', request.preprocess)} is for RGB, {weights} takes grey images")
    elif pixels:
        preprocessing = require_preprocessing(module, variables, weights)
    else:
        preprocessing = recognize_preprocessing(module, variables)
    linear = module.graph.classifier is not None and module.classifier_activation in (None, "linear")
    ends = "; it ends without softmax or sigmoid: what is shown as probabilities is what it gives" if linear else ""
    if module.classes == 1 and module.classifier_activation == "softmax":
        ends = "; its softmax over one class is 1 for every image"
    says = (
        "how it wants its pixels is not known"
        if preprocessing is None
        else f"preprocess {preprocessing.mode}, {preprocessing.reason}"
    )
    note = f"{weights}: {says}; {recipe}{ends}" if pixels else f"{weights}: takes floats; {says}{ends}"
    preprocess = preprocessing.mode if preprocessing and pixels else None
    return LoadedNetwork(module, variables, preprocess, names, recipe, notes=(note,))


def read_whole(weights: str) -> tuple[KerasModel, MutableVariables, Sequence[tuple[str, str]] | None]:
    """Read (module, variables, names of the classes or None) of a whole model, also inside Teachable Machine's zip."""
    members = teachable_members(weights)
    if not members:
        return *load_model(weights), None
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(weights) as archive:
        file = Path(folder, "keras_model.h5")
        try:
            file.write_bytes(member(archive, members["keras_model.h5"]).getbuffer())
            module, variables = load_model(file)
            text = member(archive, members["labels.txt"]).getvalue() if "labels.txt" in members else None
        except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as e:
            raise ValueError(f"{weights}: {one_line(e).replace(str(file), file.name)}") from e
    return module, variables, None if text is None else parse_labels(text, f"labels.txt in {weights}", module.classes)


def teachable_members(weights: str) -> dict[str, str]:
    """Find keras_model.h5 and labels.txt, by these names, in Teachable Machine's zip; nothing in what is none."""
    path = Path(weights)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return {}
    paths = {name.rpartition("/")[2]: name for name in names_in_zip(path)}
    members = {name: paths[name] for name in ("keras_model.h5", "labels.txt") if name in paths}
    return members if "keras_model.h5" in members else {}


def mode_of(request: Request) -> Mode:
    """Return the mode of preprocessing that is asked for, by its own name or by a model's."""
    try:
        return preprocessing_mode(str(request.preprocess))
    except ValueError as e:
        raise ValueError(f"{request.write('preprocess', request.preprocess)} given: {e}") from None


def chosen_preprocessing(request: Request, module: Classifier, model: str) -> str:
    """Return what a model wants of its pixels; what the request says is that, or an error.

    Where the model's own preprocessing was left out of it, the request has to say what is wanted instead.

    Args:
        request: what is asked for.
        module: the network.
        model: the name of its model; of a run that began with a file, the mode.
    """
    own = MODES.get(model, preprocessing_of(module))
    if request.preprocess is None:
        if own is None:
            raise ValueError(
                f"this {model} is without its own preprocessing: {request.write('preprocess')} expected: "
                f"{MODES_IN_WORDS}, or the name of a model that wants the same"
            )
        return model
    mode = mode_of(request)
    if own not in (None, mode):
        raise ValueError(f"{request.write('preprocess', request.preprocess)} given, {model} wants {own}: leave it out")
    return mode


def taken_options(weights: str, model: str, options: Options, module: Classifier) -> str:
    """Say which options of a network were taken from a file of Keras's, and not given; empty for none.

    Args:
        weights: the file.
        model: the name of the model.
        options: what was given.
        module: the network as it was loaded.
    """
    side = spec(model).input_size
    usual = create(model, input_shape=(side, side, 3))
    given = {*NO_OPTIONS, *options} | ({"input_shape"} if module.input_shape is None else set())
    names = [field.name for field in dataclasses.fields(module) if field.name not in given]
    taken = [f"{name}={getattr(module, name)!r}" for name in names if getattr(module, name) != getattr(usual, name)]
    return f"{weights}: {', '.join(taken)} taken from it" if taken else ""


def parse_labels(text: bytes, source: str, classes: int | None) -> Sequence[tuple[str, str]]:
    """Read ("-", label) of each class from lines of text; numbers before them, as Teachable Machine writes, are left.

    Args:
        text: UTF-8, a name on each line, or "0 NAME", "1 NAME", ... on all of them.
        source: what the text is, for errors.
        classes: how many are expected; None for any number.
    """
    try:
        names = [line.strip() for line in text.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not a text file, one name a line expected") from None
    if classes is not None and len(names) != classes:
        raise ValueError(f"{source} has {len(names)} names, {classes} expected, one a line")
    numbered = [name.split(maxsplit=1) for name in names]
    if [parts[0] for parts in numbered] == [str(i) for i in range(len(names))] and all(len(p) > 1 for p in numbered):
        names = [name for _, name in numbered]
    return [("-", name) for name in names]
