"""How deferred logits are computed: a projection, and the operations since.

Operations are ATen's, as they reach ``__torch_dispatch__``, and refer to each other, so what is
derived from deferred logits costs nothing until it is computed.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from cce_inductor.recipe.stale import Guarded


def product(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``linear`` as autocast to `dtype` computes it: each operand is cast to it."""
    bias = None if linear_bias is None else linear_bias.to(dtype)
    with torch.autocast(input.device.type, enabled=False):
        return F.linear(input.to(dtype), linear_weight.to(dtype), bias)


def strided(input: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy with other strides."""
    return input.new_empty_strided(input.shape, strides).copy_(input)


_DEPTH = 25
"""Tensors that ask each other for their numbers before one is asked by itself."""


@dataclasses.dataclass(eq=False)
class Operation:
    """One operation and, through its arguments, those before it.

    Attributes:
        function: an ATen overload, `product`, `strided` or ``operator.getitem``.
        args, kwargs: its arguments; `Operation` or `Guarded` for tensors.
        nodes: what autograd calls those of its arguments that have a gradient.
        size: how many numbers a `product` makes.
        is_watched: whether somebody wants the gradient that passes here, so that it must.
        is_skipped: whether a fused reduction has taken its gradient past here.
        memory: the `Memory` of what it makes, None when that is gone.
        with_gradient: whose `without_gradient` it is, None if nobody's.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    nodes: tuple[Any, ...] = ()
    size: int = 0
    is_watched: bool = False
    is_skipped: bool = False
    memory: Callable[[], Any] = lambda: None
    with_gradient: Callable[[], Operation | None] = lambda: None

    def belongs_to(self, memory: Any) -> None:
        """Its result is what `memory` has, as long as that lives."""
        self.memory = self.without_gradient.memory = weakref.ref(memory)

    @functools.cached_property
    def without_gradient(self) -> Operation:
        """The same of tensors that have none, so that it keeps no graph of autograd alive."""
        if not self.trained:
            return self
        args, kwargs = tree_map_only(
            (Operation, Guarded), lambda a: a.without_gradient, (self.args, self.kwargs)
        )
        made = Operation(self.function, args, kwargs, size=self.size)
        made.with_gradient = weakref.ref(self)
        return made

    @functools.cached_property
    def is_real(self) -> bool:
        """Whether it reads only plain tensors: nothing waits while a compiler traces."""
        return all(argument.is_real for argument in self.arguments)

    @functools.cached_property
    def trained(self) -> bool:
        """Whether a gradient can pass through it to what it reads."""
        return any(
            argument.trained if isinstance(argument, Operation) else argument.requires_grad
            for argument in self.arguments
        )

    @functools.cached_property
    def arguments(self) -> list[Operation | Guarded]:
        """The tensors among its arguments."""
        return [
            a for a in tree_leaves((self.args, self.kwargs)) if isinstance(a, Operation | Guarded)
        ]

    def history(self, ends: Callable[[Operation], bool] = lambda _: False) -> list[Operation]:
        """All operations up to this one, each after those that it reads; what is before `ends` is
        left out."""
        found: dict[int, Operation] = {}
        pending = [self]
        while pending:
            operation = pending[-1]
            before = [] if ends(operation) else operation.arguments
            missing = [a for a in before if isinstance(a, Operation) and id(a) not in found]
            pending += missing
            if not missing:
                found[id(pending.pop())] = operation
        return list(found.values())

    def products(self) -> list[Operation]:
        """The projections that it is made of."""
        return [operation for operation in self.history() if operation.function is product]

    def compute(self) -> Any:
        """Its result, without gradient; what it reads is asked of those that still live,
        so that it is computed once."""

        living = {
            id(each): memory
            for each in self.history()
            if each is not self and (memory := each.memory()) and not memory.root.is_settled
        }
        for memory in list(living.values())[_DEPTH::_DEPTH]:
            memory.numbers()  # which asks those before it in turn
        history = self.history(lambda each: id(each) in living)
        last_reader = {id(a): each for each in history for a in each.arguments}
        results: dict[int, Any] = {}
        for each in history:
            memory = living.get(id(each))
            results[id(each)] = each._run(results) if memory is None else memory.numbers()
            for argument in each.arguments:
                if last_reader[id(argument)] is each:
                    results.pop(id(argument), None)
        return results[id(self)]

    def _run(self, results: dict[int, Any]) -> Any:
        args, kwargs = tree_map_only(
            (Operation, Guarded),
            lambda a: a.read() if isinstance(a, Guarded) else results[id(a)],
            (self.args, self.kwargs),
        )
        return self.function(*args, **kwargs)
