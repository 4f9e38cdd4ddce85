"""The folder of a fine-tuning: configuration, checkpoints, metrics, pictures, weights.

config.json      what the run was asked for, as JSON
checkpoints/     Orbax's, of the last two times
metrics.jsonl    a line for each epoch
curves.png       loss and accuracy over the epochs
confusion.csv, confusion.png   validation images by (true class, predicted class)
classes.txt      the names of the classes, in the order of the outputs
model.h5         the weights at the end, as Keras reads them: what says that the run is finished
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from fzoo.figures import make_figure
from fzoo.files import one_line, replacing
from fzoo.images.recipe import Recipe
from fzoo.inference.devices import first_alone
from fzoo.layers.classifier import Classifier, Head
from fzoo.models.keras_model import KerasModel, keras_model
from fzoo.training.config import IN_RECIPE
from fzoo.training.plots import draw_confusion, draw_curves
from fzoo.types import Json, MutableVariables, Options, Variables
from fzoo.weights import load_keras_weights, save_keras_weights
from fzoo.weights.graph import build_graph
from fzoo.weights.rewrite import configuration_of
from fzoo.zoo import create, model_options, spec

if TYPE_CHECKING:
    from fzoo.training.results import Finetuned


#: Which layout of the folder this is.
FORMAT = 1


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
        phase, epoch, step: finished ones, epochs within the phase and steps within the epoch.
        total: steps of all phases.
        position: of the input within the phase.
        loss_sum, accuracy_sum: over the steps of the epoch.
        last_loss: of the last step.
        history: a row for each epoch.
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    total: int = 0
    position: Any = None
    loss_sum: float = 0.0
    accuracy_sum: float = 0.0
    last_loss: float = 0.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def took(self, loss: float, accuracy: float) -> None:
        """Count a step."""
        self.step, self.total = self.step + 1, self.total + 1
        self.last_loss = loss
        self.loss_sum, self.accuracy_sum = self.loss_sum + loss, self.accuracy_sum + accuracy

    def means(self) -> dict[str, float]:
        """Return the means of the epoch so far."""
        return {"loss": self.loss_sum / self.step, "accuracy": self.accuracy_sum / self.step}

    def end_of_epoch(self, row: dict[str, float]) -> None:
        """Go to the next epoch."""
        self.history.append(row)
        self.epoch, self.step, self.loss_sum, self.accuracy_sum = self.epoch + 1, 0, 0.0, 0.0

    def end_of_phase(self) -> None:
        """Go to the next phase, whose input starts anew."""
        self.phase, self.epoch, self.position = self.phase + 1, 0, None


class Run:
    """A folder that is being written; of several processes, by the first.

    Args:
        folder: is made if it is not there.
        config: from `describe`.
        resume: go on with what is there.

    Raises:
        FileExistsError: there is a run already, and it is not to be resumed.
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: it is of another configuration.
        OSError: it can't be written; of several processes, it is not for all to see, or the first has failed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Json], resume: bool):
        make_figure(1, 1, extra="finetune")  # what is missing at the end is missed at the start
        self.folder, self.config = folder.absolute(), dict(config)
        self.writes = jax.process_index() == 0
        first_alone(lambda: self._begin(folder, resume))
        if not is_run(self.folder):
            raise OSError(f"{folder} is not the folder that process 0 made: one that all processes see expected")
        self.checkpoints = checkpoints(self.folder / "checkpoints")

    def _begin(self, folder: Path, resume: bool) -> None:
        """See that nothing else is there, and write down what this run is."""
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file, a folder for the run expected")
        if is_run(folder):
            if not resume:
                raise FileExistsError(f"{folder} holds a run already: resume it (--resume), or name another folder")
            # What an older fzoo did not write down says nothing.
            differing = differences({**self.config, **read_config(self.folder)}, self.config)
            if differing:
                raise ValueError(f"{folder} is a run of other settings: {'; '.join(differing)}")
        elif folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty, and no run: name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.json", json.dumps(self.config, indent=1) + "\n")

    def progress(self) -> Progress | None:
        """Read how far the last checkpoint is; None if there is none."""
        import orbax.checkpoint as ocp

        latest = self.checkpoints.latest_step()
        if latest is None:
            return None
        try:
            restored = self.checkpoints.restore(latest, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
            return Progress(**restored.progress)
        except Exception as e:  # of many classes
            raise ValueError(f"{self.folder}/checkpoints/{latest} can't be read: {one_line(e)}") from e

    def restore(self, item: str, like: PyTree) -> PyTree:
        """Read what the last checkpoint has as "variables" or "optimizer": a tree of `like`'s shapes and placement."""
        import orbax.checkpoint as ocp

        latest = self.checkpoints.latest_step()
        leaves, structure = jax.tree.flatten(like)
        abstract = {str(i): jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for i, a in enumerate(leaves)}
        try:
            arguments = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
            restored = self.checkpoints.restore(latest, args=arguments)[item]
            return jax.tree.unflatten(structure, [restored[str(i)] for i in range(len(leaves))])
        except Exception as e:  # of many classes
            raise ValueError(f"{self.folder}/checkpoints/{latest} is not of this network: {one_line(e)}") from e

    def save(self, progress: Progress, variables: Variables, opt_state: PyTree) -> None:
        """Write a checkpoint; the one before is kept until it is whole."""
        import orbax.checkpoint as ocp

        items: dict[str, Any] = {"progress": ocp.args.JsonSave(dataclasses.asdict(progress))}
        for name, tree in (("variables", variables), ("optimizer", opt_state)):
            if leaves := jax.tree.leaves(tree):
                items[name] = ocp.args.StandardSave({str(i): leaf for i, leaf in enumerate(leaves)})
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((variables, opt_state)))
        if self.writes and shutil.disk_usage(self.folder).free < 1.1 * needed + (1 << 20):
            raise OSError(errno.ENOSPC, f"No space left for a checkpoint of {needed / 1e6:.0f} MB", str(self.folder))
        # Numbered by the steps taken and the phase, whose end is a state of its own.
        number = progress.total * 100 + progress.phase
        try:
            self.checkpoints.save(number, args=ocp.args.Composite(**items), force=True)
        except Exception as e:  # of many classes
            raise OSError(f"the checkpoint {self.folder}/checkpoints/{number} can't be written: {one_line(e)}") from e

    def write_metrics(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write metrics.jsonl."""
        if self.writes:
            write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def finish(self, result: Finetuned) -> None:
        """Write all that a finished run has; the weights last."""
        self.checkpoints.close()
        if not self.writes:
            return
        self.write_metrics(result.history)
        write_text(self.folder / "classes.txt", "".join(f"{name}\n" for name in result.class_names))
        draw_curves(result.history, self.folder / "curves.png")
        if result.evaluation is not None:
            confusion = result.evaluation.confusion
            rows = [(name, *row) for name, row in zip(result.class_names, confusion.tolist(), strict=True)]
            write_text(self.folder / "confusion.csv", csv_text([("true \\ predicted", *result.class_names), *rows]))
            draw_confusion(confusion, result.class_names, self.folder / "confusion.png")
        save_keras_weights(result.module, result.variables, self.folder / "model.h5")


class LoadedRun(NamedTuple):
    """What `load_run` gives.

    Attributes:
        module, variables: the network, with a softmax at its end.
        model: the backbone's name, or the mode, for `preprocess_input`.
        class_names: of the outputs.
        recipe: how an image becomes its input.
    """

    module: Classifier
    variables: MutableVariables
    model: str
    class_names: tuple[str, ...]
    recipe: Recipe


def load_run(folder: str | os.PathLike) -> LoadedRun:
    """Load the network that a fine-tuning made.

    Args:
        folder: the `out` of `fzoo.finetune`, `--out` of `fzoo finetune`.

    Raises:
        FileNotFoundError: it is no such folder.
        ValueError: the run has not finished, or the folder is damaged.
    """
    folder = Path(folder)
    module, model, names, recipe = read_run(folder)
    return LoadedRun(module, load_keras_weights(module, folder / "model.h5"), model, names, recipe)


def read_run(folder: Path) -> tuple[Classifier, str, tuple[str, ...], Recipe]:
    """Read (network, name of its model, classes, recipe) from a finished run's config.json. Raises as `load_run`."""
    config = read_config(folder)
    if not (folder / "model.h5").exists():
        raise ValueError(f"the run in {folder} has not finished: `fzoo finetune ... --out {folder} --resume` goes on")
    try:
        recipe = Recipe.from_json(config["recipe"])
        return network(config), config.get("preprocess") or config["model"], tuple(config["classes"]), recipe
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{folder}/config.json is damaged: {one_line(e)}") from e


def settings_of(folder: Path) -> Options:
    """Return what a run says of `FinetuneConfig`'s fields for one that starts from it: its network, and its recipe.

    Raises as `load_run`.
    """
    module, model, _, recipe = read_run(folder)
    if isinstance(module, KerasModel):
        raise ValueError(
            f"{folder} began with the network of a file: model={str(folder / 'model.h5')!r} with preprocess={model!r} "
            "goes on from it"
        )
    own = {name: value for name, value in options_of(module, model).items() if name not in ("input_shape", "dtype")}
    preprocessing = {name: getattr(recipe, name) for name in IN_RECIPE if name not in ("size", "augment")}
    return {"model": model, "head": module.head, "size": recipe.size[0], **preprocessing, "options": own}


def options_of(module: Classifier, model: str) -> Options:
    """Return what makes a network differ from the model as it is by default, beyond its classifier; for `describe`.

    Of one that came from a file, all that makes it.
    """
    if isinstance(module, KerasModel):
        return {"graph": module.graph.source, "cut": module.cut, "dtype": module.dtype}
    usual = model_options(spec(model))
    own = {name: getattr(module, name) for name, value in usual.items() if getattr(module, name) != value}
    return {"input_shape": module.input_shape, "dtype": module.dtype, **own}


def network(config: Mapping[str, Json]) -> Classifier:
    """Make the network of a configuration, with a softmax at its end."""
    if "graph" in config["options"]:
        graph, _ = build_graph(configuration_of(config["options"]["graph"]))
        return keras_model(graph, jnp.dtype(config["options"]["dtype"])).clone(cut=config["options"]["cut"])
    usual = model_options(spec(config["model"]))
    options = {name: as_it_was(value, usual.get(name)) for name, value in config["options"].items()}
    options["dtype"] = jnp.dtype(options["dtype"])
    return create(config["model"], classes=len(config["classes"]), head=Head(**config["head"]), **options)


def as_it_was(value: Json, default: Any) -> Any:
    """Return an option that JSON held: a list is a tuple, of rows where the default has such."""
    if not isinstance(value, list):
        return value
    table = isinstance(default, tuple) and isinstance(default[0], tuple)
    return tuple(type(default[0])(*row) for row in value) if table else tuple(value)


def is_run(folder: str | os.PathLike) -> bool:
    """Tell whether this is the folder of a fine-tuning."""
    return Path(folder, "config.json").is_file()


def read_config(folder: Path) -> dict[str, Json]:
    """Read config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of a later fzoo.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a fine-tuning: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise ValueError(f"format {config['format']}, {FORMAT} expected")
        config["recipe"] = Recipe.from_json(config["recipe"]).to_json()
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is not a run's configuration: {one_line(e)}") from e
    return config


def describe(**settings: Any) -> dict[str, Json]:
    """Return settings as what JSON can hold, and reads back equal."""

    def plain(value: Any) -> Json:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)) and not isinstance(value, optax.GradientTransformation):
            return [plain(item) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        try:
            return jnp.dtype(value).name
        except TypeError:
            return "custom"  # an optimizer or a schedule that the user made

    return json.loads(json.dumps({"format": FORMAT, **{name: plain(value) for name, value in settings.items()}}))


def differences(there: Mapping[str, Json], here: Mapping[str, Json], prefix: str = "") -> list[str]:
    """Say where two configurations differ, in words."""
    lines = []
    for key in dict.fromkeys([*there, *here]):
        a, b = there.get(key), here.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(
                "other images (data)" if key == "data" else f"{prefix}{key} {shortened(a)}, not {shortened(b)}"
            )
    return lines


def shortened(value: Json) -> str:
    """Write a value for one line."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def checkpoints(folder: Path) -> Any:
    """Make Orbax's manager of a folder."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what it logs, it raises, too
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder, options=options)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears when it is whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """Write rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
