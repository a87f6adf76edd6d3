"""The paths of a gradient from a fused loss to a projection, where nothing interferes.

Autograd itself says which operators it applies on the way: the logits are made once more from
tensors that stand in for the real ones, and a gradient without values is sent through the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce_inductor.deferred.autograd import deferred_product, with_strides
from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.deferred.dispatch import on_meta
from cce_inductor.deferred.gradient import (
    GradientTensor,
    Known,
    NoValuesError,
    Path,
    Paths,
    Recorder,
    sent_term,
)
from cce_inductor.deferred.tape import Call, Ref, replay
from cce_inductor.recipe.operation import Operation, project, strided
from cce_inductor.recipe.stale import Guarded
from cce_inductor.torch_internals.tensors import without_hooks_on_saved_tensors

aten = torch.ops.aten


class Description(NamedTuple):
    """A tensor that logits are computed from, without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Description:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def stand_in(self, number: int, *, is_multiplied: bool) -> Tensor:
        """Return a tensor in its place.

        Args:
            number: what makes it differ from others, if it is a number itself.
            is_multiplied: whether it is a matrix, which is never read and needs no memory. A large
                tensor is not given memory either.
        """
        if is_multiplied or math.prod(self.shape) > _LARGE:
            made = torch.zeros((), dtype=self.dtype).expand(self.shape)
        else:
            made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
            made.fill_(0 if self.shape else _UNUSUAL + number)
        return made.detach().requires_grad_(self.requires_grad)


_LARGE = 2**20
"""Tensors with more elements than this are replaced by expanded scalars."""

_UNUSUAL = 1_000_003
"""A number that no derivative contains."""


@functools.lru_cache(maxsize=256)
def find_paths(
    kinds: tuple[type[DeferredTensor], type[GradientTensor]],
    calls: tuple[Call, ...],
    tensors: tuple[Description, ...],
    ends: tuple[Ref, ...],
) -> Paths:
    """Return the paths from logits to their projections and operands.

    Args:
        kinds: the classes of deferred logits and of their gradients.
        calls: compute the logits.
        tensors: what the calls read.
        ends: the results that the loss reads.
    """
    products = [call for call in calls if call.function is project]
    multiplied: set[Any] = {ref for call in products for ref in call.args if isinstance(ref, Ref)}
    with torch.enable_grad(), without_hooks_on_saved_tensors():
        given = [
            each.stand_in(number, is_multiplied=Ref("tensor", number) in multiplied)
            for number, each in enumerate(tensors)
        ]
        functions: dict[Any, Any] = {
            project: functools.partial(deferred_product, kinds[0]),
            strided: with_strides,
        }
        values = replay(calls, given, functions)
        made = [values[Ref("call", n)] for n, c in enumerate(calls) if c.function is project]
        logits = [values[end] for end in ends]
        if not all(isinstance(each, DeferredTensor) for each in logits):
            return Paths(((),) * len(made), {})
        operands = {
            number: each
            for number, each in enumerate(given)
            if Ref("tensor", number) not in multiplied
        }
        reached = [each for each in (*made, *operands.values()) if each.requires_grad]
        sent = [
            kinds[1]._of(on_meta(each), (sent_term(Recorder(), position),), each.device)
            for position, each in enumerate(logits)
        ]
        try:
            with torch.autograd.set_detect_anomaly(False):
                found = torch.autograd.grad(logits, reached, sent, allow_unused=True)
        except NoValuesError:
            return Paths(((),) * len(made), {})
    gradients = {id(each): gradient for each, gradient in zip(reached, found, strict=True)}
    known = _known(logits, given)
    return Paths(
        tuple(_paths(gradients.get(id(each)), known) for each in made),
        {
            number: paths
            for number, each in operands.items()
            if (paths := _paths(gradients.get(id(each)), known, of_sum=True))
        },
    )


def _known(logits: Sequence[DeferredTensor], given: Sequence[Tensor]) -> list[Known]:
    """Return the stand-ins, each with the copies that the logits are computed from."""
    sources = {
        id(source): source
        for each in logits
        for operation in each._operation.history()
        for source in operation.sources
    }
    known = []
    for tensor in given:
        mine = Known.of(Guarded(tensor, "a stand-in"))
        copies = [Known.of(each) for each in sources.values() if each.origin in mine.origins]
        origins = (*mine.origins, *(origin for each in copies for origin in each.origins))
        known.append(Known(origins, mine.number))
    return known


def _paths(
    gradient: Tensor | None, known: Sequence[Known], *, of_sum: bool = False
) -> tuple[Path, ...]:
    """Return the path of each term of a gradient, none if they are not known."""
    terms = gradient._terms if isinstance(gradient, GradientTensor) else ()
    paths = [Path.of(_before_views(term) if of_sum else term, known) for term in terms]
    known_paths = tuple(path for path in paths if path is not None)
    return known_paths if len(known_paths) == len(terms) else ()


_AFTER_SUM = (
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten._to_copy.default,
)


def _before_views(term: Operation) -> Operation:
    """Return the sum that a gradient of an operand is a view or a cast of."""
    while term.function in _AFTER_SUM:
        (term,) = (each for each in term.arguments if isinstance(each, Operation))
    return term
