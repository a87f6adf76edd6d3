"""The tensor class that holds deferred logits: how they are computed, and their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from cce_inductor.deferred.memory import Memory, ViewOf
from cce_inductor.recipe.operation import Operation, leaves_of
from cce_inductor.torch_internals.tensors import forbid_memory


class DeferredTensor(Tensor):
    """The data of deferred logits.

    `tensor.DeferredLogits` is the class of all instances. It adds what PyTorch's functions do with
    one, which `overrides`, `dispatch` and `flatten` define for this class.

    Args:
        like: a tensor on the meta device with the same shape, strides and dtype.
        operation: computes the values.
        device: the device of the values.
        storage_offset: in elements.
        view_of: None if it is not a view of another deferred tensor.
    """

    _gradient_kind: ClassVar[type[Any]]
    """The class of its gradient, a `gradient.GradientTensor`."""

    _numbered_kind: ClassVar[type[Any]]
    """The class of logits whose values must not be read; see `row_gradients`."""

    _WHAT: ClassVar[str] = "deferred logits"
    """What warnings and texts call the values, in the plural."""

    _operation: Operation
    _memory: Memory
    _parts: tuple[tuple[Tensor, int | None], ...] = ()
    """What was stacked, if it is a stack, each part with its version; see `stacks`."""

    _over_rows: dict[bool, Operation | None]
    """A cache for `flatten.operation_for_graph`; the key is whether a gradient is required."""

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        operation: Operation,
        device: torch.device,
        storage_offset: int = 0,
        view_of: ViewOf | None = None,
    ) -> Self:
        self: Self = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=storage_offset,
            dtype=like.dtype,
            device=device,
        )
        forbid_memory(self)
        self._operation = operation
        self._memory = Memory(
            like, operation.without_gradient, self.is_inference(), cls._WHAT, view_of
        )
        self._over_rows = {}
        operation.keep_result_in(self._memory)
        return self

    @property
    def is_deferred(self) -> bool:
        """Whether the values have not been computed yet."""
        return self._memory.is_deferred

    @property
    def _is_as_recorded(self) -> bool:
        """Whether the operation still says what the values are. They may have been computed."""
        return not (self._memory.is_materialized or self._memory.root.is_materialized)

    def _values(self) -> Tensor:
        """Return the values as a plain tensor without gradient, which must not be modified."""
        return self._memory.values()

    def _materialize(self) -> Tensor:
        """Return the values as a plain tensor without gradient, which may be modified."""
        return self._memory.materialize()

    def _view(self, like: Tensor, operation: Operation, take: Callable[[Tensor], Tensor]) -> Self:
        """Return a view.

        Args:
            like: the same view of a tensor on the meta device.
            operation: makes the view.
            take: makes the view of a plain tensor.
        """
        offset = self.storage_offset() + like.storage_offset()
        with torch.inference_mode(self.is_inference()):
            return type(self)(like, operation, self.device, offset, ViewOf(self._memory, take))


def deferred_among(arguments: Any) -> list[DeferredTensor]:
    """Return the deferred tensors in a nested structure."""
    return [each for each in leaves_of(arguments) if isinstance(each, DeferredTensor)]
