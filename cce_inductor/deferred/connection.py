"""A fused function of deferred logits in autograd: its gradient goes to the logits, deferred.

The function is computed from the hidden state, the weight and so on. It gets aliases of them, whose
gradients do not go to the tensors themselves. Instead, `_Connect` sends a deferred gradient to the
logits, which takes the gradients of the aliases to the projection.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from cce_inductor.deferred.autograd import operation_with_gradient
from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.deferred.gradient import FusedBackward, GradientTensor, Known, sent_term
from cce_inductor.deferred.paths import Description, find_paths
from cce_inductor.deferred.tape import Ref, Tape
from cce_inductor.recipe.operation import Operation, project
from cce_inductor.recipe.stale import Guarded
from cce_inductor.torch_internals.tensors import (
    in_compiled_backward,
    keeps_graph,
    number_of_backward,
)


class Connection:
    """A fused function of deferred logits.

    Args:
        logits: its deferred arguments that require a gradient.
    """

    def __init__(self, logits: Sequence[DeferredTensor]):
        self._places = {id(each): place for place, each in enumerate(logits)}
        self._likes = [torch.empty(e.shape, dtype=e.dtype, device="meta") for e in logits]
        self._kinds = type(logits[0]), logits[0]._gradient_kind
        self._device = logits[0].device
        self._originals = [operation_with_gradient(each) for each in logits]
        self._call: _Call | None = None
        self._gradients: dict[int, Tensor] = {}
        self._number_of_backward = -1

    def operations_on_aliases(self, logits: Sequence[DeferredTensor]) -> list[Operation]:
        """Return how logits are computed, for one call of the function.

        The connection does not keep them, because the aliases refer to it.

        Args:
            logits: those that the connection was made for.
        """
        sources = [s for each in _history_of(self._originals) for s in each.sources]
        trained = {id(source): source for source in sources if source.requires_grad}
        tensors = [source.read().detach() for source in trained.values()]
        aliases: tuple[Tensor, ...] = _Connect.apply(self, len(logits), *logits, *tensors)
        made: dict[int, Operation] = {}
        by_source = dict(zip(trained, aliases, strict=True))
        operations = [each.with_tensors(by_source, made) for each in self._originals]
        numbers = {id(alias): number for number, alias in enumerate(aliases)}
        self._find_paths(operations, made, numbers)
        return operations

    def _find_paths(
        self, operations: Sequence[Operation], made: dict[int, Operation], aliases: dict[int, int]
    ) -> None:
        """Find out what the gradients of the aliases are gradients of.

        Args:
            operations: compute the logits from aliases.
            made: the operations on aliases, by the identity of the original.
            aliases: the number of each alias, by its identity.
        """
        sources: dict[int, Guarded] = {}

        def read(source: Guarded) -> Tensor:
            tensor = source.read()
            sources[id(tensor)] = source
            return tensor

        tape = Tape(read)
        ends: tuple[Ref, ...] = tuple(map(tape.argument, operations))
        places = {id(tensor): place for place, tensor in enumerate(tape.tensors)}
        by_call = {
            ref: each
            for each in _history_of(self._originals)
            if each.function is project and (ref := tape.ref_of(made[id(each)])) is not None
        }
        calls = sorted(by_call, key=lambda ref: ref.number)
        self._projections = [by_call[ref] for ref in calls]
        self._parts = [
            tuple(
                None if part is None or not part.requires_grad else places[id(part.tensor)]
                for part in made[id(projection)].args[:3]
            )
            for projection in self._projections
        ]
        self._known = [Known.of(sources[id(tensor)]) for tensor in tape.tensors]
        self._aliases = [aliases.get(id(tensor)) for tensor in tape.tensors]
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
        leaves, structure = tree_flatten((args, kwargs))
        places = [self._places.get(id(leaf)) for leaf in leaves]
        others = [
            None if place is not None else leaf for leaf, place in zip(leaves, places, strict=True)
        ]
        autocast = _autocast_now(self._device)
        self._call = _Call(function, others, places, structure, self._originals, autocast)
        by_node: dict[Any, dict[int, int]] = {}
        for number, result in enumerate(tree_leaves(results)):
            if isinstance(result, Tensor) and result.grad_fn is not None:
                by_node.setdefault(result.grad_fn, {})[result.output_nr] = number
        for node, numbers in by_node.items():
            node.register_prehook(functools.partial(self._note, numbers))

    def _note(self, numbers: dict[int, int], gradients: Sequence[Tensor | None]) -> None:
        """Note gradients of results.

        Args:
            numbers: the number of a result, by its number among the outputs of its node.
            gradients: of the node's outputs.
        """
        if self._number_of_backward != number_of_backward():
            self._number_of_backward = number_of_backward()
            self._gradients = {}
        for output, number in numbers.items():
            gradient = gradients[output]
            if gradient is not None:
                self._gradients[number] = gradient

    def send(self, gradients_of_aliases: Sequence[Tensor | None]) -> list[GradientTensor]:
        """Return the gradients of the logits."""
        call = self._call
        if call is None:
            raise RuntimeError(
                "cce_inductor: trying to backward through deferred logits a second time; pass "
                "retain_graph=True the first time"
            )
        backward = FusedBackward(
            self._projections,
            self._known,
            self._paths,
            [None if number is None else gradients_of_aliases[number] for number in self._aliases],
            self._parts,
            functools.partial(call.gradients, self._gradients),
        )
        if not keeps_graph():
            self._call = None
        return [
            self._kinds[1]._of(like, (sent_term(backward, position),), self._device)
            for position, like in enumerate(self._likes)
        ]


@dataclasses.dataclass
class _Call:
    """The call of a function of logits, to be repeated with computed logits.

    Attributes:
        function: the function.
        arguments: its arguments, None in the place of logits.
        places: for each argument, its position among the logits. None if it is none of them.
        structure: of the arguments.
        operations: compute the logits.
        autocast: returns a context with the state of autocast.
    """

    function: Callable[..., Any]
    arguments: list[Any]
    places: list[int | None]
    structure: TreeSpec
    operations: list[Operation]
    autocast: Callable[[], torch.autocast]

    def gradients(self, of_results: dict[int, Tensor]) -> list[Tensor]:
        """Return the gradients of the logits.

        Args:
            of_results: the gradients of the results, by their number.
        """
        computed = [each.without_gradient.compute() for each in self.operations]
        with torch.enable_grad(), self.autocast():
            logits = [each.detach().requires_grad_() for each in computed]
            given = [
                argument if place is None else logits[place]
                for argument, place in zip(self.arguments, self.places, strict=True)
            ]
            args, kwargs = tree_unflatten(given, self.structure)
            results = tree_leaves(self.function(*args, **kwargs))
            found = torch.autograd.grad(
                [results[number] for number in of_results],
                logits,
                list(of_results.values()),
                allow_unused=True,
            )
        pairs = zip(found, logits, strict=True)
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
        if in_compiled_backward():
            raise RuntimeError(
                "cce_inductor: compiled autograd was enabled after the loss of deferred logits was "
                "computed. Enable it before, with torch._dynamo.config.compiled_autograd = True, "
                'or pass defer_logits="never".'
            )
        if all(each is None for each in gradients):
            return (None,) * len(ctx.needs_input_grad)
        sent: Iterable[Tensor] = ctx.connection.send(gradients)
        if torch.is_grad_enabled():
            anchor = torch.empty((), requires_grad=True)
            sent = (_NoSecondDerivative.apply(anchor, each) for each in sent)
        return None, None, *sent, *(None for _ in gradients)


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
