"""Tables of tensor types that libraries keep, and that compiled functions depend on.

einops, for example, remembers how to treat each type of tensor that it has met. A new type changes
the size of that table. Dynamo guards the size, so everything that reads the table would be compiled
again. `DeferredLogits` is treated like `Tensor`, so it is added to a table before a function that
reads the table is compiled.

Only tables that are variables of an installed package are changed. A dictionary of the user's own
program stays as it is, whatever its keys are.
"""

from __future__ import annotations

import site
import sys
import sysconfig
from typing import Any

from torch import Tensor

from cce_inductor.deferred.tensor import DeferredLogits
from cce_inductor.torch_internals.callers import guarded_dictionaries


def join_type_tables() -> None:
    """Add `DeferredLogits` to the tables that the function being compiled reads."""
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
    """Return the identities of all dictionaries that are variables of installed modules."""
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
