"""The members of tar archives, compressed or not: those that tarfile gives, and those behind a damaged place."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

#: Kinds that hold a tar archive.
COMPRESSED = ("gzip", "bzip2", "xz", "zstd")


#: Bytes of a member's headers, with its long name and its sparse map; one that claims more is a damaged one.
MAX_HEADERS = 1 << 20


class UnreadableError(Exception):
    """A file can't be read any further."""


class TarStream:
    """What lies in a file, decompressed and read in order, with a look at the next block of a tar archive.

    Args:
        file: from which it is read.
        length: of a file in which one can seek; None for one that is decompressed.
    """

    def __init__(self, file: Any, length: int | None = None):
        self.file, self.length = file, length
        self.position, self.budget, self.ahead = 0, MAX_HEADERS, b""
        self.error: UnreadableError | None = None

    def __enter__(self) -> TarStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def take(self, size: int) -> bytes:
        """Return the next bytes; fewer at the end.

        Raises:
            UnreadableError: the file is cut off or damaged; again at each further call.
        """
        if self.error:
            raise self.error
        pieces = [self.ahead[:size]]
        self.ahead = self.ahead[size:]
        left = size - len(pieces[0])
        try:
            while left and (piece := self.file.read(min(left, MAX_HEADERS))):
                pieces.append(piece)
                left -= len(piece)
        except Exception as e:  # each decompressor has its own
            self.error = UnreadableError(str(e) or type(e).__name__)
            raise self.error from e
        self.position += size - left
        return b"".join(pieces)

    def peek(self) -> bytes:
        """Return the next block without moving on; empty at the end."""
        if not self.ahead:
            start = self.position
            self.ahead = self.take(tarfile.BLOCKSIZE)
            self.position = start
        return self.ahead

    def skip_to(self, position: int) -> None:
        """Move on, not beyond the end; errors as for `take`."""
        if self.length is None:
            while (left := position - self.position) > 0 and self.take(min(left, MAX_HEADERS)):
                pass
            return
        self.position, self.ahead = min(position, self.length), b""
        self.file.seek(self.position)

    def tell(self) -> int:
        """Return how many bytes were read; for tarfile."""
        return self.position

    def read(self, size: int) -> bytes:
        """Return the next bytes of headers; for tarfile.

        Raises:
            ValueError: headers can't be so long.
        """
        if not 0 <= size <= self.budget:
            raise ValueError(f"headers of more than {MAX_HEADERS:,} bytes")
        self.budget -= size
        return self.take(size)


class TarMember(NamedTuple):
    """What a header says.

    Attributes:
        name: its path in the archive.
        offset, size, parts: as of `ImageFile`.
        link: the path in the archive that it leads to; None for a file.
        error: why its data can't be had.
        is_last: whether nothing can be read behind it, since the file is cut off or damaged.
    """

    name: str
    offset: int = 0
    size: int = 0
    parts: tuple[tuple[int, int], ...] = ()
    link: str | None = None
    error: str = ""
    is_last: bool = False


class Gap(NamedTuple):
    """A place in an archive where something is lost.

    Attributes:
        offset: where it begins, in bytes after decompression.
        reason: what is wrong there.
    """

    offset: int
    reason: str


