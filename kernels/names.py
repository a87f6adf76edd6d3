"""The names of values in a program, and how operands are broadcast against a block of logits."""

from __future__ import annotations

import enum
from typing import Any

NAMESPACE = "cce_inductor"
"""The operators are `torch.ops.cce_inductor.*`."""


class OperandKind(enum.StrEnum):
    """The dimensions of an operand. The value is the first letter of the operand's name."""

    ROW = "r"
    """One value for each row; for an index, one or several."""
    COLUMN = "c"
    """One value for each vocabulary entry."""
    SCALAR = "s"
    """A single value."""
    LOGIT = "b"
    """One value for each logit."""
    PRODUCT = "p"
    """The logit of another head with the same rows and vocabulary. It takes two operands: that
    head's input, [rows, hidden], and its weight, [vocabulary, hidden]."""
    BIASED_PRODUCT = "q"
    """The same with a third operand, the bias, [vocabulary]."""

    @classmethod
    def of(cls, *, varies_over_rows: bool, varies_over_columns: bool) -> OperandKind:
        """Return the kind of an operand with these dimensions."""
        if varies_over_rows:
            return cls.LOGIT if varies_over_columns else cls.ROW
        return cls.COLUMN if varies_over_columns else cls.SCALAR

    @property
    def is_product(self) -> bool:
        """Whether the operand is several tensors, whose product is as large as the logits."""
        return self in (OperandKind.PRODUCT, OperandKind.BIASED_PRODUCT)

    @property
    def tensors(self) -> int:
        """The number of operands that the kind takes, one after another."""
        return {OperandKind.PRODUCT: 2, OperandKind.BIASED_PRODUCT: 3}.get(self, 1)

    @property
    def varies_over_rows(self) -> bool:
        return self in (OperandKind.ROW, OperandKind.LOGIT) or self.is_product

    @property
    def varies_over_columns(self) -> bool:
        return self in (OperandKind.COLUMN, OperandKind.LOGIT) or self.is_product

    @property
    def summed_dims(self) -> list[int]:
        """The dimensions of a block that the gradient of an operand is summed over."""
        return [0] * (not self.varies_over_rows) + [1] * (not self.varies_over_columns)

    def of_block(self, operand: Any, rows: Any, columns: Any) -> Any:
        """Return what of an operand broadcasts against a block [rows, columns] of logits.

        Not for products, which have no tensor of their own.

        Args:
            operand: the whole tensor, with `rank` dimensions.
            rows: a slice of the rows, or their indices.
            columns: a slice of the vocabulary, or indices.
        """
        if self.varies_over_rows:
            operand = operand[rows]
            return operand[:, columns] if self.varies_over_columns else operand.unsqueeze(1)
        return operand[columns].unsqueeze(0) if self.varies_over_columns else operand

    @property
    def rank(self) -> int:
        """The number of dimensions of such an operand."""
        return self.varies_over_rows + self.varies_over_columns


class Name(str):
    """The name of a value in a program, as opposed to a string constant."""

    __slots__ = ()

    @property
    def kind(self) -> OperandKind | None:
        """The kind of the operand with this name; None for a value that is no operand."""
        return _KINDS.get(self[0])

    @property
    def position(self) -> int:
        """The operand's position in the list of operands: the number at the end of its name."""
        return int(self[1:])

    @property
    def positions(self) -> range:
        """The positions of all tensors that the operand consists of."""
        assert self.kind is not None, "a value that is no operand has no position"
        return range(self.position, self.position + self.kind.tensors)

    @property
    def is_step(self) -> bool:
        """Whether the value is the result of a step."""
        return self[0] == "t"

    @property
    def is_block(self) -> bool:
        """Whether kernels compute the value in a block of its own: the logits, those of another
        head, or a step's result."""
        return self.is_step or self == LOGIT or (self.kind is not None and self.kind.is_product)


_KINDS = {str(kind): kind for kind in OperandKind}

LOGIT = Name("z")
"""The logit itself."""

COLUMN = Name("j")
"""The logit's place in the vocabulary."""
