"""Batch jobs: any number of images through a network, decoded while others are computed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
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

from fzoo.images.archives import ArchiveReader
from fzoo.images.files import PassedOver
from fzoo.images.preprocessing import MODES
from fzoo.images.recipe import Recipe
from fzoo.images.walk import find_images
from fzoo.inference.batches import default_batch, in_flight
from fzoo.inference.devices import mesh as local_mesh
from fzoo.jobs.listing import Entry, Listing, State, is_changed, is_member, join_batches, list_images, look_at
from fzoo.jobs.network import Network, Outputs, class_labels
from fzoo.jobs.results import label_rows
from fzoo.jobs.shards import Failure
from fzoo.layers.classifier import Classifier
from fzoo.types import Variables
from fzoo.zoo import recipe as model_recipe

#: Of the threads that decode.
NICENESS = 10


@dataclasses.dataclass
class Report:
    """What a job did.

    Attributes:
        images: how many there are.
        shapes: of each result, for one image; the output has `images - failed` of them.
        before: how many of them were done before this run, or are another process's.
        added: how many came while the job ran, and are for the next one; counted where the output is there.
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
    added: int = 0
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


class Batch(NamedTuple):
    """What goes through the network at once.

    Attributes:
        shard: the number of the shard that its rows belong to.
        last: whether it is the shard's last one.
        images: what it has of these.
        whole: all images of the shard, with those whose rows are kept; only with the last batch.
    """

    shard: int
    last: bool
    images: Sequence[Entry]
    whole: Sequence[Entry] = ()


def classify(
    module: Classifier,
    variables: Variables,
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
    """Yield the likeliest classes of images as they come, (image, [(WordNet ID, label, probability), ...]).

    Arguments and errors are those of `run_job`; nothing is written. What was done goes into `report`.
    """
    network = Network(module, variables, None, top, preprocess, mesh or local_mesh())
    reading = prepare(network, images, **options)
    labels = class_labels(labels, network)
    report = Report() if report is None else report
    report.images, report.shapes = reading.images.count, reading.shapes
    report.passed_over = reading.passed_over
    for done in stream(network, reading, cut(reading.images, reading.batch, reading.batch), report):
        report.failed += len(done.failures)
        if watch is not None:
            watch(report, done.failures)
        if report.failed == report.images:
            raise ValueError(done.failures[0][1] if report.images == 1 else none_of(report.images))
        yield from label_rows(done.names, done.rows, labels)


def none_of(count: int) -> str:
    """Return the text of the error where there is nothing to write."""
    return f"none of the {count} images could be read"


class Reading(NamedTuple):
    """What a job is to read, and how.

    Attributes:
        given: what was asked for.
        images: those that there are.
        passed_over: the other files beside them.
        load: how one is read.
        batch: what the network is compiled for.
        workers: threads that decode.
        shapes: of one image's results.
    """

    given: Sequence[str | os.PathLike]
    images: Listing
    passed_over: PassedOver
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
        height, width, channels = network.module.example_shape
        sides, model = (height, width), network.options["preprocess"]
        recipe = Recipe(sides) if model is None or model in MODES else model_recipe(model, sides)
        recipe = dataclasses.replace(recipe, channels=1 if channels == 1 else 3)
    shape = *recipe.size, recipe.channels
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} given, a positive number expected")
    given = list(images)
    passed_over = PassedOver()
    listing = list_images(find_images(given, passed_over))
    if not listing.count:
        raise ValueError("no images given")
    batch_size = batch_size or default_batch(network.platform, shape) * network.devices
    batch = round_up(min(batch_size, listing.count), network.devices)
    shapes = network.shapes((batch, *shape))
    return Reading(given, listing, passed_over, Loader(recipe), batch, workers or available_cores(), shapes)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Loader(NamedTuple):
    """How images are read."""

    recipe: Recipe

    def __call__(self, source: Callable[[], str | io.BytesIO], pixels: np.ndarray) -> float:
        """Decode into an array of the batch's; returns the seconds that it took."""
        start = time.perf_counter()
        pixels[:] = self.recipe.load(source())
        return time.perf_counter() - start


class Done(NamedTuple):
    """Results of a batch.

    Attributes:
        batch: what went in.
        names: the images that could be read.
        rows: an array (len(names), ...) for each result, in their order; none without names.
        failures: (name, error) of the other images.
        states: of all images, before they were read.
        readable: which of all images could be read.
    """

    batch: Batch
    names: list[str]
    rows: dict[str, np.ndarray]
    failures: list[Failure]
    states: list[State]
    readable: list[bool]


