"""Tables of tensor types that libraries keep, and compiled functions depend on.

einops, for one, remembers for each type of tensor that it has met what to do with it. A type that
is new to such a table changes its size, which Dynamo guards on: whatever reads the table would be
compiled once more. What is right for a tensor is right for `DeferredLogits`, so it is added to a
table before a function is compiled that reads it.

The table must be a variable of an installed package. A dictionary of the user's own program stays
as it is, whatever its keys are.
"""

from __future__ import annotations

import site
import sys
import sysconfig
from typing import Any

from torch import Tensor

from cce_inductor.deferred.tensor import DeferredLogits
from cce_inductor.torch_internals.capture import guarded_dictionaries


def join_type_tables() -> None:
    """Adds `DeferredLogits` to the tables that the function reads that is being compiled."""
    tables = [
        table
        for table in guarded_dictionaries()
        if Tensor in table and all(isinstance(key, type) for key in table)
    ]
    if not tables:
        return
    of_packages = _variables_of_packages()
    for table in tables:
        if id(table) in of_packages:
            table.setdefault(DeferredLogits, table[Tensor])


def _variables_of_packages() -> set[int]:
    """The identities of the dictionaries that are variables of modules of installed packages."""
    folders = (*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib"))
    return {
        id(value)
        for module in list(sys.modules.values())
        if _file(module).startswith(folders)
        for value in list(vars(module).values())
        if isinstance(value, dict)
    }


def _file(module: Any) -> str:
    return str(getattr(module, "__file__", None) or "")
