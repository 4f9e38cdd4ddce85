"""A network as a module of Flax NNX, and back: Linen's module inside, its variables as NNX keeps them."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import unfreeze
from jax.tree_util import KeyPath
from jaxtyping import Array, Float, PyTree

from fzoo.errors import unknown
from fzoo.layers.classifier import Classifier, Inputs
from fzoo.layers.graph import trace
from fzoo.layers.keras import Training
from fzoo.layers.record import Node
from fzoo.types import Mask, MutableVariables, Params, Variables
from fzoo.weights.mapping import check_shapes

#: What an array of each of Linen's collections is in NNX.
COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}

#: What NNX's `train()` and `eval()` set, in every module that has it.
MODES = ("deterministic", "use_running_average")


class NNXClassifier(nnx.Module):
    """A network as a module of Flax NNX, from `to_nnx`.

    Its state has the tree of Linen's variables: `model.params["conv1_conv"]["kernel"]` is an `nnx.Param`, and
    `nnx.update(model, variables)` takes Linen's. It begins in inference; `train()` and `eval()`, its own or those of
    the module that it is part of, switch it.

    Attributes:
        module: of Linen; what is computed.
        params: {layer: {array: nnx.Param}}, by Keras's names of layers.
        batch_stats: {layer: {array: nnx.BatchStat}}, which move when the network is called in training.
        training: what behaves as in training once `train()` was called: True for all, or the names of layers, which is
            what Keras's `trainable` does to a BatchNormalization.
        deterministic: False has the layers drop that do; `train()` and `eval()` set it.
        use_running_average: False has BNs normalise by the batch; `train()` and `eval()` set it.
        rngs: an `nnx.RngStream` for what drops in training, or None.
    """

    module: Classifier
    params: Params
    batch_stats: Params
    training: Training
    deterministic: bool
    use_running_average: bool
    rngs: nnx.RngStream | None

    def __init__(self, module: Classifier, variables: Variables, rngs: Any = None, training: Training = True):
        self.module = module  # first: what the others may be depends on it
        for collection in COLLECTIONS:
            setattr(self, collection, variables.get(collection, {}))
        self.training = training
        self.deterministic = self.use_running_average = True
        self.rngs = rngs

    def __setattr__(self, name: str, value: Any) -> None:
        """Set one of its attributes; arrays become variables of NNX.

        Raises:
            AttributeError: it has no such attribute, so that nothing would come of it.
            ValueError: it can't have this value.
        """
        if name in COLLECTIONS:
            value = nnx.data(as_variables(COLLECTIONS[name], value))
        elif name == "rngs":
            value = nnx.data(dropout_stream(value))
        elif name == "training":
            value = check_training(self.module, value)
        elif name == "module":
            if not isinstance(value, Classifier):
                raise ValueError(f"a module from fzoo.create expected, {type(value).__name__} given")
            value = value.clone(parent=None, name=None)  # a bound module can't be hashed
        elif name in MODES:
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} given, True or False expected")
        elif not name.startswith("_"):  # underscores are NNX's own
            state = ", ".join(repr(collection) for collection in COLLECTIONS)
            raise AttributeError(
                f"{name!r} given, which this {type(self.module).__name__} has no use for: its state is {{{state}}}, as "
                "Linen's variables are; another layer goes beside it, into a module of your own"
            )
        super().__setattr__(name, value)

    def __call__(self, x: Inputs) -> PyTree:
        """Compute class probabilities (N, classes), or features, as the module of Linen does.

        Args:
            x: preprocessed images (N, H, W, C); a tuple or a mapping of arrays where the network has several inputs.

        Raises:
            ValueError: the images, the state or the mode can't be honoured.
        """
        return self._apply(x)

    def endpoints(self, x: Inputs, layers: Sequence[str]) -> dict[str, Float[Array, "n ..."]]:
        """Compute the outputs of Keras layers by name.

        Args:
            x: as for a call.
            layers: their names.

        Raises:
            ValueError: the network has no layer of that name, or as for a call.
        """
        return self._apply(x, tuple(layers), method="endpoints")

    def set_view(self, deterministic: bool | None = None, use_running_average: bool | None = None) -> None:
        """Set the mode of a view, for `nnx.view`.

        Args:
            deterministic: if False, the layers drop that do.
            use_running_average: if False, BNs normalise by the batch.
        """
        for name, value in zip(MODES, (deterministic, use_running_average), strict=True):
            if value is not None:
                setattr(self, name, value)

    def _apply(self, x: Inputs, *arguments: Any, method: str | None = None) -> PyTree:
        """Call the module of Linen, and keep what that changes."""
        module, variables = from_nnx(self)
        train = self._train()
        trained = [node for node in trace(module).nodes if train is True or (train and node.variables in train)]
        moving = {node.variables for node in trained if normalises(node)}
        dropping = [node.name for node in trained if drops(node)]
        rngs = {}
        if dropping and not module.prepared:
            if self.rngs is None:
                raise ValueError(f"{dropping[0]} drops in training, for which to_nnx(..., rngs=nnx.Rngs(0)) is wanted")
            rngs = {"dropout": self.rngs()}
        options: dict[str, Any] = {"mutable": ["batch_stats"]} if moving else {}
        result = module.apply(variables, x, *arguments, train=train, rngs=rngs, method=method, **options)
        if not moving:
            return result
        y, changed = result
        for layer in moving & self.batch_stats.keys():
            own, new = self.batch_stats[layer], changed["batch_stats"][layer]
            jax.tree.map(lambda variable, value: variable.set_value(value), own, new, is_leaf=is_variable)
        return y

    def _train(self) -> Training:
        """Say what behaves as in training, as Linen's `train`."""
        if self.deterministic and self.use_running_average:
            return False
        if not self.deterministic and not self.use_running_average:
            return self.training
        nodes = trace(self.module).nodes
        layers = frozenset(node.variables for node in nodes if normalises(node) == self.deterministic)
        return layers.intersection(self.training) if isinstance(self.training, frozenset) else self.training and layers


