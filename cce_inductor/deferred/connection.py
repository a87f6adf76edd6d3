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

from cce_inductor.deferred.autograd import hasten, operation_with_gradient
from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.deferred.dispatch import on_meta
from cce_inductor.deferred.gradient import (
    FusedBackward,
    GradientTensor,
    Known,
    NotByRowsError,
    Paths,
    sent_term,
)
from cce_inductor.deferred.paths import Description, find_paths
from cce_inductor.deferred.row_gradients import gradients_by_rows
from cce_inductor.deferred.rows import Rows, rows_of_logits, vocabulary_dim
from cce_inductor.deferred.tape import Ref, Tape
from cce_inductor.recipe.operation import Operation, leaves_of, map_arguments, project
from cce_inductor.recipe.stale import Guarded, is_plain
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
        self._logits = _Logits(
            kinds=(type(logits[0]), logits[0]._gradient_kind),
            likes=[torch.empty_like(on_meta(each)) for each in logits],
            device=logits[0].device,
            operations=[operation_with_gradient(each) for each in logits],
        )
        self._aliases: _Aliases | None = None
        self._call: _Call | None = None
        self._gradients: dict[int, Tensor] = {}
        self._number_of_backward = -1

    def operations_on_aliases(self, logits: Sequence[DeferredTensor]) -> list[Operation]:
        """Return how logits are computed, for one call of the function.

        The connection does not keep them, because the aliases refer to it.

        Args:
            logits: those that the connection was made for.
        """
        originals = self._logits.operations
        sources = [source for each in _history_of(originals) for source in each.sources]
        trained = {id(source): source for source in sources if source.requires_grad}
        tensors = [source.read().detach() for source in trained.values()]
        aliases: tuple[Tensor, ...] = _Connect.apply(self, len(logits), *logits, *tensors)
        for each in logits:
            hasten(each, aliases[0].grad_fn._sequence_nr())
        made: dict[int, Operation] = {}
        by_source = dict(zip(trained, aliases, strict=True))
        operations = [each.with_tensors(by_source, made) for each in originals]
        self._aliases = _Aliases.of(self._logits, operations, made, aliases)
        return operations

    def watched(
        self, results: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: Any
    ) -> Any:
        """Return the results of the function, whose gradients are noted in every backward.

        Small results are copied. A hook of the user's on the node that made one could otherwise
        change a gradient after it was noted.

        Args:
            results: of the fused function.
            function, args, kwargs: a call that returns the same results if the logits among its
                arguments are computed.
        """
        self._call = _Call(
            function,
            map_arguments(self._kept, (args, kwargs)),
            list(self._logits.operations),
            _autocast_now(self._logits.device),
        )
        given = {id(each) for each in leaves_of((args, kwargs))}
        tensors = [each for each in leaves_of(results) if isinstance(each, Tensor)]
        bases = [each._base for each in tensors if each._base is not None]
        exposed = {*given, *map(id, bases)}
        by_node: dict[Any, dict[int, int]] = {}
        copies: dict[int, Tensor] = {}
        for number, result in enumerate(tensors):
            if result.grad_fn is None or any(result._base is each for each in tensors):
                continue  # the gradient of a view goes to the result that it is a view of
            by_node.setdefault(result.grad_fn, {})[result.output_nr] = number
            if result.numel() <= _SMALL and result._base is None and id(result) not in exposed:
                copies[id(result)] = result.clone()
        for node, numbers in by_node.items():
            node.register_prehook(functools.partial(self._note, numbers))
        return map_arguments(lambda each: copies.get(id(each), each), results)

    def _kept(self, argument: Any) -> Any:
        """Return an argument of the function as a `_Call` has it."""
        place = self._places.get(id(argument))
        return _guarded(argument) if place is None else _Place(place)

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
        aliases, call, logits = self._aliases, self._call, self._logits
        if aliases is None or call is None:
            raise RuntimeError(
                "cce_inductor: trying to backward through deferred logits a second time; pass "
                "retain_graph=True the first time"
            )
        gradients = {number: _guarded(each) for number, each in self._gradients.items()}
        backward = FusedBackward(
            aliases.projections,
            aliases.known,
            aliases.paths,
            [
                None if number is None else gradients_of_aliases[number]
                for number in aliases.numbers
            ],
            aliases.parts,
            functools.partial(call.gradients, gradients),
            functools.partial(call.gradients_by_rows, gradients, logits),
        )
        self._gradients = {}
        if not keeps_graph():
            self._aliases, self._call = None, None
            logits.operations.clear()
        return [
            logits.kinds[1]._of(like, (sent_term(backward, position),), logits.device)
            for position, like in enumerate(logits.likes)
        ]


_SMALL = 2**16
"""The most elements of a tensor that is copied without a thought for memory."""


def _guarded(value: Any) -> Any:
    """Return a tensor that is read later, as a copy if it is small. Other values are returned."""
    if not isinstance(value, Tensor) or isinstance(value, DeferredTensor):
        return value
    if value.numel() <= _SMALL and is_plain(value):
        copy = value.detach().clone().requires_grad_(value.requires_grad)
        return Guarded(copy, "an argument of the loss", copy_of=value)
    return Guarded(value, "an argument of the loss")


