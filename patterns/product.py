"""What all projections share: logits from the two operands of a matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .logits import Logits
from .rules import Site, is_tensor, tensor_example

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def product(
    site: Site, input: Any, weight: Any, *, transposed: bool, bias: Any = None
) -> Logits | None:
    """``input @ weight.T + bias``, or with `weight` as it is if `transposed`.

    None when the operation makes no logits: another rank, a dtype without gradients.
    """
    result = site.example
    if not (is_tensor(input) and is_tensor(weight)) or result.dtype not in COMPUTE_DTYPES:
        return None
    if tensor_example(weight).dim() != 2 or tensor_example(input).dim() < 1:
        return None
    if not all(isinstance(size, int) for size in tensor_example(weight).shape):
        site.unsupported("its weight has a dynamic size")
    if bias is not None and (
        not is_tensor(bias) or tensor_example(bias).shape != result.shape[-1:]
    ):
        return None
    for operand in filter(None, (input, weight, bias)):
        if is_traceable_wrapper_subclass(tensor_example(operand)):
            site.unsupported(f"its operand is a {type(tensor_example(operand)).__name__}")
    absorbed = []
    while (source := _transpose_of(weight)) is not None:
        absorbed.append(weight)
        weight, transposed = source, not transposed
    return Logits(
        projection=site.node,
        input=input,
        linear_weight=weight,
        transposed=transposed,
        linear_bias=bias,
        vocabulary_dim=result.dim() - 1,
        compute_dtype=result.dtype,
        absorbed=tuple(absorbed),
    )


_ATTRIBUTES = (torch.ops.aten.numpy_T, torch.ops.aten.mT)


def _transpose_of(node: Node) -> Node | None:
    """The argument of ``.T``, ``.t()``, ``.mT``, ``transpose`` or ``permute`` of a matrix."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    source, *arguments = node.args
    if not isinstance(source, Node) or not is_tensor(source) or node.kwargs:
        return None
    if tensor_example(source).dim() != 2:
        return None
    if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        arguments = list(arguments[0])
    if node.target is getattr and arguments[0] in ("T", "mT"):
        return source
    if node.target in _ATTRIBUTES and not arguments:  # how torch 2.15 writes them
        return source
    if node.target in ("t", torch.t, "adjoint", torch.adjoint) and not arguments:
        return source
    swaps = ("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims)
    if node.target in swaps and sorted(d % 2 for d in arguments) == [0, 1]:
        return source
    if node.target in ("permute", torch.permute) and [d % 2 for d in arguments] == [1, 0]:
        return source
    return None
