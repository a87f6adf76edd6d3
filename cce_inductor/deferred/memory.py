"""The numbers of deferred logits, once somebody has asked, as a storage has those of a tensor.

Views share it with what they are views of. It knows nothing of gradients, so that who keeps
``logits.detach()`` keeps no graph of autograd alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from cce_inductor.deferred import cost, eager
from cce_inductor.recipe.operation import Operation, strided


class Memory:
    """Numbers that are computed when they are asked for.

    Args:
        like: a tensor without numbers of the same shape, strides and dtype.
        operation: how they are computed.
        is_inference: whether they are a tensor of inference mode.
        parent: of which this is a view, None if it is none.
        of_parent: makes its numbers of the parent's.

    Attributes:
        stored: the numbers, if they are known.
        viewed: those in the shape that views were taken of, if that has changed in place.
        is_settled: whether the numbers are all that it is: they may have been changed.
    """

    def __init__(
        self,
        like: Tensor,
        operation: Operation,
        is_inference: bool,
        parent: Memory | None = None,
        of_parent: Callable[[Tensor], Tensor] = lambda parent: parent,
    ):
        self.operation = operation
        self.stored: Tensor | None = None
        self.viewed: Tensor | None = None
        self.is_settled = False
        self._like = like
        self._is_inference = is_inference
        self._parent = parent
        self._of_parent = of_parent
        self._lock = threading.RLock()

    @property
    def root(self) -> Memory:
        """That of the tensor that it is a view of, itself if it is none."""
        return self if self._parent is None else self._parent.root

    @property
    def is_deferred(self) -> bool:
        """Whether the numbers have not been computed yet."""
        parent = self._parent
        return self.stored is None and (parent is None or parent.is_deferred)

    @property
    def is_part(self) -> bool:
        """Whether there are more logits than these, none of which have been computed."""
        history = self.operation.history()
        memories = [operation.memory() for operation in history[:-1]]
        known = any(memory is not None and not memory.is_deferred for memory in memories)
        return not known and self._like.numel() < history[0].size

    def numbers(self) -> Tensor:
        """A plain tensor without gradient."""
        with self.root._lock, torch.inference_mode(self._is_inference), torch.no_grad():
            parent = self._parent
            if parent is not None and not self.is_settled and self._takes_from(parent):
                numbers = parent.numbers() if parent.viewed is None else parent.viewed
                return self._of_parent(numbers)
            if self.stored is None:
                self.stored = self._computed()
            return self.stored

    def _takes_from(self, parent: Memory) -> bool:
        """Whether its numbers are taken from the parent's, as those of few rows need not be."""
        whole = self._like.numel() == parent._like.numel()
        return whole or not parent.is_deferred or parent.is_settled

    def settle(self) -> Tensor:
        """The numbers, which from now on are what it is, in memory that its views share."""
        with self.root._lock:
            if not self.is_settled:
                if self._parent is not None:
                    self._parent.settle()
                self.stored = self.numbers()
                self.is_settled = True
            assert self.stored is not None
            return self.stored

    def _computed(self) -> Tensor:
        cost.tell(self._like)
        computed = eager.few_rows(self.operation) if self.is_part else None
        if computed is None:
            computed = self.operation.compute()
        if computed.stride() != self._like.stride():
            computed = strided(computed, self._like.stride())
        return computed
