"""Reductions of deferred logits in eager code: the pass, run on a graph of one reduction.

The graph contains the operations that the logits are computed with, and then the reduction, as if
Dynamo had captured them. So all rules of `patterns` apply in eager code too. The rewritten graph is
cached for reductions of the same form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from cce_inductor.deferred.form import PYTORCH_ERRORS, Form
from cce_inductor.deferred.tape import Tape
from cce_inductor.patterns.language.tables import loss, reduction
from cce_inductor.recipe.operation import Operation, leaves_of, project
from cce_inductor.rewriting.mutation import storage_of
from cce_inductor.rewriting.returned import Deferral, DeferredOutput
from cce_inductor.rewriting.rewrite import rewrite, rewrite_reductions
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.symbols import Versions


def spelling(func: Any) -> Any | None:
    """Return Dynamo's call target for a function that reduces rows, None if no rule knows it."""
    name = getattr(func, "__name__", "")
    method = getattr(torch.Tensor, name, None) is func
    target = name if method else func
    known = target in loss or (target in reduction and func is not torch.Tensor.size)
    return target if known else None


def compute_reduction(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``target(*args, **kwargs)``, computed in blocks.

    Args:
        target: a result of `spelling`.
        args, kwargs: the arguments, with `Operation` in the place of deferred logits.

    Returns:
        NotImplemented if the pass cannot rewrite it.
    """
    others = [each for each in leaves_of((args, kwargs)) if isinstance(each, Tensor)]
    if not all(each.is_floating_point() or each.dtype in _INDEX_DTYPES for each in others):
        return NotImplemented
    tape = Tape()
    tape.record(target, args, kwargs)
    form, numbers = Form.of(tape)
    try:
        versions = _reduction(form)
    except TypeError:  # an argument is of a type that no rule knows, and cannot be hashed
        return NotImplemented
    fused = versions.get(numbers)
    return NotImplemented if fused is None else fused(*tape.tensors, *numbers)


_INDEX_DTYPES = (torch.int64, torch.bool)
"""Dtypes that every function accepts as indices or masks. Functions differ in the others."""


def few_rows(operation: Operation) -> Tensor | None:
    """Return the values of some rows of logits without computing the other rows.

    Returns:
        None if the pass cannot trace the rows back to rows of the hidden state.
    """
    return from_rows(operation, project)


def from_rows(operation: Operation, project: Callable[..., Tensor]) -> Tensor | None:
    """Return an operation's result as a function of the rows of the hidden state that it needs.

    Args:
        operation: the operation.
        project: multiplies those rows by the weight, like `recipe.operation.project`.

    Returns:
        None if the pass cannot trace the result back to rows of the hidden state.
    """
    tape = Tape()
    tape.argument(operation)
    form, numbers = Form.of(tape)
    rows = _rows(form).get(numbers)
    if rows is None:
        return None
    run, output = rows
    inputs = [*tape.tensors, *numbers]
    return output.make(inputs, run(*inputs), project)


Made = TypeVar("Made")


def _versions(
    form: Form,
    make: Callable[[Form, GraphModule, Callable[[Any], Any]], Made | None],
    otherwise: str,
) -> Versions[Made]:
    """Return what the pass makes of a form.

    Args:
        form: the form.
        make: runs the pass. It is given the graph of the form, and the type of the graph's result.
        otherwise: what happens if the pass fails, for the log.
    """

    def made(numbers: Any, environment: Any) -> Made | None:
        try:
            module, kind = form.graph(numbers, environment)
        except PYTORCH_ERRORS:
            return None  # on real values, the calls raise their own error, or none
        try:
            return make(form, module, kind)
        except Exception:
            surprised(otherwise)
            return None

    return Versions(form.terms, made)


@functools.lru_cache(maxsize=256)
def _reduction(form: Form) -> Versions[Callable[..., Any]]:
    """Return the functions that compute the result of the last call of a form."""
    return _versions(form, _fuse, "a reduction of deferred logits computes all of the logits")


def _fuse(form: Form, module: GraphModule, kind: Callable[[Any], Any]) -> Callable[..., Any] | None:
    """Return a graph as a function, None if the pass cannot rewrite all of its reductions."""
    if _returns_view(module.graph) or not rewrite_reductions(module.graph, form.options):
        return None
    run = _without_examples(module)
    return lambda *inputs: kind(run(*inputs))


@functools.lru_cache(maxsize=256)
def _rows(form: Form) -> Versions[tuple[Callable[..., Any], DeferredOutput]]:
    """Return the functions that compute the logits of the last call of a form.

    Each consists of a graph, and of how the logits are computed from its results.
    """
    return _versions(
        form, _select_rows, "some rows of deferred logits are computed together with all others"
    )


def _select_rows(
    form: Form, module: GraphModule, kind: Callable[[Any], Any]
) -> tuple[Callable[..., Any], DeferredOutput] | None:
    """Return what is computed instead of a graph's logits, None if the pass cannot defer them."""
    deferral = Deferral()
    rewrite(module, form.options, deferral=deferral)
    if deferral.outputs is None or isinstance(deferral.outputs[0], int):
        return None
    return _without_examples(module), deferral.outputs[0]


def _returns_view(graph: Graph) -> bool:
    """Whether the result shares the memory of logits, so that a change of either changes both."""
    output = graph.output_node()
    returned = {storage_of(node) for node in output.all_input_nodes}
    ends = {output, *output.all_input_nodes}
    return any(storage_of(node) in returned for node in graph.nodes if node not in ends)


def _without_examples(module: GraphModule) -> Callable[..., Any]:
    """Return the function of a graph, after removing what only the pass needs."""
    for node in module.graph.nodes:
        node.meta.clear()
    module.recompile()
    return module.forward
