"""``index(x, r0)``: the value at one index of each row, as ``x[rows, r0]`` reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from cce_inductor.kernels.statistics.indexed import Indexed


class Index(Indexed, name="index"):
    """A negative index counts from the end of the vocabulary."""

    def prepared(self, index: Tensor, vocabulary: int) -> Tensor:
        return super().prepared(torch.where(index < 0, index + vocabulary, index), vocabulary)

    def is_valid(self, index: Tensor, vocabulary: int) -> Tensor:
        return (index >= -vocabulary) & (index < vocabulary)
