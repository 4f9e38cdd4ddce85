"""What a network's options may be: declared beside each option, checked when a module is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Check:
    """What an option has to be.

    Attributes:
        expected: in words, for the error.
        fits: whether a value is that.
    """

    expected: str
    fits: Callable[[Any], bool]

    def __call__(self, name: str, value: object) -> None:
        """Raise ValueError unless the value of the option `name` fits."""
        if not self.fits(value):
            raise ValueError(f"{name}={value!r} given, {self.expected} expected")


def option(default: Any, check: Check) -> Any:
    """Declare an option of a module: a dataclass field with its default, which `check_declared` checks."""
    return dataclasses.field(default=default, metadata={"check": check})


def check_declared(module: Any) -> None:
    """Raise ValueError for the first option of a module, in the order of declaration, that is not what it has to be."""
    for field in dataclasses.fields(module):
        if "check" in field.metadata:
            field.metadata["check"](field.name, getattr(module, field.name))


def is_number(value: object) -> bool:
    """Tell whether this is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Tell whether this is a positive integer."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def is_floating(value: Any) -> bool:
    """Tell whether this is a floating dtype, or the name of one."""
    try:
        return bool(jnp.issubdtype(jnp.dtype(value), jnp.floating))
    except TypeError:
        return False


FLAG = Check("True or False", lambda value: isinstance(value, bool))
NAME = Check("a name", lambda value: isinstance(value, str) and bool(value))
FLOATING = Check("a floating dtype such as jnp.bfloat16", is_floating)
COUNT = Check("a positive integer", is_count)
POSITIVE = Check("a positive number", lambda value: is_number(value) and 0 < float(value) < float("inf"))
RATE = Check("a rate from 0 to less than 1", lambda value: is_number(value) and 0 <= float(value) < 1)


def counts(length: int) -> Check:
    """Make the check of a tuple of so many positive integers."""
    return Check(
        f"{length} positive integers",
        lambda value: isinstance(value, tuple) and len(value) == length and all(map(is_count, value)),
    )


def rows(kind: type) -> Check:
    """Make the check of a table: a tuple of one or more of these records."""
    return Check(
        f"a tuple of {kind.__name__}",
        lambda value: isinstance(value, tuple) and len(value) > 0 and all(isinstance(row, kind) for row in value),
    )


def one_of(*values: object) -> Check:
    """Make the check of one of these values."""
    *others, last = map(repr, values)
    return Check(f"{', '.join(others)} or {last}", lambda value: any(value is v or value == v for v in values))


def or_none(check: Check) -> Check:
    """Make the check of an option that may be None, too."""
    return Check(f"{check.expected} or None", lambda value: value is None or check.fits(value))
