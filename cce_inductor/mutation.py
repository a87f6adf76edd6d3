"""Which tensors a graph node changes in place.

The graph before autograd is not functional: `add_`, `+=`, `x[i] = v` and ``out=`` change tensors
that other nodes hold. Moving a read past such a node would change what it reads.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .patterns import example

IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in [
        "iadd",
        "iand",
        "iconcat",
        "ifloordiv",
        "ilshift",
        "imatmul",
        "imod",
        "imul",
        "ior",
        "ipow",
        "irshift",
        "isub",
        "itruediv",
        "ixor",
        "setitem",
    ]
)

UNKNOWN = object()
"""Stands for a storage that may be any."""


def storage_of(node: Node) -> object:
    """An identity that tensors share with their views, `UNKNOWN` if the graph does not say."""
    return storage_key(example(node))


def storage_key(value: object) -> object:
    """The same for an example value."""
    if not isinstance(value, torch.Tensor):
        return UNKNOWN
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a tensor without storage
        return UNKNOWN


def mutated_storages(node: Node) -> Iterator[object]:
    """The storages that the node changes in place; none for almost every node."""
    for argument in _mutated_arguments(node):
        yield storage_of(argument)


def _mutated_arguments(node: Node) -> Iterator[Node]:
    if node.op == "call_method" and _named_in_place(str(node.target)):
        yield from _nodes(node.args[:1])
    elif node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            if _subgraph_mutates(node) or "mutation" in target.name():
                yield from node.all_input_nodes
        elif isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable:
                yield from node.all_input_nodes
        elif (
            target in IN_PLACE_OPERATORS
            or _is_inplace(node)
            or _named_in_place(getattr(target, "__name__", ""))
        ):
            yield from _nodes(node.args[:1])
        if "out" in node.kwargs:
            yield from _nodes((node.kwargs["out"],))


def _named_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_inplace(node: Node) -> bool:
    """Whether ``inplace=True`` is among the arguments, by name or by position."""
    if node.kwargs.get("inplace") is True:
        return True
    if len(node.args) < 2 or not any(argument is True for argument in node.args[1:]):
        return False
    try:
        signature = inspect.signature(node.target)
        return signature.bind(*node.args, **node.kwargs).arguments.get("inplace") is True
    except (TypeError, ValueError):  # a builtin without signature
        return False


def _subgraph_mutates(node: Node) -> bool:
    module = node.graph.owning_module
    for argument in node.all_input_nodes:
        if argument.op != "get_attr" or module is None:
            continue
        subgraph = getattr(module, str(argument.target), None)
        if isinstance(subgraph, GraphModule) and any(
            True for inner in subgraph.graph.nodes for _ in _mutated_arguments(inner)
        ):
            return True
    return False


def _nodes(arguments: object) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(arguments, found.append)
    return found


_FUNCTIONAL = {
    getattr(operator, f"i{name}"): getattr(operator, f"{name}_" if name in ("and", "or") else name)
    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"]
}


def functional(function: Callable[..., Any]) -> Callable[..., Any]:
    """What an in-place operator of Python computes, which a number cannot be asked to change;
    any other function is itself."""
    return _FUNCTIONAL.get(function, function)
