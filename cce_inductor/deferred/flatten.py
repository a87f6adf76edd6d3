"""Deferred logits as an argument of a compiled function.

`torch.compile` knows a tensor subclass by the plain tensors it consists of ("traceable wrapper
subclass"): here the hidden state, the weight, the bias and operands. It makes the wrapper
again from their symbolic counterparts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cce_inductor.deferred import eager, lazy
from cce_inductor.deferred.autograd import deferred_product, fusable_operation
from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.deferred.tape import Call, Ref, Tape, replay
from cce_inductor.recipe.operation import Operation
from cce_inductor.recipe.stale import StaleLogitsError

PREFIX = "_tensor"
"""Names of the plain tensors: ``_tensor0``, ``_tensor1``, ..."""


def operation_for_graph(logits: DeferredTensor) -> Operation | None:
    """Return how logits are computed, in a form that does not depend on the number of rows.

    A compiled function that contains the operation then serves every length. For a slice of the
    rows, for example, the slice is applied to the hidden state, outside of the function.

    Returns:
        None if the values are needed.

    Raises:
        StaleLogitsError: a tensor that they are computed from has changed.
    """
    # The function may enable gradients itself, so the operation has them in any case.
    operation = fusable_operation(logits, needs_gradient=True)
    if operation is None or not depends_on_sizes(operation):
        return operation
    if operation.requires_grad not in logits._over_rows:
        logits._over_rows[operation.requires_grad] = over_rows(type(logits), operation)
    return logits._over_rows[operation.requires_grad]


def depends_on_sizes(operation: Operation) -> bool:
    """Whether the calls of an operation and those before it depend on the number of rows."""
    return any(map(lazy.depends_on_sizes, operation.history()))


def over_rows(kind: type[DeferredTensor], operation: Operation) -> Operation | None:
    """Return an operation as a function of the rows of the hidden state that it needs.

    Returns:
        None if the pass cannot trace the result back to rows of the hidden state.
    """
    made = eager.from_rows(
        operation, lambda input, *others: deferred_product(kind, input.contiguous(), *others)
    )
    return made._operation if isinstance(made, DeferredTensor) else None


def flatten(logits: DeferredTensor) -> tuple[list[str], tuple[Call, ...] | None]:
    """Set the plain tensors that logits are computed from as attributes.

    Returns:
        The names of the attributes, and the calls that compute the logits. If the values are
        needed, they are the only attribute, and there are no calls.
    """
    try:
        operation = operation_for_graph(logits)
        if operation is None:
            logits.__dict__[f"{PREFIX}0"] = logits._materialize()
            return [f"{PREFIX}0"], None
    except StaleLogitsError:  # a function that only reads the shape must not raise it
        operation = logits._operation
    tape = Tape(lambda guarded: guarded.tensor)
    tape.argument(operation)
    names = [f"{PREFIX}{number}" for number in range(len(tape.tensors))]
    logits.__dict__.update(zip(names, tape.tensors, strict=True))
    return names, tuple(tape.calls)


def unflatten(
    inner: dict[str, Tensor],
    calls: tuple[Call, ...] | None,
    outer_size: Sequence[int],
    outer_stride: Sequence[int],
) -> Tensor:
    """Return logits that are computed from other tensors in the same way."""
    tensors = [tensor.detach() for tensor in inner.values()]
    made: Tensor = tensors[0]
    if calls is not None:
        made = replay(calls, tensors)[Ref("call", len(calls) - 1)]
    if made.stride() != tuple(outer_stride) and made.shape == outer_size:
        made = made.new_empty_strided(outer_size, outer_stride)
    return made
