"""The gradient of deferred logits, which is deferred as well.

A loss of deferred logits is fused with their projection, so its backward gives the gradients of the
hidden state and the weight, and never that of the logits. Autograd still passes a gradient along
the graph that the user's code has built, from the loss through views and casts to the projection.
That gradient is a `DeferredGradient`: a tensor that refers to the `FusedBackward` it comes from,
and that records what autograd's nodes do to it. When it reaches the projection as it would without
any interference, the projection returns the gradients that the fused backward has. When a hook or a
function of the user's has done something else to it, or reads it, its values are computed.

Glossary:

- *Term*: the chain of operators from the gradient that one loss sent out. A gradient is the sum of
  its terms, one for each loss. What a hook makes of a gradient, like its magnitude, is one term.
- *Path*: a term without its tensors, as the calls of a tape. Two terms with the same path and the
  same tensors have the same values.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.deferred.tape import Call, Ref, Tape
from cce_inductor.recipe.operation import Operation
from cce_inductor.recipe.stale import Guarded, Origin
from cce_inductor.torch_internals.tensors import keeps_graph, number_of_backward

aten = torch.ops.aten


class NoValuesError(Exception):
    """Values are needed where paths are being found."""


class NotByRowsError(Exception):
    """Some rows cannot be computed without the others."""


class Recorder:
    """Stands for the backward of a loss whose paths are being found."""


class SentGradient(Guarded):
    """The gradient that a fused loss sends to one of the logits that it reads.

    It stands at the beginning of a term, in the place of a tensor.

    Args:
        stand_in: an empty tensor, which identifies it on a tape.
        backward: where it comes from.
        position: of the logits among those that the loss reads.
    """

    __slots__ = ("backward", "position")

    def __init__(self, stand_in: Tensor, backward: FusedBackward | Recorder, position: int):
        super().__init__(stand_in, "the gradient of a loss")
        self.is_plain = False
        self.backward = backward
        self.position = position

    def read(self) -> Tensor:
        if isinstance(self.backward, Recorder):
            raise NoValuesError
        return self.backward.values()[self.position]


def sent_term(backward: FusedBackward | Recorder, position: int) -> Operation:
    """Return a gradient as a loss sends it, as a term."""
    return Operation(aten.detach.default, (SentGradient(torch.empty(0), backward, position),))


class GradientTensor(DeferredTensor):
    """The data of a deferred gradient; `tensor.DeferredGradient` is the class of all instances.

    Attributes:
        _terms: see the glossary. There are none in a gradient of zeros.
    """

    _WHAT = "gradients of deferred logits"
    _terms: tuple[Operation, ...]
    _has_parts: bool = False

    @classmethod
    def _of(cls, like: Tensor, terms: Iterable[Operation], device: torch.device) -> Self:
        """Return the sum of terms.

        Args:
            like: a tensor on the meta device with the same shape, strides and dtype.
            terms: the terms.
            device: the device of the values.
        """
        terms = tuple(terms)
        made = cls(like, _total(terms, like, device), device)
        made._terms = terms
        return made

    def _part(
        self, like: Tensor, terms: Iterable[Operation], take: Callable[[Tensor], Tensor]
    ) -> Self:
        """Return a view; see `DeferredTensor._view`."""
        terms = tuple(terms)
        made = self._view(like, _total(terms, like, self.device), take)
        made._terms = terms
        self._has_parts = True
        return made

    @property
    def _is_unused(self) -> bool:
        """Whether neither its values have been computed nor views of it have been taken."""
        return self._memory.stored is None and not self._has_parts

    def _become(self, other: GradientTensor) -> None:
        """Take the terms of another gradient in the place of no terms."""
        assert not self._terms, "only zeros can become something else"
        assert self._is_unused, "what was made of the zeros would still be zero"
        self._terms, self._operation = other._terms, other._operation
        self._memory.operation = other._operation


def _total(terms: Sequence[Operation], like: Tensor, device: torch.device) -> Operation:
    if len(terms) == 1:
        return terms[0]
    return Operation(sum_of, (terms, tuple(like.shape), like.dtype, device))


def sum_of(
    terms: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the sum of any number of terms."""
    total = torch.zeros(shape, dtype=dtype, device=device)
    for term in terms:
        total += term
    return total


