"""The check of every annotated shape and type at each call, while tests run."""

import typing

from beartype import BeartypeConf, beartype
from flax.linen import linear

#: What Flax annotates with a protocol that can't be checked as it stands.
typing.runtime_checkable(linear.PromoteDtypeFn)

#: An int is a float, as for type checkers.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
