"""What rules are written with: ``from cce_inductor.patterns.language import Logits, Site, ...``.

Rule files import everything from here. Modules in this folder import each other by name.

Glossary:

- *Logits*: a tensor of [..., vocabulary] that the rewritten graph never computes. The walk over the
  graph carries a `Logits` value in its place.
- *Projection*: the matrix product that makes logits, ``input @ weight.T + bias``.
- *Transform*: an operation whose result is again logits: other rows, another shape or dtype, or a
  pointwise function of them.
- *Reduction*: an operation that makes one value (or k values) of each row of logits.
- *Loss*: a reduction that is a loss function, and is therefore reported if it is not rewritten.
- *Block*: a tensor as large as the logits that is computed from smaller tensors, a one-hot encoding
  for example.
- *Row*: the logits of one token, which is all the dimensions except the vocabulary. A value of type
  `Row` is computed once for each row, by ordinary tensor operations.
- *Column*: one vocabulary entry in every row.
- *Expression*: a value that is computed for each logit: a graph of pointwise ATen operators.
- *Operand*: a tensor that an expression reads beside the logits: one value, or one for each row,
  column or logit.
- *Statistic*: a reduction over the vocabulary that the fused operator computes (`logsumexp`,
  `gather`, `sum`, ...). Rows are made of statistics.
- *Late*: computed from a statistic of the same logits, and so unknown until a first pass over the
  vocabulary has finished. The `lse` in ``z - lse`` is late.
- *Escape*: a use of logits that no rule can follow. The projection then stays as it is, and the
  report names the source line of the escape.
"""

from cce_inductor.patterns.language.algebra import (
    Algebra,
    call,
    ignoring,
    late,
    size_of,
    vocabulary_of,
    without_vocabulary,
)
from cce_inductor.patterns.language.entries import (
    among,
    at_diagonal,
    at_index,
    at_scatter,
    is_index,
    overwritten,
    places_of_rows,
    takes_one_of_each_row,
    value_of_rows,
    wrapped,
)
from cce_inductor.patterns.language.examples import (
    constant,
    dimension,
    example,
    is_symbol,
    is_tensor,
    loss_reduction,
    same_shape,
    same_size,
    tensor_example,
)
from cce_inductor.patterns.language.expression import (
    COLUMN,
    LOGIT,
    Apply,
    Expression,
    Operand,
    leaves,
    only_where,
    where,
)
from cce_inductor.patterns.language.logits import (
    HERE,
    WIDTH,
    Call,
    Logits,
    Projection,
    Stack,
    TensorOperation,
    Value,
    applied,
)
from cce_inductor.patterns.language.product import COMPUTE_DTYPES, product
from cce_inductor.patterns.language.protocol import (
    BlockResult,
    LossResult,
    ProjectionResult,
    ReductionResult,
    TransformResult,
)
from cce_inductor.patterns.language.rows import Row, is_reduced
from cce_inductor.patterns.language.site import Site
from cce_inductor.patterns.language.tables import (
    Rule,
    UnsupportedError,
    block,
    loss,
    projection,
    reduction,
    transform,
)

__all__ = [
    "COLUMN",
    "COMPUTE_DTYPES",
    "HERE",
    "LOGIT",
    "WIDTH",
    "Algebra",
    "Apply",
    "BlockResult",
    "Call",
    "Expression",
    "Logits",
    "LossResult",
    "Operand",
    "Projection",
    "ProjectionResult",
    "ReductionResult",
    "Row",
    "Rule",
    "Site",
    "Stack",
    "TensorOperation",
    "TransformResult",
    "UnsupportedError",
    "Value",
    "among",
    "applied",
    "at_diagonal",
    "at_index",
    "at_scatter",
    "block",
    "call",
    "constant",
    "dimension",
    "example",
    "ignoring",
    "is_index",
    "is_reduced",
    "is_symbol",
    "is_tensor",
    "late",
    "leaves",
    "loss",
    "loss_reduction",
    "only_where",
    "overwritten",
    "places_of_rows",
    "product",
    "projection",
    "reduction",
    "same_shape",
    "same_size",
    "size_of",
    "takes_one_of_each_row",
    "tensor_example",
    "transform",
    "value_of_rows",
    "vocabulary_of",
    "where",
    "without_vocabulary",
    "wrapped",
]
