"""Training on top of a pretrained network."""

from __future__ import annotations

import fnmatch
from numbers import Integral
from typing import Any

import jax
import numpy as np

from fzoo.layers import Classifier, layer_names, unknown
from fzoo.registry import create, list_models, spec
from fzoo.weights.mapping import slots


def trainable_mask(
    variables: Any,
    *,
    from_layer: str | int | None = None,
    pattern: str | None = None,
    module: Classifier | None = None,
) -> Any:
    """Which variables to train, as a tree of bool for `optax.masked` or `optax.multi_transform`.

    Batch statistics are never trained. For what is frozen, keep BN from moving, too: call the network with
    `train=False`.

    Args:
        variables: of one network: {"params": ..., "batch_stats": ...}, or its "params" alone.
        from_layer: train this layer and all after it in Keras's order: a name, those of layers without weights too
            ("mixed8"), or Keras's index (249).
        pattern: train the layers whose name matches, with `fnmatch`'s wildcards ("conv5_*"). With `from_layer`, those
            that meet both. With neither, every parameter is trained.
        module: the network. Without it, `from_layer` needs the variables of a model as the registry has it, whose
            order of layers then is known.

    Returns:
        A tree like `variables`, True where a parameter is to be trained.

    Raises:
        ValueError: an unknown layer, a pattern that matches none, or variables of an unknown network.
    """
    params = variables.get("params", variables)
    chosen = set(params)
    if module is not None and set(slots(module)) != chosen:
        raise ValueError(f"these are not the variables of this {type(module).__name__}: their layers differ")
    if from_layer is not None:
        chosen &= _from(from_layer, module or _recognise(params))
    if pattern is not None:
        matching = set(fnmatch.filter(params, pattern))
        if not matching:
            raise ValueError(unknown("layer pattern", pattern, params))
        chosen &= matching
    mask = {layer: jax.tree.map(lambda _, on=layer in chosen: on, arrays) for layer, arrays in params.items()}
    if "params" not in variables:
        return mask
    return {name: mask if name == "params" else jax.tree.map(lambda _: False, tree) for name, tree in variables.items()}


def _from(layer: str | int, module: Classifier) -> set[str]:
    """The names of the layers from one on."""
    names = layer_names(module)
    if isinstance(layer, Integral) and not isinstance(layer, bool):
        index = int(layer)
        if not 0 <= index < len(names):
            raise ValueError(f"from_layer={layer} given, 0 to {len(names) - 1} expected")
        return set(names[index:])
    if layer not in names:
        raise ValueError(unknown("layer", layer, names))
    return set(names[names.index(layer) :])


def _recognise(params: Any) -> Classifier:
    """The model of the registry with these layers; which is told by their names, not by their shapes."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    likely = [name for name in list_models() if 0 <= spec(name).depth - len(params) <= 3]  # a top has up to 3
    for name in sorted(likely, key=lambda n: abs(spec(n).parameters - size)):
        for include_top in (True, False):
            module = create(name, include_top=include_top)
            if set(slots(module)) == set(params):
                return module
    raise ValueError("from_layer given, but these variables are of no model of fzoo.list_models(): pass module=, too")
