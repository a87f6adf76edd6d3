"""What people write: every spelling of a projection, of what follows it, and of a loss.

Four folders: `projections`, `transforms`, `reductions`, `losses`, each with the table of its name
(and among the transforms `block`: what makes a tensor as large as logits). A file in them is found
by being there; its rules say which functions and methods they stand for. Nothing here changes a
graph: rules read it and describe (see `logits`), `cce_inductor.rewrite` acts.
"""

import importlib
import pkgutil

from . import losses, projections, reductions, transforms
from .algebra import detach_row, rest_of, vocabulary_of
from .expression import Apply, Expression, Leaf, Operand, leaves
from .logits import (
    AtRows,
    Call,
    Logits,
    Projection,
    Row,
    Stack,
    Statistic,
    TensorOperation,
    Value,
    all_logits,
    each_logits,
    is_reduced,
    is_sum,
    nodes_of,
    parts,
    size_hint,
)
from .rules import (
    HAD_GRADIENT,
    TABLES,
    Site,
    UnsupportedError,
    detached,
    example,
    had_gradient,
    loss,
    projection,
    reduction,
    same_shape,
    transform,
)

for _folder in (projections, transforms, reductions, losses):
    for _file in pkgutil.iter_modules(_folder.__path__, _folder.__name__ + "."):
        importlib.import_module(_file.name)

from .losses.unfused import is_unfused  # noqa: E402
from .through_view import changed_through_view  # noqa: E402
from .transforms.select import begins_vocabulary, in_vocabulary  # noqa: E402
from .transforms.stack import through_stack  # noqa: E402

__all__ = [
    "HAD_GRADIENT",
    "TABLES",
    "Apply",
    "AtRows",
    "Call",
    "Expression",
    "Leaf",
    "Logits",
    "Operand",
    "Projection",
    "Row",
    "Site",
    "Stack",
    "Statistic",
    "TensorOperation",
    "UnsupportedError",
    "Value",
    "all_logits",
    "begins_vocabulary",
    "changed_through_view",
    "detach_row",
    "detached",
    "each_logits",
    "example",
    "had_gradient",
    "in_vocabulary",
    "is_reduced",
    "is_sum",
    "is_unfused",
    "leaves",
    "loss",
    "nodes_of",
    "parts",
    "projection",
    "reduction",
    "rest_of",
    "same_shape",
    "size_hint",
    "through_stack",
    "transform",
    "vocabulary_of",
]
