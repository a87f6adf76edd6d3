"""Operands: what an expression reads beside the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from cce_inductor.kernels.names import OperandKind
from cce_inductor.patterns.language.examples import is_exactly, same_size, tensor_example
from cce_inductor.patterns.language.expression import Operand
from cce_inductor.patterns.language.logits import Call, Logits
from cce_inductor.patterns.language.rows import Row, call
from cce_inductor.patterns.language.site import Site
from cce_inductor.reporting import reasons


def operand(site: Site, kind: OperandKind, source: Any, logits: Logits) -> Operand:
    """Return an operand that the node of `site` reads.

    Args:
        site: the node.
        kind: the dimensions of the logits over which it varies.
        source: a node or a call, which broadcasts to the logits.
        logits: the logits in whose expression the operand stands.
    """
    return Operand(kind, source, logits.row_operations, logits.vocabulary_dim, site.node)


def late(site: Site, row: Row, logits: Logits) -> Operand:
    """Return a row, computed from statistics of `logits`, as an operand of their expression."""
    return operand(site, OperandKind.ROW, row, logits)


def row_operand(site: Site, value: Node, logits: Logits) -> Operand:
    """Return a tensor of one value a row, without the vocabulary's dimension, as an operand."""
    column = call(torch.unsqueeze, value, logits.vocabulary_dim)
    return operand(site, OperandKind.ROW, column, logits)


def number_operand(site: Site, number: Node | Call | int, logits: Logits) -> Operand:
    """Return a Python number that may differ in the next call as an operand.

    The number is added to a tensor of 0: Dynamo keeps such a sum symbolic.
    """
    device = tensor_example(logits.projection.node).device
    zero = call(torch.zeros, (), dtype=torch.float64, device=device)
    return operand(site, OperandKind.SCALAR, call(torch.add, zero, number), logits)


def broadcast_operand(
    site: Site, argument: Node, logits: Logits, shape: tuple[Any, ...]
) -> Operand:
    """Return a tensor that is broadcast against logits of `shape` as an operand.

    Raises:
        UnsupportedError: it makes them larger, or is as large and requires a gradient.
    """
    value = tensor_example(argument)
    dim = logits.vocabulary_dim
    sizes = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    if len(sizes) > len(shape):
        site.unsupported(reasons.BROADCAST_TO_MORE_DIMENSIONS)
    for size, expected in zip(sizes, shape, strict=True):
        if not is_exactly(size, 1) and not same_size(size, expected):
            site.unsupported(reasons.OPERAND_NOT_BROADCAST)
    kind = OperandKind.of(
        varies_over_rows=any(not is_exactly(size, 1) for at, size in enumerate(sizes) if at != dim),
        varies_over_columns=not is_exactly(sizes[dim], 1),
    )
    if kind is OperandKind.SCALAR and value.dim() > 0 and value.numel() != 1:
        site.unsupported(reasons.OPERAND_SIZE_UNKNOWN)
    if kind is OperandKind.LOGIT and value.requires_grad:
        site.unsupported(reasons.OPERAND_LARGE_WITH_GRADIENT)
    return operand(site, kind, argument, logits)
