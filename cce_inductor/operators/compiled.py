"""The operators in eager code, on devices that have Triton templates.

Inductor compiles an operator for the properties of its arguments. When the number of rows changes,
it compiles the operator once more, for any number of rows.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cce_inductor.kernels.head import Head
from cce_inductor.kernels.names import NAMESPACE
from cce_inductor.operators import inductor
from cce_inductor.operators.fingerprint import tagged
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.symbols import Description, Size, Versions


def run_compiled(
    operator: str, input: Tensor, head: Head, arguments: Sequence[Any]
) -> list[Tensor] | None:
    """Return the results of an operator, computed by templates.

    Args:
        operator: the name of the operator.
        input: [rows, hidden], among the arguments.
        head: the head among the arguments.
        arguments: what the operator is called with.

    Returns:
        None if there are no templates for these arguments.
    """
    if _state.runs_compiled or not inductor.has_templates(input, head):
        return None
    rows = input.shape[0]
    # A size of 1 is never symbolic, nor is one that a size of the weight could be confused with.
    numbers = (rows,) if rows > 1 and rows not in head.linear_weight.shape else ()
    tensors: list[Tensor] = []

    def size(number: int) -> int | Size:
        return Size(0) if (number,) == numbers else number

    def described(tensor: Tensor) -> Description:
        tensors.append(tensor)
        return Description.of(tensor, size)._replace(requires_grad=False)

    properties = _mapped(Tensor, described, arguments)
    run = _versions(operator, properties, len(numbers)).get(numbers)
    if run is None:
        return None
    _state.runs_compiled = True
    try:
        return list(run(*tensors))
    finally:
        _state.runs_compiled = False


class _State(threading.local):
    """What this thread does.

    Attributes:
        runs_compiled: whether it runs a compiled operator. A part without a template is a call of
            the operator itself, which must not be compiled again.
    """

    runs_compiled = False


_state = _State()


def _mapped(kind: type[Any], function: Callable[[Any], Any], argument: Any) -> Any:
    """Return an argument with `function` applied to what is of a type, in lists as well."""
    if isinstance(argument, kind):
        return function(argument)
    if isinstance(argument, (list, tuple)):
        return tuple(_mapped(kind, function, each) for each in argument)
    return argument


@functools.lru_cache(maxsize=256)
def _versions(
    operator: str, arguments: tuple[Any, ...], symbols: int
) -> Versions[Callable[..., Any]]:
    """Return the compiled versions of an operator.

    Args:
        operator: the name of the operator.
        arguments: its arguments, with descriptions in the place of tensors.
        symbols: 1 if the number of rows may be symbolic, else 0.
    """

    def made(numbers: Sequence[Any], environment: ShapeEnv | None) -> Callable[..., Any] | None:
        try:
            return _compiled(operator, arguments, numbers, environment)
        except Exception:
            surprised("an operator runs its blockwise kernels, which are slower on a GPU")
            return None

    return Versions((None,) * symbols, made)


def _compiled(
    operator: str,
    arguments: tuple[Any, ...],
    numbers: Sequence[Any],
    environment: ShapeEnv | None,
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    function = getattr(getattr(torch.ops, NAMESPACE), operator).default
    graph = Graph()
    inputs: list[Tensor] = []

    def example(description: Description) -> Tensor:
        inputs.append(description.example(numbers))
        return inputs[-1]

    def placeholder(description: Description) -> torch.fx.Node:
        return graph.placeholder(f"tensor_{len(graph.nodes)}")

    with FakeTensorMode(shape_env=environment):
        results = function(*_mapped(Description, example, arguments))
    node = graph.call_function(function, _mapped(Description, placeholder, arguments))
    graph.output(tuple(graph.call_function(getitem, (node, at)) for at in range(len(results))))
    inductor.register()
    tag = tagged(torch.compiler.config.cache_key_tag)
    with (
        torch.no_grad(),
        torch.compiler.config.patch(cache_key_tag=tag),
        torch._inductor.config.patch(_OPTIONS),
    ):
        compiled: Callable[..., Any] = compile_fx(GraphModule({}, graph), inputs)
    return compiled


_OPTIONS = {"pre_grad_custom_pass": None, "triton.cudagraphs": False}
"""Options of Inductor: the pass has nothing to find, and the caller may capture a CUDA graph."""
