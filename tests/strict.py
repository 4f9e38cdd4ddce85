"""The check of every annotated shape and type at each call, while tests run."""

import typing
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from flax.linen import linear

#: What Flax annotates with a protocol that can't be checked as it stands.
typing.runtime_checkable(linear.PromoteDtypeFn)

#: An int is a float, as for type checkers.
CONFIGURATION = BeartypeConf(is_pep484_tower=True)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and its result; the command line's are annotated for Typer, which checks them."""
    return function if function.__module__.startswith("fzoo.cli.") else beartype(conf=CONFIGURATION)(function)
