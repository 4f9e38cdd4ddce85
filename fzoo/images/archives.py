"""Images in archives, without unpacking them: tar, as it is or compressed, and zip."""

from __future__ import annotations

import functools
import io
import os
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping

from fzoo.images.files import ImageFile, PassedOver, describe_file, ends_like_image, is_hidden, one_reason
from fzoo.images.tar import (
    COMPRESSED,
    Gap,
    TarMember,
    TarStream,
    UnreadableError,
    find_members,
    is_tar_header,
    open_tar,
    tar_members,
)

#: What archives that are read end in, and their kinds; the content has the last word on the kind.
ARCHIVE_ENDINGS = {
    ".tar": "tar",
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.bz2": "bzip2",
    ".tbz": "bzip2",
    ".tbz2": "bzip2",
    ".tar.xz": "xz",
    ".txz": "xz",
    ".tar.zst": "zstd",
    ".tzst": "zstd",
    ".zip": "zip",
}


#: Those of others.
OTHER_ENDINGS = {
    ".7z": "7z",
    ".bz2": "bzip2",
    ".cab": "CAB",
    ".gz": "gzip",
    ".lz": "lzip",
    ".lz4": "lz4",
    ".rar": "RAR",
    ".xz": "xz",
    ".z": "compress",
    ".zst": "zstd",
}


#: (how an archive begins, its kind).
MAGIC = (
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"Rar!\x1a\x07", "RAR"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x1f\x9d", "compress"),
    (b"LZIP", "lzip"),
    (b"MSCF", "CAB"),
)


#: Bytes; a member of an archive that claims more is no image.
MAX_MEMBER = 1 << 28


#: How many links lead from one to the next.
MAX_LINKS = 40


def is_archive(path: str) -> bool:
    """Return whether a given file is an archive: by its name, or by its content where the name says nothing."""
    if has_archive_ending(path) or path.lower().endswith(tuple(OTHER_ENDINGS)):
        return True
    return not ends_like_image(path) and os.path.isfile(path) and bool(archive_kind(path))


def has_archive_ending(name: str) -> bool:
    """Return whether a file beside images is an archive that is read."""
    return name.lower().endswith(tuple(ARCHIVE_ENDINGS))


def archive_kind(path: str) -> str:
    """Return what kind of archive a file is, by its content, else by its name; "" for none."""
    try:
        with open(path, "rb") as file:
            start = file.read(tarfile.BLOCKSIZE)
    except OSError:
        start = b""
    if (kind := next((kind for magic, kind in MAGIC if start.startswith(magic)), "")) or is_tar_header(start):
        return kind or "tar"
    endings = OTHER_ENDINGS | ARCHIVE_ENDINGS
    return next((endings[ending] for ending in sorted(endings, key=len)[::-1] if path.lower().endswith(ending)), "")


def archive_images(path: str, passed_over: PassedOver) -> Iterator[ImageFile]:
    """Yield the images in an archive, named "archive.tar/member", and what can't be had as one with an error.

    Nothing but headers is read of a plain tar archive, of a compressed one all, in order. What lies behind a damaged
    part is taken where a header shows its beginning, as by GNU tar's --ignore-zeros. A link to a member is that member,
    and comes after the others. Hidden members, and files that don't end like an image, are passed over.

    Args:
        path: of the archive.
        passed_over: counts these files.
    """
    archive = describe_file(path, "archive")
    if not archive.error and not os.path.isfile(path):
        archive = archive._replace(error=f"cannot read the archive {path}: it is a pipe, a socket or a device")
    if archive.error:
        yield archive
        return
    try:
        kind = archive_kind(path)
        if kind == "zip":
            yield from zip_images(archive, passed_over)
        elif kind == "tar" or kind in COMPRESSED:
            yield from tar_images(archive, kind, passed_over)
        else:
            error = f"{path} is an archive of the kind {kind}, which fzoo does not read: make a .tar or a .zip of it"
            yield archive._replace(error=error)
    except Exception as e:  # a damaged archive ends in whatever its reader meets first
        yield archive._replace(error=f"cannot read the archive {path} any further: {one_reason(e)}")


