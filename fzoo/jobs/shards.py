"""The folder of a job: what the job is, its images, and whole shards of results, put together at the end.

A shard is an .npz of the rows of its images, renamed when it is whole, and JSON lines of those that could not be read.
Whatever the output's format, a job that was killed finds its whole shards, and one shard at a time is in memory.

The folder appears at once, with the description of the job and the list of its images in it (a folder is renamed only
to a name that is free): of several processes one is the first, and the others compare what they were told with that.
Locks spare work that another process does at the same time. Nothing rests on them: files get their names when they are
whole, so on a file system without locks the same work done twice gives the same.

What the output was made of is written down beside it, in OUT.job.jsonl: a job that adds to it keeps the rows of the
images that are the same.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fzoo.files import one_line, try_lock
from fzoo.jobs.listing import (
    GONE,
    Entry,
    Listing,
    State,
    check_same_images,
    decode_entry,
    encode_entry,
    join_batches,
    list_appended,
    look_at,
)
from fzoo.jobs.results import CLASSES, IMAGES, LAYERS, Shapes, arrays_of, encode_names
from fzoo.types import Json

#: Of the folder and the record; another one is another job's.
FORMAT = 2


#: In the folder: the description of the job, and its images.
MANIFEST, LIST = "job.json", "images.jsonl"


#: What differs between two descriptions of one job.
OWN = ("images", "inputs", "shard_size", "id")


#: Arrays of a shard beside those of its rows: of all its images the states of the files, and which could be read.
STATES, READABLE = ".states", ".readable"


#: (name of the image, what is wrong with it)
Failure = tuple[str, str]


class Shard(NamedTuple):
    """What became of the images of a shard.

    Attributes:
        names: those that could be read.
        rows: an array (len(names), ...) for each result; none without names.
        failures: the other ones.
        states: of the files of all its images, before they were read.
        readable: which of all its images could be read.
    """

    names: Sequence[str]
    rows: Mapping[str, np.ndarray]
    failures: Sequence[Failure]
    states: Sequence[State]
    readable: Sequence[bool]


def parts_of(out: Path) -> Path:
    """Return the folder of the shards of an output."""
    return out.with_name(f"{out.name}.parts")


def record_of(out: Path) -> Path:
    """Return the file beside an output that says what it was made of."""
    return out.with_name(f"{out.name}.job.jsonl")


class Shards:
    """The folder of a job's shards, "OUT.parts".

    Args:
        out: the output, from `check_out`.
        job: what decides the results; compared with what is there.
        images: those of the job, where it is not there yet.
        size: how many images a shard has, where the job is not there yet.
        asked: whether the job that is there must have that size of shards, too.
        restart: remove the shards of another job instead of raising.
        process: (number of this process, which has its shards for itself; how many there are).

    Raises:
        ValueError: the folder is another job's, or has shards of another size.
        OSError: another process has this job, or the folder can't be made.

    Attributes:
        size: how many images a shard has.
        images: those of the job.
        finished: (rows, images that could not be read) where the output is there already, and the folder is gone.
    """

    def __init__(
        self,
        out: Path,
        job: Mapping[str, Json],
        images: Listing,
        size: int,
        *,
        asked: bool = False,
        restart: bool = False,
        process: tuple[int, int] = (0, 1),
    ):
        self.out, self.folder, self.record = out, parts_of(out), record_of(out)
        self.errors = out.with_name(f"{out.name}.errors.jsonl")
        self.finished: tuple[int, int] | None = None
        self._lock: BinaryIO | None = None
        for path in out.parent.glob(f"{glob.escape(old_of(self.folder))}*"):  # of a process that died while it did it
            shutil.rmtree(path, ignore_errors=True)
        (number, processes), job = process, json.loads(json.dumps({"format": FORMAT, **job}))
        while True:
            self._create(job, images, size)
            try:
                self._lock = try_lock(self.folder / f"lock-{number}")
            except FileNotFoundError:  # another process has put all together meanwhile
                continue
            if self._lock is None:
                raise BlockingIOError(errno.EAGAIN, f"another process is at work on {out}")
            manifest = read_manifest(self.folder)
            # Where no shard is whole, or the output is there already, nothing is lost with the folder.
            useless = processes == 1 and bool(manifest) and not any(self.folder.glob("*.npz"))
            try:
                if useless and manifest.get("inputs") != images.digest:
                    raise ValueError("there are other images by now, and nothing was done yet")
                self._enter(job, manifest, images, size if asked else None)
                return
            except ValueError:
                self.close()
                if not (restart or useless or self._is_written(manifest)):
                    raise
                restart = False
                self._remove_alone()
            except BaseException:
                self.close()
                raise

    def _create(self, job: Mapping[str, Json], images: Listing, size: int) -> None:
        """Make the folder; one that is there stays as it is."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if any(self.folder.iterdir()):
                return
        temporary = self.folder.with_name(f".{self.folder.name}.{secrets.token_hex(4)}")
        manifest = {**job, "images": images.count, "inputs": images.digest, "shard_size": size}
        try:
            temporary.mkdir()
            images.save(temporary / LIST)
            with whole(temporary / MANIFEST) as file:
                file.write(json.dumps({**manifest, "id": secrets.token_hex(16)}, indent=1).encode())
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # one without anything in it
            temporary.rename(self.folder)
        except OSError as e:
            shutil.rmtree(temporary, ignore_errors=True)
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # else another process was the first
                raise OSError(e.errno, e.strerror, str(self.folder)) from e

    def _remove_alone(self) -> None:
        """Remove the folder, unless another process is at work in it."""
        with contextlib.ExitStack() as held:
            for path in self.folder.glob("lock-*"):
                lock = try_lock(path)
                if lock is None:
                    raise BlockingIOError(errno.EAGAIN, f"another process is at work on {self.out}")
                held.enter_context(lock)
            remove(self.folder)

    def _enter(self, job: Mapping[str, Json], manifest: Mapping[str, Json], images: Listing, size: int | None) -> None:
        """Compare the job with the one that is there, and take that one's images and size of shards."""
        ways_out = "--restart (restart=True, of one process) removes them, or give another name to write"
        written = self._is_written(manifest)
        # What an addition was added to is not there any more when its output is.
        other = other_than(job, manifest, *(("append",) if written else ()))
        if other:
            reason = str(job["weights"]).partition(" ")[2] if "weights" in other else ""  # why they are nobody's
            raise ValueError(
                f"{self.folder} holds results of another job (other: {', '.join(sorted(other))}): {ways_out}"
                + (reason and f"; {reason}")
            )
        self.size, self.manifest = int(manifest["shard_size"]), manifest
        self.images = Listing((self.folder / LIST).open("rb"), manifest["images"], manifest["inputs"])
        if written:
            header = read_header(self.record)
            self.finished = header["rows"], header["failed"]
            self._remove()
            return
        if size not in (None, self.size):
            raise ValueError(
                f"shard_size={size} given, the job in {self.folder} has shards of {self.size}: leave it out; {ways_out}"
            )
        check_same_images(self.images, images, self.folder)
        self._drop_changed()

    def _is_written(self, manifest: Mapping[str, Json]) -> bool:
        """Tell whether the output is there, and only the folder was left."""
        return "id" in manifest and self.out.exists() and read_header(self.record).get("id") == manifest["id"]

    def _drop_changed(self) -> None:
        """Remove the shards of which an image was changed since: they are computed again."""
        for number, entries in enumerate(join_batches(self.images, self.size)):
            path = self.path(number)
            with contextlib.suppress(FileNotFoundError):
                try:
                    with np.load(path) as arrays:
                        states = arrays[STATES].tolist()
                    same = len(states) == len(entries)
                except (ValueError, EOFError, LookupError, zipfile.BadZipFile):
                    same, states = False, []
                now = (look_at(entry.image) for entry in entries)
                if not same or any(new not in (tuple(old), GONE) for new, old in zip(now, states, strict=True)):
                    path.unlink()

    def path(self, number: int) -> Path:
        """Return where a shard is, if it is whole."""
        return self.folder / f"{number:08}.npz"

    def write(self, number: int, shard: Shard) -> None:
        """Write a shard; it appears under its name when it is whole, and its errors before it."""
        with self._writing():
            with whole(self.path(number).with_suffix(".jsonl")) as file:
                lines = (json.dumps({"image": name, "error": error}) for name, error in shard.failures)
                file.writelines(line.encode() + b"\n" for line in lines)
            with whole(self.path(number)) as file:
                arrays = {STATES: np.array(shard.states, np.int64), READABLE: np.array(shard.readable, np.bool_)}
                np.savez(file, allow_pickle=False, **{IMAGES: encode_names(shard.names)}, **arrays, **shard.rows)

    def join(self, shapes: Shapes, labels: Sequence[tuple[str, str]] | None) -> tuple[int, int] | None:
        """Put the shards together and remove them; that of several processes which is the last does it.

        Returns:
            (rows, images that could not be read), or None where shards are missing, or another process is at it.
        """
        parts = [self.path(number) for number in range(-(-self.images.count // self.size))]
        if not all(part.exists() for part in parts):
            return None
        try:
            lock = try_lock(self.folder / "lock-join")
        except FileNotFoundError:  # another process has joined them meanwhile
            return None
        if lock is None:
            return None
        try:
            if not all(part.exists() for part in parts):
                return None
            with self._writing():
                counts = self._join(parts, shapes, labels)
        finally:
            lock.close()
        self._remove()
        return counts

    def _join(self, parts: Sequence[Path], shapes: Shapes, labels: Sequence[tuple[str, str]] | None) -> tuple[int, int]:
        """Write the errors, the record and the output, in this order; (rows, images that could not be read)."""
        failed = 0
        with whole(self.folder / "errors", self.errors) as file:
            for part in parts:
                lines = part.with_suffix(".jsonl").read_bytes()
                failed += lines.count(b"\n")
                file.write(lines)
        if not failed:
            self.errors.unlink()
        rows = sum(len(names) for names in arrays_of(parts, IMAGES))
        if rows:
            joined = self.folder / f"joined-{secrets.token_hex(4)}{self.out.suffix}"
            with unfinished(joined):
                (LAYERS if labels is None else CLASSES)[self.out.suffix](joined, parts, rows, shapes, labels)
                with joined.open("rb+") as file:
                    os.fsync(file.fileno())
                header = {**self.manifest, "rows": rows, "failed": failed, "output": checksum(joined)}
                with whole(self.folder / "record", self.record) as file:
                    file.write(json.dumps(header).encode() + b"\n")
                    file.writelines(map(encode_entry, self._entries(parts)))
                joined.replace(self.out)
        return rows, failed

    def _entries(self, parts: Sequence[Path]) -> Iterator[Entry]:
        """Yield the images of the rows, in the states in which they were read."""
        for entries, part in zip(join_batches(self.images, self.size), parts, strict=True):
            with np.load(part) as arrays:
                states, readable = arrays[STATES].tolist(), arrays[READABLE].tolist()
            for entry, state, good in zip(entries, states, readable, strict=True):
                if good:
                    yield Entry(entry.image._replace(bytes=state[0], changed=state[1]))

    def _remove(self) -> None:
        """Remove the folder, and with it the lock."""
        self.close()
        remove(self.folder)

    def close(self) -> None:
        """Let another process have the job."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise one kind of error, with what to do about it, whatever formats' libraries raise where a disk is full."""
        try:
            yield
        except (OSError, RuntimeError) as e:
            if isinstance(e, FileNotFoundError) and not self.folder.exists():  # possible without locks
                raise OSError(f"{self.folder} is gone: another process has finished the job, or removed it") from e
            reason = os.strerror(e.errno) if isinstance(e, OSError) and e.errno else one_line(e)
            raise OSError(
                f"{self.out} can't be written: {reason}; what was computed is kept in {self.folder}, and the same "
                "command goes on from there"
            ) from e


def read_manifest(folder: Path) -> dict[str, Json]:
    """Return the description of the job in a folder; none where it can't be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def read_header(record: Path) -> dict[str, Json]:
    """Return the description of the job that wrote an output; none where it can't be read."""
    try:
        with record.open("rb") as file:
            header = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def other_than(job: Mapping[str, Json], manifest: Mapping[str, Json], *ignored: str) -> list[str]:
    """Return in what a job differs from one that is described."""
    ignored += OWN
    return [key for key in {*manifest, *job} if key not in ignored and manifest.get(key) != job.get(key)]


def had_no_share(out: Path, job: Mapping[str, Json], number: int) -> bool:
    """Return whether a job is done that had no shard for the process of this number, which came too late for it."""
    header = read_header(record_of(out))
    if parts_of(out).exists() or not out.exists() or not header:
        return False
    job = json.loads(json.dumps({"format": FORMAT, **job}))
    same = not other_than(job, header, "rows", "failed", "output", "append")
    return same and number >= -(-header["images"] // header["shard_size"])


def read_finished(out: Path, job: Mapping[str, Json]) -> tuple[dict[str, Json], list[Entry]]:
    """Return what is written down of an output that is to grow: the description of its job, the images of its rows.

    Raises:
        ValueError: it is another job's, or nothing is written down, or the output is not what was written.
    """
    record, ways_out = record_of(out), "without --append (append=True) it is computed anew; or give another name"
    header = read_header(record)
    if not header:
        raise ValueError(f"{out} can't be added to: {record}, which says how it was made, can't be read; {ways_out}")
    # What a record has more than a job is told apart from what a job was told more.
    job = json.loads(json.dumps({"format": FORMAT, **job}))
    if other := other_than(job, header, "rows", "failed", "output", "append"):
        raise ValueError(
            f"{out} can't be added to: it is another job's (other: {', '.join(sorted(other))}); {ways_out}"
        )
    if checksum(out) != header.get("output"):
        raise ValueError(f"{out} can't be added to: it was changed after the job that wrote it; {ways_out}")
    with record.open("rb") as file:
        next(file)
        entries = [decode_entry(line) for line in file]
    if len(entries) != header["rows"]:
        raise ValueError(f"{out} can't be added to: {record} has lost lines; {ways_out}")
    return header, entries


def plan_addition(given: Listing, entries: Iterable[Entry]) -> tuple[Listing, bool]:
    """Return the images of an output that grows, and whether any is to be computed or to be moved."""
    listing = list_appended(given, entries)
    return listing, [entry.kept for entry in listing] != list(range(sum(1 for _ in entries)))


def checksum(path: Path) -> str:
    """Return a hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def old_of(folder: Path) -> str:
    """Return how the name of a folder of shards begins that is being removed."""
    return f".{folder.name}.old-"


def remove(folder: Path) -> None:
    """Remove a folder of shards at once: no part of one is left under its name."""
    aside = folder.with_name(old_of(folder) + secrets.token_hex(4))
    try:
        folder.rename(aside)
    except FileNotFoundError:  # another process was the first
        return
    except OSError:  # Windows renames no folder with open files
        aside = folder
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Remove a file if anything fails."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole(path: Path, target: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a file to write bytes to, which gets its name when it is on the disk."""
    # Several processes may write the same: each has its own.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with unfinished(temporary):
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target or path)