@dataclasses.dataclass
class _Logits:
    """The deferred arguments of a function.

    Attributes:
        kinds: the classes of logits and of their gradients.
        likes: tensors on the meta device like their gradients.
        device: where they are.
        operations: compute them.
    """

    kinds: tuple[type[DeferredTensor], type[GradientTensor]]
    likes: list[Tensor]
    device: torch.device
    operations: list[Operation]


@dataclasses.dataclass(frozen=True)
class _Aliases:
    """What the gradients of aliases are gradients of; see `FusedBackward`.

    Attributes:
        projections, known, parts, paths: arguments of `FusedBackward`.
        numbers: the number of the alias for each tensor in `known`, None if it needs no gradient.
    """

    projections: list[Operation]
    known: list[Known]
    parts: list[tuple[int | None, ...]]
    paths: Paths
    numbers: list[int | None]

    @classmethod
    def of(
        cls,
        logits: _Logits,
        operations: Sequence[Operation],
        made: dict[int, Operation],
        aliases: Sequence[Tensor],
    ) -> _Aliases:
        """Return the description of aliases.

        Args:
            logits: the logits.
            operations: compute them from the aliases.
            made: the operations on aliases, by the identity of the original.
            aliases: the aliases.
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
            ref.number: each
            for each in _history_of(logits.operations)
            if (ref := tape.ref_of(made[id(each)])) is not None
            and tape.calls[ref.number].function is project
        }
        projections = [by_call[number] for number in sorted(by_call)]
        numbers = {id(alias): number for number, alias in enumerate(aliases)}
        descriptions = tuple(map(Description.of, tape.tensors))
        return cls(
            projections=projections,
            known=[Known.of(sources[id(tensor)]) for tensor in tape.tensors],
            parts=[
                tuple(
                    None if part is None or not part.requires_grad else places[id(part.tensor)]
                    for part in made[id(projection)].args[:3]
                )
                for projection in projections
            ],
            paths=find_paths(logits.kinds, tuple(tape.calls), descriptions, ends),
            numbers=[numbers.get(id(tensor)) for tensor in tape.tensors],
        )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for logits among the arguments of a function.

    Attributes:
        number: of the logits.
    """

    number: int


@dataclasses.dataclass(frozen=True)
class _Call:
    """The call of a function of logits, to be repeated with computed logits.

    Attributes:
        function: the function.
        arguments: its positional and keyword arguments: `Guarded` in the place of tensors, `_Place`
            in that of logits.
        operations: compute the logits.
        autocast: returns a context with the state of autocast.
    """

    function: Callable[..., Any]
    arguments: Any
    operations: list[Operation]
    autocast: Callable[[], torch.autocast]

    def gradients(self, of_results: dict[int, Guarded]) -> list[Tensor]:
        """Return the gradients of the logits.

        Args:
            of_results: the gradients of the results, by their number.

        Raises:
            StaleLogitsError: an argument has changed since the call.
        """
        computed = [each.without_gradient.compute() for each in self.operations]
        leaves = [each.detach().requires_grad_() for each in computed]
        found = self._run(leaves, of_results, {})
        pairs = zip(found, leaves, strict=True)
        return [torch.zeros_like(leaf) if each is None else each for each, leaf in pairs]

    def gradients_by_rows(self, of_results: dict[int, Guarded], logits: _Logits) -> list[Rows]:
        """Return the rows of the gradients of the logits.

        Args:
            of_results: the gradients of the results, by their number.
            logits: the logits.

        Raises:
            NotByRowsError: some rows cannot be computed without the others.
            StaleLogitsError: an argument has changed since the call.
        """
        others = [each for each in leaves_of(self.arguments) if isinstance(each, DeferredTensor)]
        others = list({id(each): each for each in others}.values())
        if not all(each.is_deferred for each in others):
            raise NotByRowsError
        trained = len(self.operations)
        operations = [*self.operations, *(each._operation for each in others)]
        likes = [each.detach().requires_grad_() for each in logits.likes]
        likes += map(on_meta, others)
        rows = [
            rows_of_logits(operation, like.shape, vocabulary_dim(operation, like.shape))
            for operation, like in zip(operations, likes, strict=True)
        ]

        def run(numbered: list[Tensor]) -> None:
            replaced = {id(each): n for each, n in zip(others, numbered[trained:], strict=True)}
            self._run(numbered[:trained], of_results, replaced)

        return gradients_by_rows(rows, likes, logits.kinds[0], logits.device, run)

    def _run(
        self,
        logits: Sequence[Tensor],
        of_results: dict[int, Guarded],
        others: dict[int, Tensor],
    ) -> tuple[Tensor | None, ...]:
        """Repeat the call with other logits, and return their gradients.

        Args:
            logits: in the place of those that the gradient is asked for.
            of_results: the gradients of the results, by their number.
            others: in the place of deferred arguments without a gradient, by their identity.
        """

        def value(argument: Any) -> Any:
            if isinstance(argument, _Place):
                return logits[argument.number]
            return others.get(id(argument), _read(argument))

        with torch.enable_grad(), self.autocast():
            args, kwargs = map_arguments(value, self.arguments)
            made = leaves_of(self.function(*args, **kwargs))
            results = [each for each in made if isinstance(each, Tensor)]
            return torch.autograd.grad(
                [results[number] for number in of_results],
                logits,
                list(map(_read, of_results.values())),
                allow_unused=True,
            )


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, Guarded) else value


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
