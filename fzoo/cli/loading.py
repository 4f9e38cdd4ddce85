"""A model, its weights and the names of its classes, as the options of a command say."""

from __future__ import annotations

import functools
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fzoo.cli.console import complain
from fzoo.cli.options import Network, Reading, parse_options
from fzoo.files import one_line


class LoadedNetwork(NamedTuple):
    """A network, and how it wants its images.

    Attributes:
        module, variables: the network.
        preprocess: the name or mode for `preprocess_input`.
        names: (WordNet ID or "-", label) of the classes, where the weights tell.
        recipe: how an image becomes its input.
        model: the name of the model whose published accuracies its own may be held against; None for a fine-tuned one
            and a user's.
    """

    module: Any
    variables: Any
    preprocess: str
    names: Sequence[tuple[str, str]] | None
    recipe: Any
    model: str | None = None


def load_network(network: Network, reading: Reading, include_top: bool = True) -> LoadedNetwork:
    """Load the network of a command: a model by its name, what a fine-tuning made, or a whole model of a user's.

    Args:
        network, reading: the options of the command.
        include_top: whether a model by its name has its classifier.

    Raises:
        ValueError: these do not go together, or do not fit the weights.
    """
    import fzoo
    from fzoo.images.recipe import change_recipe
    from fzoo.training.runs import is_run, load_run

    if is_run(network.weights):
        run, size = load_run(network.weights), reading.size
        if size is not None and (size, size) != run.recipe.size:
            raise ValueError(
                f"--size {size} given, {network.weights} was trained on {run.recipe.size[0]} x {run.recipe.size[1]}"
            )
        names = [("-", name) for name in run.class_names]
        recipe = change_recipe(run.recipe, {**reading.changes(), "augment": False})
        preprocess = chosen_preprocessing(network, run.module, run.model)
        return LoadedNetwork(run.module, run.variables, preprocess, names, recipe)
    model = network.model or model_of(network.weights)
    if model is None:
        if not include_top or network.option:
            given = f"--option {network.option[0]}" if network.option else "--no-include-top"
            raise ValueError(f"{given} goes with --model NAME, {network.weights} is a whole model without options")
        return load_whole(network, reading)
    module, variables, side = load_model(
        model,
        network.weights,
        reading.size,
        option=network.option,
        classes=network.classes,
        include_top=include_top,
    )
    recipe = change_recipe(fzoo.recipe(model, side), reading.changes())
    return LoadedNetwork(module, variables, chosen_preprocessing(network, module, model), None, recipe, model)


def model_of(weights: str) -> str | None:
    """Find the name of the model whose weights these are; None for a whole model, which needs none.

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
        raise ValueError(f"{weights} has weights alone, and does not tell whose: --model NAME expected")
    return None


def load_whole(network: Network, reading: Reading) -> LoadedNetwork:
    """Load the whole model of a file, and say on standard error how its images are read.

    Raises:
        ValueError: it is no such model, or one that wants what the options are not or can't give.
    """
    from fzoo.images.recipe import change_recipe
    from fzoo.recognition import recognize_preprocessing, usual_recipe

    weights = network.weights
    module, variables, names = read_whole(weights)
    if network.classes not in (None, module.classes):
        raise ValueError(f"--classes {network.classes} given, {weights} has {module.classes}")
    if len(module.graph.inputs) > 1:
        raise ValueError(f"{weights} takes {len(module.graph.inputs)} inputs, a network of one image expected")
    height, width, channels = module.image_shape
    if channels not in (1, 3):
        raise ValueError(f"{weights} takes images of {channels} channels, 3 (RGB) or 1 (grey) expected")
    size = reading.size
    if size is not None and any(side not in (None, size) for side in (height, width)):
        raise ValueError(f"--size {size} given, {weights} takes {height} x {width}: leave it out")
    recipe = change_recipe(usual_recipe(module), reading.changes() | ({} if size is None else {"size": (size, size)}))
    if network.preprocess is not None:
        mode, reason = mode_of(network.preprocess), "as --preprocess says"
        if channels == 1 and mode in ("caffe", "torch"):
            raise ValueError(f"--preprocess {network.preprocess} is for RGB, {weights} takes grey images")
    else:
        wanted = recognize_preprocessing(module, variables)
        if wanted is None:
            raise ValueError(
                f"{weights} does not show what it wants of its pixels: --preprocess tf (from -1 to 1), torch, caffe, "
                "none (from 0 to 255 as they are) or the name of a model that wants the same expected"
            )
        mode, reason = wanted
    linear = module.graph.classifier is not None and module.classifier_activation in (None, "linear")
    ends = "; it ends without softmax or sigmoid: what is shown as probabilities is what it gives" if linear else ""
    if module.classes == 1 and module.classifier_activation == "softmax":
        ends = "; its softmax over one class is 1 for every image"
    complain(f"{weights}: preprocess {mode}, {reason}; {recipe}{ends}")
    return LoadedNetwork(module, variables, mode, names, recipe)


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


def mode_of(preprocess: str) -> str:
    """Return the mode of preprocessing that a mode's or a model's name means."""
    from fzoo.zoo import preprocessing_mode

    try:
        return preprocessing_mode(preprocess)
    except ValueError as e:
        raise ValueError(f"--preprocess {preprocess} given: {e}") from None


def chosen_preprocessing(network: Network, module: Any, model: str) -> str:
    """Return what a model wants of its pixels; what --preprocess says is that, or an error.

    Where the model's own preprocessing was left out of it, what --preprocess says is taken.
    """
    from fzoo.zoo import preprocessing_of

    if network.preprocess is None:
        return model
    mode, own = mode_of(network.preprocess), preprocessing_of(module)
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
    from fzoo.weights import read_description

    usual = fzoo.spec(model).input_size
    options = parse_options(model, option)
    if not include_top:
        options["include_top"] = False
    if classes is not None:
        options["classes"] = classes
    described = None if weights == "imagenet" else read_description(weights)
    shape = described.options.get("input_shape") if described and size is None else None
    if not shape or None in shape:
        options["input_shape"] = (size or usual, size or usual, 3)
    module, variables = fzoo.load(model, weights=weights, **options)
    return module, variables, module.example_shape[:2]


@functools.cache
def class_names(labels: Path | None, classes: int | None) -> Sequence[tuple[str, str]]:
    """(WordNet ID, label) of each class: ImageNet's, those of a file, or the bare number."""
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
    """(number of this process, how many there are)."""
    from fzoo.inference.devices import start_distributed

    return (0, 1) if distributed is None else start_distributed(distributed)
