"""Names of the types that recur in the whole package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from jax.typing import DTypeLike

__all__ = ["DTypeLike", "Json", "Mask", "MutableVariables", "Options", "Params", "Variables", "Weights"]

#: A tree of one collection, by names of layers and of their arrays; its leaves are arrays or what stands in their
#: places: their shapes, a mask.
Params = Mapping[str, Any]

#: A network's variables: a tree for each collection, by the names that Flax gives them ("params", "batch_stats").
Variables = Mapping[str, Params]

#: Those that fzoo makes: plain dicts all the way down, which a caller may change.
MutableVariables = dict[str, Any]

#: A tree of bool for the arrays of a tree of `Params`, or of `Variables`: which of them are meant.
Mask = Mapping[str, Any]

#: Options by their names, each of a type of its own.
Options = Mapping[str, Any]

#: What JSON can say: null, a boolean, a number, a text, a list, a dict. Who reads it checks what it is.
Json = Any

#: Which weights a network gets: "imagenet" for what was published, a file or the folder of a fine-tuning, a state dict
#: by PyTorch's names, or None for new ones.
Weights = str | os.PathLike | Mapping[str, Any] | None
