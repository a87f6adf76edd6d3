"""What a graph knows about a node: its example value, its gradient, its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import _reduction
from torch.utils._pytree import tree_leaves

from cce_inductor.patterns.language.tables import UnsupportedError
from cce_inductor.reporting import reasons

HAD_GRADIENT = "cce_inductor_had_gradient"
"""Key in a node's `meta`: whether its result required a gradient when it was computed, if the
example value does not say so."""


def had_gradient(node: Node) -> bool:
    """Whether a tensor required a gradient when it was computed.

    The example value shows the tensor at the end of the graph. It may have been detached in place
    since, or a tensor that requires a gradient may have been written into it.
    """
    if HAD_GRADIENT in node.meta:
        return bool(node.meta[HAD_GRADIENT])
    tensors = [leaf for leaf in tree_leaves(example(node)) if isinstance(leaf, torch.Tensor)]
    return any(tensor.requires_grad for tensor in tensors)


def requires_grad(source: Any) -> bool:
    """Whether a node holds a tensor that requires a gradient at the end of the graph."""
    return isinstance(source, Node) and tensor_example(source).requires_grad


def is_exactly(size: Any, number: int) -> bool:
    """Whether a size is an int with this value, and not symbolic."""
    return isinstance(size, int) and size == number


def same_size(first: Any, second: Any) -> bool:
    """Whether two sizes are known to be equal, without a new guard."""
    return statically_known_true(first == second)


def same_shape(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal, without a new guard."""
    return len(first) == len(second) and all(map(same_size, first, second))


def example(argument: Any) -> Any:
    """Return the example value of a node, None if it has none; the argument if it is no node."""
    if isinstance(argument, Node):
        return argument.meta.get("example_value", argument.meta.get("val"))
    return argument


def tensor_example(argument: Any) -> torch.Tensor:
    """Return the example value of a node that must hold a tensor.

    Raises:
        UnsupportedError: it holds something else, or its value is not known.
    """
    value = example(argument)
    if not isinstance(value, torch.Tensor):
        raise UnsupportedError(reasons.not_a_tensor(argument))
    return value


def is_tensor(argument: Any) -> bool:
    """Whether an argument is a node that holds a tensor."""
    return isinstance(example(argument), torch.Tensor)


def is_symbol(argument: Any) -> bool:
    """Whether an argument is a Python number that Dynamo keeps symbolic.

    The compiled graph is used again if the number differs in the next call.
    """
    value = example(argument)
    return isinstance(value, (torch.SymInt, torch.SymFloat)) and _fixed(value) is None


def _fixed(value: torch.SymInt | torch.SymFloat) -> int | float | None:
    """Return the value of a number that a guard has already fixed, None if none has."""
    node = value.node
    is_int = isinstance(value, torch.SymInt)
    number: int | float | None = node.maybe_as_int() if is_int else node.maybe_as_float()
    return number


def with_fixed_number(node: Node) -> Any:
    """Return the number that a node holds if it is the same in every call, else the node."""
    value = example(node)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        fixed = _fixed(value)
        return node if fixed is None else fixed
    return value if isinstance(value, (int, float)) else node


def arguments_of(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a node's arguments, positional and by name.

    A number that Dynamo has fixed by a guard may still be a node; the number itself is returned.
    """
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), with_fixed_number)
    return args, kwargs


def constant(argument: Any) -> float:
    """Return a Python number that is the same in every call.

    Raises:
        UnsupportedError: `argument` is not a number, or may differ in the next call.
    """
    value = example(argument)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        fixed = _fixed(value)
        if fixed is None:
            raise UnsupportedError(reasons.NUMBER_MAY_DIFFER)
        return fixed
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnsupportedError(reasons.NUMBER_EXPECTED)
    return value


def loss_reduction(size_average: Any, reduce: Any, reduction: str) -> str:
    """Return a loss's "none", "mean" or "sum", which its two deprecated arguments may override."""
    if size_average is None and reduce is None:
        return reduction
    return _reduction.legacy_get_string(size_average, reduce, emit_warning=False)


def dimension(dim: Any, rank: int) -> int:
    """Return a dimension counted from the front.

    Raises:
        UnsupportedError: `dim` is not a plain int.
    """
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise UnsupportedError(reasons.DIMENSION_NOT_CONSTANT)
    return dim + rank if dim < 0 else dim
