"""Inputs of graphs that Dynamo captured, and how to replace them.

For each input Dynamo records where it comes from (its source, for guards), and the symbols of its
dynamic sizes. An input that replaces others needs both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import AttrSource
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule, Node


def copy_graph(module: GraphModule) -> tuple[Graph, list[Node]]:
    """Return a copy of a graph, and its placeholders. Dynamo still needs those of the original."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for node, copied in copies.items():
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
    return graph, [copies[node] for node in module.graph.find_nodes(op="placeholder")]


def module_like(module: GraphModule, graph: Graph) -> GraphModule:
    """Return another graph as a module with what Dynamo noted on `module`."""
    inner = GraphModule(module, graph)
    inner.meta.update(module.meta)
    for name in ("compile_subgraph_reason", "_param_name_to_source"):
        if hasattr(module, name):
            setattr(inner, name, getattr(module, name))
    return inner


def use_symbols_of_part(tensor: Tensor, whole: Tensor, attribute: str) -> None:
    """Have a tensor compiled with the symbols of a part of an input.

    Args:
        tensor: the tensor that the compiler is given.
        whole: an example of the input, of a tensor subclass.
        attribute: the part's name in its ``__tensor_flatten__``.
    """
    context: Any = torch._guards.TracingContext.get()
    context.tensor_to_context[tensor] = context.tensor_to_context[whole].inner_contexts[attribute]


def add_part(whole: Node, example: Tensor, attribute: str, tensor: Tensor) -> Node:
    """Add a placeholder for a part of an input.

    Args:
        whole: the placeholder of the input, of a tensor subclass. It is added to this node's graph.
        example: what Dynamo was called with for the input.
        attribute: the part's name in its ``__tensor_flatten__``.
        tensor: the part of `example`.
    """
    node = whole.graph.placeholder(f"{whole.name}{attribute}")
    node.meta["example_value"] = whole.meta["example_value"].fake_mode.from_tensor(tensor)
    node._dynamo_source = AttrSource(whole._dynamo_source, attribute)
    use_symbols_of_part(tensor, example, attribute)
    return node


def disable_autocast(node: Node, device: str) -> None:
    """Disable autocast in a graph while one node runs."""
    with node.graph.inserting_before(node):
        disabled = node.graph.call_function(_enter_autocast, (device, None, False, None))
    with node.graph.inserting_after(node):
        node.graph.call_function(_exit_autocast, (disabled,))
