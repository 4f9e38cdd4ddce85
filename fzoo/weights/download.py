"""Published files, in the cache that Keras shares.

A file is downloaded as `.NAME.part` and gets its name when all of it is there and its hash is right, so what bears the
name is whole, whenever a process is killed. Processes that want the same file take turns, by a lock on `.NAME.lock`
that the system releases when its holder dies. The next attempt goes on where a `.part` ends; there is one for a name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import url2pathname

from fzoo.files import hold_lock

#: What a published file is known by: its hash, "md5:..." or "sha256:..." (without the algorithm, the number of digits
#: tells it), or its first digits, `DIGITS` or more, where no more are published ("sha256:7ebf99e0"); or, where none is
#: published, what raises ValueError or OSError for a file that can't be it.
Proof = str | Callable[[Path], object]

#: Seconds for a connection, and without a byte from it.
CONNECT_TIMEOUT, TIMEOUT = 10.0, 30.0

#: Seconds between the attempts, after what may have been a moment's failure.
WAITS = (1.0, 2.0, 4.0)

#: Statuses of such a failure.
TEMPORARY = (500, 502, 503, 504)

#: What is said of a file without a published hash.
UNPROVEN = "no hash is published; its structure was checked"

#: How many digits of a hash will do: by chance, they are those of one damaged file in four billion.
DIGITS = 8

_CHUNK = 1 << 16


class _Unavailable(OSError):
    """What was asked for can't be had; `again` where it may be a moment later."""

    def __init__(self, reason: str, again: bool = False):
        super().__init__(reason)
        self.again = again


