"""The memory of deferred logits: their values, once they have been computed.

It stands for a tensor's storage. Views share their parent's. It knows nothing of gradients, so
``logits.detach()`` keeps no autograd graph alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cce_inductor.deferred.cost import warn_of_cost
from cce_inductor.deferred.eager import few_rows
from cce_inductor.recipe.operation import Operation, strided


class ViewOf(NamedTuple):
    """Where the memory of a view comes from.

    Attributes:
        parent: the memory that it is a part of.
        take: returns the view of the parent's values.
    """

    parent: Memory
    take: Callable[[Tensor], Tensor]


class Memory:
    """Values that are computed when they are needed.

    A view of few rows computes its values alone, and takes them from the parent's as soon as these
    are computed. Before values can be modified, the memory is materialized, its parent's first.
    From then on `stored` is authoritative.

    Args:
        like: a tensor on the meta device with the same shape, strides and dtype.
        operation: computes the values.
        is_inference: whether they are a tensor of inference mode.
        what: what a warning calls the values, in the plural.
        view_of: None if this is not the memory of a view.

    Attributes:
        like: see above.
        stored: the values, None if they have not been computed.
        view_base: the values that views taken earlier refer to, if the tensor has been given
            others since, or another shape in place. None otherwise.
        is_materialized: whether `stored` is authoritative. It may have been modified, so it must
            not be computed again.
    """

    def __init__(
        self,
        like: Tensor,
        operation: Operation,
        is_inference: bool,
        what: str,
        view_of: ViewOf | None = None,
    ):
        self.operation = operation
        self.stored: Tensor | None = None
        self.view_base: Tensor | None = None
        self.is_materialized = False
        self.like = like
        self._is_inference = is_inference
        self._what = what
        self._view_of = view_of
        self._lock = threading.RLock()

    @property
    def root(self) -> Memory:
        """The memory that this is a view of, through all views between. Itself if not a view."""
        return self if self._view_of is None else self._view_of.parent.root

    @property
    def is_deferred(self) -> bool:
        """Whether the values have not been computed yet."""
        view_of = self._view_of
        return self.stored is None and (view_of is None or view_of.parent.is_deferred)

    @property
    def is_partial(self) -> bool:
        """Whether these are some of the logits of a projection that has not been computed."""
        history = self.operation.history()
        if not all(source.is_plain for each in history for source in each.sources):
            return False
        memories = [operation.memory() for operation in history[:-1]]
        known = any(memory is not None and not memory.is_deferred for memory in memories)
        return not known and self.like.numel() < history[0].size

    def values(self) -> Tensor:
        """Return the values as a plain tensor without gradient, which must not be modified."""
        with self.root._lock, torch.inference_mode(self._is_inference), torch.no_grad():
            view_of = self._view_of
            if view_of is not None and not self.is_materialized and self._is_read_from(view_of):
                parent = view_of.parent
                values = parent.values() if parent.view_base is None else parent.view_base
                return view_of.take(values)
            if self.stored is None:
                self.stored = self._compute()
            return self.stored

    def _is_read_from(self, view_of: ViewOf) -> bool:
        """Whether the values are taken from the parent's, rather than computed without the rest."""
        parent = view_of.parent
        is_whole = self.like.numel() == parent.like.numel()
        return is_whole or not parent.is_deferred or parent.is_materialized

    def materialize(self) -> Tensor:
        """Compute the values and make them authoritative.

        Returns:
            The values as a plain tensor without gradient. It may be modified: views share it.
        """
        with self.root._lock:
            if not self.is_materialized:
                if self._view_of is not None:
                    self._view_of.parent.materialize()
                values = self.values()
                # The values of a gradient may be those of others that come from the same loss.
                is_own = self._view_of is not None or self.operation.is_plain
                self.stored = values if is_own else values.clone()
                self.is_materialized = True
            assert self.stored is not None
            return self.stored

    def replace(self, values: Tensor) -> None:
        """Give the tensor other values. Views that were taken earlier keep the present ones."""
        if self.view_base is None:
            self.view_base = self.materialize()
        self.stored = values

    def _compute(self) -> Tensor:
        warn_of_cost(self.like, self._what)
        computed = few_rows(self.operation) if self.is_partial else None
        if computed is None:
            computed = self.operation.compute()
        if computed.stride() != self.like.stride():
            computed = strided(computed, self.like.stride())
        return computed
