"""Logits as a function of the tensors that a rewritten graph returns in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cce_inductor.kernels.names import COLUMN, LOGIT, Name, OperandKind
from cce_inductor.kernels.program.text import Step


@dataclasses.dataclass(frozen=True)
class Formula:
    """Logits as a function of a matrix product and some operands.

    Attributes:
        product_dtype: the dtype of the operands of the matrix product and of its result.
        steps: the pointwise operations on each logit, as in `kernels.program`.
        value: the name of the last one's result.
        wide: the dtype in which the steps are computed.
        vocabulary_dim: the vocabulary's dimension in the result, counted from the front.
        dtype: the dtype of the result.
        strides: the strides of the logits in the user's graph, None if they are contiguous. Calling
            the formula does not apply them.
    """

    product_dtype: torch.dtype
    steps: tuple[Step, ...]
    value: Name
    wide: torch.dtype
    vocabulary_dim: int
    dtype: torch.dtype
    strides: tuple[int, ...] | None

    def __call__(self, product: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """Return the logits, with the vocabulary at `vocabulary_dim`.

        Args:
            product: ``input @ weight.T + bias``, [..., vocabulary].
            operands: the operands of the steps.
        """
        result = product
        if self.steps or self.value != LOGIT:
            result = self._stepped(product.to(self.wide), operands)
        result = result.to(self.dtype)
        if self.vocabulary_dim != result.dim() - 1:
            result = result.movedim(-1, self.vocabulary_dim)
        return result

    def _stepped(self, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
        values: dict[Any, Any] = {LOGIT: z}
        for step in self.steps:
            for name in step.uses:
                if name not in values:
                    values[name] = self._leaf(name, z, operands)
            values[step.name] = step.run(values, z.dtype)
        if self.value not in values:
            values[self.value] = self._leaf(self.value, z, operands).expand_as(z)
        result: Tensor = values[self.value]
        return result

    @staticmethod
    def _leaf(name: Name, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
        if name == COLUMN:
            return torch.arange(z.shape[-1], device=z.device)
        operand = operands[name.position]
        if name.kind is OperandKind.COLUMN:
            return operand.reshape(-1)
        return operand.reshape(()) if name.kind is OperandKind.SCALAR else operand
