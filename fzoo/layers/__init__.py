"""How Keras defines a layer, what all networks share, and the record of a call."""

from fzoo.layers.activations import Activation, activation_function
from fzoo.layers.classifier import Classifier, Head
from fzoo.layers.conventions import make_divisible, snake_case
from fzoo.layers.graph import Trace, layer_names, random_variables, trace
from fzoo.layers.keras import Layers, Training
from fzoo.layers.options import is_count
from fzoo.layers.record import OPERATION, Node, Prepared

__all__ = [
    "OPERATION",
    "Activation",
    "Classifier",
    "Head",
    "Layers",
    "Node",
    "Prepared",
    "Trace",
    "Training",
    "activation_function",
    "is_count",
    "layer_names",
    "make_divisible",
    "random_variables",
    "snake_case",
    "trace",
]
