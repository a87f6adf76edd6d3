"""The transpose of a matrix of logits, with the roles of input and weight exchanged.

Contrastive learning reduces ``query @ key.T`` over both of its dimensions: over the second one the
keys are the vocabulary, over the first one the queries.
"""

from __future__ import annotations

import dataclasses

import torch

from cce_inductor.kernels.names import OperandKind
from cce_inductor.patterns.language.examples import same_size, tensor_example
from cce_inductor.patterns.language.expression import COLUMN, leaves, operands_of
from cce_inductor.patterns.language.logits import HERE, Logits


def transposed_logits(logits: Logits) -> Logits | None:
    """Return the same logits with input and weight exchanged.

    None if the weight cannot be an input: there is a bias, an operand that varies over rows or
    columns, or an operation on rows that is no transposition.
    """
    projection = logits.projection
    if projection.joined:
        return None
    input = tensor_example(projection.input)
    if (
        input.dim() != 2
        or projection.linear_bias is not None
        or not same_size(logits.vocabulary, projection.vocabulary)
        or any(operation.target is not torch.permute for operation in logits.row_operations)
        or any(operand.kind is not OperandKind.SCALAR for operand in operands_of(logits.expression))
        or COLUMN in leaves(logits.expression)
    ):
        return None
    rows = tuple(
        dataclasses.replace(operation, vocabulary_dim=1)
        for operation in projection.weight_operations
    )
    transposed = Logits(
        projection.replace(
            input=projection.linear_weight,
            linear_weight=projection.input,
            weight_operations=(),
            vocabulary=input.shape[0],
            vocabulary_dim=1 - (len(rows) % 2),
        ),
        vocabulary_dim=1,
        vocabulary=input.shape[0],
        compute_dtype=logits.compute_dtype,
        row_operations=rows,
        expression=logits.expression,
        path=logits.path,
    )
    if len(logits.row_operations) % 2 == 0:
        transposed = transposed.with_row_operation(torch.permute, HERE, (1, 0), vocabulary_dim=0)
    return transposed