def to_nnx(
    module: Classifier, variables: Variables, *, rngs: nnx.Rngs | nnx.RngStream | None = None, training: Training = True
) -> NNXClassifier:
    """Make a module of Flax NNX of a network and its variables; nothing is initialised or compiled.

    `model(x)` and `model.endpoints(x, layers)` compute what `module.apply` does. The model begins in inference;
    `model.train()` and `model.eval()` switch BNs and dropout. Its state has the tree of Linen's variables:
    `model.params["conv1_conv"]["kernel"]` is an `nnx.Param`, `model.batch_stats["conv1_bn"]["mean"]` an
    `nnx.BatchStat`.

    Args:
        module: from `fzoo.load`, `fzoo.create`, `fzoo.load_model` or `fzoo.optimize_for_inference`.
        variables: its variables, or a tree of `jax.ShapeDtypeStruct` like them, for an abstract model.
        rngs: random numbers for what drops in training, whose stream "dropout" (or else "default") is forked. Networks
            that drop nothing need none.
        training: what behaves as in training once `model.train()` was called: True for all, or a frozenset of names of
            layers, which `fzoo.training_layers` gives for a mask.

    Returns:
        An `nnx.Module`, which `nnx.split`, `nnx.jit`, `nnx.Optimizer`, ... take, also as a part of another.

    Raises:
        ValueError: this is no network of fzoo's, the variables are not its own (`WeightsMismatch`), or `training` names
            a layer that it has not.
    """
    check_shapes(module, variables)
    return NNXClassifier(module, variables, rngs, training)


def from_nnx(model: NNXClassifier) -> tuple[Classifier, MutableVariables]:
    """Return the network and the variables of a module that `to_nnx` made, as they are now.

    These are what `fzoo.predict`, `fzoo.save_keras_weights`, `fzoo.save_variables`, ... take.

    Args:
        model: from `to_nnx`; of a module that has one in it, that attribute (`model.backbone`).

    Returns:
        (module, variables), as `fzoo.load` gives them.

    Raises:
        ValueError: `to_nnx` did not make it, or its state is not the network's any more (`WeightsMismatch`).
    """
    if not isinstance(model, NNXClassifier):
        raise ValueError(f"a model from fzoo.to_nnx expected, {type(model).__name__} given{inside(model)}")
    trees = {collection: getattr(model, collection) for collection in COLLECTIONS}
    trees = {collection: tree for collection, tree in trees.items() if tree or collection == "params"}
    values = jax.tree.map(lambda leaf: leaf.get_value() if is_variable(leaf) else leaf, trees, is_leaf=is_variable)
    check_shapes(model.module, values)
    return model.module, jax.tree_util.tree_map_with_path(read_variable, trees, is_leaf=is_variable)


