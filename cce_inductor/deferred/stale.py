"""A tensor that will be read later, and whether it is still what it was."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_SAMPLE = 1021
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StaleLogitsError(RuntimeError):
    """Deferred logits were looked at after what they are computed from had changed."""


class Guarded:
    """A tensor and how to tell that it changed.

    What PyTorch changes in place counts versions. Those who write to memory themselves (``p.data``,
    fused optimizers) do not, so a sample is kept as well, but of what a compiled function has made
    for itself.

    Args:
        tensor: what will be read.
        name: what the error calls it.

    Attributes:
        is_real: whether it has numbers, as those of compilers have not.
    """

    __slots__ = ("_pointer", "_sample", "_version", "is_real", "name", "tensor")

    def __init__(self, tensor: Tensor, name: str):
        self.tensor = tensor
        self.name = name
        self.is_real = real = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        self._version = tensor._version if real and not tensor.is_inference() else None
        self._pointer = tensor.data_ptr() if real else None
        others = real and (tensor.is_leaf or tensor._is_view())
        self._sample = _sample(tensor) if others else None

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
        tensor = self.tensor
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


def _sample(tensor: Tensor) -> Tensor | None:
    """The bits of some elements, evenly spaced; None if there is no cheap way to them."""
    tensor = tensor.detach()
    if tensor.numel() == 0 or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return None
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat[:: tensor.numel() // _SAMPLE | 1].clone().view(_BITS[tensor.element_size()])


def _is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be compared."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
