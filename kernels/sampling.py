"""The sampled gradient: which pairs of a row and a block of the vocabulary it computes.

The gradient of a logit is nearly always a multiple of its probability, and nearly all probabilities
are small. A pair (row, block) whose block holds the mass m of the row's softmax is computed with
probability ``min(1, m / sample_below)``, and what is computed is weighted by the inverse. So the
expectation is the exact gradient, a pair's weighted mass never exceeds `sample_below`, and a row
computes at most ``1 / sample_below`` blocks, rounded up, however large the vocabulary. Pairs that
hold an index of the row, its target for example, are always computed, and not among these.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels import all_statistics
from cce_inductor.kernels.head import TILE, Head, tile_count
from cce_inductor.kernels.names import LOGIT, Name, OperandKind
from cce_inductor.kernels.output import Block
from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.program.text import Program, needed
from cce_inductor.kernels.statistics.base import Statistic
from cce_inductor.kernels.statistics.cotangent import Cotangent
from cce_inductor.kernels.statistics.indexed import NOWHERE

DEVICES = {"cpu", "cuda"}
"""The types of device on which gradients are sampled."""

MIN_BLOCKS = 8
"""The least number of blocks for which the vocabulary is ordered. Fewer leave little out."""

UNIT = 2**40
"""Chances are whole multiples of ``1 / UNIT``, so that their sums are exact."""

MAX_SHARE = 0.75
"""If a larger share of the pairs is expected to be computed, all of them are: gathering rows of a
block costs time, too."""


def reason_against(
    program: Program,
    vocabulary: int,
    operands: Sequence[Tensor],
    device: str,
    wanted: Collection[Name] = (),
) -> str | None:
    """Return why the gradient of a program is not sampled, as what follows "because"; None if it
    is.

    Args:
        program: the program of the forward.
        vocabulary: the size of the vocabulary.
        operands: the operands of the program, of which only the dtypes matter.
        device: the type of the device.
        wanted: the operands whose gradients are asked for.
    """
    if device not in DEVICES:
        return f"there are no sampling kernels for {device}"
    if not isinstance(vocabulary, int):
        return "the size of the vocabulary changes"
    blocks = tile_count(vocabulary)
    if blocks < MIN_BLOCKS:
        return f"the vocabulary has only {blocks} of at least {MIN_BLOCKS} blocks"
    if program.products:
        return "the loss reads the logits of several heads"
    ordered = [each for each in program.statistics if torch.int64 in each.result_dtypes]
    if ordered:
        return f"{ordered[0].name} depends on the order of the vocabulary"
    terms = _terms(str(program))
    if not any(each.has_mass for each in terms.values()):
        return "the gradient has no softmax"
    for name, each in terms.items():
        if each.has_factors:
            return f"a gradient is a multiple of {name}, and not of a probability"
        if each.has_constant:
            varying = varying_gradients(program, name, operands)
            if not varying.isdisjoint([LOGIT, *wanted]):
                return f"the sum of {name} has a gradient that depends on the logits"
    if any(name.kind is OperandKind.LOGIT for name in wanted):
        return "a tensor as large as the logits has a gradient"
    return None


def applies(head: Head) -> bool:
    """Whether the gradient of a head is sampled, if the forward's masses allow it."""
    device = head.linear_weight.device.type
    return (
        head.sample_below > 0
        and reason_against(head.program, head.vocabulary, head.operands, device) is None
    )


class _Terms:
    """The kinds of terms that a cotangent has."""

    def __init__(self, cotangent: Cotangent):
        self.has_mass = cotangent.lse is not None or bool(cotangent.probabilities)
        self.has_constant = cotangent.grad_sum is not None
        self.has_factors = bool(cotangent.factors)


@functools.lru_cache(maxsize=1024)
def _terms(text: str) -> Mapping[Name, _Terms]:
    """Return the kinds of terms of every value's cotangent, from one row of zeros."""
    program = Program.parse(text)
    zero = torch.zeros(1, dtype=torch.float64)
    results = [zero for each in program.statistics for _ in each.result_dtypes]
    indices: dict[Statistic, Tensor] = {each: zero.long().unsqueeze(1) for each in program.indexed}
    cotangents = all_statistics.cotangents(program, results, results, indices, torch.float64)
    return {name: _Terms(each) for name, each in cotangents.items()}


