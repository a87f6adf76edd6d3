"""What the rules of each table may return, and what the walk over a graph does with it.

A rule is called with a `Site` for the node, then with the node's own arguments, bound to the rule's
signature. A block rule gets the logits between the two.

The walk (`cce_inductor.rewriting.walk`) visits the nodes of a graph in order. For a node that reads
no logits it asks the *projection* table. For a node that reads logits it asks:

1. the *loss* table. If there is a rule, no other table is asked. (A loss that reads no logits is
   not passed to its rule, but is reported with the reason.)
2. the *reduction* table. If there is no rule or the rule returns None, it asks
3. the *transform* table. If there is no rule, the operation is captured as a pointwise function.

Returned values:

- `Logits`: the node's result is these logits. Nothing is computed for it. If the node writes to its
  argument in place, these are the values of the argument afterwards.
- a tuple of `Logits`: the same, for a node that returns several tensors (``split``, ``unbind``).
- `Stack`: logits of several projections along a new dimension.
- `Row`: one value for each row, which replaces the node in the graph. A tuple of rows replaces a
  node that returns several tensors (``max``, ``topk``).
- `Expression`: one value for each logit. Only block rules return one.
- None: the rule does not apply to these arguments. A projection rule says that the operation makes
  no logits, and nothing is recorded. A reduction rule hands the node to the transform table.

Raised errors: `UnsupportedError` says that the rule applies and cannot follow this form.

- A node that reads logits is then an escape. Its projection is not rewritten, and the report quotes
  the error. The node may still be a projection whose input happens to be logits, so the projection
  table is asked as well.
- A projection rule's error is quoted in the report of a loss that is computed from the node.
- A block rule's error means that the tensor is read as it is stored.

Per logit or per row: an `Expression` is evaluated for every logit, inside the fused operator. A
`Row` is evaluated once for every row, by ordinary nodes of the graph; its shape is that of the
logits with 1 in the vocabulary dimension. `Algebra` turns an expression into a row by reducing it
over the vocabulary, and its method `row` does so for an expression that is constant over the row.
`late` turns a row into an operand of an expression, which costs a second pass over the vocabulary
unless `Algebra` knows an identity that avoids it.
"""

from __future__ import annotations

from cce_inductor.patterns.language.expression import Expression
from cce_inductor.patterns.language.logits import Logits, Value
from cce_inductor.patterns.language.rows import Row

ProjectionResult = Logits | None
TransformResult = Value
ReductionResult = Row | tuple[Row, ...] | Logits | None
LossResult = Row | Logits
BlockResult = Expression
