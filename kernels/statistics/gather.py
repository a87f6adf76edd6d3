"""``gather(x, r0)``: the values at several indices of each row, [rows, k], as in `torch.gather`."""

from __future__ import annotations

from cce_inductor.kernels.statistics.indexed import Indexed


class Gather(Indexed, name="gather"):
    is_flat = False

    def error(self, index: int, vocabulary: int) -> Exception:
        return RuntimeError(*super().error(index, vocabulary).args)
