"""Rules: every spelling of a projection, of the operations that follow it, and of a loss.

Four folders hold the rules: `projections`, `transforms`, `reductions` and `losses`. Every file in
them is imported, and its rules are registered for the functions and methods that they name. Rules
are written with `language`, whose docstring is a glossary, and WRITING_RULES.md explains how.

A rule describes the result of a node and never changes the graph, which `cce_inductor.rewriting`
does.
"""

import importlib
import pkgutil

for _folder in ("projections", "transforms", "reductions", "losses"):
    _package = importlib.import_module(f"{__name__}.{_folder}")
    for _file in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_file.name)
