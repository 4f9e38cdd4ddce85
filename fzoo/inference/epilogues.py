"""What comes right behind a convolution of oneDNN, done by it: a bias, the sum of a block, an activation.

XLA would write the convolution's output, and read and write it again for these.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, PyTree

from fzoo.layers.computation import CALLS, Inner, inner_computation
from fzoo.ops import onednn

#: Of functions that JAX compiles once, so small ones are taken apart: activations, and a layer's own convolution.
COMPILED, SMALL = frozenset({"jit", "pjit"}), 8

#: Returns the value of what an equation takes.
Read = Callable[[Any], Any]

#: Computes an equation: (its number, itself, `Read`) to what it gives, by variable.
Compute = Callable[[int, JaxprEqn, Read], Iterable[tuple[Var, Any]]]


def with_epilogues(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Have the convolutions of oneDNN in a function of arrays do what comes right behind them.

    What something else reads as well, or the function returns, stays as it is.
    """

    @functools.wraps(function)
    def call(*arguments: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(arguments)

        def flat(*leaves: Array) -> PyTree:
            return function(*jax.tree.unflatten(structure, leaves))

        traced, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        apart = jax.make_jaxpr(functools.partial(interpret, traced.jaxpr, traced.consts, inline))(*leaves)
        compute = functools.partial(compute_chains, Chains(apart.jaxpr).found())
        outputs = interpret(apart.jaxpr, apart.consts, compute, *leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return call


def interpret(jaxpr: Jaxpr, constants: Sequence[Any], compute: Compute, *inputs: Any) -> list[Any]:
    """Compute a jaxpr, equation by equation."""
    values: dict[Var, Any] = {}

    def read(atom: Var | Literal) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    values.update(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    for number, equation in enumerate(jaxpr.eqns):
        values.update(compute(number, equation, read))
    return [read(atom) for atom in jaxpr.outvars]


def bind(equation: JaxprEqn, read: Read) -> Iterable[tuple[Var, Any]]:
    """Compute an equation as it stands."""
    outputs = equation.primitive.bind(*map(read, equation.invars), **equation.params)
    return zip(equation.outvars, outputs if equation.primitive.multiple_results else [outputs], strict=True)


def inline(number: int, equation: JaxprEqn, read: Read) -> Iterable[tuple[Var, Any]]:
    """Compute an equation; of a function, what that does."""
    inner = function_of(equation)
    if inner is None or (equation.primitive.name in COMPILED and size_of(inner.jaxpr) > SMALL):
        return bind(equation, read)
    taken = [read(atom) for atom in equation.invars]
    return zip(equation.outvars, interpret(inner.jaxpr, inner.constants, inline, *taken), strict=True)


def function_of(equation: JaxprEqn) -> Inner | None:
    """Return the function that an equation calls, where it does nothing else; what is computed again stays so."""
    return inner_computation(equation) if equation.primitive.name in CALLS - {"checkpoint"} else None


def size_of(jaxpr: Jaxpr) -> int:
    """Count the operations of a jaxpr and of the functions that it calls."""
    return sum(1 if one is None else size_of(one.jaxpr) for one in map(function_of, jaxpr.eqns))


@dataclasses.dataclass
class Chain:
    """A convolution with what comes behind it.

    Attributes:
        call: the convolution's equation.
        output: what comes out in the end.
        numbers: of the equations, in their order; at the last one, everything it takes is there.
        behind, operands: for `onednn.add_behind`.
    """

    call: JaxprEqn
    output: Var
    numbers: list[int]
    behind: list[str]
    operands: list[Var]


def compute_chains(chains: dict[int, Chain], number: int, equation: JaxprEqn, read: Read) -> Iterable[tuple[Var, Any]]:
    """Compute an equation, or at the last one of a chain, all of it.

    Args:
        chains: by the numbers of their equations.
        number, equation, read: as for any `Compute`.
    """
    chain = chains.get(number)
    if chain is None:
        return bind(equation, read)
    if number != chain.numbers[-1]:
        return ()
    added = [read(operand) for operand in chain.operands]
    if chain.behind[0] == onednn.BIAS:
        added[0] = added[0].reshape(-1)
    return [(chain.output, onednn.add_behind(chain.call.params, [*map(read, chain.call.invars)], added, chain.behind))]


class Chains:
    """The chains of a jaxpr whose functions were taken apart."""

    def __init__(self, jaxpr: Jaxpr):
        self._equations = jaxpr.eqns
        self._returned = {atom for atom in jaxpr.outvars if isinstance(atom, Var)}
        self._makers: dict[Var, JaxprEqn] = {}
        self._readers: dict[Var, list[int]] = {}
        for number, equation in enumerate(jaxpr.eqns):
            self._makers.update(dict.fromkeys(equation.outvars, equation))
            for atom in {atom for atom in equation.invars if isinstance(atom, Var)}:
                self._readers.setdefault(atom, []).append(number)

    def found(self) -> dict[int, Chain]:
        """Return the chain that each equation is in, by the equation's number."""
        chains: dict[int, Chain] = {}
        for number, equation in enumerate(self._equations):
            if not onednn.is_call(equation.primitive.name, equation.params):
                continue
            onednn.note_call()
            chain = Chain(equation, equation.outvars[0], [number], [], [])
            while self.grow(chain, chains):
                pass
            if chain.behind:
                chains.update(dict.fromkeys(chain.numbers, chain))
        return chains

    def grow(self, chain: Chain, others: dict[int, Chain]) -> bool:
        """Take what reads a chain's output into it, if that is all that does and oneDNN can do it."""
        readers = self._readers.get(chain.output, [])
        if chain.output in self._returned or any(number in others for number in readers):
            return False
        equations = [self._equations[number] for number in readers]
        names = [equation.primitive.name for equation in equations]
        if names == ["logistic", "mul"]:
            gate = equations[0].outvars[0]
            alone = self._readers[gate] == readers[1:] and gate not in self._returned
            word = onednn.SILU if alone and {*equations[1].invars} == {chain.output, gate} else None
        elif len(equations) == 1:
            word = self.word_for(chain, equations[0])
        else:
            return False
        if word is None:
            return False
        if word == onednn.RELU6:  # which is a ReLU so far
            chain.behind.pop()
        chain.behind.append(word)
        chain.numbers += readers
        chain.output = equations[-1].outvars[0]
        return True

    def word_for(self, chain: Chain, equation: JaxprEqn) -> str | None:
        """Return oneDNN's word for what an equation does to a chain's output, and note what it takes beside that."""
        name, others = equation.primitive.name, [atom for atom in equation.invars if atom is not chain.output]
        if len(equation.invars) != 2 or len(others) != 1:
            return None
        other, size, beside = others[0], shape_of(chain.output), shape_of(others[0])
        if name == "max" and self.is_number(other, 0):
            return onednn.RELU
        if name == "min" and chain.behind[-1:] == [onednn.RELU] and self.is_number(other, 6):
            return onednn.RELU6
        if name != "add" or isinstance(other, Literal) or beside.dtype != size.dtype:
            return None
        of_channels = beside.shape == (1, 1, 1, size.shape[-1])
        word = onednn.BIAS if of_channels and not chain.behind else onednn.SUM if beside.shape == size.shape else None
        if word is not None:
            chain.operands.append(other)
        return word

    def is_number(self, atom: Var | Literal, number: float) -> bool:
        """Tell whether this is a certain number."""
        maker = None if isinstance(atom, Literal) else self._makers.get(atom)
        if maker is not None and maker.primitive.name == "convert_element_type":
            (atom,) = maker.invars
        return isinstance(atom, Literal) and shape_of(atom).shape == () and float(atom.val) == number


def shape_of(atom: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and the dtype of a variable or a literal."""
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)
