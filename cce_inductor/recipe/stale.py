"""Tensors that are read later, and the error if they have changed by then."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cce_inductor.torch_internals.tensors import detached, version_of

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StaleLogitsError(RuntimeError):
    """The values of deferred logits are needed, but a tensor they are computed from has changed."""


class Origin(NamedTuple):
    """Which memory a tensor is, so that two tensors can be compared without their elements.

    Two tensors that exist at the same time have the same values if their origins are equal.
    """

    pointer: int | None
    version: int | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Origin:
        pointer = tensor.data_ptr() if is_plain(tensor) else None
        return cls(pointer, version_of(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype)


class Guarded:
    """A tensor that is read later, with evidence that it has not changed.

    The evidence is PyTorch's version counter, the address, and a sample of the elements for code
    that writes to memory without counting (``p.data``, fused optimizers). No sample is kept of the
    result of an operation, which no optimizer has access to. A tensor of inference mode has no
    version counter, so all of its elements are kept.

    Args:
        tensor: the tensor.
        name: what the error calls it.
        copy_of: the user's tensor, if `tensor` is a copy of it.

    Attributes:
        is_plain: see the glossary of `recipe`.
        origin: describes the user's tensor, see `Origin`.
        requires_grad: whether the tensor required a gradient when this was created.
    """

    __slots__ = (
        "_copy_of",
        "_pointer",
        "_sample",
        "_tensor",
        "_version",
        "is_plain",
        "name",
        "origin",
        "requires_grad",
    )

    def __init__(self, tensor: Tensor, name: str, copy_of: Tensor | None = None):
        self.origin = Origin.of(tensor if copy_of is None else copy_of)
        self._copy_of = copy_of  # so that no other tensor gets its address
        self.name = name
        self._read_from(tensor)

    def _read_from(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.requires_grad = tensor.requires_grad
        self.is_plain = is_plain(tensor)
        self._version = version_of(tensor)
        self._pointer = tensor.data_ptr() if self.is_plain else None
        is_exposed = self.is_plain and (tensor.is_leaf or tensor._is_view())
        self._sample = _sample(tensor) if is_exposed else None

    @property
    def without_gradient(self) -> Guarded:
        """The same tensor, detached."""
        if not self.requires_grad:
            return self
        other = copy.copy(self)
        other._tensor, other.requires_grad = detached(self._tensor), False
        return other

    def with_tensor(self, tensor: Tensor) -> Guarded:
        """The same evidence for another tensor, which shares the memory of this one."""
        other = copy.copy(self)
        other._tensor = tensor
        return other

    def keep(self, changing: set[int], copies: dict[Origin, Tensor]) -> None:
        """Read a copy from now on, if the tensor is about to change.

        A tensor that requires a gradient is not copied: its gradient could not reach the original.

        Args:
            changing: the addresses of the storages that are about to change.
            copies: those that have been made, by their origin. One that is made is added.
        """
        tensor = self._tensor
        if self.requires_grad or not self.is_plain or self._change() is not None:
            return
        if tensor.untyped_storage().data_ptr() in changing:
            origin = Origin.of(tensor)
            if origin not in copies:
                copies[origin] = tensor.detach().clone()
            self._read_from(copies[origin])

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now. It requires a gradient if it did at first."""
        if self._tensor.requires_grad and not self.requires_grad:
            self._tensor = detached(self._tensor)
        return self._tensor

    def read(self) -> Tensor:
        """Return the tensor.

        Raises:
            StaleLogitsError: the tensor has changed.
        """
        how = self._change()
        if how is not None:
            raise StaleLogitsError(
                "cce_inductor: deferred logits, or their gradient, have not been computed, and "
                f"{self.name}, which they are computed from, {how} since. Read "
                'them before that, or pass stale_logits="keep", which copies what an optimizer '
                'changes, or defer_logits="never", with which the compiled function computes them.'
            )
        return self.tensor

    def _change(self) -> str | None:
        tensor = self._tensor
        if self._version is not None and tensor._version != self._version:
            return "was changed in place (for example by an optimizer step)"
        if self._pointer is not None and tensor.data_ptr() != self._pointer:
            return "was moved or freed (for example by FSDP, after the backward)"
        if self._sample is not None and not _is_capturing(tensor):
            with _disable_current_modes():  # a compiler's fake tensors cannot be compared
                now = _sample(tensor)
                if now is None or not torch.equal(now, self._sample):
                    return "was written to (for example by an optimizer step)"
        return None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is plain: see the glossary of `recipe`."""
    kind = type(tensor)
    return kind is Tensor or (
        isinstance(tensor, torch.nn.Parameter)
        and kind.__torch_function__ is torch.nn.Parameter.__torch_function__
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def _sample(tensor: Tensor) -> Tensor | None:
    """Return the bits of some elements, at least one of each row and column of a matrix.

    Returns:
        None if the elements cannot be read without copying the tensor.
    """
    tensor = tensor.detach()
    if tensor.numel() == 0 or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return None
    flat = tensor.as_strided((tensor.numel(),), (1,))
    is_whole = tensor.is_inference() or tensor.dim() < 2
    step = 1 if is_whole else max(tensor.shape[-1] - 1, 1)
    return flat[::step].clone().view(_BITS[tensor.element_size()])


def _is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, during which values cannot be compared."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
