"""The names of values in a program, and how operands are broadcast against a block of logits."""

from __future__ import annotations

import enum


class OperandKind(enum.StrEnum):
    """The dimensions of an operand. The letter is the first one of the operand's name."""

    ROW = "r"
    """One value (for an index: one or several) for each row."""
    COLUMN = "c"
    """One value for each vocabulary entry."""
    SCALAR = "s"
    """A single value."""
    LOGIT = "b"
    """One value for each logit."""

    @classmethod
    def of(cls, *, varies_over_rows: bool, varies_over_columns: bool) -> OperandKind:
        """The kind of an operand with these dimensions."""
        if varies_over_rows:
            return cls.LOGIT if varies_over_columns else cls.ROW
        return cls.COLUMN if varies_over_columns else cls.SCALAR

    @property
    def varies_over_rows(self) -> bool:
        return self in (OperandKind.ROW, OperandKind.LOGIT)

    @property
    def varies_over_columns(self) -> bool:
        return self in (OperandKind.COLUMN, OperandKind.LOGIT)

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
        """The position of an operand in the list of operands, which its name ends with."""
        return int(self[1:])

    @property
    def is_step(self) -> bool:
        """Whether the value is the result of a step."""
        return self[0] == "t"

    @property
    def is_block(self) -> bool:
        """Whether the value is as large as the logits: it is them, or the result of a step."""
        return self.is_step or self == LOGIT


_KINDS = {str(kind): kind for kind in OperandKind}

LOGIT = Name("z")
"""The logit itself."""

COLUMN = Name("j")
"""The logit's place in the vocabulary."""
