"""Batch jobs: any number of images through a network, decoded while others are computed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fzoo._version import __version__
from fzoo.images.archives import ArchiveReader
from fzoo.images.files import ImageFile, PassedOver
from fzoo.images.recipe import Recipe
from fzoo.inference.devices import mesh as local_mesh
from fzoo.inference.predict import default_batch, in_flight
from fzoo.jobs.network import Network, class_labels, fingerprint
from fzoo.jobs.results import Failure, Shards, check_out, named, parts_of
from fzoo.jobs.survey import Survey
from fzoo.layers.classifier import Classifier
from fzoo.zoo import recipe as model_recipe

#: A shard's images, and bytes; fewer images where they would be more bytes, but a batch at least.
SHARD_IMAGES, SHARD_BYTES = 1024, 64 << 20


#: Of the threads that decode.
NICENESS = 10


@dataclasses.dataclass
class Report:
    """What a job did.

    Attributes:
        images: how many there are.
        shapes: of each result, for one image; the output has `images - failed` of them.
        before: how many of them were done before this run, or are another process's.
        passed_over: how many files of which endings lie beside the images, and were not taken.
        failed: how many could not be read, of all that were joined; of this process's where it did not join them.
        done: how many this process decoded in this run.
        joined: whether the output is there; else other processes are still at their shares.
        seconds: from the first image to the last result, without compiling.
        compiling: seconds until the network was compiled.
        decoding, computing: images a second that each could do while the other went on.
        waited_for_images, waited_for_results: seconds in which there was nothing to compute, and in which images were
            there, but the network was not done with those before.
    """

    images: int = 0
    shapes: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
    before: int = 0
    passed_over: PassedOver = dataclasses.field(default_factory=PassedOver)
    failed: int = 0
    done: int = 0
    joined: bool = False
    seconds: float = 0.0
    compiling: float = 0.0
    decoding: float = 0.0
    computing: float = 0.0
    waited_for_images: float = 0.0
    waited_for_results: float = 0.0

    @property
    def bottleneck(self) -> str:
        """Which of the two the other waited for: "decoding" or "computing"."""
        return "decoding" if self.waited_for_images > self.waited_for_results else "computing"

    def __str__(self) -> str:
        if not self.done:
            return f"{self.images:,} images, all done before"
        before, speed = f" of {self.images:,}" if self.before else "", self.done / max(self.seconds, 1e-9)
        return (
            f"{self.done:,}{before} images in {self.seconds:.1f} s, {speed:,.1f} images/s; the bottleneck was "
            f"{self.bottleneck} (decoding {self.decoding:,.1f} images/s, computing {self.computing:,.1f}); compiled in "
            f"{self.compiling:.1f} s"
        )


class Piece(NamedTuple):
    """What goes through the network at once.

    Attributes:
        shard: the number of the shard that its rows belong to.
        last: whether it is the shard's last one.
        sources: its images.
    """

    shard: int
    last: bool
    sources: Sequence[ImageFile]


def run_job(
    module: Classifier,
    variables: Any,
    images: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    layers: str | Sequence[str] | None = None,
    top: int = 5,
    labels: Sequence[tuple[str, str]] | None = None,
    preprocess: str | None = None,
    recipe: Recipe | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    workers: int | None = None,
    shard_size: int | None = None,
    restart: bool = False,
    process: tuple[int, int] = (0, 1),
    watch: Callable[[Report, Sequence[Failure]], None] | None = None,
) -> Report:
    """Put the likeliest classes of any number of images, or the outputs of layers, into one file.

    Images are decoded in threads while others are computed, and memory does not grow with their number. Results are
    kept in whole shards, in the folder `OUT.parts`, until all are there: a job that was killed goes on from these when
    it is called again. Images that can't be read are passed over, and listed in `OUT.errors.jsonl`, an object
    {"image", "error"} a line.

    Args:
        module, variables: the network, as for `predict`.
        images: files, folders, globs, "@list.txt" and archives, as `fzoo.images.walk.find_images` says.
        out: the file to write. Classes go to .jsonl, .csv or .parquet, outputs of layers to .npz, .h5 or .parquet
            (an array for each layer, and `images`, the names). Rows are in the order of the images.
        layers: names of layers, as for `features`; None for classes.
        top: how many of the likeliest classes.
        labels: (WordNet ID, label) of each class; ImageNet's by default for 1000 classes, else the bare numbers.
        preprocess: the model whose `preprocess_input` the network needs ("ResNet50").
        recipe: how an image becomes the network's input; by default that of the model that `preprocess` names, at the
            network's own size.
        batch_size: images at once, on all devices together; by default as for `predict`.
        mesh: from `fzoo.devices.mesh()`; all local devices by default.
        workers: threads that decode; by default one for each core.
        shard_size: images in a shard; by default 1024, fewer where they would be over 64 MiB.
        restart: throw away the shards of another job on the same `out`, instead of raising.
        process: (number, count) where several processes share the job, each with the same arguments otherwise, from
            `fzoo.devices.start_distributed`. Each takes its share of the shards, in a folder that all see, and the last
            puts them together.
        watch: called as `watch(report, failures)` after each batch: the report so far, and (name, error) of those
            images of the batch that could not be read.

    Returns:
        What was done, how fast, and whether decoding or computing was the bottleneck.

    Raises:
        ValueError: an argument is wrong; none of the images could be read; there are shards of another job.
        OSError: a file can't be written; what was computed so far is kept.
        ModuleNotFoundError: pyarrow is not installed, for .parquet.
    """
    path = check_out(out, tapped=layers is not None)
    mesh = mesh or local_mesh()
    network = Network(module, variables, layers, top, preprocess, mesh)
    reading = prepare(network, images, recipe, batch_size, workers)
    labels = class_labels(labels, network) if layers is None else None
    batch, count = reading.batch, reading.images.count
    if shard_size is None:
        bytes_each = sum(int(np.prod(aval.shape)) * np.dtype(aval.dtype).itemsize for aval in reading.shapes.values())
        shard_size = max(1, min(SHARD_IMAGES, SHARD_BYTES // bytes_each) // batch) * batch
    elif shard_size < 1:
        raise ValueError(f"shard_size={shard_size} given, a positive number expected")
    if restart and process[1] > 1:
        raise ValueError("restart given with several processes: which of them is to remove what the others have begun?")
    job = {
        "fzoo": __version__,
        "images": count,
        "inputs": reading.images.digest,
        "weights": fingerprint(module, variables),
        "layers": network.layers and list(network.layers),
        "top": top if layers is None else None,
        "preprocess": preprocess,
        "recipe": reading.load.recipe.to_json(),
    }
    report = Report(images=count, shapes=reading.shapes, passed_over=reading.images.passed_over)
    number, processes = process
    if number >= -(-count // shard_size) and not parts_of(path).exists():
        return report  # no share for this process; the others may have put theirs together already
    with contextlib.closing(Shards(path, job, shard_size, restart=restart, process=number)) as shards:
        mine = range(number, -(-count // shards.size), processes)
        wanted = {n for n in mine if not shards.path(n).exists()}
        report.before = count - sum(min(shards.size, count - n * shards.size) for n in wanted)
        names, parts, failed, only = [], [], [], ""
        for done in stream(network, reading, cut(reading.images, shards.size, batch, wanted), report):
            names += done.names
            parts += [done.rows] if done.names else []
            failed += done.failures
            if watch is not None:
                watch(report, done.failures)
            if done.piece.last:
                together = {key: np.concatenate([part[key] for part in parts]) for key in (parts[0] if parts else ())}
                shards.write(done.piece.shard, names, together, failed)
                report.failed += len(failed)
                only = failed[0][1] if count == 1 and failed else only
                names, parts, failed = [], [], []
        found = shards.join(-(-count // shards.size), reading.shapes, labels)
    if found is not None:
        report.joined, (rows, report.failed) = True, found
        if not rows:
            raise ValueError(only or f"{none_of(count)}: see {shards.errors}")
    return report


def classify(
    module: Classifier,
    variables: Any,
    images: Iterable[str | os.PathLike],
    *,
    top: int = 5,
    labels: Sequence[tuple[str, str]] | None = None,
    preprocess: str | None = None,
    mesh: Mesh | None = None,
    report: Report | None = None,
    watch: Callable[[Report, Sequence[Failure]], None] | None = None,
    **options: Any,
) -> Iterator[tuple[str, list[tuple[str, str, float]]]]:
    """The likeliest classes of images as they come, (image, [(WordNet ID, label, probability), ...]).

    Arguments and errors are those of `run_job`; nothing is written. What was done goes into `report`.
    """
    network = Network(module, variables, None, top, preprocess, mesh or local_mesh())
    reading = prepare(network, images, **options)
    labels = class_labels(labels, network)
    report = Report() if report is None else report
    report.images, report.shapes = reading.images.count, reading.shapes
    report.passed_over = reading.images.passed_over
    for done in stream(network, reading, cut(reading.images, reading.batch, reading.batch), report):
        report.failed += len(done.failures)
        if watch is not None:
            watch(report, done.failures)
        if report.failed == report.images:
            raise ValueError(done.failures[0][1] if report.images == 1 else none_of(report.images))
        yield from named(done.names, done.rows, labels)


def none_of(count: int) -> str:
    """The error where there is nothing to write."""
    return f"none of the {count} images could be read"


class Reading(NamedTuple):
    """What a job is to read, and how.

    Attributes:
        images: which.
        load: how one is read.
        batch: what the network is compiled for.
        workers: threads that decode.
        shapes: of one image's results.
    """

    images: Survey
    load: Loader
    batch: int
    workers: int
    shapes: Mapping[str, jax.ShapeDtypeStruct]


def prepare(
    network: Network,
    images: Iterable[str | os.PathLike],
    recipe: Recipe | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Reading:
    """Look at what is given, before anything is computed; arguments and errors as for `run_job`."""
    if recipe is None:
        height, width, _ = network.module.example_shape
        sides, model = (height, width), network.options["preprocess"]
        recipe = Recipe(sides) if model is None else model_recipe(model, sides)
    sides = recipe.size
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} given, a positive number expected")
    survey = Survey(images)
    if not survey.count:
        raise ValueError("no images given")
    batch_size = batch_size or default_batch(network.platform, (*sides, 3)) * network.devices
    batch = round_up(min(batch_size, survey.count), network.devices)
    shapes = network.shapes((batch, *sides, 3))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Reading(survey, Loader(recipe), batch, workers or cores, shapes)


class Loader(NamedTuple):
    """How images are read."""

    recipe: Recipe

    def __call__(self, source: Callable[[], Any], pixels: np.ndarray) -> float:
        """Decode into an array of the batch's; returns the seconds that it took."""
        start = time.perf_counter()
        pixels[:] = self.recipe.load(source())
        return time.perf_counter() - start