@dataclasses.dataclass(frozen=True)
class TrainableFilter:
    """A filter of NNX for the parameters that a mask marks.

    Attributes:
        paths: theirs, within a network.
    """

    paths: frozenset[tuple[str, ...]]

    def __call__(self, path: Sequence[Hashable], value: object) -> bool:
        """Tell whether a variable is one of these, whichever module the network is part of."""
        return any(tuple(path[start:]) in self.paths for start in range(len(path)))


def trainable_filter(mask: Mask) -> TrainableFilter:
    """Make of a mask over a network's parameters a filter of NNX, for `nnx.Optimizer(model, tx, wrt=...)`.

    It fits `nnx.DiffState` and `nnx.state`, too, and a module that has the network in it: with a new head,
    `nnx.Any(fzoo.trainable_filter(mask), nnx.PathContains("head"))`.

    Args:
        mask: a tree of bool, from `fzoo.trainable_mask`: of the variables, or of "params" alone.

    Returns:
        A callable of (path, variable).

    Raises:
        ValueError: this is no mask, or it marks nothing.
    """
    if not isinstance(mask, Mapping):
        raise ValueError(f"{type(mask).__name__} given, a mask expected, as fzoo.trainable_mask gives it")
    leaves, _ = jax.tree_util.tree_flatten_with_path(unfreeze(mask.get("params", mask)))
    for _, leaf in leaves:
        if not isinstance(leaf, (bool, np.bool_)):
            raise ValueError(f"a tree with {type(leaf).__name__} given, one of bool expected: fzoo.trainable_mask's")
    paths = frozenset(("params", *(key.key for key in path)) for path, on in leaves if on)
    if not paths:
        raise ValueError("a mask that marks nothing given: nothing would train")
    return TrainableFilter(paths)


def normalises(node: Node) -> bool:
    """Tell whether a layer has statistics that move in training."""
    return any(part.kind == "BatchNormalization" for part in (node, *node.parts))


def drops(node: Node) -> bool:
    """Tell whether a layer needs random numbers in training."""
    return any(part.config.get("rate") for part in (node, *node.parts))


def is_variable(value: object) -> bool:
    """Tell whether this is a variable of NNX."""
    return isinstance(value, nnx.Variable)


def as_variables(kind: type[nnx.Variable], tree: PyTree) -> PyTree:
    """Make the arrays of a tree variables of NNX; those that are stay."""

    def convert(leaf: Any) -> nnx.Variable:
        if is_variable(leaf):
            return leaf
        return kind(leaf if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else jnp.array(leaf))

    return jax.tree.map(convert, unfreeze(tree), is_leaf=is_variable)


def read_variable(path: KeyPath, leaf: Any) -> Any:
    """Read a variable of NNX; no gradient and no optimizer would see what else stands in its place."""
    if not is_variable(leaf):
        name = f"model.{path[0].key}{jax.tree_util.keystr(path[1:])}"
        raise ValueError(f"{name} was replaced, and is no nnx.Variable any more: {name}[...] = array sets its value")
    return leaf.get_value()


def dropout_stream(rngs: object) -> nnx.RngStream | None:
    """Fork the stream of random numbers for what drops."""
    if isinstance(rngs, nnx.Rngs) and ("dropout" in rngs or "default" in rngs):
        return rngs["dropout"].fork()
    if rngs is None or isinstance(rngs, nnx.RngStream):
        return rngs
    given = f"nnx.Rngs of {', '.join(rngs)}" if isinstance(rngs, nnx.Rngs) else f"rngs={rngs!r}"
    raise ValueError(f"{given} given, nnx.Rngs(0) or nnx.Rngs(dropout=0) expected")


def check_training(module: Classifier, training: Any) -> Training:
    """Return `training`, hashable; raise ValueError for a name that no layer has."""
    if isinstance(training, bool):
        return training
    if isinstance(training, str):
        raise ValueError(f"training={training!r} given, True or names of layers expected: {{{training!r}}}")
    names = {name for node in trace(module).nodes for name in (node.name, node.variables)}
    for name in training:
        if name not in names:
            raise ValueError(unknown("layer", name, [node.name for node in trace(module).layers]))
    return frozenset(training)


def inside(model: object) -> str:
    """Say where a module has networks of fzoo's in it, to end a line."""
    if not isinstance(model, nnx.Module):
        return ""
    paths = [path for path, part in nnx.iter_modules(model) if isinstance(part, NNXClassifier)]
    return f", which has one as .{'.'.join(map(str, paths[0]))}" if paths else ""