def tar_images(archive: ImageFile, kind: str, passed_over: PassedOver) -> Iterator[ImageFile]:
    """Yield the images of a tar archive; see `archive_images`."""
    path, links, names = archive.path, {}, []
    with open_tar(path, kind) as stream:
        if kind in COMPRESSED and not has_archive_ending(path) and not is_tar_header(stream.peek()):
            yield archive._replace(
                error=f"{path} is one file, compressed by {kind}: decompress it, or make a .tar of it"
            )
            return
        for member in tar_members(stream):
            if isinstance(member, Gap):
                error = f"{path} is damaged at byte {member.offset:,}: {member.reason}"
                yield archive._replace(name=f"{path} (at byte {member.offset})", error=error)
                continue
            if member.link is not None:
                links[posixpath.normpath(member.name)] = member.link
            if is_wanted(member.name, passed_over):
                if member.link is None:
                    yield member_image(archive, member)
                else:
                    names.append(member.name)
            elif member.is_last:
                yield archive._replace(error=f"cannot read the archive {path} any further: {member.error}")
    if names:
        yield from linked_images(archive, names, links, functools.partial(find_members, path, kind))


def is_wanted(name: str, passed_over: PassedOver) -> bool:
    """Return whether a member is an image that is seen; counts it where it is another file."""
    *folders, name = posixpath.normpath(name).split("/")
    if any(is_hidden(folder) for folder in folders if folder != "..") or is_hidden(name):
        return False
    if not ends_like_image(name):
        passed_over.note(name)
    return ends_like_image(name)


def member_image(archive: ImageFile, member: TarMember) -> ImageFile:
    """Return a member as an image of its archive."""
    name, error = f"{archive.path}/{member.name}", member.error
    if not error and member.size > MAX_MEMBER:
        error = f"it has more than {MAX_MEMBER:,} bytes"
    error = error and f"cannot read the image {name}: {error}"
    return archive._replace(name=name, offset=member.offset, size=member.size, parts=member.parts, error=error)


def linked_images(
    archive: ImageFile,
    names: Iterable[str],
    links: Mapping[str, str],
    find: Callable[[set[str]], dict[str, TarMember]],
) -> Iterator[ImageFile]:
    """Yield the members that links lead to, under the names of the links, in the order in which they are stored.

    Args:
        archive: where they lie.
        names: paths of links in the archive.
        links: where each link of the archive leads to.
        find: gives the members of these paths.
    """
    targets = {name: follow_links(posixpath.normpath(name), links) for name in names}
    members = find({target for target in targets.values() if target})
    images = []
    for name, target in targets.items():
        error = f"it is a link to {links[posixpath.normpath(name)]}, which leads to no member of the archive"
        images.append(member_image(archive, members.get(target, TarMember(name, error=error))._replace(name=name)))
    yield from sorted(images, key=lambda image: image.offset)


def follow_links(path: str, links: Mapping[str, str]) -> str:
    """Return the path at which a chain of links ends, folders among them; "" where it is a loop."""
    for _ in range(MAX_LINKS):
        ends = [i for i, c in enumerate(path) if c == "/" and i] + [len(path)]
        end = next((end for end in ends if path[:end] in links), None)
        if end is None:
            return path
        path = posixpath.normpath(links[path[:end]] + path[end:])
    return ""


