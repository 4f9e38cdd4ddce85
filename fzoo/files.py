"""The one way in which fzoo writes a file, locks one, and writes a table of text; one line from an exception."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
import secrets
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

#: What file systems say that have no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def one_line(error: BaseException) -> str:
    """Return an exception's text on one line that can be shown; KeyError puts its own in quotes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = on_one_line(text[:4000])
    return (text if len(text) < 1000 else text[:1000] + "...") or type(error).__name__


def on_one_line(text: str) -> str:
    """Put a text on one line, with a ? for what can't be shown; its spaces stay, for names have them, too."""
    line = " ".join(filter(None, (part.strip() for part in text.splitlines()))).replace("\t", " ")
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else "?" for c in line)


def missing(noun: str, path: str | os.PathLike) -> FileNotFoundError:
    """Return the error for a path that leads nowhere; it tells of a name that looks the same and is spelled otherwise.

    "é" may be one character or two (NFC, NFD), which file systems tell apart and people don't.
    """
    at = Path(path)
    while not at.parent.exists() and at.parent != at:
        at = at.parent
    try:
        alike = [other.name for other in at.parent.iterdir() if same_looks(other.name, at.name)]
    except OSError:
        alike = []
    if not alike or at.exists():
        return FileNotFoundError(f"no such {noun}: {path}")
    return FileNotFoundError(
        f"no such {noun}: {path}; there is {alike[0]!a}, which looks like {at.name!a} and is spelled with "
        "other characters (Unicode's NFC and NFD): give that name, or rename it"
    )


def same_looks(one: str, other: str) -> bool:
    """Tell whether two names differ in their Unicode form alone."""
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def write_rows(file: TextIO | io.TextIOBase, rows: Iterable[Iterable[object]], delimiter: str = ",") -> None:
    """Write a line for each row, which `csv.reader` reads as it was, whatever is in its cells.

    Args:
        file: of text, to write to; opened with `newline=""`.
        rows: of cells, whose `str` is written.
        delimiter: between two cells; a tab for the dialect "excel-tab".
    """
    plain, quoted = (
        csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=quoting)
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    for row in rows:
        cells = [str(cell) for cell in row]
        # A carriage return ends a line for the reader, but the writer quotes no ends of lines other than its own.
        (quoted if any("\r" in cell for cell in cells) else plain).writerow(cells)


def check_parent(path: Path) -> None:
    """Raise FileNotFoundError unless there is the directory that a file is to be written to."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such directory: {path.parent}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new name beside `path` to write to; renamed to `path` at the end, removed if anything fails."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, the name of a file expected")
    check_parent(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        # Not by tempfile, whose 0600 is for secrets: of these permissions the system takes the process's umask.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        permissions = temporary.stat().st_mode
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e  # not the temporary's name
    try:
        yield temporary
        if temporary.stat().st_mode != permissions:  # safetensors puts a file of its own there, for its user alone
            temporary.chmod(permissions)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> bool:
        """Lock a file that no other process has locked."""
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

    def _release(file: BinaryIO, path: Path) -> None:
        """Unlock and remove; Windows removes no file that a process has open."""
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        file.close()
        with contextlib.suppress(OSError):
            path.unlink()

else:
    import fcntl

    def _lock(file: BinaryIO) -> bool:
        """Lock a file that no other process has locked."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _release(file: BinaryIO, path: Path) -> None:
        """Remove and unlock, in this order: who waits for the lock of a file that is gone looks for the new one."""
        path.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_UN)  # closing does not, if the process was forked meanwhile
        file.close()


def try_lock(path: Path) -> BinaryIO | None:
    """Lock a file, which is made, until it is closed or this process ends; None where another process has it locked.

    Where the file system has no locks, every process gets it.

    Raises:
        FileNotFoundError: its directory is gone.
    """
    file = path.open("ab")
    try:
        if _lock(file):
            return file
    except OSError as e:
        if e.errno in NO_LOCKS:
            return file
        file.close()
        raise
    file.close()
    return None


@contextlib.contextmanager
def hold_lock(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock of a file, which is made and removed; False where the file system has no locks.

    The system takes the lock from a process that dies; the file that is left is the next holder's.

    Args:
        path: of the file.
        waiting: is called once where another process has the lock, before its end is waited for.
    """
    locked, waited = True, False
    while True:
        file = path.open("ab")
        try:
            while not _lock(file):
                if not waited:
                    waiting()
                waited = True
                time.sleep(0.1)
            if _same(file, path):
                break
        except OSError:  # some network file systems have no locks
            locked = False
            break
        except BaseException:
            file.close()
            raise
        file.close()
    try:
        yield locked
    finally:
        if locked:
            _release(file, path)
        else:
            file.close()
            path.unlink(missing_ok=True)


def _same(file: BinaryIO, path: Path) -> bool:
    """Tell whether an open file is the one that has a name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
