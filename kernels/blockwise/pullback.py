"""From the values of a block to the gradients of its logits and operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from cce_inductor.kernels.names import LOGIT, Name
from cce_inductor.kernels.program.derivative import Derivative, derivative
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.statistics.cotangent import Cotangent


@dataclasses.dataclass(frozen=True)
class Pullback:
    """The gradient of a program's statistics with respect to the logits and operands of a block.

    Attributes:
        program: the statistics that have a gradient.
        cotangents: the cotangent of each value that a statistic reads.
        steps: the derivative of the program; None if it is plain.
    """

    program: Program
    cotangents: Mapping[Name, Cotangent]
    steps: Derivative | None

    @classmethod
    def of(
        cls, program: Program, operands: Sequence[Tensor], cotangents: Mapping[Name, Cotangent]
    ) -> Pullback:
        """Return the gradient of a program, of whose operands only the dtypes matter."""
        steps = None if program.is_plain else derivative(program, operands)
        return cls(program, cotangents, steps)

    def of_pairs(self, rows: Tensor, weight: Tensor, place: Tensor) -> Pullback:
        """Return the gradient of some rows; see `Cotangent.of_pairs`."""
        cotangents = {
            name: each.of_pairs(rows, weight, place) for name, each in self.cotangents.items()
        }
        return dataclasses.replace(self, cotangents=cotangents)

    def of_block(
        self, values: dict[Name, Tensor], block: slice | Tensor, tile: slice
    ) -> dict[Name, Tensor]:
        """Return the gradients of a block, of any shape that broadcasts against the block; a
        gradient that is 0 may be absent.

        Args:
            values: the logits of the block, and the operands; they may be overwritten.
            block: the block's rows among those of the cotangents.
            tile: its range of the order of the vocabulary.
        """
        if self.steps is None:
            only = self.cotangents[LOGIT]
            overwrite = not only.reads_values
            return {LOGIT: only.of_block(values, block, tile, overwrite=overwrite)}
        logits = values[LOGIT]
        self.steps.forward.run(values)
        made = {
            root: values[name].expand(logits.shape)
            if isinstance(name, Name)
            else logits.new_full(logits.shape, name)
            for root, name in zip(self.program.roots, self.steps.roots, strict=True)
        }
        made[LOGIT] = logits
        for number, root in enumerate(self.program.roots):
            cotangent = self.cotangents.get(root)
            values[Name(f"g{number}")] = (
                logits.new_zeros(logits.shape)
                if cotangent is None
                else cotangent.of_block(made, block, tile, overwrite=False)
            )
        self.steps.backward.run(values)
        return {name: values[result] for name, result in self.steps.gradients.items()}


def as_large_as(gradient: Tensor | None, logits: Tensor) -> Tensor:
    """Return a gradient in the shape of a block of logits, zeros for None."""
    if gradient is None:
        return logits.new_zeros(logits.shape)
    return (
        gradient if gradient.shape == logits.shape else gradient.expand(logits.shape).contiguous()
    )
