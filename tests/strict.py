"""The check of every annotated shape and type at each call, while tests run."""

import functools
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from flax.linen import linear

#: What Flax annotates with a protocol that can't be checked as it stands.
typing.runtime_checkable(linear.PromoteDtypeFn)

#: An int is a float, as for type checkers.
CONFIGURATION = BeartypeConf(is_pep484_tower=True)

of_jaxtyping = jaxtyping.jaxtyped


def install() -> None:
    """Have fzoo's functions checked from their import on.

    By jaxtyping's import hook, but not by its decorator: that checks a call's arguments twice, and binds them to their
    names, which costs more than most functions do. Where a size is that of an argument ("{filters}"), it has to.
    """
    jaxtyping.jaxtyped = decorator  # the name by which the hook decorates
    jaxtyping.install_import_hook("fzoo", "strict.checked")


def decorator(*, typechecker: Callable[..., Any]) -> Callable[..., Any]:
    """Make what the hook puts around functions and classes."""
    return functools.partial(decorated, typechecker=typechecker)


def decorated(function: Any, typechecker: Callable[..., Any]) -> Any:
    """Put the checks of its annotations around a function; around what makes it, for a dataclass."""
    if not inspect.isfunction(function) or any("{" in str(text) for text in function.__annotations__.values()):
        return of_jaxtyping(function, typechecker=typechecker)
    checking, shapes = typechecker(function), has_shapes(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if not shapes:
            return checking(*args, **kwargs)
        with of_jaxtyping("context"):  # sizes of one name are equal in it
            return checking(*args, **kwargs)

    return call


def has_shapes(function: Callable[..., Any]) -> bool:
    """Tell whether an annotation names a type of jaxtyping, or what is made of one."""
    names = {name for text in function.__annotations__.values() for name in re.findall(r"\w+", str(text))}
    return any("jaxtyping" in repr(function.__globals__.get(name)) for name in names)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and its result; the command line's are annotated for Typer, which checks them."""
    return function if function.__module__.startswith("fzoo.cli.") else beartype(conf=CONFIGURATION)(function)
