"""``target(x, r0, ignore_index)``: the value at each row's class index, 0 where it is ignored."""

from __future__ import annotations

from torch import Tensor

from cce_inductor.kernels.statistics.indexed import NOWHERE, Indexed


class Target(Indexed, name="target"):
    ignores = True

    @property
    def ignore_index(self) -> int:
        return int(self.args[2])

    def prepared(self, index: Tensor, vocabulary: int) -> Tensor:
        ignored = index == self.ignore_index
        return super().prepared(index.masked_fill(ignored, NOWHERE), vocabulary)

    def is_valid(self, index: Tensor, vocabulary: int) -> Tensor:
        return super().is_valid(index, vocabulary) | (index == self.ignore_index)

    def is_kept(self, index: Tensor) -> Tensor | None:
        return index != self.ignore_index

    def error(self, index: int, vocabulary: int) -> Exception:
        return IndexError(f"Target {index} is out of bounds.")
