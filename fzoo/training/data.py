"""Labelled images for training and evaluation: folders and arrays, read in a fixed random order by Grain."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, PyTree, UInt8

from fzoo.errors import unknown
from fzoo.images.files import PassedOver
from fzoo.images.recipe import Recipe
from fzoo.images.walk import images_below


@runtime_checkable
class DataSource(Protocol):
    """Labelled inputs of a network by index."""

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        """The class of each."""
        ...

    def read(self, index: int, rng: np.random.Generator | None = None) -> PyTree:
        """Read an image (H, W, C), with `rng` augmented, or a tree of arrays; None for what can't be read."""
        ...


@dataclasses.dataclass
class Broken:
    """Images that could not be read, each reported once.

    Attributes:
        limit: how many are put up with.
        say: takes a line for each.
        paths: of those met so far.
    """

    limit: int
    say: Callable[[str], None]
    paths: set[Path] = dataclasses.field(default_factory=set)
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    def add(self, path: Path, error: Exception) -> None:
        """Report one; too many are an error."""
        with self.lock:
            if path in self.paths:
                return
            self.paths.add(path)
            count = len(self.paths)
        self.say(f"skipped: {error}")
        if count > self.limit:
            raise ValueError(f"more than {self.limit} images could not be read (max_broken)")


