"""Published files, in the cache that Keras shares."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pooch
import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn


def cache_dir() -> Path:
    """Where Keras keeps its files: `$KERAS_HOME/models`, or `~/.keras/models`."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models"


def file_hash(path: str | os.PathLike, algorithm: str) -> str:
    """The hash of a file as the registry writes it: "md5:..."."""
    return f"{algorithm}:{pooch.file_hash(str(path), alg=algorithm)}"


def fetch(url: str, name: str, known_hash: str | None, otherwise: str = "") -> Path:
    """The path of a published file, downloaded unless the cache has it.

    A file gets its name when it is whole and its hash is right.

    Args:
        url: where it lies.
        name: in the cache.
        known_hash: "md5:..." or "sha256:...", or None where none is published.
        otherwise: what else would do without a network, for the error.

    Raises:
        OSError: it can't be downloaded; the message says what to do without a network.
    """
    path = cache_dir() / name
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, a file expected: remove it")
    pooch.get_logger().setLevel(logging.WARNING)
    downloader: Any = _downloader
    try:
        return Path(
            pooch.retrieve(
                url,
                known_hash=known_hash,
                fname=name,
                path=path.parent,
                downloader=downloader,
            )
        )
    except (requests.RequestException, OSError, ValueError) as e:
        reason = "its hash is not the published one" if isinstance(e, ValueError) else _reason(e)
        if path.exists():
            raise OSError(
                f"{path} is not the published file (its hash differs), nor is {url} to be had ({reason})"
            ) from e
        raise OSError(f"could not download {url} ({reason}): put the file at {path}{otherwise}") from e


def _reason(error: BaseException) -> str:
    """The innermost cause, in a few words: requests wraps it several times over."""
    while inner := [e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, BaseException)]:
        error = inner[0]
    text = " ".join(str(error).split())
    return text.split("): ", 1)[-1] or type(error).__name__


def _downloader(url: str, output_file: Any, pooch_instance: Any) -> None:
    """pooch's HTTP download with a time-out, and with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        pooch.HTTPDownloader(timeout=30)(url, output_file, pooch_instance)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar: Any = _Bar(progress, url.rsplit("/", 1)[1])
        pooch.HTTPDownloader(timeout=30, progressbar=bar)(url, output_file, pooch_instance)


class _Bar:
    """What pooch asks of a progress bar, on rich's."""

    def __init__(self, progress: Progress, name: str):
        self._progress, self._task = progress, progress.add_task(name, total=None)

    @property
    def total(self) -> float | None:
        return self._progress.tasks[0].total

    @total.setter
    def total(self, size: float) -> None:
        self._progress.update(self._task, total=size)

    def update(self, step: int) -> None:
        self._progress.advance(self._task, step)

    def reset(self) -> None:
        self._progress.reset(self._task, total=self.total)

    def close(self) -> None:
        self._progress.refresh()
