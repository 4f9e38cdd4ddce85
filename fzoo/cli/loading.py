"""A model, its weights and the names of its classes, as the options of a command say."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fzoo.cli.console import complain
from fzoo.cli.options import Network, Reading, parse_options
from fzoo.files import one_line

if TYPE_CHECKING:
    from fzoo.images.preprocessing import Mode


class LoadedNetwork(NamedTuple):
    """A network, and how it wants its images.

    Attributes:
        module, variables: the network.
        preprocess: the name or mode for `preprocess_input`; None where no pixels are to be given.
        names: (WordNet ID or "-", label) of the classes, where the weights tell.
        recipe: how an image becomes its input.
        model: the name of the model whose published accuracies its own may be held against; None for a fine-tuned one
            and a user's.
    """

    module: Any
    variables: Any
    preprocess: str | None
    names: Sequence[tuple[str, str]] | None
    recipe: Any
    model: str | None = None


def load_network(network: Network, reading: Reading, include_top: bool = True, pixels: bool = True) -> LoadedNetwork:
    """Load the network of a command: a model by its name, what a fine-tuning made, or a whole model of a user's.

    Args:
        network, reading: the options of the command.
        include_top: whether a model by its name has its classifier.
        pixels: whether the network is given pixels, so that it must be known how it wants them.

    Raises:
        ValueError: these do not go together, or do not fit the weights.
    """
    import fzoo
    from fzoo.images.recipe import change_recipe
    from fzoo.training.runs import is_run

    if is_run(network.weights) and (include_top or network.model is None):
        return load_own_run(network, reading, include_top, pixels)
    model = network.model or model_of(network.weights)
    if model is None:
        if not include_top or network.option:
            given = f"--option {network.option[0]}" if network.option else "--no-include-top"
            raise ValueError(f"{given} goes with --model NAME, {network.weights} is a whole model without options")
        return load_whole(network, reading, pixels)
    module, variables, side = load_model(
        model,
        network.weights,
        reading.size,
        option=network.option,
        classes=network.classes,
        include_top=include_top,
    )
    recipe = change_recipe(fzoo.recipe(model, side), reading.changes())
    preprocess = chosen_preprocessing(network, module, model) if pixels else None
    return LoadedNetwork(module, variables, preprocess, None, recipe, model)


def load_own_run(network: Network, reading: Reading, include_top: bool, pixels: bool) -> LoadedNetwork:
    """Load what a fine-tuning made, whose folder says what it is; arguments as for `load_network`.

    Raises:
        ValueError: the options say something else.
    """
    from fzoo.images.recipe import change_recipe
    from fzoo.training.runs import load_run

    folder, run, size = network.weights, load_run(network.weights), reading.size
    if size is not None and (size, size) != run.recipe.size:
        raise ValueError(f"--size {size} given, {folder} was trained on {run.recipe.size[0]} x {run.recipe.size[1]}")
    for given, fits, theirs in (
        (f"--model {network.model}", network.model in (None, run.model), f"began with {run.model}"),
        (f"--classes {network.classes}", network.classes in (None, run.module.classes), f"has {run.module.classes}"),
        (f"--option {next(iter(network.option or ()), '')}", not network.option, "says its own"),
        ("--no-include-top", include_top, "has its head"),
    ):
        if not fits:
            raise ValueError(f"{given} given, {folder} {theirs}: leave it out")
    names = [("-", name) for name in run.class_names]
    recipe = change_recipe(run.recipe, {**reading.changes(), "augment": False})
    preprocess = chosen_preprocessing(network, run.module, run.model) if pixels else None
    return LoadedNetwork(run.module, run.variables, preprocess, names, recipe)


def model_of(weights: str, wanted: str = "--model NAME") -> str | None:
    """Find the name of the model whose weights these are; None for a whole model, which needs none.

    Args:
        weights: a file, or "imagenet".
        wanted: what would do where they do not tell, for the message.

    Raises:
        ValueError: they do not tell.
        OSError: the file is not there.
    """
    from fzoo.models.keras_model import of_a_family
    from fzoo.pretrained.options import described_network
    from fzoo.weights import kind, read_description
    from fzoo.weights.config import read_configuration

    if weights == "imagenet":
        return "MobileNetV2"
    if teachable_members(weights):
        return None
    described = of_a_family(read_description(weights))
    if described is not None:
        return described_network(described)[0]
    if kind(weights) != "keras" or read_configuration(weights) is None:
        raise ValueError(f"{weights} has weights alone, and does not tell whose: {wanted} expected")
    return None


def load_whole(network: Network, reading: Reading, pixels: bool = True) -> LoadedNetwork:
    """Load the whole model of a file, and say on standard error how its images are read, or what it takes.

    Raises:
        ValueError: it is no such model, or one that wants what the options are not or can't give.
    """
    from fzoo.images.preprocessing import RGB_MODES
    from fzoo.images.recipe import change_recipe
    from fzoo.recognition import PixelsWanted, recognize_preprocessing, require_preprocessing, usual_recipe

    weights = network.weights
    module, variables, names = read_whole(weights)
    if network.classes not in (None, module.classes):
        raise ValueError(f"--classes {network.classes} given, {weights} has {module.classes}")
    if len(module.graph.inputs) > 1:
        raise ValueError(f"{weights} takes {len(module.graph.inputs)} inputs, a network of one image expected")
    height, width, channels = module.image_shape
    if pixels and channels not in (1, 3):
        raise ValueError(f"{weights} takes images of {channels} channels, 3 (RGB) or 1 (grey) expected")
    size = reading.size
    if size is not None and any(side not in (None, size) for side in (height, width)):
        raise ValueError(f"--size {size} given, {weights} takes {height} x {width}: leave it out")
    if size is not None:
        module = module.clone(input_shape=(size, size, channels))
    recipe = change_recipe(usual_recipe(module), reading.changes())
    if network.preprocess is not None:
        wanted = PixelsWanted(mode_of(network.preprocess), "as --preprocess says")
        if channels == 1 and wanted.mode in RGB_MODES:
            raise ValueError(f"--preprocess {network.preprocess} is for RGB, {weights} takes grey images")
    elif pixels:
        wanted = require_preprocessing(module, variables, weights)
    else:
        wanted = recognize_preprocessing(module, variables)
    linear = module.graph.classifier is not None and module.classifier_activation in (None, "linear")
    ends = "; it ends without softmax or sigmoid: what is shown as probabilities is what it gives" if linear else ""
    if module.classes == 1 and module.classifier_activation == "softmax":
        ends = "; its softmax over one class is 1 for every image"
    how = "how it wants its pixels is not known" if wanted is None else f"preprocess {wanted.mode}, {wanted.reason}"
    complain(f"{weights}: {how}; {recipe}{ends}" if pixels else f"{weights}: takes floats; {how}{ends}")
    return LoadedNetwork(module, variables, wanted.mode if wanted and pixels else None, names, recipe)


def read_whole(weights: str) -> tuple[Any, Any, Sequence[tuple[str, str]] | None]:
    """Read (module, variables, names of the classes or None) of a whole model, also inside Teachable Machine's zip."""
    import fzoo

    members = teachable_members(weights)
    if not members:
        return *fzoo.load_model(weights), None
    from fzoo.weights.files import member

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(weights) as archive:
        file = Path(folder, "keras_model.h5")
        try:
            file.write_bytes(member(archive, members["keras_model.h5"]).getbuffer())
            module, variables = fzoo.load_model(file)
            text = member(archive, members["labels.txt"]).getvalue() if "labels.txt" in members else None
        except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as e:
            raise ValueError(f"{weights}: {one_line(e).replace(str(file), file.name)}") from e
    return module, variables, None if text is None else parse_labels(text, f"labels.txt in {weights}", module.classes)


