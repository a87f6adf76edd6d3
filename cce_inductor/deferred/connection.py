"""A fused function of deferred logits in autograd: its gradient goes to the logits, deferred.

The function is computed from the hidden state, the weight and so on. It gets aliases of them, whose
gradients do not go to the tensors themselves. Instead, `_Connect` sends a deferred gradient to the
logits, which takes the gradients of the aliases to the projection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from cce_inductor.deferred.autograd import operation_with_gradient
from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.deferred.gradient import FusedBackward, GradientTensor, Known, sent_term
from cce_inductor.deferred.paths import Description, find_paths
from cce_inductor.deferred.tape import Ref, Tape
from cce_inductor.recipe.operation import Operation, project
from cce_inductor.recipe.stale import Guarded
from cce_inductor.torch_internals.tensors import in_compiled_backward, keeps_graph


class Connection:
    """A fused function of deferred logits.

    Args:
        logits: its deferred arguments that require a gradient.
    """

    def __init__(self, logits: Sequence[DeferredTensor]):
        self._operations = [operation_with_gradient(each) for each in logits]
        self._likes = [torch.empty(e.shape, dtype=e.dtype, device="meta") for e in logits]
        self._kinds = type(logits[0]), logits[0]._gradient_kind
        self._device = logits[0].device
        self._autocast = _autocast_now(self._device)
        self._places = {id(each): place for place, each in enumerate(logits)}
        self._gradients_of_results: dict[int, Tensor] = {}

    def aliased(self, logits: Sequence[DeferredTensor]) -> list[Operation]:
        """Return how logits are computed from aliases.

        Args:
            logits: those that the connection was made for.
        """
        history = _history_of(self._operations)
        sources = {
            id(source): source
            for each in history
            for source in each.sources
            if source.requires_grad
        }
        tensors = [source.read() for source in sources.values()]
        aliases = _Connect.apply(self, len(logits), *logits, *tensors)
        by_source = dict(zip(sources, aliases, strict=True))
        made: dict[int, Operation] = {}
        operations = [each.with_tensors(by_source, made) for each in self._operations]
        self._find_paths(operations, aliases, {id(e): made[id(e)] for e in history})
        return operations

    def _find_paths(
        self, operations: list[Operation], aliases: Sequence[Tensor], made: dict[int, Operation]
    ) -> None:
        read: dict[int, Guarded] = {}

        def reading(source: Guarded) -> Tensor:
            tensor = source.read()
            read[id(tensor)] = source
            return tensor

        tape = Tape(reading)
        ends: tuple[Ref, ...] = tuple(map(tape.argument, operations))
        places = {id(tensor): place for place, tensor in enumerate(tape.tensors)}
        by_id = {id(each): each for each in _history_of(self._operations)}
        by_call = {
            ref: by_id[old]
            for old, new in made.items()
            if new.function is project and (ref := tape.ref_of(new)) is not None
        }
        calls = sorted(by_call, key=lambda ref: ref.number)
        self._projections = [by_call[ref] for ref in calls]
        self._parts = [
            tuple(
                places[id(part.tensor)]
                if isinstance(part, Guarded) and part.requires_grad
                else None
                for part in made[id(by_call[ref])].args[:3]
            )
            for ref in calls
        ]
        self._known = [Known.of(read[id(tensor)]) for tensor in tape.tensors]
        self._alias_of_place = [
            next((n for n, alias in enumerate(aliases) if alias is tensor), None)
            for tensor in tape.tensors
        ]
        descriptions = tuple(map(Description.of, tape.tensors))
        self._paths = find_paths(self._kinds, tuple(tape.calls), descriptions, ends)

    def watch(
        self, results: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: Any
    ) -> None:
        """Note the gradients of the results in every backward.

        Args:
            results: of the fused function.
            function, args, kwargs: a call that returns the same results if the logits among its
                arguments are computed.
        """
        self._call = function, *tree_flatten((args, kwargs))
        for number, result in enumerate(tree_leaves(results)):
            if isinstance(result, Tensor) and result.requires_grad:
                result.register_hook(functools.partial(self._note, number))

    def _note(self, number: int, gradient: Tensor) -> None:
        self._gradients_of_results[number] = gradient

    def send(self, gradients_of_aliases: Sequence[Tensor | None]) -> list[GradientTensor]:
        """Return the gradients of the logits."""
        backward = FusedBackward(
            self._projections,
            self._known,
            self._paths,
            [None if n is None else gradients_of_aliases[n] for n in self._alias_of_place],
            self._parts,
            functools.partial(self._compute, self._gradients_of_results),
        )
        self._gradients_of_results = {}
        return [
            self._kinds[1]._of(like, (sent_term(backward, position),), self._device)
            for position, like in enumerate(self._likes)
        ]

    def _compute(self, gradients: dict[int, Tensor]) -> list[Tensor]:
        """Return the gradients of the logits, from the unfused function of computed logits.

        Args:
            gradients: of the function's results.
        """
        function, arguments, structure = self._call
        logits = [each.without_gradient.compute() for each in self._operations]
        with torch.enable_grad(), self._autocast():
            leaves = [each.detach().requires_grad_() for each in logits]
            computed = [
                leaves[self._places[id(each)]] if id(each) in self._places else each
                for each in arguments
            ]
            args, kwargs = tree_unflatten(computed, structure)
            results = tree_leaves(function(*args, **kwargs))
            found = torch.autograd.grad(
                [results[number] for number in gradients],
                leaves,
                list(gradients.values()),
                allow_unused=True,
            )
        pairs = zip(found, leaves, strict=True)
        return [torch.zeros_like(leaf) if each is None else each for each, leaf in pairs]


class _Connect(torch.autograd.Function):
    """Makes aliases of tensors, whose gradients become that of logits."""

    @staticmethod
    def forward(
        ctx: Any, connection: Connection, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.connection = connection
        ctx.set_materialize_grads(False)
        return tensors[count:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        connection, sources = ctx.connection, [None] * len(gradients)
        count = len(ctx.needs_input_grad) - 2 - len(sources)
        if in_compiled_backward():
            raise RuntimeError(_BACKWARD_IS_COMPILED)
        if connection is None:
            raise RuntimeError(
                "cce_inductor: a second backward through deferred logits needs retain_graph=True "
                "in the first one, as any second backward does."
            )
        sent: Sequence[Tensor | None]
        if all(each is None for each in gradients):
            sent = [None] * count
        else:
            sent = connection.send(gradients)
            if torch.is_grad_enabled():
                anchor = torch.empty((), requires_grad=True)
                sent = [_NoSecondDerivative.apply(anchor, each) for each in sent]
        if not keeps_graph():
            ctx.connection = None
        return None, None, *sent, *sources


_BACKWARD_IS_COMPILED = (
    "cce_inductor: compiled autograd was enabled after the loss of deferred logits was computed. "
    "Enable it before, with torch._dynamo.config.compiled_autograd = True, or pass "
    'defer_logits="never".'
)


class _NoSecondDerivative(torch.autograd.Function):
    """The identity. Its backward is an error."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, gradient: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise RuntimeError(
            "cce_inductor: the gradient of logits whose loss is fused has no second derivative; "
            'with defer_logits="never" the logits are stored, and it has one.'
        )


def _is_trained(source: Guarded | None) -> bool:
    return source is not None and source.requires_grad


def _history_of(operations: Sequence[Operation]) -> list[Operation]:
    """Return all operations that some depend on, each once and after those that it reads."""
    return list({id(each): each for last in operations for each in last.history()}.values())


def _autocast_now(device: torch.device) -> Callable[[], torch.autocast]:
    """Return a function that makes a context with the present state of autocast."""
    return functools.partial(
        torch.autocast,
        device.type,
        torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
    )
