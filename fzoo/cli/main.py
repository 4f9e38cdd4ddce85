"""The command line: what the Python functions do, as commands; `fzoo --help` lists them.

Results go to standard output: tables on a terminal, plain lines in a pipe.
Errors are one line on standard error, with exit code 2; 1 means that some of several images or files could not be had.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

from fzoo.cli import bench, demo, models, predict, train, weights  # each registers its commands
from fzoo.cli.console import INTERRUPTED, app, complain, silence

__all__ = ["bench", "demo", "main", "models", "predict", "train", "weights"]

#: The commands as `fzoo --help` lists them.
COMMANDS = (
    *("list", "info", "summary", "classify", "features", "explain", "finetune", "evaluate", "convert", "download"),
    *("export", "bench", "tune", "demo"),
)
app.registered_commands.sort(key=lambda command: COMMANDS.index(command.name or ""))


def main() -> None:
    """Run the command line; what is wrong with the arguments is one line, too."""
    try:
        with interruptible(), warnings_in_lines():
            code = app(standalone_mode=False)
    except Exception as e:
        if not hasattr(e, "format_message"):  # of the option parser's own errors
            raise
        complain(f"error: {e.format_message()} (--help shows the options)")  # pyright: ignore
        code = 2
    if code == INTERRUPTED:
        silence()
        os._exit(INTERRUPTED)  # XLA's threads still compute, and can crash while the interpreter is taken down
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Print each warning as a line of the command line's, without the place in the code that it comes from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise again a Ctrl-C that comes while Python runs one of JAX's callbacks, whose exceptions it ignores."""
    report = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
        else:
            report(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = report