class Known(NamedTuple):
    """A tensor that logits are computed from, by which it is recognized.

    Attributes:
        origins: the memory of the tensor, and that of the user's tensor if it is a copy.
        number: the tensor, if it is a number. None otherwise, so that it is not kept alive.
    """

    origins: tuple[Origin, ...]
    number: Tensor | None

    @classmethod
    def of(cls, source: Guarded) -> Known:
        tensor = source.tensor
        number = tensor if _is_number(tensor) else None
        return cls((Origin.of(tensor), source.origin), number)

    def is_(self, tensor: Tensor) -> bool:
        """Whether a tensor is this one: it has the same memory, or is the same number."""
        origin = Origin.of(tensor)
        if origin.pointer is not None and origin in self.origins:
            return True
        return self.number is not None and _is_number(tensor) and _are_equal(tensor, self.number)


class Path(NamedTuple):
    """What autograd does to a gradient on its way from a loss to a tensor.

    Attributes:
        calls: the operators.
        tensors: what each tensor that they read is: ``("sent", position)`` for a gradient that the
            loss sends, ``("known", position)`` for a tensor that the logits are computed from,
            ``("number", text)`` for any other number.
    """

    calls: tuple[Call, ...]
    tensors: tuple[tuple[str, int | str], ...]

    @classmethod
    def of(cls, term: Operation, known: Sequence[Known]) -> Path | None:
        """Return the path of a term.

        Args:
            term: the term.
            known: the tensors that the logits are computed from.

        Returns:
            None if it reads any other tensor.
        """
        tape, sources = _recorded(term)
        names: list[tuple[str, int | str]] = []
        for tensor, source in zip(tape.tensors, sources, strict=True):
            at = next((n for n, each in enumerate(known) if each.is_(tensor)), None)
            if isinstance(source, SentGradient):
                names.append(("sent", source.position))
            elif at is not None:
                names.append(("known", at))
            elif _is_number(tensor):
                names.append(("number", _text_of_number(tensor)))
            else:
                return None
        return cls(tuple(tape.calls), tuple(names))

    def describes(self, term: Operation, known: Sequence[Known]) -> bool:
        """Whether a term has this path, and so the values of the loss's gradient."""
        tape, sources = _recorded(term)
        if tuple(tape.calls) != self.calls or len(tape.tensors) != len(self.tensors):
            return False

        def is_named(name: tuple[str, Any], tensor: Tensor, source: Guarded | None) -> bool:
            kind, which = name
            if isinstance(source, SentGradient):
                return name == ("sent", source.position)
            if kind == "number":
                return _is_number(tensor) and _text_of_number(tensor) == which
            return kind == "known" and known[which].is_(tensor)

        return all(map(is_named, self.tensors, tape.tensors, sources))


IDENTITIES = (aten.alias.default, aten.detach.default)
"""Operators without an effect on values. Autograd applies them to what it saves."""


