"""The gradient of a logit, written as a program.

`statistics.cotangent` computes the cotangent of a value with tensor operations. Here the same terms
are written as pointwise steps, so that one kernel can compute a block of logits and their gradient
without storing anything else.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cce_inductor.kernels.names import COLUMN, LOGIT, Name
from cce_inductor.kernels.output import Block
from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.program.text import Program, Step
from cce_inductor.kernels.statistics.cotangent import Cotangent
from cce_inductor.kernels.statistics.numerics import finite_or_zero, split
from cce_inductor.kernels.triton.base2 import LOG2_E


class UntiledError(Exception):
    """A gradient cannot be written as a program."""


class _Writer:
    """A program that is being written, its operands, and the rows that have a gradient.

    Args:
        operands: the operands to start with.
        first: the number of the first step.
        kept: bool [rows]; None if all rows have a gradient.
    """

    def __init__(self, operands: Sequence[Tensor], first: int, kept: Tensor | None):
        self.operands = list(operands)
        self.kept = kept
        self.steps: list[Step] = []
        self._next = first
        self._rows: dict[int, Name] = {}
        self._given: list[Tensor] = []  # keeps the tensors alive whose ids are in `_rows`

    def row(self, values: Tensor) -> Name:
        """Return the name of an operand with one value per row, float32 unless it is an index or a
        mask."""
        if id(values) not in self._rows:
            self._rows[id(values)] = Name(f"r{len(self.operands)}")
            narrow = values.to(torch.float32) if values.is_floating_point() else values
            self._given.append(values)
            self.operands.append(narrow)
        return self._rows[id(values)]

    def gradient(self, values: Tensor) -> Name:
        """Return the name of an operand that is 0 in rows without a gradient."""
        return self.row(values if self.kept is None else torch.where(self.kept, values, 0.0))

    def call(self, target: str, *args: Any, **kwargs: Any) -> Name:
        name = Name(f"t{self._next}")
        self._next += 1
        self.steps.append(Step(name, target, args, tuple(kwargs.items())))
        return name

    @functools.cached_property
    def zero(self) -> Name:
        return self.call("full_like", LOGIT, 0.0)


def gradient_program(
    program: Program,
    operands: Sequence[Tensor],
    by_value: Mapping[Name, Cotangent],
    wanted: Sequence[Name],
    kept: Tensor | None,
) -> tuple[Program, list[Tensor]]:
    """Return the program that computes the gradient of a block of logits.

    Args:
        program: the forward's program.
        operands: the forward's operands.
        by_value: the cotangent of each root, from `all_statistics.cotangents`.
        wanted: the operands whose gradient is also wanted.
        kept: bool [rows], the rows that have a gradient; None for all.

    Returns:
        A program and its operands. The program ends in a ``block`` for the logit's gradient, and
        one for each wanted operand's gradient in every entry. If a row has a gradient at indices,
        the first block has two values: one without that gradient, which costs less, and one
        with it.

    Raises:
        UntiledError: a value that is reduced is a constant.
    """
    writer, made = _forward(program, operands, kept)
    cotangents = [
        _cotangent(writer, by_value[root], made) if root in by_value else _Pair.of(writer.zero)
        for root in program.roots
    ]
    everywhere = _backward(writer, program, [pair.everywhere for pair in cotangents])
    blocks = [Block((everywhere[name],)) for name in (LOGIT, *wanted)]
    indices = dict.fromkeys(index for pair in cotangents for index in pair.indices)
    if indices:
        elsewhere = _backward(writer, program, [pair.elsewhere for pair in cotangents])
        blocks[0] = Block((elsewhere[LOGIT], everywhere[LOGIT], *indices))
    return Program(tuple(writer.steps), tuple(blocks)), writer.operands


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A cotangent without the gradients at `indices`, and with them."""

    elsewhere: Name
    everywhere: Name
    indices: tuple[Name, ...]

    @classmethod
    def of(cls, cotangent: Name) -> _Pair:
        return cls(cotangent, cotangent, ())


