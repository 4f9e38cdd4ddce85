"""Where images come from: files, folders, globs, lists of paths and tar archives, as one flat sequence."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

#: What a file must end in to be taken from a folder or an archive, where other files lie beside images.
IMAGES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


COMPRESSED = (".tar.gz", ".tgz")


ARCHIVES = (".tar", *COMPRESSED)


#: Bytes; a member of an archive that claims more is no image.
MAX_MEMBER = 1 << 28


class Source(NamedTuple):
    """An image that was not opened yet.

    Attributes:
        name: the path, or that of the archive with the member's behind it.
        path: the file to open.
        offset, size: where the image lies in an archive, in bytes, after decompression; size is -1 for a whole file.
    """

    name: str
    path: str
    offset: int = 0
    size: int = -1


def find(given: Iterable[str | os.PathLike]) -> Iterator[Source]:
    """Images, in order, one at a time: nothing is opened but archives, and those are not kept.

    Args:
        given: files; folders, whose images and archives are taken in sorted order, with those of the folders inside;
            globs ("photos/*.jpg", "**" for any depth); "@list.txt", a file of any of these, one a line; .tar, .tar.gz
            and .tgz archives, whose images are called "archive.tar/member". Hidden files of folders and archives, and
            files whose names don't end like an image's, are passed over.

    Raises:
        FileNotFoundError, PermissionError: a list or an archive that can't be read. A missing image is no error yet.
        ValueError: a damaged archive; a folder, glob, list or archive without images.
    """
    for path in given:
        each = os.fspath(path)
        yield from listed(each) if each.startswith("@") else expand(each)


def listed(path: str) -> Iterator[Source]:
    """The images that a list names, one path a line."""
    with open(path[1:], encoding="utf-8", errors="surrogateescape") as lines:
        yield from some((s for line in lines if line.strip() for s in expand(line.rstrip("\r\n"))), f"{path[1:]} lists")


def expand(path: str) -> Iterator[Source]:
    """The images of one path."""
    if os.path.isdir(path):
        return some(walk(path), f"{path} is a directory of")
    if path.lower().endswith(ARCHIVES):
        return some(members(path), f"{path} holds")
    if glob.has_magic(path) and not os.path.lexists(path):
        return some((s for each in sorted(glob.iglob(path, recursive=True)) for s in expand(each)), f"{path} matches")
    return iter((Source(path, path),))


def some(sources: Iterator[Source], what: str) -> Iterator[Source]:
    """The same; none is an error."""
    first = next(sources, None)
    if first is None:
        raise ValueError(f"{what} no images")
    yield first
    yield from sources


def is_image(name: str) -> bool:
    """Whether a file beside others is taken."""
    return name.lower().endswith(IMAGES) and not name.startswith(".")


def walk(folder: str) -> Iterator[Source]:
    """The images below a folder, links to folders not followed."""
    with os.scandir(folder) as entries:
        found = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in entries if not e.name.startswith("."))
    for name, is_folder in found:
        path = os.path.join(folder, name)
        if is_folder:
            yield from walk(path)
        elif name.lower().endswith(ARCHIVES):
            yield from members(path)
        elif is_image(name):
            yield Source(path, path)


def members(path: str) -> Iterator[Source]:
    """The images in an archive; of a plain one only the headers are read."""
    try:
        with tarfile.open(path, "r:gz" if path.lower().endswith(COMPRESSED) else "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it keeps all that it has seen
                if member.isreg() and not member.issparse() and is_image(member.name.rpartition("/")[2]):
                    yield Source(f"{path}/{member.name}", path, member.offset_data, member.size)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"no such archive: {path}") from e
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as e:
        raise ValueError(f"{path} is not a readable tar archive: {e}") from e


class Survey:
    """How many images there are, and where: walked once to know, and again to read them, with a look that they stayed.

    Args:
        given: as for `find`, whose errors this raises.

    Attributes:
        given: the paths.
        count: how many images.
        digest: a hash of their names and places.
    """

    def __init__(self, given: Iterable[str | os.PathLike]):
        self.given, self.count, digest = list(given), 0, hashlib.blake2b(digest_size=16)
        for source in find(self.given):
            self.count += 1
            digest.update(place(source))
        self.digest = digest.hexdigest()

    def __iter__(self) -> Iterator[Source]:
        digest = hashlib.blake2b(digest_size=16)
        for source in find(self.given):
            digest.update(place(source))
            yield source
        if digest.hexdigest() != self.digest:
            raise ValueError(
                "images were added or removed while the job ran: start over, with --restart (restart=True)"
            )


def place(source: Source) -> bytes:
    """What identifies a source."""
    return os.fsencode("\0".join(map(str, source)) + "\n")


class Opener:
    """Opens sources. What lies in a compressed archive is read at once, in order; `Opener` keeps the place."""

    def __init__(self) -> None:
        self.path = ""
        self.file: gzip.GzipFile | None = None

    def prepare(self, source: Source) -> Source | io.BytesIO:
        """What `opened` needs to go on, in any thread; to be called in the order of `find`.

        Raises:
            ValueError, OSError: it can't be read.
        """
        if source.size < 0 or not source.path.lower().endswith(COMPRESSED):
            return source
        if self.path != source.path:
            self.close()
            self.path, self.file = source.path, gzip.open(source.path)  # noqa: SIM115
        assert self.file is not None
        return read(self.file, source)

    def close(self) -> None:
        """Close what is open."""
        if self.file is not None:
            self.file.close()
        self.path, self.file = "", None


def opened(source: Source | io.BytesIO) -> str | io.BytesIO:
    """What `load_image` takes.

    Raises:
        ValueError, OSError: it can't be read.
    """
    if not isinstance(source, Source):
        return source
    if source.size < 0:
        return source.path
    with open(source.path, "rb") as file:
        return read(file, source)


def read(file: io.BufferedIOBase, source: Source) -> io.BytesIO:
    """A member of an archive, in memory, under its name."""
    if source.size > MAX_MEMBER:
        raise ValueError(f"cannot read the image {source.name}: it has more than {MAX_MEMBER:,} bytes")
    try:
        file.seek(source.offset)
        data = io.BytesIO(file.read(source.size))
    except (EOFError, zlib.error, OSError) as e:
        raise ValueError(f"cannot read the image {source.name}: {e}") from e
    data.name = source.name  # pyright: ignore[reportAttributeAccessIssue]
    return data