class _TermTape(Tape):
    """A tape without operators that have no effect on values."""

    def record(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ref:
        if function in IDENTITIES:
            ref: Ref = self.argument(args[0])
            return ref
        return super().record(function, args, kwargs)


def _recorded(term: Operation) -> tuple[Tape, list[Guarded | None]]:
    """Return a term on a tape, and the source of each tensor on it."""
    sources: dict[int, Guarded] = {}

    def read(source: Guarded) -> Tensor:
        tensor = source.tensor
        sources[id(tensor)] = source
        return tensor

    tape = _TermTape(read)
    tape.argument(term)
    return tape, [sources.get(id(tensor)) for tensor in tape.tensors]


def _is_number(tensor: Tensor) -> bool:
    return tensor.dim() == 0 and tensor.device.type == "cpu" and not tensor.requires_grad


def _text_of_number(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tensor.item()!r}"


def _are_equal(one: Tensor, other: Tensor) -> bool:
    same = one.dtype == other.dtype and torch.equal(one, other)
    return same and bool(one.signbit() == other.signbit())


class Paths(NamedTuple):
    """The paths of the gradients of one fused loss, where nothing interferes.

    There are several to one place if the logits are used several times, as in ``z * z.sigmoid()``.

    Attributes:
        projections: to each projection. There are none if no gradient reaches it.
        operands: to the sum over rows and columns that is the gradient of an operand, by the
            position of the operand.
    """

    projections: tuple[tuple[Path, ...], ...]
    operands: dict[int, tuple[Path, ...]]


class Gradients(NamedTuple):
    """The gradients of the tensors of a projection; None for those that need none."""

    input: Tensor | None
    linear_weight: Tensor | None
    linear_bias: Tensor | None


class Pool:
    """The gradients of one projection from all fused losses of a backward, added up.

    Each loss has gradients as large as the weight. They are added as soon as they are computed,
    so that they do not all exist at a time.

    Attributes:
        members: the numbers of the backwards that have been added.
    """

    def __init__(self) -> None:
        self.members: set[int] = set()
        self._gradients: Gradients | None = Gradients(None, None, None)

    @staticmethod
    def of(projection: Operation) -> Pool:
        """Return the pool of a projection in the backward that is in progress."""
        key = (number_of_backward(), id(projection))
        with _lock:
            pool = _pools.get(key)
            if pool is None:
                pool = _pools[key] = Pool()
            return pool

    def add(self, number: int, gradients: Gradients) -> None:
        assert self._gradients is not None, "the projection comes after all of its losses"
        self.members.add(number)
        self._gradients = Gradients(*map(added, self._gradients, gradients))

    def take(self) -> Gradients | None:
        """Return the sum, None if it was taken before.

        Without ``retain_graph`` it is given away, so that nothing else keeps it alive, and so that
        autograd need not copy it. Otherwise it is copied, because a hook may change what it gets.
        """
        gradients = self._gradients
        if not keeps_graph():
            self._gradients = None
        elif gradients is not None:
            gradients = Gradients(*(None if each is None else each.clone() for each in gradients))
        return gradients


def added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients, either of which may be missing."""
    if total is None or more is None:
        return more if total is None else total
    return total + more


_pools: WeakValueDictionary[tuple[int, int], Pool] = WeakValueDictionary()
"""By the number of the backward and the identity of the projection."""
_lock = threading.Lock()
_numbers = itertools.count()


class FusedBackward:
    """The backward of one fused loss: its gradients, and whose gradients they are.

    Args:
        projections: those that the logits are computed with. They are not kept alive.
        known: the tensors that the logits are computed from.
        paths: the paths of its gradients.
        gradients: the gradient of each tensor in `known`, None if it needs none.
        parts: for each projection, the positions in `known` of its input, weight and bias.
        compute: computes the gradient of each of the logits that the loss reads, with the logits.
        by_rows: prepares the computation of some rows of these gradients.

    Attributes:
        number: differs from that of every other.
    """

    def __init__(
        self,
        projections: Sequence[Operation],
        known: Sequence[Known],
        paths: Paths,
        gradients: Sequence[Tensor | None],
        parts: Sequence[tuple[int | None, ...]],
        compute: Callable[[], list[Tensor]],
        by_rows: Callable[[], list[Any]],
    ):
        self.number = next(_numbers)
        self._projections = [weakref.ref(each) for each in projections]
        self._known = known
        self._paths = paths
        self._gradients_of_operands = {at: gradients[at] for at in paths.operands}
        self._compute: Callable[[], list[Tensor]] | None = compute
        self._values: list[Tensor] = []
        self._by_rows: Callable[[], list[Any]] | None = by_rows
        self._rows: list[Any] = []
        self._lock = threading.Lock()
        self._pools = [Pool.of(each) for each in projections]
        for pool, positions in zip(self._pools, parts, strict=True):
            own = Gradients(*(None if at is None else gradients[at] for at in positions))
            pool.add(self.number, own)

    def values(self) -> list[Tensor]:
        """Return the gradient of each of the logits that the loss reads. They are kept."""
        with self._lock:
            if self._compute is not None:
                self._values, self._compute = self._compute(), None
                self._rows, self._by_rows = [], None
            return self._values

    def rows(self, position: int) -> Any:
        """Return the `rows.Rows` of the gradient of one of the logits that the loss reads.

        Raises:
            NotByRowsError: some rows cannot be computed without the others, or all have been.
        """
        with self._lock:
            if self._by_rows is None:
                raise NotByRowsError
            self._rows = self._rows or self._by_rows()
            return self._rows[position]

    def pool(self, projection: Operation) -> Pool | None:
        """Return the pool of a projection, None if the loss does not depend on it."""
        at = self._place(projection)
        return None if at is None else self._pools[at]

    def is_whole(self, terms: Sequence[Operation], projection: Operation) -> bool:
        """Whether terms that reach a projection are all of this loss's gradient there."""
        at = self._place(projection)
        return at is not None and self._describe(self._paths.projections[at], terms)

    def _place(self, projection: Operation) -> int | None:
        places = (at for at, each in enumerate(self._projections) if each() is projection)
        return next(places, None)

    def of_operand(self, terms: Sequence[Operation]) -> Tensor | None:
        """Return the gradient of the operand that sums are the gradient of, None if of none."""
        for position, paths in self._paths.operands.items():
            if self._describe(paths, terms):
                return self._gradients_of_operands[position]
        return None

    def _describe(self, paths: Sequence[Path], terms: Sequence[Operation]) -> bool:
        """Whether each of the terms has another one of the paths, and no path is left."""
        left = list(paths)
        for term in terms:
            path = next((each for each in left if each.describes(term, self._known)), None)
            if path is None:
                return False
            left.remove(path)
        return not left


def terms_by_source(
    terms: Iterable[Operation],
) -> dict[FusedBackward | Recorder | None, list[Operation]]:
    """Return terms by the backward that they come from, None for values from elsewhere."""
    found: dict[FusedBackward | Recorder | None, list[Operation]] = {}
    for term in terms:
        found.setdefault(_source_of(term), []).append(term)
    return found


def _source_of(term: Operation) -> FusedBackward | Recorder | None:
    """Return the backward that a term comes from, None for values that come from elsewhere."""
    return next(
        (
            source.backward
            for operation in term.history()
            for source in operation.sources
            if isinstance(source, SentGradient)
        ),
        None,
    )


def fused_gradients(
    gradient: GradientTensor, projection: Operation
) -> tuple[Gradients, Tensor | None] | None:
    """Return what the losses that a gradient comes from have for a projection that it reaches.

    Returns:
        Their gradients, and the part of the gradient of the logits that comes from elsewhere. None
        if something has interfered with the gradient on its way.
    """
    if not gradient._is_as_recorded:
        return None
    by_source = terms_by_source(gradient._terms)
    others = by_source.pop(None, [])
    backwards = [each for each in by_source if isinstance(each, FusedBackward)]
    if not all(each.is_whole(by_source[each], projection) for each in backwards):
        return None
    pool = backwards[0].pool(projection) if backwards else None
    if pool is None or pool.members != {each.number for each in backwards}:
        return None
    gradients = pool.take()
    if gradients is None:
        return None
    rest = None
    for term in others:
        rest = added(rest, term.compute())
    return gradients, rest
