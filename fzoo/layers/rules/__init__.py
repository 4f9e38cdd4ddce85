"""What each class of Keras does, as the configuration of a model says it."""

from fzoo.layers.rules import merging, operations, weighted, weightless
from fzoo.layers.rules.options import REFUSED, RULES, Rule, check_rank, read_options, table

__all__ = [
    "REFUSED",
    "RULES",
    "Rule",
    "check_rank",
    "merging",
    "operations",
    "read_options",
    "table",
    "weighted",
    "weightless",
]
