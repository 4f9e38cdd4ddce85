"""An image that was not opened yet, and which names are those of images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

#: What a file must end in to be taken from a folder or an archive, where other files lie beside images.
IMAGE_ENDINGS = (
    ".apng",
    ".avif",
    ".bmp",
    ".dib",
    ".gif",
    ".j2k",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpf",
    ".jpg",
    ".jpx",
    ".mpo",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".qoi",
    ".tga",
    ".tif",
    ".tiff",
    ".webp",
)


#: Folders that a system puts beside images without showing them: macOS in its archives, a Synology on its disks.
HIDDEN_FOLDERS = ("__MACOSX", "@eaDir")


class ImageFile(NamedTuple):
    """An image that was not opened yet, or one that can't be had.

    Attributes:
        name: the path, or that of the archive with the member's behind it.
        path: the file to open.
        bytes, changed: size of that file, and the time of its last change in nanoseconds, when it was listed; -1 where
            there was none. Those of a member are its archive's.
        offset: of a member of a tar archive, where its data begin after decompression; of a zip's, its number.
        size: bytes of a member; -1 for a whole file.
        parts: of a sparse member, (where in the image, bytes) of what is stored, one after the other from `offset`.
        error: why it can't be had, in one line; empty where it may be read.
    """

    name: str
    path: str
    bytes: int = -1
    changed: int = -1
    offset: int = 0
    size: int = -1
    parts: Sequence[Sequence[int]] = ()
    error: str = ""


class PassedOver(Counter[str]):
    """How many files of which endings were not taken, of those beside images."""

    def note(self, name: str) -> None:
        """Count a file by its ending."""
        self[os.path.splitext(name.lower())[1] or "without an ending"] += 1

    def __str__(self) -> str:
        """Say it in one line, such as "passed over 12 files: 7 .txt, 3 .heic, 2 without an ending"; empty for none."""
        if not self.total():
            return ""
        first = sorted(self.items(), key=lambda item: (-item[1], item[0]))[:8]
        kinds = [f"{count:,} {ending}" for ending, count in first]
        rest = self.total() - sum(count for _, count in first)
        kinds += [f"{rest:,} others"] if rest else []
        return f"passed over {self.total():,} file{'s' * (self.total() > 1)}: {', '.join(kinds)}"


def ends_like_image(name: str) -> bool:
    """Return whether a file beside others is taken for an image."""
    return name.lower().endswith(IMAGE_ENDINGS)


def is_hidden(name: str) -> bool:
    """Return whether a name, without its folder, is one that a person does not see beside the others."""
    return name.startswith(".") or name in HIDDEN_FOLDERS


def describe_file(path: str, kind: str = "image") -> ImageFile:
    """Return the file at a path, an image or of another kind; with an error where there is none."""
    try:
        status = os.stat(path)
        return ImageFile(path, path, status.st_size, status.st_mtime_ns)
    except FileNotFoundError:
        error = describe_missing(path, kind)
    except (OSError, ValueError) as e:  # the latter for a name that holds a zero byte
        error = f"cannot read the {kind} {path}: {one_reason(e)}"
    return ImageFile(path, path, error=error)


def describe_missing(path: str | os.PathLike, kind: str = "image") -> str:
    """Say that there is nothing at a path, in one line."""
    there = os.path.islink(path)
    return f"{path} is a link to a file that is not there" if there else f"no such {kind}: {path}"


def one_reason(error: Exception) -> str:
    """Return what an exception says, without the names that `OSError` adds."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
