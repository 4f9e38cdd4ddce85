"""The images of a job: listed once, when it begins, and read from that list ever after."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from fzoo.images.files import ImageFile
from fzoo.images.walk import find_images

#: (bytes, time of the last change in ns) of a file.
State = tuple[int, int]


#: The state of a file that is not there, or can't be looked at.
GONE: State = (-1, -1)


class Entry(NamedTuple):
    """An image of a job.

    Attributes:
        image: where it is, and the state of its file when it was listed.
        kept: its row in the finished output, where that is still right; -1 where it is to be computed.
    """

    image: ImageFile
    kept: int = -1

    @property
    def state(self) -> State:
        """The state of its file, when it was listed."""
        return self.image.bytes, self.image.changed


T = TypeVar("T")


def look_at(image: ImageFile) -> State:
    """Return the state in which an image's file, or its archive, is now."""
    try:
        status = os.stat(image.path)
    except (OSError, ValueError):  # the latter for a name that holds a zero byte
        return GONE
    return status.st_size, status.st_mtime_ns


def is_member(image: ImageFile) -> bool:
    """Return whether an image lies in an archive."""
    return image.size >= 0


def is_changed(entry: Entry) -> bool:
    """Return whether an image's file is there, and another than when it was listed."""
    return look_at(entry.image) not in (entry.state, GONE)


def join_batches(things: Iterable[T], count: int) -> Iterator[list[T]]:
    """Yield lists of `count` things; the last may be shorter."""
    things = iter(things)
    while batch := list(itertools.islice(things, count)):
        yield batch


class Listing:
    """A list of images in a file, which takes no memory, however many they are.

    Args:
        file: from which it is read, a line for each image.
        count: how many images.
        digest: a hash of their names.
    """

    def __init__(self, file: IO[bytes], count: int, digest: str):
        self.file, self.count, self.digest = file, count, digest
        weakref.finalize(self, file.close)

    @classmethod
    def write(cls, entries: Iterable[Entry]) -> Listing:
        """Write a list to a temporary file, which goes with it."""
        file, count, digest = tempfile.TemporaryFile(), 0, hashlib.blake2b(digest_size=16)  # noqa: SIM115
        try:
            for entry in entries:
                file.write(encode_entry(entry))
                digest.update(encode_name(entry.image))
                count += 1
            return cls(file, count, digest.hexdigest())
        except BaseException:
            file.close()
            raise

    def save(self, path: Path) -> None:
        """Write the list to a file that stays."""
        self.file.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(self.file, file)
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[Entry]:
        """Yield the images; one such iterator at a time."""
        self.file.seek(0)
        return map(decode_entry, self.file)


def encode_name(image: ImageFile) -> bytes:
    """Return what the digest of a list is made of."""
    return os.fsencode(image.name) + b"\0"


def encode_entry(entry: Entry) -> bytes:
    """Return an image as a line of JSON."""
    return json.dumps([list(entry.image), entry.kept]).encode() + b"\n"


def decode_entry(line: bytes) -> Entry:
    """Return the image of a line."""
    image, kept = json.loads(line)
    return Entry(ImageFile(*image), kept)


def list_images(images: Iterable[ImageFile]) -> Listing:
    """List images with the states of their files, as they were found."""
    return Listing.write(map(Entry, images))


def list_appended(given: Listing, rows: Iterable[Entry]) -> Listing:
    """List the images of an output that is to grow.

    Args:
        given: the images asked for.
        rows: the images of the output's rows, in their order.

    Returns:
        First the images of rows that were not asked for, then those asked for. Each that has a row, and is the same
        file in the same state, keeps it.
    """
    rows, names = list(rows), {entry.image.name for entry in given}
    known = {entry.image.name: (entry.state, row) for row, entry in enumerate(rows)}

    def entries() -> Iterator[Entry]:
        for row, entry in enumerate(rows):
            if entry.image.name not in names:
                yield entry._replace(kept=row)
        for entry in given:
            state, row = known.get(entry.image.name, (GONE, -1))
            yield entry._replace(kept=row if state == entry.state != GONE else -1)

    return Listing.write(entries())


def count_new(known: Listing, given: Sequence[str | os.PathLike]) -> int:
    """Count the images that are found now and are not in a list.

    Raises:
        ValueError, OSError: as `find_images` does.
    """
    digest = hashlib.blake2b(digest_size=16)
    for image in find_images(given):
        digest.update(encode_name(image))
    if digest.hexdigest() == known.digest:  # as nearly always, and without names in memory
        return 0
    names = Counter(entry.image.name for entry in known)
    return sum((Counter(image.name for image in find_images(given)) - names).values())


def check_same_images(known: Listing, given: Listing, folder: Path) -> None:
    """Raise ValueError unless a job that was begun is a job on the images that are given now.

    Images that came since, and some that have gone, don't matter: the list of a job is fixed.

    Args:
        known: the images of the job.
        given: those asked for now.
        folder: the job's, for the error.
    """
    ways_out = "--restart (restart=True) starts over, or give another name to write"
    if known.digest != given.digest:
        names = Counter(entry.image.name for entry in given)
        for entry in known:
            names[entry.image.name] -= 1
            if names[entry.image.name] < 0 and look_at(entry.image) != GONE:
                raise ValueError(
                    f"{folder} holds results of another job (other: images, of which {entry.image.name} was not given "
                    f"this time): {ways_out}"
                )
    path: Any = None
    for entry in known:
        if is_member(entry.image) and entry.image.path != path:
            path = entry.image.path
            if is_changed(entry):
                raise ValueError(f"{path} was changed since the job in {folder} listed its images: {ways_out}")