def cache_dir() -> Path:
    """Return where Keras keeps its files: `$KERAS_HOME/models`, or `~/.keras/models`."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras").expanduser() / "models"


def checked_by(proof: Proof) -> str:
    """Say what was checked of a file that is right by this proof."""
    if not isinstance(proof, str):
        return UNPROVEN
    algorithm, digits = parse_hash(proof)
    whole = len(digits) == 2 * hashlib.new(algorithm).digest_size
    return "hash is right" if whole else f"the first {len(digits)} digits of its hash are right, all that are published"


def parse_hash(proof: str) -> tuple[str, str]:
    """Split what is published of a hash: its algorithm, and the digits in lower case.

    Raises:
        ValueError: there are too few digits, or more than the hash has.
    """
    algorithm, _, digits = proof.lower().rpartition(":")
    algorithm = algorithm or {32: "md5", 64: "sha256"}.get(len(digits), "")
    if algorithm not in ("md5", "sha256") or not DIGITS <= len(digits) <= 2 * hashlib.new(algorithm).digest_size:
        raise ValueError(f"the hash {proof!r} given, 'sha256:...' or 'md5:...' with {DIGITS} digits or more expected")
    return algorithm, digits


def file_hash(path: str | os.PathLike, algorithm: str) -> str:
    """Compute the hash of a file as the registry writes it: "md5:..."."""
    with open(path, "rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def cached_file(name: str, proof: Proof) -> Path | None:
    """Return the path of a published file if the cache has it, as `fetch` would find it; no network.

    Args:
        name: in the cache.
        proof: see `fetch`.
    """
    path = cache_dir() / name
    return path if path.is_file() and _fault(path, proof) is None else None


def fetch(url: str, name: str, proof: Proof, otherwise: str = "") -> Path:
    """Return the path of a published file, downloaded unless the cache has it.

    A file that is there is used without a network, if it is right; one that is not is replaced. A download gets its
    name when it is whole and its hash is right; of the Hub's files, that is the one that the Hub announces. Where none
    is known (MobileNet's, MobileNetV2's, and the Hub's on a mirror), a file is accepted when HTTP delivered all that it
    announced (Content-Length, or the last chunk) and the arrays are the network's by number and shape; a terminal is
    told so.

    The environment variable FZOO_WEIGHTS_URL names a mirror, "https://HOST/FOLDER" or "file:///FOLDER". Files are then
    asked for as $FZOO_WEIGHTS_URL/NAME, and nowhere else; hashes are checked all the same. The folder of a cache that
    `fzoo download` has filled is such a mirror.

    Args:
        url: where it lies.
        name: in the cache.
        proof: what tells that it is the file.
        otherwise: what else would do without a network, for the error.

    Returns:
        Its path in `cache_dir()`.

    Raises:
        OSError: it can't be downloaded; the message says why, and what to do without a network.
        ValueError: FZOO_WEIGHTS_URL is no URL of a folder.
    """
    path = cache_dir() / name
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, a file expected: remove it")
    if cached_file(name, proof):
        return path
    url = source(url, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(path.with_name(f".{name}.lock"), functools.partial(_waiting, name)) as shared:
            if not cached_file(name, proof):  # the holder before may have downloaded it
                # Where there are no locks, each process has a partial file of its own.
                unique = "" if shared else f".{uuid.uuid4().hex}"
                if not isinstance(proof, str) and name.endswith(".safetensors"):
                    proof = announced_hash(url) or proof
                _obtain(url, path, path.with_name(f".{name}{unique}.part"), proof, resume=shared)
                if not isinstance(proof, str) and sys.stderr.isatty():
                    print(f"fzoo: {name}: {UNPROVEN}", file=sys.stderr)
    except OSError as e:
        reason = " ".join(str(e).split())
        if path.exists():
            raise OSError(
                f"{path} is not the published file ({_fault(path, proof)}), and {_shown(url)} could not be downloaded "
                f"({reason}): put the file in its place{otherwise}"
            ) from e
        raise OSError(f"could not download {_shown(url)} ({reason}): put the file at {path}{otherwise}") from e
    return path


def source(url: str, name: str) -> str:
    """Return the URL that is asked: that of a file on the mirror where there is one, see `fetch`.

    Raises:
        ValueError: FZOO_WEIGHTS_URL is no URL of a folder.
    """
    mirror = os.environ.get("FZOO_WEIGHTS_URL")
    if not mirror:
        return url
    try:
        parts = urlsplit(mirror)
        host, _ = parts.hostname, parts.port  # a ValueError where it is no number
        good = bool(host) if parts.scheme in ("http", "https") else parts.scheme == "file" and parts.path[:1] == "/"
        good = good and not (parts.query or parts.fragment) and (parts.scheme != "file" or host in (None, "localhost"))
    except ValueError:
        good = False
    if not good:
        shown = mirror if "@" not in mirror else mirror.rpartition("@")[2]  # without a password
        raise ValueError(f"FZOO_WEIGHTS_URL={shown!r} given, https://HOST/FOLDER or file:///FOLDER expected")
    return f"{mirror.rstrip('/')}/{quote(name)}"


def announced_hash(url: str) -> str | None:
    """Ask for the hash that the Hub of Hugging Face announces for a file when asked where that is; None of others.

    It comes before a redirection to where the file lies, whose own ETag is another thing.
    """
    import requests

    if urlsplit(url).scheme == "file":
        return None
    try:
        response = requests.head(url, allow_redirects=False, timeout=(CONNECT_TIMEOUT, TIMEOUT))
    except requests.RequestException:
        return None  # what is wrong will show, and be said, when the file is asked for
    digits = response.headers.get("X-Linked-Etag", "").strip('"').lower()
    return f"sha256:{digits}" if re.fullmatch("[0-9a-f]{64}", digits) else None


def _shown(url: str) -> str:
    """Return a URL without the password that a mirror's may have."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _fault(path: Path, proof: Proof) -> str | None:
    """Say why a file is not the published one; None if it is, as far as can be known."""
    if not isinstance(proof, str):
        try:
            proof(path)
        except (ValueError, OSError) as e:
            return str(e).replace(str(path), "it")
        return None
    algorithm, digits = parse_hash(proof)
    right = file_hash(path, algorithm).startswith(f"{algorithm}:{digits}")
    return None if right else "its hash is not the published one"


def _obtain(url: str, path: Path, part: Path, proof: Proof, resume: bool) -> None:
    """Download into `part`, check, and give it its name.

    What came is kept for the next attempt only where a hash will tell whether the pieces belong together.
    """
    hashed = isinstance(proof, str)
    resume = resume and hashed
    waits = iter(WAITS)
    try:
        # It may be whole: killed just before it got its name.
        while not (resume and part.is_file() and _fault(part, proof) is None):
            try:
                resumed = _transfer(url, part, resume, unknown_length=hashed)
            except _Unavailable as e:
                wait = next(waits, None) if e.again else None
                if wait is None:
                    raise
                time.sleep(wait)
                continue
            fault = _fault(part, proof)
            if fault is None:
                break
            part.unlink()
            if not resumed:
                raise _Unavailable(fault)
            # Pieces of two files: once more, from the start.
        part.replace(path)
    except BaseException as e:
        local = isinstance(e, OSError) and not isinstance(e, _Unavailable)  # such as a full disk
        if not resume or local or (part.exists() and not part.stat().st_size):
            part.unlink(missing_ok=True)
        raise


def _transfer(url: str, part: Path, resume: bool, unknown_length: bool) -> bool:
    """Write what lies at a URL to `part`.

    Args:
        url: http, https or file.
        part: the file.
        resume: whether to ask for what is missing only, if the file is there.
        unknown_length: whether an answer will do whose end can't be told from a broken connection.

    Returns:
        Whether what was there before is part of it.

    Raises:
        _Unavailable: not all of it came.
    """
    if urlsplit(url).scheme == "file":
        try:
            shutil.copyfile(url2pathname(urlsplit(url).path), part)
        except FileNotFoundError as e:
            raise _Unavailable("no such file") from e
        return False

    import requests  # here, since what is in the cache needs none
    import urllib3

    offset = part.stat().st_size if resume and part.is_file() else 0
    # Not compressed: what is announced, counted and asked for by Range are the file's own bytes.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    total, came, answered = None, 0, False
    try:
        with (
            requests.Session() as session,
            session.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT, TIMEOUT)) as response,
        ):
            answered, status = True, response.status_code
            if offset and status == 206:
                usable = response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
            else:
                usable = status != 416
            if offset and not usable:  # it has no such range: from the start
                part.unlink()
                return _transfer(url, part, resume, unknown_length)
            if status not in (200, 206) or (status == 206 and not offset):
                raise _Unavailable(f"{status} {response.reason}".strip(), status in TEMPORARY)
            if status == 200:
                offset = 0
            length = None if "Content-Encoding" in response.headers else response.headers.get("Content-Length", "")
            if length and length.isdecimal():
                total = offset + int(length)
            elif not unknown_length and "Transfer-Encoding" not in response.headers:
                raise _Unavailable("the server does not say how long it is, and no hash is published")
            with part.open("ab" if offset else "wb") as file, _bar(url.rsplit("/", 1)[1], offset, total) as advance:
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)
                    came += len(chunk)
                    advance(len(chunk))
                file.flush()
                os.fsync(file.fileno())  # before it has its name
    except requests.RequestException as e:
        if isinstance(e, requests.ConnectTimeout):
            raise _Unavailable(f"no connection in {CONNECT_TIMEOUT:g} s") from e
        cause = _cause(e)
        if isinstance(e, requests.Timeout) or isinstance(cause, urllib3.exceptions.ReadTimeoutError):
            raise _Unavailable(f"the server sent nothing for {TIMEOUT:g} s", again=came > 0) from e
        if not answered:
            raise _Unavailable(_words(cause), again=isinstance(cause, ConnectionError)) from e
        raise _Unavailable(_broken(total), again=True) from e
    if total is not None and offset + came != total:  # urllib3 before 2 is content with less
        raise _Unavailable(_broken(total), again=True)
    return offset > 0


def _broken(total: int | None) -> str:
    """Say of a connection that it ended too early."""
    return f"the connection broke before {'the end' if total is None else f'all {total:,} bytes'} had come"


def _cause(error: BaseException) -> BaseException:
    """Find the innermost cause: requests wraps it several times over."""
    while inner := [e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, BaseException)]:
        error = inner[0]
    return error


def _words(error: BaseException) -> str:
    """Say an error of requests in a few words, without the objects it names first."""
    text = " ".join(str(error).split())
    return text.split("): ", 1)[-1] or type(error).__name__


def _waiting(name: str) -> None:
    """Say on a terminal why nothing moves."""
    if sys.stderr.isatty():
        print(f"fzoo: waiting for another process: it downloads {name}", file=sys.stderr)


@contextlib.contextmanager
def _bar(name: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal; gives what to call with each number of bytes."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda step: progress.advance(task, step)