def teachable_members(weights: str) -> dict[str, str]:
    """Find keras_model.h5 and labels.txt, by these names, in Teachable Machine's zip; nothing in what is none."""
    from fzoo.weights.foreign import names_in_zip

    path = Path(weights)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return {}
    paths = {name.rpartition("/")[2]: name for name in names_in_zip(path)}
    found = {name: paths[name] for name in ("keras_model.h5", "labels.txt") if name in paths}
    return found if "keras_model.h5" in found else {}


def mode_of(preprocess: str) -> Mode:
    """Return the mode of preprocessing that a mode's or a model's name means."""
    from fzoo.zoo import preprocessing_mode

    try:
        return preprocessing_mode(preprocess)
    except ValueError as e:
        raise ValueError(f"--preprocess {preprocess} given: {e}") from None


def chosen_preprocessing(network: Network, module: Any, model: str) -> str:
    """Return what a model wants of its pixels; what --preprocess says is that, or an error.

    Where the model's own preprocessing was left out of it, --preprocess has to say what is wanted instead.

    Args:
        network: the options of the command.
        module: the network.
        model: the name of its model; of a run that began with a file, the mode.
    """
    from fzoo.images.preprocessing import MODES, MODES_IN_WORDS
    from fzoo.zoo import preprocessing_of

    own = MODES.get(model, preprocessing_of(module))
    if network.preprocess is None:
        if own is None:
            raise ValueError(
                f"this {model} is without its own preprocessing: --preprocess expected: {MODES_IN_WORDS}, or the name "
                "of a model that wants the same"
            )
        return model
    mode = mode_of(network.preprocess)
    if own not in (None, mode):
        raise ValueError(f"--preprocess {network.preprocess} given, {model} wants {own}: leave it out")
    return mode


