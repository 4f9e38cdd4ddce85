"""What images there are: files, folders, globs, lists of paths and archives, as one flat sequence."""

from __future__ import annotations

import codecs
import contextlib
import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from fzoo.images.archives import archive_images, has_archive_ending, is_archive
from fzoo.images.files import ImageFile, PassedOver, describe_file, ends_like_image, is_hidden, one_reason

#: (device, number) of a folder, by which it is known under all its names.
Identity = tuple[int, int]


def find_images(given: Iterable[str | os.PathLike], passed_over: PassedOver | None = None) -> Iterator[ImageFile]:
    """Yield images, in order, one at a time: nothing is opened but archives, and those are not kept.

    What can't be had (a link to nothing, a folder that can't be read, a damaged part of an archive) comes as an image
    with an error, and the others go on.

    Args:
        given: any of these, each as often as it is given:

            - files;
            - folders, whose images and archives are taken in sorted order, with those of the folders inside. Links to
              folders are followed, but for those that lead back to a folder around them;
            - globs ("photos/*.jpg", "**" for any depth), each of which takes an image once. Of what they match, folders
              and archives are gone through, and other files are taken where they end like an image, or as the pattern
              does ("*.dat");
            - archives, whose images are called "archive.tar/member": .tar, .tar.gz, .tar.bz2, .tar.xz, .tar.zst, .zip;
            - "@list.txt", a file of any of the above, one a line, in UTF-8 or what its byte order mark says; relative
              paths are relative to the working directory. A picture that is called "@x.jpg" is a picture.

            What is hidden (".x", "__MACOSX", "@eaDir") is left out of folders and archives, and other files beside
            images are passed over.
        passed_over: counts these, for a report.

    Raises:
        OSError: a list can't be read.
        ValueError: a list that is no text; a folder, glob, list or archive without images.
    """
    for argument in given:
        path, own = os.fspath(argument), PassedOver()
        if is_list(path):
            yield from require_nonempty(images_of_list(path[1:], own), f"{path[1:]} lists", own)
        else:
            yield from images_of_path(path, own)
        if passed_over is not None:
            passed_over.update(own)


def is_list(argument: str) -> bool:
    """Return whether an argument is a list of paths, and not a file that is called like one."""
    return argument.startswith("@") and not (
        os.path.lexists(argument)
        and (ends_like_image(argument) or has_archive_ending(argument) or not os.path.lexists(argument[1:]))
    )


def check_one_image(path: str | os.PathLike) -> None:
    """Raise ValueError for what may hold many images, where one is expected."""
    path = os.fspath(path)
    kind = "a folder" if os.path.isdir(path) else "an archive" if is_archive(path) else ""
    if kind:
        raise ValueError(f"{path} is {kind}, one image expected")


def require_nonempty(images: Iterator[ImageFile], text: str, passed_over: PassedOver) -> Iterator[ImageFile]:
    """Yield the same images.

    Raises:
        ValueError: there are none.
    """
    first = next(images, None)
    if first is None:
        raise ValueError(f"{text} no images" + (f" ({passed_over})" if passed_over else ""))
    yield first
    yield from images


def images_of_list(path: str, passed_over: PassedOver) -> Iterator[ImageFile]:
    """Yield the images of the paths in a file, one a line; a line without images is one with an error."""
    with open(path, "rb") as file:
        start = file.read(2)
    encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    with open(path, encoding=encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "replace") as lines:
        for number, line in enumerate(lines, 1):
            text = line.rstrip("\r\n")
            try:
                if text.strip():
                    yield from images_of_path(text, passed_over)
            except ValueError as e:
                yield ImageFile(text, text, error=f"{path}, line {number}: {e}")


def images_of_path(path: str, passed_over: PassedOver) -> Iterator[ImageFile]:
    """Yield the images of a file, a folder, an archive or a glob.

    Raises:
        ValueError: there are none.
    """
    if os.path.isdir(path):
        yield from require_nonempty(images_below(path, passed_over), f"{path} is a directory of", passed_over)
    elif glob.has_magic(path) and not os.path.lexists(path):
        yield from require_nonempty(images_of_glob(path, passed_over), f"{path} matches", passed_over)
    elif is_archive(path):
        yield from require_nonempty(archive_images(path, passed_over), f"{path} holds", passed_over)
    else:
        yield describe_file(path)


class Folder(NamedTuple):
    """What is in a folder.

    Attributes:
        path: its own; "" for the working directory.
        names: of what is seen in it, in sorted order, with whether it is a folder.
        around: the folders around it, and itself.
        failure: where it could not be read, or not all of it.
    """

    path: str
    names: Iterator[tuple[str, bool]]
    around: frozenset[Identity]
    failure: ImageFile | None = None


