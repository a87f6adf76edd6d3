"""Tables of tensor types that libraries keep, and compiled functions depend on.

einops, for one, remembers for each type of tensor that it has met what to do with it. A type that
is new to such a table changes its size, which Dynamo guards on: whatever reads the table would be
compiled once more. What is right for a tensor is right for `DeferredLogits`, so it is added to a
table before a function is compiled that reads it.
"""

from __future__ import annotations

from torch import Tensor

from .. import compat
from .tensor import DeferredLogits


def join_type_tables() -> None:
    """Adds `DeferredLogits` to the tables that the function reads that is being compiled."""
    for table in compat.guarded_dictionaries():
        if Tensor in table and all(isinstance(key, type) for key in table):
            table.setdefault(DeferredLogits, table[Tensor])
