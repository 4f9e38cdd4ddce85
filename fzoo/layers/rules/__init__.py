"""What each class of Keras does, as the configuration of a model says it."""

from fzoo.layers.rules import merging, operations, weighted, weightless
from fzoo.layers.rules.options import REFUSED, RULES, Rule, check_rank, read_options, table
from fzoo.layers.rules.turned import turn_step

__all__ = [
    "REFUSED",
    "RULES",
    "Rule",
    "check_rank",
    "merging",
    "operations",
    "read_options",
    "table",
    "turn_step",
    "weighted",
    "weightless",
]