class Done(NamedTuple):
    """Results of a piece.

    Attributes:
        piece: what went in.
        names: the images that could be read.
        rows: an array (len(names), ...) for each result, in their order; none without names.
        failures: (name, error) of the other images.
    """

    piece: Piece
    names: list[str]
    rows: dict[str, np.ndarray]
    failures: list[Failure]


def stream(network: Network, reading: Reading, pieces: Iterable[Piece], report: Report) -> Generator[Done]:
    """Results of pieces in their order, while images ahead of them are decoded; `report` has what was measured."""
    begin, busy = time.perf_counter(), 0.0

    def started() -> Iterator[Any]:
        nonlocal busy
        for piece, pixels, outcomes in decoded(reading, pieces, report):
            names, good, failures = [], [], []
            for i, (source, outcome) in enumerate(zip(piece.sources, outcomes, strict=True)):
                if isinstance(outcome, float):
                    names.append(source.name)
                    good.append(i)
                    busy += outcome
                else:
                    failures.append((source.name, str(outcome)))
            start = time.perf_counter()
            outputs = network(pixels) if good else {}
            if good and not report.compiling:
                report.compiling = time.perf_counter() - start
            else:
                report.waited_for_results += time.perf_counter() - start
            yield piece, names, good, failures, outputs

    for piece, names, good, failures, outputs in in_flight(started()):
        start = time.perf_counter()
        rows = network.rows(outputs, good) if good else {}
        now = time.perf_counter()
        report.waited_for_results += now - start
        report.done += len(piece.sources)
        report.seconds = now - begin - report.compiling
        yield Done(piece, names, rows, failures)
    report.decoding = report.done * reading.workers / max(busy, 1e-9)
    report.computing = report.done / max(report.seconds - report.waited_for_images, 1e-9)


