"""The application, how its commands fail, and what they print."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fzoo.files import on_one_line, write_rows

#: Exit code after Ctrl-C.
INTERRUPTED = 130


app = typer.Typer(
    help="A functional model zoo for JAX: the image classifiers of keras.applications as pure Flax modules.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def command(function: Callable) -> Callable:
    """Register a command whose bad input ends in one line and exit code 2.

    A parameter whose type is a dataclass stands for its fields: options that several commands share.
    """
    parameters, groups = expand_groups(function)

    @functools.wraps(function)
    def wrapped(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        try:
            function(**given)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of a pipe has left: say nothing
            silence()
            raise typer.Exit(141) from None
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, OSError, ImportError) as e:
            complain(f"error: {e}")
            silence()
            raise typer.Exit(2) from None

    # What typer reads in place of the function's own.
    wrapped.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return app.command(function.__name__.rstrip("_"), help=(function.__doc__ or "").split("\n\n")[0])(wrapped)


def expand_groups(function: Callable) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """Return a command's parameters with the fields of its groups in their places, and the groups by name."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    types = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        kind = types[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = kind
        for name, option in get_type_hints(kind, include_extras=True).items():
            default, keyword = kind.__dataclass_fields__[name].default, inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, keyword, default=default, annotation=option))
    return parameters, groups


def silence() -> None:
    """Keep the interpreter's last flush of standard output from failing again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(line: str) -> None:
    """Print one line on standard error, whatever breaks the text has; its spaces stay."""
    print(f"fzoo: {on_one_line(line)}", file=sys.stderr, flush=True)


def show(headers: Sequence[str], rows: Sequence[Sequence[object]], footer: str = "") -> None:
    """Print a table on a terminal; in a pipe a line for each row, its cells separated by tabs, without the headers.

    A cell that holds a tab, a quotation mark or the end of a line is quoted, as `csv.reader` with the dialect
    "excel-tab" reads it.
    """
    if not sys.stdout.isatty():
        write_rows(sys.stdout, rows, "\t")
        if footer:
            print(footer)
        return
    table = Table(box=None, pad_edge=False)
    numeric = [
        all(str(row[i]).replace(",", "").replace(".", "").replace("-", "0").isdigit() for row in rows)
        for i in range(len(headers))
    ]
    for header, right in zip(headers, numeric, strict=True):
        table.add_column(header, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # a path may look like markup
    Console().print(table)
    if footer:
        print(footer)


@app.callback(invoke_without_command=True)
def before(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    """Do what comes without a command: show the version, or the help."""
    if version:
        from fzoo._version import __version__

        print(f"fzoo {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def prepare_process(cache: bool) -> None:
    """Set up a process that is our own: memory is kept, and so are compiled programs unless `cache` is off."""
    from fzoo.inference.runtime import enable_compilation_cache, reuse_memory

    reuse_memory()
    if cache:
        try:
            enable_compilation_cache()
        except OSError as e:
            complain(f"no compilation cache: {e} (--no-cache does without)")
