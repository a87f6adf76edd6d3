"""The gradients of the logits that a fused loss reads, some rows at a time.

The loss is computed once more, on *numbered logits*: in the place of a hidden state, they have the
numbers of its rows, and in the place of a weight the numbers of the vocabulary's entries. So each
operator of the loss shows which logits it reads, however the loss slices and permutes them, and is
computed from those, a block of rows at a time. The backward of the loss then says what the gradient
of each statistic is, and that is all one needs for any row of the gradient of the logits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cce_inductor.deferred.autograd import deferred_product, with_strides
from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.deferred.gradient import NotByRowsError
from cce_inductor.deferred.rows import Rows, blocks_of_rows
from cce_inductor.kernels import all_statistics, reference
from cce_inductor.kernels.head import Factors, Head
from cce_inductor.kernels.names import LOGIT, Name
from cce_inductor.kernels.saved import saved_tensors
from cce_inductor.recipe.stale import is_plain
from cce_inductor.torch_internals.capture import in_this_thread


def gradients_by_rows(
    logits: Sequence[Rows],
    likes: Sequence[Tensor],
    kind: type[DeferredTensor],
    device: torch.device,
    run: Callable[[list[Tensor]], object],
) -> list[Rows]:
    """Return the rows of the gradient of each of the logits that a loss reads.

    Args:
        logits: the logits.
        likes: tensors on the meta device like them, which require a gradient if the logits do.
        kind: the class of the logits.
        device: the device of the logits.
        run: runs the forward and the backward of the loss on other logits.

    Raises:
        NotByRowsError: the loss reads values of the logits, not only their statistics.
    """
    if len(logits) > _BASE:
        raise NotByRowsError
    operators = _Operators(logits)
    with torch.enable_grad(), torch.autograd.set_detect_anomaly(False):
        numbered = [
            _numbered_logits(kind._numbered_kind, number, rows, like, device)
            for number, (rows, like) in enumerate(zip(logits, likes, strict=True))
        ]
        with in_this_thread(operators):
            run(numbered)
    return [
        dataclasses.replace(rows, compute=operators.gradient_of(number, like.dtype))
        for number, (rows, like) in enumerate(zip(logits, likes, strict=True))
    ]


def _numbered_logits(
    kind: type[DeferredTensor], head: int, rows: Rows, like: Tensor, device: torch.device
) -> Tensor:
    outer = [size for at, size in enumerate(rows.shape) if at != rows.dim]
    input = numbered(rows.count, head, like.dtype, device).view(*outer, _COLUMNS)
    weight = numbered(rows.shape[rows.dim], head, like.dtype, device)
    input.requires_grad_(like.requires_grad)
    made = deferred_product(kind, input, weight, None, like.dtype)
    order = list(range(len(outer)))
    order.insert(rows.dim, len(outer))
    return with_strides(made.permute(order), like.stride())


_BASE = 256
"""Numbers are written in this base. bfloat16 represents all integers up to it."""

_DIGITS = 4
_COLUMNS = 2 + _DIGITS


def numbered(count: int, head: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a matrix [count, 6] whose rows have their own numbers.

    The first column is NaN, so that a product of such matrices is never taken for logits.

    Args:
        count: the number of rows.
        head: another number, which all rows have, from 0 to 255.
        dtype: any floating dtype.
        device: the device.
    """
    numbers = torch.arange(count, device=device)
    digits = [numbers // _BASE**place % _BASE for place in range(_DIGITS)]
    matrix = torch.stack([torch.full_like(numbers, head), *digits], dim=1).to(dtype)
    return torch.nn.functional.pad(matrix, (1, 0), value=math.nan)


def _numbers_in(matrix: Tensor) -> tuple[int, Tensor]:
    """Return what `numbered` was given and gave to the rows of a matrix: the head, the numbers."""
    if matrix.shape[1] != _COLUMNS or not bool(matrix[:, 0].isnan().all()):
        raise NotByRowsError
    heads, *digits = matrix[:, 1:].to(torch.int64).unbind(1)
    head, *others = heads.unique().tolist() or [0]
    if others:
        raise NotByRowsError
    return head, sum((digit * _BASE**place for place, digit in enumerate(digits)), heads * 0)


@dataclasses.dataclass(frozen=True)
class _Selection:
    """Which logits an operator reads.

    Attributes:
        head: the number of the logits.
        rows: [rows], the numbers of the rows.
        columns: [columns], the numbers of the vocabulary's entries.
        is_whole: whether these are all entries, in order.
    """

    head: int
    rows: Tensor
    columns: Tensor
    is_whole: bool

    @classmethod
    def of(cls, factors: Factors, logits: Sequence[Rows]) -> _Selection:
        (head, rows), (other, columns) = map(_numbers_in, (factors.input, factors.linear_weight))
        if factors.linear_bias is not None or head != other:
            raise NotByRowsError
        rows_of_head = logits[head]
        every = torch.arange(rows_of_head.shape[rows_of_head.dim], device=columns.device)
        return cls(head, rows, columns, torch.equal(columns, every))


@dataclasses.dataclass(frozen=True)
class _Read:
    """A call of the operator `reduce_rows` on numbered logits.

    Attributes:
        head: its arguments.
        selections: the logits that it reads, by their names in the program.
        logits: all logits that the loss reads.
        grads: the gradients of its results; none in the forward.
    """

    head: Head
    selections: Mapping[Name, _Selection]
    logits: Sequence[Rows]
    grads: Sequence[Tensor | None] = ()

    @classmethod
    def of(
        cls, logits: Sequence[Rows], input: Tensor, head: Head, grads: Sequence[Tensor | None] = ()
    ) -> _Read:
        selections = {
            name: _Selection.of(each, logits) for name, each in head.factors(input).items()
        }
        return cls(head, selections, logits, grads)

    def _block(self, places: Tensor) -> dict[Name, Tensor]:
        """Return some rows of the logits that it reads, [places, columns] each."""
        block = {}
        for name, selection in self.selections.items():
            rows = self.logits[selection.head].compute(selection.rows[places])
            rows = rows if selection.is_whole else rows[:, selection.columns]
            block[name] = rows.to(self.head.logit_dtype)
        return block

    def _statistics(self, block: Mapping[Name, Tensor], places: Tensor) -> list[Tensor]:
        program = self.head.program
        operands = reference.rows_of_operands(self.head.operands, program, places)
        results = reference.statistics_of(block, operands, program)
        kept = all_statistics.kept_rows(program, operands) if self.head.skip_ignored else None
        if kept is None:
            return results
        return [each.where(kept.view(-1, *[1] * (each.dim() - 1)), 0) for each in results]

    def results(self) -> list[Tensor]:
        """Return the results of the operator."""
        program = self.head.program
        every = self.selections[LOGIT]
        parts = [
            self._statistics(self._block(places), places)
            for places in blocks_of_rows(len(every.rows), len(every.columns), every.rows.device)
        ]
        dtypes = [dtype for each in program.statistics for dtype in each.result_dtypes]
        pairs = zip(zip(*parts, strict=True), dtypes, strict=True)
        results = [torch.cat(blocks).to(dtype) for blocks, dtype in pairs]
        saved = saved_tensors(self.head, len(every.rows))
        return [*results, *(every.rows.new_empty(shape, dtype=dtype) for shape, dtype in saved)]

    def add_gradient(self, total: Tensor, head: int, rows: Tensor) -> None:
        """Add the gradient of some rows of logits.

        Args:
            total: [k, vocabulary], to which it is added.
            head: the number of the logits.
            rows: [k], the numbers of the rows, each once.
        """
        for name, selection in self.selections.items():
            if selection.head != head:
                continue
            found = selection.rows.new_full((self.logits[head].count,), -1)
            found[rows] = torch.arange(len(rows), device=rows.device)
            row_of = found[selection.rows]
            chosen = (row_of >= 0).nonzero().squeeze(1)
            for places in chosen.split(len(rows)) if len(chosen) else ():
                gradient = self._gradient(name, places).to(total.dtype)
                if selection.is_whole:
                    total.index_add_(0, row_of[places], gradient)
                else:
                    index = row_of[places].unsqueeze(1), selection.columns.unsqueeze(0)
                    total.index_put_(index, gradient, accumulate=True)

    def _gradient(self, name: Name, places: Tensor) -> Tensor:
        """Return the gradient of some rows of the logits with a name in the program."""
        block = self._block(places)
        with torch.enable_grad():
            block[name] = leaf = block[name].requires_grad_()
            pairs = [
                (result, grad[places].to(result.dtype))
                for result, grad in zip(self._statistics(block, places), self.grads, strict=False)
                if grad is not None and result.requires_grad
            ]
            if not pairs:
                return torch.zeros_like(leaf)
            results, grads = zip(*pairs, strict=True)
            return torch.autograd.grad(results, leaf, grads, materialize_grads=True)[0]


def _is_numbered(input: Tensor) -> bool:
    """Whether the operator is called with numbers of rows: the pass gives it fake tensors."""
    return is_plain(input) and input.shape[0] > 0


class _Operators(TorchDispatchMode):
    """Computes the operators of a loss of numbered logits.

    Args:
        logits: the logits that have been numbered.

    Attributes:
        reads: the calls of the operators, with the gradients of their results.
    """

    def __init__(self, logits: Sequence[Rows]):
        super().__init__()
        self.logits = logits
        self.reads: list[_Read] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operators = torch.ops.cce_inductor
        if func is operators.reduce_rows.default and _is_numbered(args[0]):
            return self._forward(*args)
        if func is operators.reduce_rows_backward.default and _is_numbered(args[2]):
            return self._backward(*args)
        return func(*args, **(kwargs or {}))

    def _forward(self, input: Tensor, *arguments: Any) -> list[Tensor]:
        return _Read.of(self.logits, input, Head.of(*arguments)).results()

    def _backward(
        self,
        grads: Sequence[Tensor | None],
        results: Sequence[Tensor],
        input: Tensor,
        *arguments: Any,
    ) -> list[Tensor]:
        head, wanted = Head.of(*arguments[:-1]), arguments[-1]
        self.reads.append(_Read.of(self.logits, input, head, grads))
        primals = (input, head.linear_weight, head.linear_bias, *head.operands)
        pairs = zip(primals, wanted, strict=True)
        return [torch.zeros_like(primal) for primal, is_wanted in pairs if is_wanted]

    def gradient_of(self, head: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return a function that computes rows of the gradient of logits."""
        logits = self.logits[head]

        def compute(rows: Tensor) -> Tensor:
            each, places = rows.unique(return_inverse=True)
            shape = len(each), logits.shape[logits.dim]
            wide = torch.promote_types(dtype, torch.float32)
            total = torch.zeros(shape, dtype=wide, device=rows.device)
            for read in self.reads:
                read.add_gradient(total, head, each)
            return total[places].to(dtype)

        return compute
