"""Batch jobs: any number of images through a network, into one file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from fzoo._version import __version__
from fzoo.images.recipe import Recipe
from fzoo.inference.devices import mesh as local_mesh
from fzoo.inference.optimize import tune_network
from fzoo.jobs.listing import count_new
from fzoo.jobs.network import Network, class_labels, fingerprint
from fzoo.jobs.pipeline import Done, Reading, Report, cut, none_of, prepare, stream
from fzoo.jobs.results import check_out, read_rows
from fzoo.jobs.shards import Failure, Shard, Shards, had_no_share, parts_of, plan_addition, read_finished
from fzoo.layers.classifier import Classifier
from fzoo.types import Variables

#: A shard's images, and bytes; fewer images where they would be more bytes, but a batch at least.
SHARD_IMAGES, SHARD_BYTES = 1024, 64 << 20


def run_job(
    module: Classifier,
    variables: Variables,
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
    append: bool = False,
    tune: bool = False,
    process: tuple[int, int] = (0, 1),
    watch: Callable[[Report, Sequence[Failure]], None] | None = None,
) -> Report:
    """Put the likeliest classes of any number of images, or the outputs of layers, into one file.

    Images are decoded in threads while others are computed, and memory does not grow with their number. Results are
    kept in whole shards, in the folder `OUT.parts`, until all are there: a job that was killed goes on from these when
    it is called again. Images that can't be read are passed over, and listed in `OUT.errors.jsonl`, an object
    {"image", "error"} a line.

    The images of a job are listed when it begins. Those that come later are for the next job (`append`), those that go
    before they are read are images that can't be read, and where one was changed (its bytes or its time of change) when
    the job is called again, its shard is computed again. `OUT.job.jsonl` says what the output was made of.

    Args:
        module, variables: the network, as for `predict`.
        images: files, folders, globs, "@list.txt" and tar archives, as `fzoo.images.walk.find_images` says.
        out: the file to write. Classes go to .jsonl, .csv or .parquet, outputs of layers to .npz, .h5 or .parquet
            (an array for each layer, and `images`, the names). Rows are in the order of the images. Where one name
            among many is so long that NumPy's array of text would take over 1 GiB for it, an .npz has `images_utf8`,
            all names in a row as UTF-8 in uint8, and `images_ends`, where each of them ends, in place of `images`.
        layers: names of layers, as for `features`; None for classes.
        top: how many of the likeliest classes.
        labels: (WordNet ID, label) of each class; ImageNet's by default for 1000 classes, else the bare numbers.
        preprocess: the model ("ResNet50"), or the mode ("unit"), whose `preprocess_input` the network needs.
        recipe: how an image becomes the network's input; by default that of the model that `preprocess` names, at the
            network's own size.
        batch_size: images at once, on all devices together; by default as for `predict`.
        mesh: from `fzoo.devices.mesh()`; all local devices by default.
        workers: threads that decode; by default one for each core.
        shard_size: images in a shard; by default that of the job that was begun, else 1024, fewer where they would be
            over 64 MiB.
        restart: throw away the shards of another job on the same `out`, instead of raising.
        append: add to an output that is there: rows of images that are the same file (name, bytes, time of change) are
            kept, others are computed, and the output is written anew. First come rows of images that are not asked for
            this time, then those that are. Without an output, as without `append`.
        tune: compute with the network that `fzoo.tune` makes for these images, on a CPU; each process finds out for its
            own machine what is the fastest there, so that the last digits may differ.
        process: (number, count) where several processes share the job, each with the same arguments otherwise, from
            `fzoo.devices.start_distributed`. Each takes its share of the shards, in a folder that all see, and the last
            puts them together.
        watch: called as `watch(report, failures)` after each batch: the report so far, and (name, error) of those
            images of the batch that could not be read.

    Returns:
        What was done, how fast, and whether decoding or computing was the bottleneck.

    Raises:
        ValueError: an argument is wrong; none of the images could be read; there are shards of another job; the output
            to add to is another job's, or nothing is known of it; the network gives NaN or infinity, whose image is
            named.
        OSError: a file can't be written; what was computed so far is kept.
        ModuleNotFoundError: pyarrow is not installed, for .parquet.
    """
    path = check_out(out, tapped=layers is not None)
    number, processes = process
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"shard_size={shard_size} given, a positive number expected")
    if restart and processes > 1:
        raise ValueError("restart given with several processes: which of them is to remove what the others have begun?")
    mesh = mesh or local_mesh()
    network = Network(module, variables, layers, top, preprocess, mesh)
    reading = prepare(network, images, recipe, batch_size, workers)
    labels = class_labels(labels, network) if layers is None else None
    job = {
        "fzoo": __version__,
        "weights": identify(module, variables, processes),
        "layers": network.layers and list(network.layers),
        "top": top if layers is None else None,
        "labels": labels and hashlib.blake2b(json.dumps(list(labels)).encode(), digest_size=16).hexdigest(),
        "preprocess": preprocess,
        "recipe": reading.load.recipe.to_json(),
        "append": None,
    }
    if tune:
        job["tune"] = True
    report = Report(images=reading.images.count, shapes=reading.shapes, passed_over=reading.passed_over)
    if had_no_share(path, job, number):
        return report  # the others have put theirs together already
    if tune:
        shape = (reading.batch, *reading.load.recipe.size, reading.load.recipe.channels)
        tuned = tune_network(module, variables, jax.ShapeDtypeStruct(shape, np.float32), module.dtype)
        network = Network(*tuned.network, layers, top, preprocess, mesh)
        network.shapes(shape)  # says which layers are gone
    listing, rows, before = reading.images, 0, None
    if append and path.exists():
        before = path.stat()
        header, entries = read_finished(path, job)
        job["append"], rows = header["output"], len(entries)
        listing, grows = plan_addition(listing, entries)
        if not grows and not parts_of(path).exists():
            report.images = report.before = listing.count
            report.joined = True
            return report
    images_each, asked = shard_size or default_shard_size(reading), shard_size is not None
    begun = Shards(path, job, listing, images_each, asked=asked, restart=restart, process=process)
    with contextlib.closing(begun) as shards, contextlib.ExitStack() as scratch:
        count = report.images = shards.images.count
        if shards.finished is not None:
            report.joined, report.before, report.failed = True, count, shards.finished[1]
            return report
        mine = range(number, -(-count // shards.size), processes)
        to_do = {n for n in mine if not shards.path(n).exists()}
        kept = None
        if rows and to_do:
            folder = scratch.enter_context(tempfile.TemporaryDirectory(prefix="kept-", dir=shards.folder))
            kept = read_rows(path, rows, reading.shapes, labels, Path(folder))
            now = path.stat()
            if before is None or (before.st_ino, before.st_mtime_ns) != (now.st_ino, now.st_mtime_ns):
                raise OSError(f"{path} was written by another process meanwhile: the same command begins from that")
        report.before = count - sum(min(shards.size, count - n * shards.size) for n in to_do)
        finished: list[Done] = []
        only = ""
        for done in stream(network, reading, cut(shards.images, shards.size, reading.batch, to_do), report):
            finished.append(done)
            if watch is not None:
                watch(report, done.failures)
            if done.batch.last:
                shard = put_together(finished, kept)
                shards.write(done.batch.shard, shard)
                report.failed += len(shard.failures)
                report.before += sum(entry.kept >= 0 for entry in done.batch.whole)
                only = shard.failures[0][1] if count == 1 and shard.failures else only
                finished = []
        kept = None
        counts = shards.join(reading.shapes, labels)
        if counts is not None:
            report.joined, (joined, report.failed) = True, counts
            if not joined:
                raise ValueError(only or f"{none_of(count)}: see {shards.errors}")
            with contextlib.suppress(ValueError, OSError):  # what can't be listed now is for the next job
                report.added = count_new(shards.images, reading.given)
    return report


def identify(module: Classifier, variables: Variables, processes: int) -> str:
    """Return by what the job's network is known again: its fingerprint, or what no other network is known by, and why.

    Raises:
        ValueError: it has no fingerprint, and several processes would share the job.
    """
    try:
        return fingerprint(module, variables)
    except ValueError as e:
        if processes > 1:
            raise
        return f"{secrets.token_hex(16)} {e}"


def default_shard_size(reading: Reading) -> int:
    """Return how many images a shard has: whole batches, of some bytes at most."""
    bytes_each = sum(int(np.prod(aval.shape)) * np.dtype(aval.dtype).itemsize for aval in reading.shapes.values())
    return max(1, min(SHARD_IMAGES, SHARD_BYTES // max(bytes_each, 1)) // reading.batch) * reading.batch


def put_together(finished: Sequence[Done], kept: Mapping[str, np.ndarray] | None) -> Shard:
    """Return a shard of all its batches, and of rows of an output that are kept."""
    fresh = iter([outcome for done in finished for outcome in zip(done.states, done.readable, strict=True)])
    parts = [done.rows for done in finished if done.names]
    rows = {key: np.concatenate([part[key] for part in parts]) for key in (parts[0] if parts else ())}
    names, states, readable, order, numbers = [], [], [], [], []
    computed, total = 0, sum(len(done.names) for done in finished)
    for entry in finished[-1].batch.whole:
        state, good = (entry.state, True) if entry.kept >= 0 else next(fresh)
        states.append(state)
        readable.append(good)
        if not good:
            continue
        names.append(entry.image.name)
        if entry.kept >= 0:
            order.append(total + len(numbers))
            numbers.append(entry.kept)
        else:
            order.append(computed)
            computed += 1
    if numbers:
        assert kept is not None
        old = {key: array[numbers] for key, array in kept.items()}
        rows = {key: np.concatenate([rows[key], array])[order] if rows else array for key, array in old.items()}
    return Shard(names, rows, [failure for done in finished for failure in done.failures], states, readable)
