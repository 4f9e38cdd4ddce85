"""A network as what batch engines call: from a batch of columns to a batch of columns."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from fzoo.errors import unknown
from fzoo.files import one_line
from fzoo.images.recipe import Recipe
from fzoo.inference.batches import check_batch_size, default_batch, in_flight
from fzoo.inference.devices import mesh as local_mesh
from fzoo.inference.optimize import optimize_for_inference
from fzoo.jobs.loading import Request, load_network, mode_of, model_of, teachable_members
from fzoo.jobs.network import Network, class_labels
from fzoo.jobs.pipeline import available_cores, round_up, step_back
from fzoo.layers.graph import layer_names
from fzoo.layers.options import is_count
from fzoo.pretrained.whole import is_whole_model, network_in
from fzoo.training.runs import is_run, read_run
from fzoo.types import DTypeLike
from fzoo.zoo import VARIANTS, create

#: The column of why an image could not be read.
ERROR = "error"

#: Networks that a process keeps, for all predictors that are told the same.
KEPT = 4


#: What an image is read from; None for a row without one.
ImageSource = str | os.PathLike | io.BytesIO | np.ndarray | Image.Image | None


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """What decides the network of a `Predictor`, and its results; the attributes are its arguments.

    Attributes:
        state: of the files of the weights, where they are a user's.
    """

    model: str | None
    weights: str
    options: dict[str, Any]
    layers: tuple[str, ...] | None
    top: int
    labels: Sequence[tuple[str, str]] | None
    preprocess: str | None
    size: int | tuple[int, int] | None
    recipe: Recipe | None
    dtype: np.dtype
    optimize: bool
    tune: bool
    devices: int | None
    state: tuple[tuple[str, int, int], ...]

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def request(self) -> Request:
        """Return what is to be loaded."""
        options = dict(self.options)
        classes, include_top = options.pop("classes", None), options.pop("include_top", True)
        changes = {} if self.recipe is None else dataclasses.asdict(self.recipe)
        size = changes.pop("size", self.size)
        return Request(
            self.weights,
            self.model,
            lambda model: dict(options),
            next((f"{name}={value!r}" for name, value in options.items()), ""),
            classes,
            self.preprocess,
            size,
            changes,
            include_top,
        )


class Loaded(NamedTuple):
    """A network in memory.

    Attributes:
        network: it, and what is wanted of it.
        recipe: how an image becomes its input.
        labels: (WordNet ID, label) of its classes; None where layers are wanted.
    """

    network: Network
    recipe: Recipe
    labels: Sequence[tuple[str, str]] | None


class Predictor:
    """Compute classes or features of images in the columns of a batch, wherever the batch is.

    An object of this class is what Ray Data's `map_batches`, Hugging Face's `datasets.map(batched=True)` and, inside of
    a `make_predict_fn`, Spark's `predict_batch_udf` call. It is made and pickled without its weights: these
    are read at the first call, once in each process, and every batch goes through one compiled program.
    Threads may call it at the same time.

    Images are read as `fzoo classify` reads them, and the results are those that it gives. Of an image that can't
    be read, the row has the reason in the column "error", and no names, NaN for numbers (0 for integers): no row is
    lost, and none is left out. Elsewhere "error" is empty.

    Args:
        model: the name of a model, or the path of what a network can be loaded from without one: a whole model of
            Keras's, a file that fzoo wrote, the folder of a fine-tuning. A path has to be the same in each process.
        weights: for the name of a model: "imagenet", or a file as for `fzoo.load`.
        layers: the Keras layers whose outputs are the results, a column (N, ...) for each. By default the results are
            the likeliest classes: "wnid", "label" and "probability", in each row a list of these, the likeliest first.
        top: how many classes.
        labels: (WordNet ID, label) of each class; by default those that the weights tell, ImageNet's for 1000 classes,
            else the bare numbers.
        preprocess: what a whole model wants of its pixels where it does not show: a mode, or the model whose it is.
        size: (height, width) of the network's images in pixels, or one number for both; by default the weights' own.
        recipe: how an image becomes the network's input, its size too; by default that of the weights.
        batch_size: how many images go through at once, on all devices together. By default as many as the first call
            has, at most 32 for each device on a CPU, elsewhere some 256.
        dtype: of the computation.
        optimize: whether the network is that of `optimize_for_inference`.
        tune: whether it is that, and its convolutions take the forms that are the fastest on the CPU of each process.
        devices: how many of the process's devices; all by default.
        workers: threads that decode; one for each core by default.
        image_column: the column of the images.
        keep: whether the batch's other columns are part of the result.
        prefix: put before the names of the results, where columns that are kept have the same.
        **options: of the model, as for `fzoo.load`: `alpha=0.5`, `include_top=False`, `classes=10`.

    Raises:
        ValueError: an unknown model, layer or option, or a value that can't be honoured.
        OSError: a file is not there.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        weights: str | os.PathLike = "imagenet",
        layers: str | Sequence[str] | None = None,
        top: int = 5,
        labels: Sequence[tuple[str, str]] | None = None,
        preprocess: str | None = None,
        size: int | tuple[int, int] | None = None,
        recipe: Recipe | None = None,
        batch_size: int | None = None,
        dtype: DTypeLike = jnp.float32,
        optimize: bool = False,
        tune: bool = False,
        devices: int | None = None,
        workers: int | None = None,
        image_column: str = "image",
        keep: bool = True,
        prefix: str = "",
        **options: Any,
    ):
        name, source = chosen_source(model, weights)
        if size is not None and recipe is not None:
            raise ValueError(f"size={size!r} and a recipe given, which says the size: leave one of them out")
        if "input_shape" in options:
            raise ValueError(f"input_shape={options['input_shape']!r} given: size=(height, width) expected")
        for argument, value in (("top", top), ("workers", workers), ("devices", devices)):
            if value is not None and not is_count(value):
                raise ValueError(f"{argument}={value!r} given, a positive number expected")
        check_batch_size(batch_size)
        names = (layers,) if isinstance(layers, str) else None if layers is None else tuple(layers)
        self.settings = Settings(
            name,
            source,
            options,
            names,
            top,
            labels,
            preprocess,
            size,
            recipe,
            jnp.dtype(dtype),
            optimize or tune,
            tune,
            devices,
            state_of(source),
        )
        check_settings(self.settings)
        self.batch_size, self.workers = batch_size, workers
        self.image_column, self.keep, self.prefix = image_column, keep, prefix
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Predictor({self.settings.model or self.settings.weights!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: the arguments."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Set the arguments again."""
        self.__dict__.update(state, _lock=threading.Lock())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the results of a batch.

        Args:
            batch: {column: N values}. Those of the column of images are the bytes of files, paths, Pillow's images,
                Hugging Face's {"bytes", "path"}, or pixels: uint8 (H, W), or (H, W, C) with C = 1, 3 or 4. Pixels
                of the network's size are taken as they are, all others by the recipe.

        Returns:
            {column: N values}: what is kept of the batch, and the results, NumPy's arrays.

        Raises:
            ValueError: this is no such batch, a column would be there twice, or the network gives NaN for an image
                that could be read.
        """
        sources = self.sources(batch)
        with self._lock:  # the devices are shared, and so is what the first call decides
            loaded = load_settings(self.settings)
            if self.batch_size is None:
                network, shape = loaded.network, (*loaded.recipe.size, loaded.recipe.channels)
                most = default_batch(network.platform, shape) * network.devices
                self.batch_size = min(most, max(1, len(sources)))
            results = self.results(loaded, sources)
        results = {self.prefix + name: column for name, column in results.items()}
        kept = {name: column for name, column in batch.items() if self.keep and name != self.image_column}
        if twice := kept.keys() & results.keys():
            raise ValueError(
                f"the batch has a column {min(twice)!r}, and so have the results: prefix='predicted_' (or another) or "
                "keep=False expected"
            )
        return {**kept, **results}

    def sources(self, batch: Any) -> list[ImageSource]:
        """Return what each image of a batch is read from."""
        if not isinstance(batch, Mapping):
            raise ValueError(f"{type(batch).__name__} given, a mapping from columns to their values expected")
        if self.image_column not in batch:
            raise ValueError(
                f"no column {self.image_column!r} in a batch of {', '.join(map(str, batch)) or 'none'}: "
                "image_column=... expected"
            )
        column = batch[self.image_column]
        if isinstance(column, (str, bytes)) or not isinstance(column, Iterable):
            raise ValueError(f"{self.image_column!r} is {type(column).__name__}, a column of images expected")
        return [as_source(image) for image in column]

    def results(self, loaded: Loaded, sources: Sequence[ImageSource]) -> dict[str, np.ndarray]:
        """Compute the columns of results."""
        network, recipe = loaded.network, loaded.recipe
        size = round_up(self.batch_size or 1, network.devices)
        shape = (size, *recipe.size, recipe.channels)
        columns = {
            name: np.full((len(sources), *aval.shape), np.nan if aval.dtype.kind == "f" else 0, aval.dtype)
            for name, aval in network.shapes(shape).items()
        }
        errors = np.full(len(sources), "", object)

        def started(pool: ThreadPoolExecutor) -> Iterator[tuple[int, list[str], Any]]:
            for start in range(0, len(sources), size):
                pixels = np.zeros(shape, np.uint8)
                chunk = sources[start : start + size]
                reasons = list(pool.map(functools.partial(read_into, recipe), chunk, pixels))
                yield start, reasons, network(pixels) if "" in reasons else None

        with ThreadPoolExecutor(self.workers or available_cores(), "decode", step_back) as pool:
            for start, reasons, outputs in in_flight(started(pool)):
                errors[start : start + len(reasons)] = reasons
                good = [i for i, reason in enumerate(reasons) if not reason]
                names = [f"of row {start + i} of the batch" for i in good]
                for name, rows in (network.rows(outputs, good, names) if good else {}).items():
                    columns[name][[start + i for i in good]] = rows
        if loaded.labels is not None:
            columns = label_columns(columns, loaded.labels, errors)
        return {**columns, ERROR: errors}


def chosen_source(model: Any, weights: Any) -> tuple[str | None, str]:
    """Return (name of the model or None, "imagenet" or the path of the weights) of a predictor's arguments.

    Raises:
        ValueError: these are none.
        OSError: a file is not there.
    """
    for name, value in (("model", model), ("weights", weights)):
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise ValueError(f"{name}={value!r} given, a name or a path expected")
    if isinstance(model, str) and model in VARIANTS:
        if weights != "imagenet" and not os.path.exists(weights):
            raise FileNotFoundError(f"no such weights file: {os.fspath(weights)}")
        return model, "imagenet" if weights == "imagenet" else os.path.abspath(weights)
    if not is_run(model) and not is_whole_model(model) and not os.path.exists(model):
        raise ValueError(f"no such file, and {unknown('model', os.fspath(model), VARIANTS)}")
    if weights != "imagenet":
        raise ValueError(f"weights={os.fspath(weights)!r} given, {os.fspath(model)} has its own: leave it out")
    return None, os.path.abspath(model)


def state_of(weights: str) -> tuple[tuple[str, int, int], ...]:
    """Return what changes with the files of weights: their sizes and times of change."""
    if weights == "imagenet":
        return ()
    path = Path(weights)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def check_settings(settings: Settings) -> None:
    """Raise an error for what can be known to be wrong before weights are read."""
    request, module = settings.request(), None
    sides = request.sides
    if settings.model is not None:
        options = {**settings.options, "dtype": settings.dtype}
        module = create(settings.model, **options, input_shape=None if sides is None else (*sides, 3))
    elif is_run(settings.weights):
        module = read_run(Path(settings.weights))[0]
    elif model_of(settings.weights, "fzoo.Predictor(NAME, weights=...)") is None:
        module = None if teachable_members(settings.weights) else network_in(settings.weights)[0]
    if settings.preprocess is not None:
        mode_of(request)
    if settings.layers is not None and not settings.layers:
        raise ValueError("no layers given: at least one name of fzoo.layer_names(module) expected")
    if settings.layers is not None and module is not None:
        known = layer_names(module)
        for layer in settings.layers:
            if layer not in known:
                raise ValueError(unknown("layer", layer, known))


_loading = threading.Lock()


def load_settings(settings: Settings) -> Loaded:
    """Load a network, once in a process, however often a predictor is unpickled there."""
    with _loading:
        return keep_loaded(settings)


@functools.lru_cache(maxsize=KEPT)
def keep_loaded(settings: Settings) -> Loaded:
    """Load a network, and keep it."""
    loaded = load_network(settings.request())
    module, variables = loaded.module, loaded.variables
    if settings.optimize:
        module, variables = optimize_for_inference(module, variables, dtype=settings.dtype, tune=settings.tune)
    elif settings.dtype != module.dtype:
        module = module.clone(dtype=settings.dtype)
    mesh = local_mesh(settings.devices)
    network = Network(module, variables, settings.layers, settings.top, loaded.preprocess, mesh)
    labels = class_labels(settings.labels or loaded.names, network) if settings.layers is None else None
    return Loaded(network, loaded.recipe, labels)


def as_source(image: object) -> ImageSource:
    """Return what an image of a column is read from: a path, an open file, an array of pixels or Pillow's image.

    Raises:
        ValueError: this is nothing of the kind, and so is the whole column.
    """
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (bytes, bytearray, memoryview)):
        file = io.BytesIO(image)
        file.name = "of this row"  # for errors
        return file
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise ValueError(
                f"pixels of {image.dtype} and shape {image.shape} given, uint8 expected, (H, W) or (H, W, C) with "
                "C = 1, 3 or 4"
            )
        return image
    if image is None or isinstance(image, (str, os.PathLike, Image.Image)):
        return image
    raise ValueError(
        f"an image that is {type(image).__name__} given: bytes of a file, a path, pixels or Pillow's image expected"
    )


def read_into(recipe: Recipe, source: ImageSource, pixels: np.ndarray) -> str:
    """Read an image into an array of the batch's; returns the reason why it can't be, else an empty text."""
    try:
        if source is None:
            raise ValueError("no image in this row")
        if isinstance(source, np.ndarray):
            if source.shape[:2] == recipe.size:
                recipe = dataclasses.replace(recipe, crop=None)
            source = Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source)
        pixels[:] = recipe.load(source)
        return ""
    except (ValueError, OSError) as e:
        return one_line(e) or type(e).__name__


def label_columns(
    columns: Mapping[str, np.ndarray], labels: Sequence[tuple[str, str]], errors: np.ndarray
) -> dict[str, np.ndarray]:
    """Return "wnid", "label" and "probability" of each image, lists in one column each: Arrow's own kind of those."""
    wnids, names, probabilities = (np.empty(len(errors), object) for _ in range(3))
    for i, (classes, p, error) in enumerate(zip(columns["classes"], columns["probabilities"], errors, strict=True)):
        pairs = [("", "") if error else labels[c] for c in classes]
        wnids[i], names[i] = (list(column) for column in zip(*pairs, strict=True))
        probabilities[i] = list(p)
    return {"wnid": wnids, "label": names, "probability": probabilities}
