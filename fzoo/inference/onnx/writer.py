"""From JAX's primitives to ONNX's operators.

What is written is what JAX would compute on an accelerator: of what is lowered differently for each platform, the plain
form. Constants are computed on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.typing import ArrayLike

from fzoo.inference.onnx.graph import OnnxGraph, Tensor, constant, is_number
from fzoo.layers.computation import inner_computation

#: Parameters of a primitive, by JAX's names.
Parameters = Mapping[str, Any]

#: Shapes and types of what a primitive gives.
Avals = Sequence[ShapedArray]

#: Primitives of one value each that are an operator of ONNX.
ELEMENTWISE = {
    "abs": "Abs",
    "add": "Add",
    "add_any": "Add",
    "and": "And",
    "ceil": "Ceil",
    "cos": "Cos",
    "cosh": "Cosh",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sinh": "Sinh",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tan": "Tan",
    "tanh": "Tanh",
    "xor": "Xor",
}

#: Those that are the values themselves.
IDENTITIES = frozenset({"copy", "copy_p", "stop_gradient", "optimization_barrier", "sharding_constraint", "reshard"})

#: What ONNX's floats may be here.
FLOAT = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a tensor comes from: a primitive, what it took, and its parameters."""

    primitive: str
    taken: tuple[Tensor, ...]
    params: Parameters


class OnnxWriter:
    """Writes what a jaxpr computes into a graph; a method for each primitive that is no operator by itself."""

    def __init__(self, graph: OnnxGraph, rules: Mapping[str, Callable[..., Tensor | list[Tensor]]], root: str = ""):
        self.graph, self._rules, self._root = graph, rules, root
        self._origins: dict[str, Origin] = {}  # by the names of tensors

    def jaxpr(
        self, jaxpr: Jaxpr, constants: Sequence[ArrayLike], inputs: Sequence[Tensor], scope: str = ""
    ) -> list[Tensor]:
        """Write a jaxpr; returns its outputs."""
        known: dict[Var, Tensor] = dict(zip(jaxpr.invars, inputs, strict=True))
        known.update(zip(jaxpr.constvars, map(constant, constants), strict=True))

        def read(atom: Var | Literal) -> Tensor:
            if not isinstance(atom, Literal):
                return known[atom]
            aval: Any = atom.aval
            return constant(np.asarray(atom.val, aval.dtype))

        for equation in jaxpr.eqns:
            inside = "/".join(part for part in (scope, str(equation.source_info.name_stack)) if part)
            outputs = self.equation(equation, [read(atom) for atom in equation.invars], inside)
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: JaxprEqn, taken: list[Tensor], scope: str) -> list[Tensor]:
        """Write an equation; returns its outputs."""
        name, params = equation.primitive.name, equation.params
        if (inner := inner_computation(equation)) is not None:
            return self.jaxpr(inner.jaxpr, inner.constants, taken[inner.skipped :], scope)
        if name == "platform_index":
            return [constant(np.int32(0))]  # nothing asks: `inner_computation` knows the plain form
        if name == "dim_as_value":
            raise ValueError("a network that computes with the number of its images given: batch_size=N fixes it")
        if name in IDENTITIES:
            return taken
        avals: list[Any] = [variable.aval for variable in equation.outvars]
        for aval in avals:
            if jnp.issubdtype(aval.dtype, jnp.floating) and aval.dtype != FLOAT:
                raise ValueError(f"a network that computes in {aval.dtype} given, float32 expected for ONNX")
        layer = layer_of(scope)
        self.graph.scope = "" if layer == self._root else layer
        if all(t.value is not None for t in taken) and (folded := fold(equation, taken, avals)) is not None:
            return folded
        if name in self._rules:
            outputs = self._rules[name](self, params, avals, *taken)
        elif name in ELEMENTWISE:
            outputs = self.elementwise(ELEMENTWISE[name], avals[0], taken)
        else:
            where = f"layer {self.graph.scope}" if self.graph.scope else "the network"
            raise ValueError(f"{where} needs JAX's {name}, which can't be written as ONNX: .stablehlo holds everything")
        outputs = outputs if isinstance(outputs, list) else [outputs]
        for tensor in outputs:
            if tensor.value is None and tensor not in taken:
                self._origins.setdefault(tensor.name, Origin(name, tuple(taken), params))
        return outputs

    def origin(self, tensor: Tensor, *primitives: str) -> Origin | None:
        """Tell where a tensor comes from, if from one of these primitives."""
        origin = None if tensor.value is not None else self._origins.get(tensor.name)
        return origin if origin is not None and origin.primitive in primitives else None

    def sum_of(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]] | None:
        """Tell what a tensor is the sum of, and over which axes, which may be kept."""
        shape = tensor.shape
        while (origin := self.origin(tensor, "broadcast_in_dim", "reshape")) is not None:
            sides, (tensor, *_) = tensor.sides, origin.taken
            if (summed := self.origin(tensor, "reduce_sum")) is not None:
                axes = summed.params["axes"]
                kept = len(sides) == len(summed.taken[0].shape) and all(sides[axis] == 1 for axis in axes)
                return (summed.taken[0], axes) if kept else None
        summed = self.origin(tensor, "reduce_sum")
        return (summed.taken[0], summed.params["axes"]) if summed is not None and tensor.shape == shape else None

    def elementwise(self, operator: str, aval: ShapedArray, taken: Sequence[Tensor], **attributes: Any) -> Tensor:
        """Apply an operator to each value; all operands are stored in the order of the largest."""
        natural = tuple(range(len(aval.shape)))
        moving = [t for t in taken if t.value is None and t.shape]
        order = next((t.order for t in [t for t in moving if t.is_whole] or moving if t.order != natural), natural)
        names = [self.graph.stored(t, order if t.shape else ()) for t in taken]
        sides = tuple(next((t.sides[i] for t in taken if t.shape and t.sides[i] != 1), 1) for i in natural)
        like = Tensor(tuple(aval.shape), np.dtype(aval.dtype), sides, order)
        return self.graph.tensor(operator, names, like, **attributes)


def layer_of(scope: str) -> str:
    """Name the Flax module in which an equation stands: the last that is no method's, as "Class.method" is."""
    parts = [part for part in scope.split("/") if part and "." not in part and "(" not in part]
    return parts[-1] if parts else ""


def fold(equation: JaxprEqn, taken: Sequence[Tensor], avals: Avals) -> list[Tensor] | None:
    """Compute an equation of constants; None where that is left to the graph: for sides that are open."""
    name = equation.primitive.name
    if name in ("broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims"):
        return None  # their rules copy nothing
    if not all(is_number(side) for t in (*taken, *avals) for side in t.shape):
        return None
    values = [np.broadcast_to(t.value, t.shape) for t in taken if t.value is not None]
    results = equation.primitive.bind(*map(jnp.asarray, values), **equation.params)
    return [constant(result) for result in (results if equation.primitive.multiple_results else [results])]
