"""A tensor that will be read later, and whether it is still what it was."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cce_inductor.torch_internals.tensors import detached

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StaleLogitsError(RuntimeError):
    """Deferred logits were looked at after what they are computed from had changed."""


class Guarded:
    """A tensor and how to tell that it changed.

    What PyTorch changes in place counts versions. Those who write to memory themselves (``p.data``,
    fused optimizers) do not, so a sample is kept as well, but of what a compiled function has made
    for itself. Tensors of inference mode count nothing: all of one is kept.

    Args:
        tensor: what will be read.
        name: what the error calls it.

    Attributes:
        is_real: whether it has numbers in memory of its own, as those of compilers have not.
        requires_grad: whether it did when this was made.
    """

    __slots__ = ("_pointer", "_sample", "_tensor", "_version", "is_real", "name", "requires_grad")

    def __init__(self, tensor: Tensor, name: str):
        self._tensor = tensor
        self.name = name
        self.requires_grad = tensor.requires_grad
        self.is_real = real = has_memory(tensor)
        self._version = None if tensor.is_inference() else tensor._version
        self._pointer = tensor.data_ptr() if real else None
        others = real and (tensor.is_leaf or tensor._is_view())
        self._sample = _sample(tensor) if others else None

    @property
    def without_gradient(self) -> Guarded:
        """The same with a tensor that has none."""
        if not self.requires_grad:
            return self
        other = copy.copy(self)
        other._tensor, other.requires_grad = detached(self._tensor), False
        return other

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now, with the gradient that it had."""
        if self._tensor.requires_grad and not self.requires_grad:
            self._tensor = detached(self._tensor)
        return self._tensor

    def read(self) -> Tensor:
        """The tensor.

        Raises:
            StaleLogitsError: it is not what it was.
        """
        how = self._change()
        if how is not None:
            raise StaleLogitsError(
                "cce_inductor: these logits were returned by a compiled function without having "
                f"been computed, and {self.name}, which they are computed from, {how} since. Look "
                'at them before that, or let the function compute them: defer_logits="never".'
            )
        return self.tensor

    def _change(self) -> str | None:
        tensor = self._tensor
        if self._version is not None and tensor._version != self._version:
            return "was changed in place (by an optimizer step, say)"
        if self._pointer is not None and tensor.data_ptr() != self._pointer:
            return "was moved or freed (by FSDP, say, after the backward)"
        if self._sample is not None and not _is_capturing(tensor):
            with _disable_current_modes():  # a compiler may be the one who asks
                now = _sample(tensor)
                if now is None or not torch.equal(now, self._sample):
                    return "was written to (by an optimizer step, say)"
        return None


def has_memory(tensor: Tensor) -> bool:
    """Whether it is a tensor like any other: of no class that changes what functions do."""
    kind = type(tensor)
    return kind is Tensor or (
        isinstance(tensor, torch.nn.Parameter)
        and kind.__torch_function__ is torch.nn.Parameter.__torch_function__
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def _sample(tensor: Tensor) -> Tensor | None:
    """The bits of some elements, with one of each row and column of a matrix among them; None if
    there is no cheap way to them."""
    tensor = tensor.detach()
    if tensor.numel() == 0 or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return None
    flat = tensor.as_strided((tensor.numel(),), (1,))
    is_whole = tensor.is_inference() or tensor.dim() < 2
    step = 1 if is_whole else max(tensor.shape[-1] - 1, 1)
    return flat[::step].clone().view(_BITS[tensor.element_size()])


def _is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be compared."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