def _forward(
    program: Program, operands: Sequence[Tensor], kept: Tensor | None
) -> tuple[_Writer, dict[Name, Name]]:
    """Write the steps that make the roots; return the writer and the name of each root."""
    if program.is_plain:
        return _Writer(operands, 0, kept), {LOGIT: LOGIT}
    backward = derivative(program, operands)
    steps = (*backward.forward.steps, *backward.backward.steps)
    writer = _Writer(operands, 1 + max((int(step.name[1:]) for step in steps), default=-1), kept)
    writer.steps += backward.forward.steps
    made: dict[Name, Name] = {LOGIT: LOGIT}
    for root, name in zip(program.roots, backward.roots, strict=True):
        if not isinstance(name, Name):
            raise UntiledError(f"{root} is a constant")
        made[root] = name
    return writer, made


def _backward(writer: _Writer, program: Program, cotangents: Sequence[Name]) -> Mapping[Name, Name]:
    """Write the steps of the gradients of the logit and of the operands, from the cotangents of the
    roots; return the name of each gradient, which is 0 if there is none."""
    gradients: dict[Name, Name] = collections.defaultdict(lambda: writer.zero)
    if program.is_plain:
        (gradients[LOGIT],) = cotangents
        return gradients
    backward = derivative(program, writer.operands)
    names = {Name(f"g{number}"): name for number, name in enumerate(cotangents)}

    def renamed(argument: Any) -> Any:
        return names.get(argument, argument) if isinstance(argument, Name) else argument

    for step in backward.backward.steps:
        kwargs = {key: renamed(value) for key, value in step.kwargs}
        names[step.name] = writer.call(step.target, *map(renamed, step.args), **kwargs)
    gradients.update({name: renamed(value) for name, value in backward.gradients.items()})
    return gradients


def _cotangent(writer: _Writer, of: Cotangent, made: Mapping[Name, Name]) -> _Pair:
    """Write what `Cotangent.of_block` computes as steps; `made` has the names of the values."""
    call, row, gradient = writer.call, writer.row, writer.gradient
    value = made[of.name]
    terms: list[Name] = []
    if of.grad_sum is not None:
        terms.append(gradient(of.grad_sum))
    if of.lse is not None:
        probability = _probability(writer, value, of.lse)
        grad_lse = gradient(of.grad_lse)
    for grad_mean, mean, y in of.means:
        assert of.lse is not None, "a mean is under a softmax"
        near, rest = split(mean, torch.float32)
        # The value comes second, because it may be a mask.
        distance = call("add.Tensor", row(-near), made[y])
        distance = call("sub.Tensor", distance, row(finite_or_zero(rest)))
        weighted = call("mul.Tensor", distance, probability)
        terms.append(call("mul.Tensor", weighted, gradient(grad_mean)))
    for grad_mean, lse, x in of.probabilities:
        terms.append(call("mul.Tensor", _probability(writer, made[x], lse), gradient(grad_mean)))
    for grad_dot, other in of.factors:
        terms.append(call("mul.Tensor", made[other], gradient(grad_dot)))

    def with_softmax(addends: list[Name]) -> Name:
        """Write the sum of the terms and the softmax term; -g + g p, with p near 1, is rounded
        once."""
        if of.lse is not None and not addends:
            return call("mul.Tensor", probability, grad_lse)
        addend = functools.reduce(lambda a, b: call("add.Tensor", a, b), addends or [writer.zero])
        return addend if of.lse is None else call("addcmul", addend, probability, grad_lse)

    elsewhere = everywhere = with_softmax(terms)
    if not of.has_indices:
        return _Pair.of(elsewhere)
    indices = [row(index) for index in of.index.unbind(1)]
    for index, grad in zip(indices, of.grad_index.unbind(1), strict=True):
        here = call("eq.Tensor", COLUMN, index)
        at_index = with_softmax([*terms, gradient(grad)])
        everywhere = call("where.self", here, at_index, everywhere)
    return _Pair(elsewhere, everywhere, tuple(indices))


def _probability(writer: _Writer, value: Name, lse: Tensor) -> Name:
    """Write ``exp(value - lse)`` of each entry, which is 0 in rows that are not kept."""
    shift, rest = split(lse, torch.float32)
    rest = rest * -LOG2_E
    if writer.kept is not None:
        rest = torch.where(writer.kept, rest, -math.inf)
    distance = writer.call("sub.Tensor", value, writer.row(shift))
    return writer.call("exp2", writer.call("addcmul", writer.row(rest), distance, LOG2_E))