def is_tar_header(block: bytes) -> bool:
    """Return whether a block begins a member."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def open_tar(path: str, kind: str) -> TarStream:
    """Open a tar archive.

    Raises:
        OSError: it can't be opened.
        ModuleNotFoundError: what reads the kind is not installed.
    """
    if kind == "tar":
        return TarStream(open(path, "rb"), os.path.getsize(path))
    openers: Mapping[str, Callable[[str], Any]] = {
        "gzip": gzip.open,
        "bzip2": bz2.open,
        "xz": lzma.open,
        "zstd": open_zstd,
    }
    return TarStream(openers[kind](path))


def open_zstd(path: str) -> Any:
    """Open a file compressed by Zstandard, as Python 3.14 does, or with the package zstandard."""
    try:
        return importlib.import_module("compression.zstd").open(path)
    except ModuleNotFoundError:
        pass
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ModuleNotFoundError("zstandard is not installed: pip install 'fzoo[archives]'") from None
    return zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True)


def tar_members(stream: TarStream) -> Iterator[TarMember | Gap]:
    """Yield all files and links of a tar archive, or of several one after the other, and what is between them.

    Raises:
        UnreadableError: the file can't be read any further.
    """
    # tarfile knows the headers of all writers, but goes no further than the first damaged one.
    reader = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * tarfile.BLOCKSIZE)))
    reader.fileobj = stream  # pyright: ignore[reportAttributeAccessIssue]
    zeros, gap, end = 0, None, 0
    while block := stream.peek():
        start = stream.position
        if not any(block):
            zeros += len(block) == tarfile.BLOCKSIZE
            stream.skip_to(start + tarfile.BLOCKSIZE)
            continue
        header = read_header(reader, stream)
        if gap is None and (header is None or zeros == 1):  # an archive ends in two blocks of zeros or more
            gap = start - tarfile.BLOCKSIZE if zeros == 1 else start
        if header is None:
            continue
        if gap is not None:
            yield Gap(gap, f"no member can be recognised up to byte {start:,}")
        zeros, gap = 0, None
        member = read_data(header, reader.offset, stream)
        end = stream.position
        if member is not None:
            yield member
            if member.is_last:
                return
    if gap is not None:
        yield Gap(gap, "no member can be recognised up to the end")
    elif zeros < 2:
        yield Gap(end, "its end marker is missing, what follows may be lost" if stream.position else "it is empty")


def read_header(reader: tarfile.TarFile, stream: TarStream) -> tarfile.TarInfo | None:
    """Return a member's headers; None for what are none, of which at least a block was read.

    Raises:
        UnreadableError: the file can't be read any further.
    """
    stream.budget = MAX_HEADERS
    try:
        header = tarfile.TarInfo.fromtarfile(reader)
    except UnreadableError:
        raise
    except Exception:  # damaged headers of all kinds: HeaderError, but ValueError or RecursionError as well
        return None
    return header if header.size >= 0 and reader.offset >= stream.position else None


def read_data(header: tarfile.TarInfo, end: int, stream: TarStream) -> TarMember | None:
    """Return a member, and move to the next header; None for a folder."""
    name, stored, parts, error = header.name, header.size, (), ""
    if header.issparse():
        parts = tuple((start, length) for start, length in sparse_map(header) if length)
        stored = sum(length for _, length in parts)
        if any(start < 0 or length < 0 or start + length > header.size for start, length in parts):
            parts, error = (), "its map of holes is damaged"
    if header.isdir():
        member = None
    elif header.issym():
        member = TarMember(name, link=posixpath.normpath(posixpath.join(posixpath.dirname(name), header.linkname)))
    elif header.islnk():
        member = TarMember(name, link=posixpath.normpath(header.linkname))
    elif header.isdev():
        member = TarMember(name, error="it is no file, but a pipe or a device")
    else:
        member = TarMember(name, header.offset_data, header.size, parts, error=error)
    try:
        stream.skip_to(end)
    except UnreadableError as e:
        return member and member._replace(error=f"{e}; what follows is lost", is_last=True)
    if member is not None and member.link is None and stream.position < member.offset + stored:
        return member._replace(error="the archive ends in it; what follows is lost", is_last=True)
    return member


def sparse_map(header: tarfile.TarInfo) -> Iterable[tuple[int, int]]:
    """Return (where in the file, bytes) of what is stored of a sparse member."""
    return header.sparse  # pyright: ignore[reportReturnType]  # of which typeshed knows no more than that it is there


def find_members(path: str, kind: str, names: set[str]) -> dict[str, TarMember]:
    """Return the members of some names in a tar archive, by these."""
    members = {}
    with open_tar(path, kind) as stream:
        try:
            for member in tar_members(stream):
                if isinstance(member, TarMember) and member.link is None:
                    name = posixpath.normpath(member.name)
                    if name in names:
                        members[name] = member
        except UnreadableError:
            pass  # which was reported when the archive was read for the first time
    return members
