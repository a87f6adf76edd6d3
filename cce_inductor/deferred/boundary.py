"""Deferred logits as results of compiled functions.

The rewritten graph returns the hidden state in the place of logits (`rewriting.returned`). The
function around it makes `DeferredLogits` of that. `arguments` has the other direction.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from cce_inductor.deferred.arguments import (
    Compiled,
    Compiler,
    any_deferred,
    compile_for_any_backend,
    compile_for_operands,
    with_plain_arguments,
)
from cce_inductor.deferred.autograd import with_strides
from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.deferred.kept import keep
from cce_inductor.deferred.tensor import defer
from cce_inductor.deferred.type_tables import join_type_tables
from cce_inductor.recipe.operation import strided
from cce_inductor.recipe.sharded import is_freed_after_forward, is_sharded
from cce_inductor.reporting import reasons
from cce_inductor.rewriting.returned import Deferral, DeferredOutput
from cce_inductor.torch_internals.callers import ends_in_break, is_whole_graph
from cce_inductor.torch_internals.patches import wrap_backends
from cce_inductor.torch_internals.versions import saves_compiled


class _Compilations(threading.local):
    """The compilations in progress in this thread, innermost last."""

    def __init__(self) -> None:
        self.open: list[tuple[GraphModule, Deferral]] = []


_compilations = _Compilations()


def deferral_for(module: object) -> Deferral | None:
    """Return where the pass registers the logits that a graph need not return.

    Returns:
        None if the graph's caller expects all results.
    """
    compiled, deferral = _compilations.open[-1] if _compilations.open else (None, None)
    return deferral if compiled is module else None


def compile_with_deferral(
    compiler: Compiler, module: GraphModule, example_inputs: Sequence[Any]
) -> Compiled:
    """Return ``compiler(module, example_inputs)``, with deferred logits as arguments and results.

    Args:
        compiler: runs the pass with `deferral_for` the module that it is given.
        module: what Dynamo captured.
        example_inputs: its inputs.
    """
    if any_deferred(example_inputs):
        join_type_tables()
        return compile_for_operands(
            functools.partial(_compile_with_results, compiler), module, example_inputs
        )
    compiled = _compile_with_results(compiler, module, example_inputs)
    return compiled if is_whole_graph(module) else with_plain_arguments(compiled)


def _compile_with_results(
    compiler: Compiler, module: GraphModule, example_inputs: Sequence[Any]
) -> Compiled:
    deferral = Deferral(arguments=example_inputs, ends_in_break=ends_in_break(module))
    if saves_compiled():
        deferral.why_not = reasons.FUNCTION_IS_SAVED
    _compilations.open.append((module, deferral))
    try:
        compiled = compiler(module, example_inputs)
    finally:
        _compilations.open.pop()
    deferral.arguments = ()  # the compiled function must not keep them alive
    if deferral.outputs is None:
        return compiled
    join_type_tables()
    prepare_compilers()
    return _with_deferred_results(compiled, deferral, may_be_freed=is_sharded(example_inputs))


@functools.cache
def prepare_compilers() -> None:
    """Prepare all backends for deferred arguments. They can occur from now on."""
    wrap_backends(compile_for_any_backend)


def _with_deferred_results(
    compiled: Compiled, deferral: Deferral, *, may_be_freed: bool
) -> Compiled:
    outputs, keeps_stale = deferral.outputs, deferral.keeps_stale
    assert outputs is not None, "the graph returns what it did"

    def call(*arguments: Any) -> tuple[Any, ...]:
        results = compiled(*arguments)
        if any(isinstance(value, FakeTensor) for value in results):
            make = _computed  # a compiler runs the function for the shapes
        # The configuration of FSDP may change, and Dynamo does not guard it.
        elif may_be_freed and is_freed_after_forward(arguments):
            make = _computed_with_strides
        else:
            make = _kept if keeps_stale else _deferred
        return tuple(
            results[output] if isinstance(output, int) else make(output, arguments, results)
            for output in outputs
        )

    return call


def _computed(output: DeferredOutput, arguments: Sequence[Any], results: Sequence[Any]) -> Tensor:
    return output.make(arguments, results)


def _computed_with_strides(
    output: DeferredOutput, arguments: Sequence[Any], results: Sequence[Any]
) -> Tensor:
    logits, strides = output.make(arguments, results), output.formula.strides
    return logits if strides is None else strided(logits, strides)


def _deferred(output: DeferredOutput, arguments: Sequence[Any], results: Sequence[Any]) -> Tensor:
    logits, strides = output.make(arguments, results, project=defer), output.formula.strides
    return logits if strides is None else with_strides(logits, strides)


def _kept(output: DeferredOutput, arguments: Sequence[Any], results: Sequence[Any]) -> Tensor:
    logits = _deferred(output, arguments, results)
    if isinstance(logits, DeferredTensor):
        keep(logits)
    return logits
