"""A pretrained network with a new classifier."""

from __future__ import annotations

import os
from typing import Any

import jax

from fzoo.errors import unknown
from fzoo.layers.classifier import OF_RUNS, Classifier, Head
from fzoo.layers.graph import layer_names, random_variables, trace
from fzoo.layers.options import is_count
from fzoo.models.keras_model import KerasModel, keras_model
from fzoo.pretrained import load, load_model
from fzoo.pretrained.whole import is_whole_model
from fzoo.types import DTypeLike, MutableVariables, Variables, Weights
from fzoo.weights.mapping import check_variables, slots, without_top
from fzoo.weights.rewrite import with_head
from fzoo.zoo import create


def transfer(
    name: str | os.PathLike | KerasModel,
    *,
    classes: int,
    head: Head | None = None,
    weights: Weights = "imagenet",
    rng: jax.Array | None = None,
    variables: Variables | None = None,
    cut: str | None = None,
    **create_options: Any,
) -> tuple[Classifier, MutableVariables]:
    """Put a new classifier on a pretrained backbone, as one network with one tree of variables.

    It is what Keras users build as `Dense(classes)(GlobalAveragePooling2D()(base.output))`, with the same names and
    order of layers; `save_keras_weights` writes a file that such a model of Keras's loads.

    A network of `load_model` is taken, too: up to its last feature map, or to the layer `cut`, with its own variables.

    Args:
        name: the model; the path of a whole model that Keras saved, or what `load_model` made of it.
        classes: number of outputs of the classifier.
        head: its layers; average pooling and the classifier by default. Nothing is pooled where `cut` gives a vector.
        weights: of the backbone: "imagenet", a file, or None, as for `load`; a file with a top will do. A whole model
            has its own.
        rng: of the new layers, and of all where `weights` is None; key 0 by default.
        variables: of what `load_model` made.
        cut: of a whole model: the last layer that is kept, by its name in `layer_names`; by default the one with the
            last feature map.
        **create_options: see `create`; of a whole model, `dtype` and the other options of a run (`remat`), and the name
            of a `classifier_activation`.

    Returns:
        (module, variables).

    Raises:
        ValueError, OSError: as `load`.
    """
    head, rng = head or Head(), jax.random.key(0) if rng is None else rng
    if isinstance(name, KerasModel) or is_whole_model(name):
        if not isinstance(name, KerasModel):
            name, variables = load_model(name)
        if variables is None or weights != "imagenet":
            raise ValueError("variables=... of the network expected, and no weights, which it has")
        return transfer_model(name, variables, classes, head, rng, cut, **create_options)
    if variables is not None or cut is not None:
        given = "variables" if cut is None else f"cut={cut!r}"
        raise ValueError(f"{given} given, which goes with a network of load_model, {name!r} given")
    name = os.fspath(name)
    backbone: MutableVariables = {"params": {}, "batch_stats": {}}
    if weights is not None:
        below = {k: v for k, v in create_options.items() if k != "classifier_activation"}
        loaded, backbone = load(name, weights=weights, include_top=False, **below)
        module = loaded.clone(
            include_top=True,
            classes=classes,
            head=head,
            classifier_activation=create_options.get("classifier_activation", "softmax"),
        )
    else:
        module = create(name, classes=classes, head=head, **create_options)
    fresh = random_variables(module, rng)
    return module, {kind: {**tree, **backbone.get(kind, {})} for kind, tree in fresh.items()}


def transfer_model(
    module: KerasModel,
    variables: Variables,
    classes: int,
    head: Head,
    rng: jax.Array,
    cut: str | None,
    classifier_activation: str | None = "softmax",
    dtype: DTypeLike | None = None,
    **others: Any,
) -> tuple[KerasModel, MutableVariables]:
    """Do what `transfer` does, for the network of a file."""
    run = {name: others.pop(name) for name in OF_RUNS if name in others}
    for name, value in others.items():
        raise ValueError(f"{name}={value!r} given, which goes with a model of list_models(); its file says it here")
    if classifier_activation is not None and not isinstance(classifier_activation, str):
        raise ValueError(f"classifier_activation={classifier_activation!r} given, the name of one expected")
    if not is_count(classes):
        raise ValueError(f"classes={classes!r} given, a positive integer expected")
    check_variables(module, variables)
    cut = module.cut if cut is None else cut
    shapes = {node.name: (node.shape, node.kind) for node in trace(module).nodes}
    if cut is None:
        raise ValueError("cut=NAME of a layer expected: this network has no last feature map that everything passes")
    if cut not in shapes:
        raise ValueError(unknown("layer", cut, layer_names(module)))
    shape, kind = shapes[cut]
    if len(shape) not in (1, 3) or kind == "InputLayer":
        raise ValueError(f"cut={cut!r} given, whose output is of shape {shape}: a feature map or a vector expected")
    graph = with_head(module.graph, cut, head, classes, classifier_activation, flat=len(shape) == 1)
    made = keras_model(graph, module.dtype if dtype is None else dtype)
    made = made.clone(cut=cut, **{name: getattr(module, name) for name in OF_RUNS if name != "dtype"} | run)
    kept = slots(without_top(made))
    fresh = random_variables(made, rng)
    return made, {
        kind: {layer: variables[kind][layer] if layer in kept else tree for layer, tree in layers.items()}
        for kind, layers in fresh.items()
    }