def zip_images(archive: ImageFile, passed_over: PassedOver) -> Iterator[ImageFile]:
    """Yield the images of a zip archive; see `archive_images`."""
    path, links, names = archive.path, {}, []
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
        if archive_kind(path) == "zip" and all(member.header_offset for member in members):
            error = f"{path} is damaged at byte 0: what lies before the members that its directory knows is lost"
            yield archive._replace(name=f"{path} (at byte 0)", error=error)
        for i, member in enumerate(members):
            name, is_link = member.filename, stat.S_ISLNK(member.external_attr >> 16)
            if is_link:
                links[posixpath.normpath(name)] = zip_link(file, member)
            if not member.is_dir() and is_wanted(name, passed_over):
                if is_link:
                    names.append(name)
                else:
                    yield member_image(archive, TarMember(name, i, member.file_size))
        if names:
            places = {posixpath.normpath(m.filename): TarMember("", i, m.file_size) for i, m in enumerate(members)}
            yield from linked_images(archive, names, links, lambda _: places)


def zip_link(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    """Return the path in the archive that a link leads to; "" where it can't be read."""
    try:
        with archive.open(member) as file:
            target = os.fsdecode(file.read(4096))
    except Exception:  # see `read_zip_member`
        return ""
    return posixpath.normpath(posixpath.join(posixpath.dirname(member.filename), target))


class ArchiveReader:
    """Reads images that were found, in their order: an archive is gone through once, and not kept in memory."""

    def __init__(self) -> None:
        self.path, self.kind = "", ""
        self.zip: zipfile.ZipFile | None = None
        self.stream: TarStream | None = None

    def prepare(self, image: ImageFile) -> Callable[[], str | io.BytesIO]:
        """Return what gives, in any thread, what `load_image` takes; to be called in the order of the images.

        Raises:
            ValueError, OSError: it can't be read.
        """
        if image.error:
            raise ValueError(image.error)
        if image.size < 0:
            return lambda: image.path
        if self.path != image.path:
            self.close()
            self.path, self.kind = image.path, archive_kind(image.path)
        if self.kind == "tar":
            return functools.partial(read_tar_member, image)
        try:
            if self.kind == "zip":
                self.zip = self.zip or zipfile.ZipFile(image.path)
                return functools.partial(read_zip_member, self.zip, image)
            if self.stream is None or self.stream.position > image.offset:
                if self.stream is not None:
                    self.stream.file.close()
                self.stream = open_tar(image.path, self.kind)
        except Exception as e:  # see `archive_images`
            raise ValueError(f"cannot read the image {image.name}: {one_reason(e)}") from e
        data = member_data(self.stream, image)
        return lambda: data

    def close(self) -> None:
        """Close what is open, but for a zip archive that threads still read: it is closed with the last of them."""
        if self.stream is not None:
            self.stream.file.close()
        self.path, self.kind, self.zip, self.stream = "", "", None, None


def read_tar_member(image: ImageFile) -> io.BytesIO:
    """Return a member of a plain tar archive, in memory."""
    with open_tar(image.path, "tar") as stream:
        return member_data(stream, image)


def read_zip_member(archive: zipfile.ZipFile, image: ImageFile) -> io.BytesIO:
    """Return a member of a zip archive, in memory."""
    try:
        with archive.open(archive.infolist()[image.offset]) as member:
            data = member.read(image.size + 1)
    except Exception as e:  # encrypted, damaged, or of a compression that Python does not know: each has its own
        raise ValueError(f"cannot read the image {image.name}: {one_reason(e)}") from e
    return as_file(data, image)


def member_data(stream: TarStream, image: ImageFile) -> io.BytesIO:
    """Return a member of a tar archive, in memory."""
    data = bytearray(image.size)
    try:
        stream.skip_to(image.offset)
        for start, length in image.parts or ((0, image.size),):
            data[start : start + length] = part = stream.take(length)
            if len(part) < length:
                raise UnreadableError("the archive ends in it")
    except UnreadableError as e:
        raise ValueError(f"cannot read the image {image.name}: {e}") from e
    return as_file(data, image)


def as_file(data: bytes | bytearray, image: ImageFile) -> io.BytesIO:
    """Return a member as an open file under its name."""
    file = io.BytesIO(data)
    file.name = image.name  # pyright: ignore[reportAttributeAccessIssue]
    return file
