"""One line for a wrong name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(noun: str, given: object, known: Iterable[str], show: int = 3) -> str:
    """Say in one line that a name does not exist: what was given, and the nearest that do."""
    known = list(known)
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(given).lower(), lower, n=show, cutoff=0.5)
    hint = [lower[n] for n in near] or known[:show]
    more = ", ..." if len(hint) < len(known) and not near else ""
    return f"unknown {noun} {given!r}: did you mean {', '.join(hint)}{more}?"
