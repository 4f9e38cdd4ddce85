"""The one way in which fzoo writes a file, and one line from an exception."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def one_line(error: BaseException) -> str:
    """An exception's text on one line that can be shown; KeyError puts its own in quotes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text[:4000].split()))
    return (text if len(text) < 1000 else text[:1000] + "...") or type(error).__name__


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A new name beside `path` to write to; renamed to `path` at the end, removed if anything fails."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, the name of a file expected")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such directory: {path.parent}")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        # Not by tempfile, whose 0600 is for secrets: of these permissions the system takes the process's umask.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e  # not the temporary's name
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
