"""Operations that the pass must recognise although no rule stands for them."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from cce_inductor.patterns.language.examples import example
from cce_inductor.reporting.location import operation
from cce_inductor.torch_internals.capture import get_data

# Softmaxes inside graphs that are not followed

_SOFTMAXES = ("logsumexp", "log_softmax", "softmax")


def is_softmax(node: Node) -> bool:
    """Return whether a node computes a softmax, its logarithm, or its normalizer."""
    return operation(node) in _SOFTMAXES


# Operations that cut the gradient

_DETACHING = frozenset(
    ["detach", torch.detach, torch.Tensor.detach, torch.ops.aten.detach.default, get_data]
)
_DETACHING_IN_PLACE = frozenset(["detach_", torch.detach_, torch.Tensor.detach_])


def detaches(node: Node) -> bool:
    """Return whether a node returns its argument without a gradient."""
    return node.target in _DETACHING


def detaches_in_place(node: Node) -> bool:
    """Return whether a node takes the gradient from its argument."""
    return node.target in _DETACHING_IN_PLACE


# Operations on indices and masks, which an operator may need earlier than the user's graph has them

_INDEX_OPERATIONS = (
    *("view", "reshape", "flatten", "getitem", "contiguous", "unsqueeze", "squeeze", "transpose"),
    *("t", "permute", "clone", "expand", "to", "long", "int", "detach"),
    *("clamp", "clamp_min", "clamp_max", "where", "masked_fill"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"),
    *("invert", "bitwise_not", "logical_not"),
)
_MOVABLE = frozenset(
    [
        *_INDEX_OPERATIONS,  # methods
        *(
            getattr(module, name)
            for module in (torch, torch.Tensor, operator)
            for name in _INDEX_OPERATIONS
            if hasattr(module, name)
        ),
    ]
)


def may_move(node: Node) -> bool:
    """Return whether a node can be moved to an earlier place without changing its result.

    This holds for functions that reshape, compare or mask tensors of integers or truth values, once
    their arguments are there.
    """
    value = example(node)
    return (
        node.target in _MOVABLE
        and isinstance(value, torch.Tensor)
        and not value.is_floating_point()
    )
