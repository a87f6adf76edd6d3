"""What rules are written with: ``from cce_inductor.patterns.language import Logits, Site, ...``.

Rule files import everything from here, except `reasons`, from `cce_inductor.reporting`. Modules in
this folder import each other by name.

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
- *Row*: the logits of one token: one position in all dimensions except the vocabulary.
- *Column*: one vocabulary entry in every row.
- `Row`, the type: a value that is computed once for each row, by ordinary tensor operations.
- *Expression*: a value that is computed for each logit: a graph of pointwise ATen operators.
- *Operand*: what an expression reads beside the logits: a tensor of one value, or of one for each
  row, column or logit; or the logits of another head.
- *RowStatistic*: a reduction over the vocabulary that the fused operator computes (`logsumexp`,
  `gather`, `sum`, ...). Rows are made of statistics.
- *Late*: computed from a statistic of the same logits, and so unknown until a first pass over the
  vocabulary has finished. The `lse` in ``z - lse`` is late.
- *Escape*: a use of logits that no rule can follow. The projection then stays as it is, and the
  report names the source line of the escape.
"""

from cce_inductor.kernels.names import OperandKind
from cce_inductor.patterns.language.algebra import Algebra
from cce_inductor.patterns.language.blocks import read
from cce_inductor.patterns.language.examples import (
    constant,
    dimension,
    example,
    is_exactly,
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
    depends_on_column,
    is_detached,
    leaves,
    operands_of,
    under_mask,
    where,
)
from cce_inductor.patterns.language.heads import beside
from cce_inductor.patterns.language.indexing import (
    is_integer_tensor,
    non_negative,
    row_numbers,
    takes_one_of_each_row,
    without_ellipsis,
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
    same_logits,
)
from cce_inductor.patterns.language.masks import (
    column_mask,
    columns_mask,
    diagonal_mask,
    index_mask,
    overwritten,
    range_mask,
    scatter_mask,
    target_mask,
)
from cce_inductor.patterns.language.operands import late, number_operand, operand, row_operand
from cce_inductor.patterns.language.pointwise import pointwise
from cce_inductor.patterns.language.product import (
    COMPUTE_DTYPES,
    joined_product,
    product,
    weight_of,
)
from cce_inductor.patterns.language.protocol import (
    BlockResult,
    LossResult,
    ProjectionResult,
    ReductionResult,
    TransformResult,
)
from cce_inductor.patterns.language.ranges import vocabulary_range
from cce_inductor.patterns.language.rows import (
    Row,
    RowStatistic,
    call,
    ignoring,
    is_reduced,
    size_of,
    vocabulary_of,
    without_vocabulary,
)
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
    "OperandKind",
    "Projection",
    "ProjectionResult",
    "ReductionResult",
    "Row",
    "RowStatistic",
    "Rule",
    "Site",
    "Stack",
    "TensorOperation",
    "TransformResult",
    "UnsupportedError",
    "Value",
    "applied",
    "beside",
    "block",
    "call",
    "column_mask",
    "columns_mask",
    "constant",
    "depends_on_column",
    "diagonal_mask",
    "dimension",
    "example",
    "ignoring",
    "index_mask",
    "is_detached",
    "is_exactly",
    "is_integer_tensor",
    "is_reduced",
    "is_symbol",
    "is_tensor",
    "joined_product",
    "late",
    "leaves",
    "loss",
    "loss_reduction",
    "non_negative",
    "number_operand",
    "operand",
    "operands_of",
    "overwritten",
    "pointwise",
    "product",
    "projection",
    "range_mask",
    "read",
    "reduction",
    "row_numbers",
    "row_operand",
    "same_logits",
    "same_shape",
    "same_size",
    "scatter_mask",
    "size_of",
    "takes_one_of_each_row",
    "target_mask",
    "tensor_example",
    "transform",
    "under_mask",
    "vocabulary_of",
    "vocabulary_range",
    "weight_of",
    "where",
    "without_ellipsis",
    "without_vocabulary",
]
