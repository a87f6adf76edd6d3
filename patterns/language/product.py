"""The logits that a matrix product makes. All projections are made here."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cce_inductor.patterns.language.examples import (
    arguments_of,
    is_tensor,
    same_size,
    tensor_example,
)
from cce_inductor.patterns.language.expression import LOGIT
from cce_inductor.patterns.language.logits import HERE, Logits, Projection, TensorOperation, applied
from cce_inductor.patterns.language.site import Site
from cce_inductor.reporting import reasons

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRANSPOSE = TensorOperation(torch.t, (HERE,))


def product(
    site: Site,
    input: Any,
    weight: Any,
    *,
    transposed: bool,
    bias: Any = None,
    weight_operations: tuple[TensorOperation, ...] = (),
    vocabulary_dim: int | None = None,
) -> Logits | None:
    """Return the logits ``input @ weight.T + bias``; with `transposed`, ``input @ weight + bias``.

    All projections end here. A rule has to make sure that its operation computes this product, with
    the rows of the result in the order of `input`; this function checks ranks, sizes and dtypes.

    Args:
        site: the node of the product.
        input: [..., hidden].
        weight: [vocabulary, hidden], or [hidden, vocabulary] if `transposed`. A batch of equal
            matrices (``weight.expand(n, -1, -1)``) is accepted as well.
        transposed: whether the weight is [hidden, vocabulary], as `matmul` takes it.
        bias: [vocabulary], or None.
        weight_operations: turn a weight of another rank into a matrix.
        vocabulary_dim: the dimension of the result that is the vocabulary, which is also the
            dimension of `input` that is summed over; the last one if None. (A convolution has 1.)

    Returns:
        None if the operands do not fit: another rank, different hidden sizes, a bias that is not
        [vocabulary], or a result whose dtype has no gradients.

    Raises:
        UnsupportedError: the size of the weight depends on data, or an operand is a subclass of
            tensors.
    """
    result = site.example
    if not (is_tensor(input) and is_tensor(weight)) or result.dtype not in COMPUTE_DTYPES:
        return None
    if tensor_example(input).dim() < 1 or tensor_example(input).dim() != result.dim():
        return None
    absorbed: list[Node] = []
    operations = list(weight_operations)
    while not operations and tensor_example(weight).dim() == 3:
        source = _expanded(weight)
        if source is None:
            return None
        absorbed.append(weight)
        weight = source
    if not operations and tensor_example(weight).dim() != 2:
        return None
    if not all(_has_value(size) for size in tensor_example(weight).shape):
        site.unsupported(reasons.WEIGHT_SIZE_DEPENDS_ON_DATA)
    dim = result.dim() - 1 if vocabulary_dim is None else vocabulary_dim
    vocabulary = result.shape[dim]
    hidden = tensor_example(weight).shape[0 if transposed else 1]
    if not same_size(tensor_example(input).shape[dim], hidden):  # einsum broadcasts a size of 1
        return None
    if bias is not None and (
        not is_tensor(bias) or tuple(tensor_example(bias).shape) != (vocabulary,)
    ):
        return None
    for operand in (node for node in (input, weight, bias) if node is not None):
        if is_traceable_wrapper_subclass(tensor_example(operand)):
            site.unsupported(reasons.wrapped_operand(tensor_example(operand)))
    while not operations and (source := _transpose_of(weight)) is not None:
        absorbed.append(weight)
        weight, transposed = source, not transposed
    if transposed:
        operations.append(TRANSPOSE)
    projection = Projection(
        node=site.node,
        input=input,
        linear_weight=weight,
        weight_operations=tuple(operations),
        linear_bias=bias,
        vocabulary=vocabulary,
        hidden=int(tensor_example(input).shape[dim]),
        vocabulary_dim=dim,
        absorbed=tuple(absorbed),
    )
    return Logits(projection, dim, vocabulary, result.dtype)


def joined_product(
    site: Site, parts: list[Logits], input: Any, weight: Any, *, hidden: int, vocabulary: int
) -> Logits:
    """Return the logits of one product that replaces several projections.

    Args:
        site: the node that joins them.
        parts: the logits of each projection. The result has the rows of the first.
        input: [..., hidden].
        weight: [vocabulary, hidden].
        hidden, vocabulary: their sizes.
    """
    projection = Projection(
        node=site.node,
        input=input,
        linear_weight=weight,
        weight_operations=(),
        linear_bias=None,
        vocabulary=vocabulary,
        hidden=hidden,
        vocabulary_dim=parts[0].projection.vocabulary_dim,
        joined=tuple(part.projection for part in parts),
    )
    return parts[0].replace(projection=projection, vocabulary=vocabulary, expression=LOGIT)


def weight_of(projection: Projection) -> Any:
    """Return the weight of a projection as a [vocabulary, hidden] matrix."""
    return applied(projection.linear_weight, projection.weight_operations, 0)


def _has_value(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or isinstance(size.node.hint, int)


_ATTRIBUTES = (torch.ops.aten.numpy_T, torch.ops.aten.mT)


def _transpose_of(node: Node) -> Node | None:
    """Return the matrix that a node transposes, in any spelling."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    (source, *arguments), named = arguments_of(node)
    if not isinstance(source, Node) or not is_tensor(source) or named:
        return None
    if tensor_example(source).dim() != 2:
        return None
    if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        arguments = list(arguments[0])
    if node.target is getattr and arguments[0] in ("T", "mT"):
        return source
    if node.target in _ATTRIBUTES and not arguments:  # the spelling of torch 2.15
        return source
    if node.target in ("t", torch.t, "adjoint", torch.adjoint) and not arguments:
        return source
    swaps = ("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims)
    if not all(isinstance(argument, int) for argument in arguments):
        return None
    if node.target in swaps and sorted(d % 2 for d in arguments) == [0, 1]:
        return source
    if node.target in ("permute", torch.permute) and [d % 2 for d in arguments] == [1, 0]:
        return source
    return None


def _expanded(node: Node) -> Node | None:
    """Return the matrix that a node repeats as a batch of views.

    Recognized are ``unsqueeze(0)``, ``expand``, ``expand_as``, ``broadcast_to`` and ``[None]``.
    """
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    source = node.args[0]
    if not isinstance(source, Node) or not is_tensor(source):
        return None
    shape, result = tensor_example(source).shape, tensor_example(node).shape
    same_matrix = tuple(shape[-2:]) == tuple(result[-2:]) and len(result) == 3
    if not same_matrix or not (len(shape) == 2 or shape[0] == 1):
        return None
    makers = ("expand", "unsqueeze", torch.unsqueeze, torch.broadcast_to, "expand_as")
    if node.target in makers or (node.target, node.args[1:]) == (operator.getitem, (None,)):
        return _first_matrix(source)
    return None


def _first_matrix(node: Node) -> Node | None:
    return node if tensor_example(node).dim() == 2 else _expanded(node)
