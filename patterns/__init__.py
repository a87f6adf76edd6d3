"""What people write: every spelling of a projection, of what follows it, and of a loss.

Three folders, one table each: `projections`, `transforms`, `losses`. A file in them is found by
being there; its rules say which functions and methods they stand for. Nothing here changes a
graph: rules read it and describe (see `logits`), `cce_inductor.rewrite` acts.
"""

import importlib
import pkgutil

from . import losses, projections, transforms
from .logits import HERE, CrossEntropy, Logits, RowOperation
from .rules import Site, UnsupportedError, example, loss, projection, transform

for _folder in (projections, transforms, losses):
    for _file in pkgutil.iter_modules(_folder.__path__, _folder.__name__ + "."):
        importlib.import_module(_file.name)

__all__ = [
    "HERE",
    "CrossEntropy",
    "Logits",
    "RowOperation",
    "Site",
    "UnsupportedError",
    "example",
    "loss",
    "projection",
    "transform",
]