@dataclasses.dataclass(frozen=True)
class Files:
    """Images of a folder, decoded when they are asked for."""

    paths: tuple[Path, ...]
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...]
    recipe: Recipe
    broken: Broken

    def read(self, index: int, rng: np.random.Generator | None = None) -> UInt8[np.ndarray, "h w c"] | None:
        """Decode one."""
        try:
            return self.recipe.load(self.paths[index], rng)
        except (ValueError, OSError) as e:
            self.broken.add(self.paths[index], e)
            return None

    def check_left(self) -> None:
        """Raise ValueError where no image of a class can be read."""
        for label, name in enumerate(self.class_names):
            paths = [self.paths[i] for i in np.flatnonzero(self.labels == label)]
            if paths and self.broken.paths.issuperset(paths):
                raise ValueError(f"none of the {len(paths)} images of class {name} can be read, e.g. {paths[0]}")

    def readable(self, index: int) -> Path:
        """Name an image by its number among those that could be read."""
        return [path for path in self.paths if path not in self.broken.paths][index]

    def fingerprint(self) -> str:
        """Return a hash of names, sizes and labels; the content is not read."""
        lines = (
            f"{p.parent.name}/{p.name} {p.stat().st_size} {y}" for p, y in zip(self.paths, self.labels, strict=True)
        )
        return hashlib.sha256("\n".join([*self.class_names, *lines]).encode()).hexdigest()

    def subset(self, indices: Sequence[int]) -> Files:
        """Return some of the images."""
        return dataclasses.replace(self, paths=tuple(self.paths[i] for i in indices), labels=self.labels[list(indices)])


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Images that are in memory: uint8 pixels, or floats that are preprocessed."""

    images: np.ndarray
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...]

    def read(self, index: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """Look one up; nothing is augmented."""
        return self.images[index]

    def subset(self, indices: Sequence[int]) -> Arrays:
        """Return some of the images."""
        return dataclasses.replace(self, images=self.images[list(indices)], labels=self.labels[list(indices)])

    def fingerprint(self) -> str:
        """Return a hash of the values."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).view(np.uint8).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Features:
    """Outputs of layers for images, in memory."""

    arrays: Mapping[str, np.ndarray]
    labels: Int[np.ndarray, " n"]

    def read(self, index: int, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """Look one up."""
        return {layer: array[index] for layer, array in self.arrays.items()}


class Batches:
    """Batches that the user makes: an iterable that is gone through once an epoch, or an iterator that goes on.

    The position is the number of batches taken; to come back to it, that many are drawn again.
    """

    def __init__(
        self,
        data: Iterable[tuple[Any, Any]],
        classes: int,
        steps: int | None = None,
        check: Callable[[Any], None] = lambda images: None,
    ):
        self.endless = iter(data) is data
        if steps is None:
            if self.endless or not hasattr(data, "__len__"):
                raise ValueError("steps_per_epoch expected: the number of batches of this iterable is not known")
            steps = len(data)  # pyright: ignore[reportArgumentType]
        self.data, self.classes, self.steps, self.check = data, classes, steps, check

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield one pass, or what is left of an iterator."""
        for batch in self.data:
            if not isinstance(batch, (tuple, list)):
                raise ValueError(f"a batch that is {type(batch).__name__} given, (images, labels) expected")
            if len(batch) != 2:
                raise ValueError(
                    f"a batch of {len(batch)} parts given, (images, labels) expected: weights of images are not taken"
                )
            images, labels = batch[0], check_labels(batch[1], self.classes)
            if np.ndim(images) != 4 or len(images) != len(labels) or not len(labels):
                given = f"images of shape {np.shape(images)} and {len(labels)} labels"
                raise ValueError(f"{given} given, (N, H, W, C) and as many labels expected")
            self.check(images)
            yield images, labels


class Replayed:
    """An endless iterator over `Batches`, with Grain's way to keep the position."""

    def __init__(self, batches: Batches):
        self.batches, self.iterator, self.count = batches, iter(batches), 0

    def __next__(self) -> tuple[Any, Any]:
        """Return the next batch, from the next pass where one ends."""
        try:
            batch = next(self.iterator)
        except StopIteration:
            if self.batches.endless or self.count == 0:
                raise ValueError(f"the data ended after {self.count} batches, more expected") from None
            self.iterator = iter(self.batches)
            batch = next(self.iterator)
        self.count += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Return the position."""
        return {"count": self.count}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go there."""
        while self.count < state["count"]:
            next(self)


def check_labels(labels: object, classes: int | None) -> Int[np.ndarray, " n"]:
    """Return labels as int32.

    Raises:
        ValueError: they are no integers from 0 to below `classes`.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        expected = "the number of its class for each image expected, integers (N,)"
        if labels.ndim == 2:
            expected += ": labels[:, 0]" if labels.shape[1] == 1 else ": of one-hot rows, labels.argmax(1)"
        raise ValueError(f"labels of shape {labels.shape} and {labels.dtype} given, {expected}")
    if labels.size and (labels.min() < 0 or (classes is not None and labels.max() >= classes)):
        most = "" if classes is None else f" to {classes - 1}"
        raise ValueError(f"labels from {labels.min()} to {labels.max()} given, 0{most} expected")
    return labels.astype(np.int32)


def class_name(folder: Path) -> str:
    """Return the name of a folder as other systems have it, too: macOS may write "é" as two characters."""
    return unicodedata.normalize("NFC", folder.name)


def class_folders(folder: Path) -> list[Path]:
    """List the folders inside of a folder, in the order of their names: a class each."""
    return sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=class_name)


def read_folder(folder: str | os.PathLike, recipe: Recipe, broken: Broken, least: int = 2) -> Files:
    """Find the images of a folder that holds a folder for each class; files in folders below these count, too.

    What is hidden is left out, links to folders are followed, and archives are not looked into. `broken` reports what
    can't be read, and how many other files were passed over.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: fewer than `least` classes, one without images, or names that can't be told apart in a list.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no such folder: {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, a folder with a folder for each class expected")
    classes = class_folders(folder)
    if len(classes) < least:
        names = ", ".join(p.name for p in classes) or "none"
        raise ValueError(
            f"{folder} has {len(classes)} class folders ({names}), {least} or more expected: a folder each"
        )
    for first, second in itertools.pairwise(classes):
        if class_name(first) == class_name(second):
            raise ValueError(
                f"{folder} has two class folders called {class_name(first)}, which differ in their bytes alone"
            )
    for class_folder in classes:
        if len(class_folder.name.splitlines()) != 1:
            raise ValueError(f"class folder {str(class_folder)!r} has a line end in its name: rename it")
    paths: list[Path] = []
    labels: list[int] = []
    passed_over = PassedOver()
    for label, class_folder in enumerate(classes):
        images = []
        for image in images_below(str(class_folder), passed_over, archives=False):
            if image.error:
                broken.add(Path(image.path), ValueError(image.error))
            else:
                images.append(Path(image.path))
        if not images:
            raise ValueError(f"class folder {class_folder} has no images: fill it or remove it")
        paths += images
        labels += [label] * len(images)
    if passed_over:
        broken.say(f"{folder}: {passed_over}")
    return Files(tuple(paths), np.array(labels, np.int32), tuple(map(class_name, classes)), recipe, broken)


def with_classes(files: Files, names: Sequence[str], numbered: bool = False) -> Files:
    """Label images by the places of their folders' names among the classes of a network, or of other images.

    Args:
        files: of any of the classes, in any order.
        names: of the classes.
        numbered: the names are but the numbers of the classes: folders are matched as numbers ("007" is class 7).

    Raises:
        ValueError: a folder that is none of the classes, or two that are the same.
    """
    if numbered:
        places = {n: int(n) for n in files.class_names if n.isdecimal() and int(n) < len(names)}
        expected = f"class folders named 0 to {len(names) - 1} expected: of these classes only the numbers are known"
        problem = {n: f"class folder {n!r} given, {expected}" for n in files.class_names}
    else:
        places = {unicodedata.normalize("NFC", name): i for i, name in enumerate(names)}
        hint = "(the folders are named as the classes)"
        problem = {n: f"{unknown('class folder', n, places)} {hint}" for n in files.class_names if n not in places}
    for name in files.class_names:
        if name not in places:
            raise ValueError(problem[name])
    order = np.array([places[name] for name in files.class_names], np.int32)
    if len(set(order.tolist())) < len(order):
        raise ValueError(f"class folders {', '.join(files.class_names)} given, some of which are the same number")
    return dataclasses.replace(files, labels=order[files.labels], class_names=tuple(names))


def grain() -> ModuleType:
    """Import the library, an extra."""
    try:
        import grain
    except ModuleNotFoundError:
        raise ModuleNotFoundError("grain is not installed: pip install 'fzoo[finetune]'") from None
    return grain


def training_batches(
    source: DataSource, batch_size: int, *, seed: int, workers: int, part: tuple[int, int] = (0, 1)
) -> Read:
    """Make an endless Grain iterator over (inputs, labels) batches, each pass in another order.

    Its `get_state` and `set_state` are the position.

    Args:
        source: the images.
        batch_size: of this process.
        seed: of the order, and of the augmentation.
        workers: threads that decode.
        part: (number of this process, of all): which share of each batch this process reads.
    """
    library, labels = grain(), source.labels

    def read_example(index: np.integer, rng: np.random.Generator) -> tuple[PyTree, np.integer] | None:
        image = source.read(int(index), rng)
        if image is not None:
            return image, labels[index]
        if isinstance(source, Files):
            source.check_left()  # else a pass without an image would be followed by the next, for ever
        return None

    one = library.MapDataset.source(np.arange(len(labels))).seed(seed).shuffle().random_map(read_example)
    # The share of a process is taken after the shuffle, so that a batch has the same images however many share it.
    stream = one[part[0] :: part[1]].repeat(None).to_iter_dataset(ahead(batch_size, workers))
    return Read(iter(stream.batch(batch_size, drop_remainder=True)))


def in_order(
    source: DataSource | Batches, batch_size: int, workers: int, part: tuple[int, int] = (0, 1)
) -> Iterator[tuple[PyTree, Int[np.ndarray, " n"]]]:
    """Iterate over (inputs, labels) batches of all that can be read, once, in their order; or of a share of them."""
    if isinstance(source, Batches):
        return itertools.islice(source, source.steps)
    labels = source.labels

    def read_example(index: np.integer) -> tuple[PyTree, np.integer] | None:
        example = source.read(int(index))
        return None if example is None else (example, labels[index])

    one = grain().MapDataset.source(np.arange(part[0], len(labels), part[1])).map(read_example)
    return Read(iter(one.to_iter_dataset(ahead(batch_size, workers)).batch(batch_size, drop_remainder=False)))


class Read:
    """Grain's iterator, whose errors are those of the source: Grain adds pages on where they came from."""

    def __init__(self, iterator: Any):
        self.iterator, self.get_state, self.set_state = iterator, iterator.get_state, iterator.set_state

    def __iter__(self) -> Read:
        """Return itself."""
        return self

    def __next__(self) -> Any:
        """Return the next batch."""
        try:
            return next(self.iterator)
        except ValueError as e:
            raise ValueError(str(e).splitlines()[0]) from e


def ahead(batch_size: int, workers: int) -> Any:
    """Return how far Grain's threads read ahead."""
    return grain().ReadOptions(num_threads=workers, prefetch_buffer_size=max(2 * batch_size, workers))
