"""Which cases of a test are slow: all run before a change is taken, the quick ones whenever somebody asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any, marks: Iterable[Any] = (), **options: Any) -> Any:
    """A case of the slow tier; marks beyond that, and options of `pytest.param`."""
    return pytest.param(*values, marks=[pytest.mark.slow, *marks], **options)


def slow_but(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Values of one parameter, of which all but some are slow.

    Raises:
        ValueError: a quick one is none of them.
    """
    cases = list(cases)
    if missing := [case for case in quick if case not in cases]:
        raise ValueError(f"{missing} are no cases of {cases}")
    return [case if case in quick else slow(case) for case in cases]