def stream(network: Network, reading: Reading, batches: Iterable[Batch], report: Report) -> Generator[Done]:
    """Yield results of batches in order, while images ahead of them are decoded; `report` has what was measured."""
    begin, busy = time.perf_counter(), 0.0

    def started() -> Iterator[tuple[Done, Outputs]]:
        nonlocal busy
        for batch, pixels, states, outcomes in decoded(reading, batches, report):
            done = Done(batch, [], {}, [], states, [isinstance(outcome, float) for outcome in outcomes])
            for entry, outcome in zip(batch.images, outcomes, strict=True):
                if isinstance(outcome, float):
                    done.names.append(entry.image.name)
                    busy += outcome
                else:
                    done.failures.append((entry.image.name, str(outcome)))
            start = time.perf_counter()
            outputs = network(pixels) if done.names else {}
            if done.names and not report.compiling:
                report.compiling = time.perf_counter() - start
            else:
                report.waited_for_results += time.perf_counter() - start
            yield done, outputs

    for done, outputs in in_flight(started()):
        start = time.perf_counter()
        if done.names:
            done.rows.update(network.rows(outputs, np.flatnonzero(done.readable).tolist(), done.names))
        now = time.perf_counter()
        report.waited_for_results += now - start
        report.done += len(done.batch.images)
        report.seconds = now - begin - report.compiling
        yield done
    report.decoding = report.done * reading.workers / max(busy, 1e-9)
    report.computing = report.done / max(report.seconds - report.waited_for_images, 1e-9)


def decoded(
    reading: Reading, batches: Iterable[Batch], report: Report
) -> Iterator[tuple[Batch, np.ndarray, list[State], list[float | Exception]]]:
    """Yield batches, uint8 pixels (batch, H, W, C), each image's state, and the seconds it took or its error."""
    load, batch_size, workers = reading.load, reading.batch, reading.workers
    ahead = 1 + -(-2 * workers // batch_size)  # batches: each thread has its next image, and the network its next batch
    pending: deque[tuple[Batch, np.ndarray, list[State], list[Future[float] | Exception]]] = deque()
    reader, pool = ArchiveReader(), ThreadPoolExecutor(workers, "decode", step_back)

    def load_unchanged(entry: Entry, prepared: Callable[[], str | io.BytesIO], pixels: np.ndarray) -> float:
        try:
            return load(prepared, pixels)
        finally:
            if is_member(entry.image) and is_changed(entry):  # another image may lie at its place by now
                raise ValueError(
                    f"cannot read the image {entry.image.name}: {entry.image.path} was changed while the job ran"
                )

    def submit(entry: Entry, pixels: np.ndarray) -> Future[float] | Exception:
        try:
            return pool.submit(load_unchanged, entry, reader.prepare(entry.image), pixels)
        except (ValueError, OSError) as e:
            return e

    def finished(
        batch: Batch, pixels: np.ndarray, states: list[State], futures: list[Future[float] | Exception]
    ) -> tuple[Batch, np.ndarray, list[State], list[float | Exception]]:
        start = time.perf_counter()
        outcomes = [outcome(future) for future in futures]
        report.waited_for_images += time.perf_counter() - start
        return batch, pixels, states, outcomes

    try:
        for batch in batches:
            pixels = np.zeros((batch_size, *load.recipe.size, load.recipe.channels), np.uint8)
            states = [look_at(entry.image) for entry in batch.images]  # before: a later change is seen the next time
            futures = [submit(entry, row) for entry, row in zip(batch.images, pixels, strict=False)]
            pending.append((batch, pixels, states, futures))
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
    """Return what came of an image: seconds, or what is wrong with it."""
    if isinstance(future, Exception):
        return future
    try:
        return future.result()
    except (ValueError, OSError) as e:
        return e


def cut(
    images: Iterable[Entry], shard_size: int, batch_size: int, shards: Iterable[int] | None = None
) -> Iterator[Batch]:
    """Yield images in batches, none across the bounds of two shards; of the shards `shards` only.

    Images whose rows are kept are no part of a batch, unless they were changed since they were listed. A shard has a
    last batch whether or not there is an image in it.
    """
    for shard, entries in enumerate(join_batches(images, shard_size)):
        if shards is None or shard in shards:
            whole = [entry._replace(kept=-1) if entry.kept >= 0 and is_changed(entry) else entry for entry in entries]
            fresh = [entry for entry in whole if entry.kept < 0]
            for start in range(0, max(len(fresh), 1), batch_size):
                last = start + batch_size >= len(fresh)
                yield Batch(shard, last, fresh[start : start + batch_size], whole if last else ())


def round_up(count: int, step: int) -> int:
    """Return the least multiple of `step` that is not less."""
    return -(-count // step) * step
