"""How a network computes what its layers give, told by digests: the same digest is the same computation."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.types import Variables

#: Where equations that only call another computation keep it.
INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint"})

#: What does not care for the order of what it takes.
COMMUTATIVE = frozenset({"add", "mul", "max", "min"})

#: Parameters of equations that no number depends on.
SILENT = frozenset({"name", "sharding"})

#: How the digest of a constant begins that is one number.
SCALAR = "constant ()"

#: Of a longer array, every bit counts; the numbers of a shorter one are a file's, as text.
SHORT = 64


@dataclasses.dataclass(frozen=True)
class Computation:
    """What a network computes, layer by layer.

    Attributes:
        jaxpr: from (variables, inputs) to the outputs of the layers.
        layers: their names, in Keras's order.
        variables: the path of each variable.
    """

    jaxpr: ClosedJaxpr
    layers: tuple[str, ...]
    variables: tuple[tuple[str, ...], ...]

    def digests(self, arrays: Mapping[tuple[str, ...], str], image: str | None = None) -> dict[str, str]:
        """Return a digest of the output of each layer.

        Args:
            arrays: what each variable is called, by its path, where it is not the path's own name: the same name in
                two networks means the same array.
            image: the layer whose output is taken for the image; the input by default.
        """
        jaxpr = self.jaxpr.jaxpr
        names = [f"array {arrays.get(path, '/'.join(path))}" for path in self.variables]
        names += [f"image {i}" for i in range(len(jaxpr.invars) - len(names))]
        known = {jaxpr.outvars[self.layers.index(image)]: "image 0"} if image is not None else {}
        digests = Digests(known).outputs(jaxpr, self.jaxpr.consts, names)
        return dict(zip(self.layers, digests, strict=True))


def computation_of(module: Classifier, inputs: PyTree = None) -> Computation:
    """Find out how a network computes its layers' outputs in inference, for one image.

    Args:
        module: the network.
        inputs: what it takes, as `jax.ShapeDtypeStruct`s; `example_inputs` by default.
    """
    traced = trace(module)
    layers = tuple(node.name for node in traced.layers)

    def outputs(variables: Variables, inputs: PyTree) -> list[Array]:
        tapped: Any = module.apply(variables, inputs, layers, method="endpoints")
        return [tapped[name] for name in layers]

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(traced.variables)]
    jaxpr = jax.make_jaxpr(outputs)(traced.variables, module.example_inputs if inputs is None else inputs)
    return Computation(jaxpr, layers, tuple(tuple(str(getattr(step, "key", step)) for step in path) for path in paths))


class Digests:
    """Digests of what a jaxpr computes.

    Args:
        known: digests of variables of the jaxpr that count whatever computes them.
    """

    def __init__(self, known: Mapping[Var, str]):
        self._known = known
        self._padded: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {}  # by digest: of what, by how much

    def outputs(self, jaxpr: Jaxpr, constants: Sequence[ArrayLike], inputs: Sequence[str]) -> list[str]:
        """Return a digest of each output, from those of the inputs."""
        digests: dict[Var, str] = {}

        def read(atom: Var | Literal) -> str:
            return digest_constant(atom.val) if isinstance(atom, Literal) else digests[atom]

        digests.update(zip(jaxpr.constvars, map(digest_constant, constants), strict=True))
        digests.update(zip(jaxpr.invars, inputs, strict=True))
        for equation in jaxpr.eqns:
            of_outputs = self.of_equation(equation, [read(atom) for atom in equation.invars])
            for variable, digest in zip(equation.outvars, of_outputs, strict=True):
                digests[variable] = self._known.get(variable, digest)
        return [read(atom) for atom in jaxpr.outvars]

    def of_equation(self, equation: Any, taken: list[str]) -> list[str]:
        """Return the digests of what an equation gives, from those of what it takes."""
        name, params = equation.primitive.name, dict(equation.params)
        if (inner := inner_computation(equation)) is not None:
            return self.outputs(inner.jaxpr, inner.constants, taken[inner.skipped :])
        if name == "convert_element_type" and taken[0].startswith(SCALAR):
            return taken
        if name == "conv_general_dilated":
            _, _, *sides = params["dimension_numbers"].rhs_spec
            sizes = (equation.invars[1].aval.shape[side] for side in sides)
            dilation = zip(params["rhs_dilation"], sizes, strict=True)  # of one pixel it is nothing
            params["rhs_dilation"] = tuple(int(by) if size > 1 else 1 for by, size in dilation)
            if taken[0] in self._padded:
                taken, params = self.with_padding(taken, params)
        if name in COMMUTATIVE:
            taken = sorted(taken)
        asked = [f"{key}={value}" for key, value in sorted(params.items()) if key not in SILENT]
        shapes = [str(variable.aval) for variable in equation.outvars]
        digest = digest_text("\n".join([name, *asked, *taken, *shapes]))
        if name == "pad" and taken[1] == f"{SCALAR} 0" and not any(inside for *_, inside in params["padding_config"]):
            self._padded[f"{digest} 0"] = taken[0], tuple((int(a), int(b)) for a, b, _ in params["padding_config"])
        return [f"{digest} {i}" for i in range(len(shapes))]

    def with_padding(self, taken: list[str], params: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Let a convolution of what was padded by zeros pad itself, as Keras's "same" does."""
        source, pads = self._padded[taken[0]]
        batch, features, *sides = params["dimension_numbers"].lhs_spec
        if any(pads[batch]) or any(pads[features]) or any(n != 1 for n in params["lhs_dilation"]):
            return taken, params
        own = zip(params["padding"], (pads[side] for side in sides), strict=True)
        padding = tuple((int(a) + c, int(b) + d) for (a, b), (c, d) in own)
        return [source, *taken[1:]], params | {"padding": padding}


class Inner(NamedTuple):
    """A computation that an equation only calls: with what it takes, but for the first few."""

    jaxpr: Jaxpr
    constants: Sequence[ArrayLike]
    skipped: int


def inner_computation(equation: JaxprEqn) -> Inner | None:
    """Return what an equation calls, where it does nothing else; of forms for each platform, not a CPU's own."""
    name, params, skipped = equation.primitive.name, equation.params, 0
    inner = next((params[key] for key in INNER if key in params), None) if name in CALLS else None
    if name == "cond" and None in (platforms := params.get("branches_platforms") or ()):
        inner, skipped = params["branches"][platforms.index(None)], 1
    if inner is None:
        return None
    return Inner(inner.jaxpr, inner.consts, skipped) if isinstance(inner, ClosedJaxpr) else Inner(inner, (), skipped)


def digest_text(text: str) -> str:
    """Return a digest of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest_constant(value: ArrayLike) -> str:
    """Return what stands for a constant: its numbers as a file would have them, or a digest of its bits."""
    array = np.asarray(value)
    if array.size > SHORT or array.dtype.kind not in "fiu":
        return f"{array.dtype}{array.shape} {digest_text(array.tobytes().hex())}"
    return f"constant {array.shape} {' '.join(rounded(array))}"


def rounded(array: np.ndarray) -> Iterator[str]:
    """Yield numbers as texts, of as many digits as a float32 is sure of: 0.001 of a file is that of a program."""
    for number in array.ravel().tolist():
        yield f"{number:.6g}"
