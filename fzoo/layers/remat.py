"""A forward pass that is computed again in the backward pass, part by part, so that little of it has to be kept."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
from flax.core import Scope, lift
from flax.linen.transforms import lift_direct_transform
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import PyTree

from fzoo.layers.record import Node, narrow_nodes

#: How many bounds of a part's size are tried.
TRIED = 24

#: How the outputs that are kept are marked in a program.
MARK = "fzoo:"


def mark(name: str, y: jax.Array) -> jax.Array:
    """Mark the output of a layer as one that is kept."""
    return checkpoint_name(y, MARK + name)


def kept_nodes(nodes: Sequence[Node]) -> frozenset[str]:
    """Choose the layers whose outputs are kept for the backward pass, so that its peak of memory is the least.

    Kept are some of the layers through which everything passes. The peak is taken for all that is kept and the largest
    part between two of them, which is computed again as a whole.

    Args:
        nodes: of one call, in an order of execution.
    """
    size = {node.name: _size(node) for node in nodes}
    narrow = {node.name for node in narrow_nodes(nodes)}
    places = [i for i, node in enumerate(nodes) if node.name in narrow]
    total = [0, *itertools.accumulate(size[node.name] for node in nodes)]
    best: tuple[float, tuple[str, ...]] = (total[-1], ())
    for step in range(1, TRIED + 1):
        bound = total[-1] * 0.7**step
        least: dict[int, tuple[float, tuple[int, ...]]] = {-1: (0, ())}  # by the last that is kept: what all take
        for place in places:
            before = [choice for last, choice in least.items() if total[place] - total[last + 1] <= bound]
            if before:
                taken, kept = min(before)
                least[place] = taken + size[nodes[place].name], (*kept, place)
        ends = [choice for last, choice in least.items() if total[-1] - total[last + 1] <= bound]
        if ends:
            taken, kept = min(ends)
            best = min(best, (taken + bound, tuple(nodes[place].name for place in kept)))
    return frozenset(best[1])


def _size(node: Node) -> int:
    return int(functools.reduce(lambda a, b: a * b, node.shape, 1))


def remat(function: Callable[..., PyTree], module: nn.Module, *arguments: PyTree) -> PyTree:
    """Call `function(module, *arguments)`, to be computed again part by part where a gradient of it is taken.

    The parts end with what `mark` marked.

    Args:
        function: of a bound module and of arrays, which returns arrays.
        module: the module.
        *arguments: trees of arrays.
    """
    return lift_direct_transform(_lifted, (function,), module, *arguments, multi_scope=False)


def _lifted(function: Callable[..., PyTree], scope: Scope, *arguments: PyTree) -> PyTree:
    """Call a function of a scope of Flax's and of arrays as `in_parts` does one of arrays alone."""

    def inner(
        scope_of: Callable[..., Scope],
        repack: Callable[[Scope], PyTree],
        variables: PyTree,
        rngs: PyTree,
        *arguments: PyTree,
    ) -> PyTree:
        def pure(variables: PyTree, rngs: PyTree, *arguments: PyTree) -> tuple[PyTree, PyTree]:
            scope = scope_of(variables, rngs)
            y = function(scope, *arguments)
            return y, repack(scope)

        return in_parts(pure, variables, rngs, *arguments)

    return lift.pack(inner, (True,), (True,), (True,), name="remat")(scope, *arguments)


def in_parts(function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Call a function of arrays, each part of its program behind a `jax.checkpoint` of its own, but for the last."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, jax.tree.leaves(arguments), strict=True))
    parts: list[list[JaxprEqn]] = [[]]
    for equation in jaxpr.eqns:
        parts[-1].append(equation)
        if equation.primitive.name == "name" and str(equation.params["name"]).startswith(MARK):
            parts.append([])
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    outputs: list[list[Var]] = []
    for part in reversed(parts):
        made = {variable for equation in part for variable in equation.outvars}
        outputs.append([variable for equation in part for variable in equation.outvars if variable in needed])
        needed |= {atom for equation in part for atom in equation.invars if not isinstance(atom, Literal)} - made
    for part, outs in zip(parts, reversed(outputs), strict=True):
        made = {variable for equation in part for variable in equation.outvars}
        atoms = (atom for equation in part for atom in equation.invars if not isinstance(atom, Literal))
        ins = [variable for variable in dict.fromkeys(atoms) if variable not in made]
        run = jaxpr_as_fun(
            ClosedJaxpr(Jaxpr([], ins, outs, part, debug_info=jaxpr.debug_info.with_unknown_names()), [])
        )
        run = run if part is parts[-1] else jax.checkpoint(run)
        values |= dict(zip(outs, run(*(values[variable] for variable in ins)), strict=True))
    leaves = [atom.val if isinstance(atom, Literal) else values[atom] for atom in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