def decoded(
    reading: Reading, pieces: Iterable[Piece], report: Report
) -> Iterator[tuple[Piece, np.ndarray, list[float | Exception]]]:
    """(piece, uint8 pixels (batch, H, W, 3), for each image the seconds that it took or why it can't be read)."""
    load, batch, workers = reading.load, reading.batch, reading.workers
    ahead = 1 + -(-2 * workers // batch)  # pieces: each thread has its next image, and the network its next batch
    pending: deque[tuple[Piece, np.ndarray, list[Future[float] | Exception]]] = deque()
    reader, pool = ArchiveReader(), ThreadPoolExecutor(workers, "decode", step_back)

    def submit(source: ImageFile, pixels: np.ndarray) -> Future[float] | Exception:
        try:
            return pool.submit(load, reader.prepare(source), pixels)
        except (ValueError, OSError) as e:
            return e

    def finished(
        piece: Piece, pixels: np.ndarray, futures: list[Future[float] | Exception]
    ) -> tuple[Piece, np.ndarray, list[float | Exception]]:
        start = time.perf_counter()
        outcomes = [outcome(future) for future in futures]
        report.waited_for_images += time.perf_counter() - start
        return piece, pixels, outcomes

    try:
        for piece in pieces:
            pixels = np.zeros((batch, *load.recipe.size, 3), np.uint8)
            pending.append((piece, pixels, [submit(s, row) for s, row in zip(piece.sources, pixels, strict=False)]))
            if len(pending) > ahead:
                yield finished(*pending.popleft())
        while pending:
            yield finished(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def step_back() -> None:
    """Let the calling thread give way: on a CPU, XLA's threads wait for the one that shares its core.

    Linux has priorities of threads; elsewhere this would be the whole process's.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def outcome(future: Future[float] | Exception) -> float | Exception:
    """What came of an image: seconds, or what is wrong with it."""
    if isinstance(future, Exception):
        return future
    try:
        return future.result()
    except (ValueError, OSError) as e:
        return e


def cut(
    sources: Iterable[ImageFile], shard_size: int, batch: int, wanted: Iterable[int] | None = None
) -> Iterator[Piece]:
    """Images in pieces of at most a batch, none across the bounds of two shards; those of the shards `wanted` only."""
    sources = iter(sources)
    for shard in itertools.count():
        images = list(itertools.islice(sources, shard_size))
        if not images:
            return
        if wanted is None or shard in wanted:
            for start in range(0, len(images), batch):
                yield Piece(shard, start + batch >= len(images), images[start : start + batch])


def round_up(count: int, step: int) -> int:
    """The least multiple of `step` that is not less."""
    return -(-count // step) * step
