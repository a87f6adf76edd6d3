"""Where in the user's source a graph node comes from, and how to write it in one line."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.torch_internals.callers import in_torch

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)


def location(node: Node) -> str | None:
    """Return ``file.py:line`` of the innermost frame outside PyTorch, None if it is unknown."""
    frames = [match.groups() for match in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    outside = [frame for frame in frames if not in_torch(frame[0])]
    return "{}:{}".format(*outside[-1]) if outside else None


def at(node: Node) -> str:
    """Return `` at file.py:line`` for the middle of a sentence, or nothing if it is unknown."""
    place = location(node)
    return f" at {place}" if place else ""


def operation(node: Node) -> str:
    """Return the name of a node's operation: ``view``, ``cross_entropy``, ``setitem``."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        if node.target is getattr:
            return str(node.args[1])
        name = getattr(node.target, "__name__", str(node.target))
        return name.removeprefix("numpy_")  # `.T` is numpy_T in torch 2.15
    return node.op


def describe(node: Node) -> str:
    """Return an operation with constants: ``view(-1, 32000)``, ``truediv(30.0)``, ``linear``."""
    first, *rest = node.args or (None,)
    shown = [] if isinstance(first, (Node, type(None))) else [_argument(first)]
    shown += [_argument(argument) for argument in rest if argument is not None]
    shown += [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    shown = [text for text in shown if not text.startswith("%") and not text.endswith("=%")]
    return operation(node) + (f"({', '.join(shown)})" if shown else "")


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        number = value.meta.get("example_value")
        return str(number) if isinstance(number, (torch.SymInt, torch.SymFloat)) else "%"
    if isinstance(value, slice):
        parts = ["" if part is None else _argument(part) for part in (value.start, value.stop)]
        return ":".join(parts) + ("" if value.step is None else f":{_argument(value.step)}")
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_argument(item) for item in value) + "]"
    return "..." if value is Ellipsis else repr(value)
