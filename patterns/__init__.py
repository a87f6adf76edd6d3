"""What people write: every spelling of a projection, of what follows it, and of a loss.

Four folders hold the rules: `projections`, `transforms`, `reductions` and `losses`. A file in them
is found by being there; its rules say which functions and methods they stand for. `language` is
what the rules are written in. Nothing here changes a graph: rules read it and describe what they
found, and `cce_inductor.rewriting` acts.
"""

import importlib
import pkgutil

for _folder in ("projections", "transforms", "reductions", "losses"):
    _package = importlib.import_module(f"{__name__}.{_folder}")
    for _file in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_file.name)