def load_model(
    model: str,
    weights: str,
    size: int | None,
    *,
    option: Sequence[str] | None,
    include_top: bool = True,
    classes: int | None = None,
) -> tuple[Any, Any, tuple[int, int]]:
    """Load a network; what the command leaves out is what the weights say, or the model's default.

    Returns:
        (module, variables, height and width of its images).
    """
    import fzoo
    from fzoo.pretrained.whole import own_configuration
    from fzoo.weights import read_description

    usual = fzoo.spec(model).input_size
    options = parse_options(model, option)
    if not include_top:
        options["include_top"] = False
    if classes is not None:
        options["classes"] = classes
    described = None if weights == "imagenet" else read_description(weights)
    shape = described.options.get("input_shape") if described and size is None else None
    whole = weights != "imagenet" and size is None and own_configuration(weights) is not None
    if not whole and (not shape or None in shape):
        options["input_shape"] = (size or usual, size or usual, 3)
    module, variables = fzoo.load(model, weights=weights, **options)
    if module.input_shape is None:  # a whole model for images of any size
        module = module.clone(input_shape=(usual, usual, 3))
    if weights != "imagenet" and described is None:
        report_taken(weights, model, options, module)
    return module, variables, module.example_shape[:2]


def report_taken(weights: str, model: str, options: Mapping[str, Any], module: Any) -> None:
    """Say on standard error which options of a network were taken from a file of Keras's: those that were not given.

    Args:
        weights: the file.
        model: the name of the model.
        options: what was given.
        module: the network as it was loaded.
    """
    import fzoo
    from fzoo.weights.description import NO_OPTIONS

    side = fzoo.spec(model).input_size
    usual = fzoo.create(model, input_shape=(side, side, 3))
    given = {*NO_OPTIONS, *options} | ({"input_shape"} if module.input_shape is None else set())
    names = [field.name for field in dataclasses.fields(module) if field.name not in given]
    taken = [f"{name}={getattr(module, name)!r}" for name in names if getattr(module, name) != getattr(usual, name)]
    if taken:
        complain(f"{weights}: {', '.join(taken)} taken from it")


@functools.cache
def class_names(labels: Path | None, classes: int | None) -> Sequence[tuple[str, str]]:
    """Return (WordNet ID, label) of each class: ImageNet's, those of a file, or the bare number."""
    if labels is not None:
        return parse_labels(labels.read_bytes(), str(labels), classes)
    if classes not in (None, 1000):
        return [("-", str(i)) for i in range(classes)]
    from fzoo.images.labels import class_index

    return class_index()


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


def join_processes(distributed: str | None) -> tuple[int, int]:
    """Join the processes of a run: (number of this process, how many there are)."""
    from fzoo.inference.devices import start_distributed

    return (0, 1) if distributed is None else start_distributed(distributed)