def open_folder(path: str, around: frozenset[Identity], passed_over: PassedOver, *, hidden: bool = False) -> Folder:
    """Return what is in a folder; nothing of one that is around itself, by a link.

    Args:
        path: where it is.
        around: the folders that it was reached through.
        passed_over: counts links that lead back.
        hidden: whether what is hidden is seen.
    """
    names, failure = [], None
    try:
        status = os.stat(path or os.curdir)
        identity = status.st_dev, status.st_ino
        if identity in around:
            passed_over["in a loop of links"] += 1
            return Folder(path, iter(()), around)
        around |= {identity}
        with os.scandir(path or os.curdir) as entries:
            names.extend((entry.name, is_folder(entry)) for entry in entries if hidden or not is_hidden(entry.name))
    except OSError as e:
        failure = ImageFile(path, path, error=f"cannot read the folder {path}: {one_reason(e)}")
    return Folder(path, iter(sorted(names)), around, failure)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def identify_around(path: str) -> frozenset[Identity]:
    """Return the folders around a file or folder where it really is, links resolved."""
    path, around = os.path.realpath(path or os.curdir), set()
    while (folder := os.path.dirname(path)) != path:
        path = folder
        with contextlib.suppress(OSError):
            status = os.stat(path)
            around.add((status.st_dev, status.st_ino))
    return frozenset(around)


def images_below(
    folder: str, passed_over: PassedOver, *, archives: bool = True, around: frozenset[Identity] = frozenset()
) -> Iterator[ImageFile]:
    """Yield the images of a folder and of the folders inside, in sorted order; with errors, as `find_images` says.

    Args:
        folder: where to look.
        passed_over: counts the files that are not taken.
        archives: whether images of archives are taken; else archives are passed over.
        around: the folders to which a link leads back; if left out those that are around it on the disk.
    """
    stack = [open_folder(folder, around or identify_around(folder), passed_over)]
    while stack:
        current = stack[-1]
        if (entry := next(current.names, None)) is None:
            if current.failure:
                yield current.failure
            stack.pop()
        elif entry[1]:
            stack.append(open_folder(os.path.join(current.path, entry[0]), current.around, passed_over))
        else:
            yield from images_of_entry(os.path.join(current.path, entry[0]), passed_over, archives=archives)


def images_of_entry(path: str, passed_over: PassedOver, *, archives: bool = True) -> Iterator[ImageFile]:
    """Yield the images of a file that lies beside others."""
    if archives and has_archive_ending(path):
        yield from archive_images(path, passed_over)
    elif ends_like_image(path) or leads_nowhere(path):
        yield describe_file(path)
    else:
        passed_over.note(os.path.basename(path))


def leads_nowhere(path: str) -> bool:
    """Return whether this is a link to something that is not there, and that may have been a folder of images."""
    return not os.path.splitext(path)[1] and os.path.islink(path) and not os.path.exists(path)


def images_of_glob(pattern: str, passed_over: PassedOver) -> Iterator[ImageFile]:
    """Yield the images of what a pattern matches, each once."""
    drive, rest = os.path.splitdrive(pattern)
    start, parts = drive + os.sep * rest.startswith(os.sep), [part for part in rest.split(os.sep) if part]
    failures: dict[str, ImageFile] = {}
    paths = dict(matching_paths(start, parts, frozenset(), passed_over, failures))
    yield from failures.values()
    ending, folders = os.path.splitext(pattern.lower())[1], set()
    for path in sorted(paths):
        if any(folder in folders for folder in folders_around(path)):
            continue
        if os.path.isdir(path or os.curdir):
            folders.add(path)
            yield from images_below(path, passed_over, around=paths[path])
        elif ending and path.lower().endswith(ending) and not has_archive_ending(path):
            yield describe_file(path)
        else:
            yield from images_of_entry(path, passed_over)


def folders_around(path: str) -> Iterator[str]:
    """Yield the folders that a path names, from the last up."""
    while path and (folder := os.path.dirname(path)) != path:
        yield folder
        path = folder


def matching_paths(
    folder: str,
    parts: Sequence[str],
    around: frozenset[Identity],
    passed_over: PassedOver,
    failures: dict[str, ImageFile],
) -> Iterator[tuple[str, frozenset[Identity]]]:
    """Yield (path, folders it was reached through) of what matches the parts of a pattern, some of it more than once.

    Of a pattern that ends in "**", only the folder in which this begins. Not `glob`, which goes around in loops of
    links, for ever where there are two.

    Args:
        folder: where to look.
        parts: of the pattern, one for each folder and one for the name.
        around: the folders that "*" and "**" went through.
        passed_over: counts links that lead back.
        failures: takes the folders that can't be read, by their paths.
    """
    if not parts:
        yield folder, around
        return
    first, rest = parts[0], parts[1:]
    if not glob.has_magic(first):
        path = os.path.join(folder, first)
        if os.path.isdir(path) if rest else os.path.lexists(path):
            yield from matching_paths(path, rest, around, passed_over, failures)
        return
    if first == "**":
        yield from matching_paths(folder, rest, around, passed_over, failures)
        if not rest:
            return
    current = open_folder(folder, around or identify_around(folder), passed_over, hidden=first.startswith("."))
    if current.failure:
        failures[folder] = current.failure
    for name, is_dir in current.names:
        path = os.path.join(folder, name)
        if first == "**":
            if is_dir:
                yield from matching_paths(path, parts, current.around, passed_over, failures)
        elif fnmatch.fnmatch(name, first) and (is_dir or not rest):
            yield from matching_paths(path, rest, current.around, passed_over, failures)