def program_of(program: Program, value: Name) -> Program:
    """Return the program that computes a value of another program."""
    return Program(tuple(needed(list(program.steps), (value,))), (Block((value,)),))


def varying_gradients(program: Program, value: Name, operands: Sequence[Tensor]) -> set[Name]:
    """Return the logit and the operands whose derivative of a value differs between rows, or
    depends on the logits."""
    steps = derivative(program_of(program, value), operands)
    varying = {LOGIT, *(name for name, kind in program.operands.items() if kind.varies_over_rows)}
    for step in (*steps.forward.steps, *steps.backward.steps):
        if not varying.isdisjoint(step.uses):
            varying.add(step.name)
    return {name for name, gradient in steps.gradients.items() if gradient in varying}


def chances(masses: Sequence[Tensor], active: Tensor, held: Tensor, sample_below: float) -> Tensor:
    """Return the probability with which each pair is computed, int64 [rows, blocks] in units of
    ``1 / UNIT``. It is greater than 0 if the mass is.

    Args:
        masses: for each softmax, the mass of each pair, float64 [rows, blocks].
        active: the rows in which the gradient of any softmax is not 0, bool [rows].
        held: the pairs that hold an index of the row, bool [rows, blocks].
        sample_below: see `Head`.
    """
    mass = torch.stack(list(masses)).amax(0)
    # A row whose masses are nan has a gradient that is nan.
    always = held | mass.isnan()
    share = (mass.nan_to_num(0.0) / sample_below).clamp_(max=1.0) * active.unsqueeze(1)
    return share.mul_(UNIT).ceil_().long().masked_fill_(always, UNIT)


def drawn(chances: Tensor, lse: Tensor) -> Tensor:
    """Return which pairs are computed, bool [rows, blocks]: a systematic sample of each row.

    The chances of a row are laid end to end, and marks are set at a distance of 1 from each other,
    the first at a random offset. A pair is computed if a mark lies on its chance. So each pair has
    its own chance, and a row computes as many pairs as its chances add up to, rounded up or down.
    Between the blocks of a row, this leaves less to chance than separate draws do.

    Args:
        chances: what `chances` returns.
        lse: the logsumexp of each row, float64 [rows].
    """
    marks = (chances.cumsum(1) + offsets(lse).unsqueeze(1)).div(UNIT, rounding_mode="floor")
    return marks.diff(dim=1, prepend=torch.zeros_like(marks[:, :1])) > 0


def held_pairs(
    indices: Sequence[Tensor], rows: int, blocks: int, width: int = TILE, *, device: torch.device
) -> Tensor:
    """Return which pairs hold an index of the row, bool [rows, blocks].

    Args:
        indices: places in the order of the vocabulary, [rows, k] each, or `NOWHERE`.
        rows, blocks: the number of rows and blocks.
        width: the vocabulary entries of a block.
        device: the device of the rows.
    """
    # The last column is for `NOWHERE`.
    held = torch.zeros(rows, blocks + 1, dtype=torch.bool, device=device)
    for index in indices:
        block = index.div(width, rounding_mode="floor").where(index != NOWHERE, blocks)
        held.scatter_(1, block, True)
    return held[:, :blocks]


def offsets(lse: Tensor) -> Tensor:
    """Return a random number for each row, int64 [rows] from 0 to ``UNIT - 1``.

    It is a hash of the bits of the row's logsumexp and of the row's number. So the same inputs get
    the same numbers, other inputs get others, and no generator of PyTorch is used. The hash is
    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

    Args:
        lse: float64 [rows].
    """
    row = torch.arange(1, len(lse) + 1, device=lse.device)
    return _mixed(lse.contiguous().view(torch.int64) ^ _mixed(row * _GAMMA)) & (UNIT - 1)


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Shift int64 to the right, and fill with zeros rather than with the sign."""
    return (bits >> count) & (2 ** (64 - count) - 1)


def _signed(bits: int) -> int:
    return bits - 2**64


_GAMMA, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
