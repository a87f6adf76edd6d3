"""The gradient of a logit, written down as a program.

`reductions.Cotangent` says what the gradients of a row's reductions make of a value; here the same
is a few pointwise steps on vectors of rows, so that one kernel can compute a block of logits and
their gradient without storing anything else.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base2 import LOG2_E, exponent_of
from .program import Backward, Name, Program, Reduction, Step
from .reductions import Cotangent

_Z = Name("z")


class UntiledError(Exception):
    """A gradient that has no program."""


class _Writer:
    """A program as it grows, its operands, and the rows that have a gradient (None for all)."""

    def __init__(self, operands: Sequence[Tensor], first: int, kept: Tensor | None):
        self.operands = list(operands)
        self.kept = kept
        self.steps: list[Step] = []
        self._next = first
        self._rows: dict[int, Name] = {}
        self._given: list[Tensor] = []  # keeps what `_rows` knows by its id

    def row(self, values: Tensor) -> Name:
        """An operand of one value a row, float32 unless it is an index or a mask."""
        if id(values) not in self._rows:
            self._rows[id(values)] = Name(f"r{len(self.operands)}")
            narrow = values.to(torch.float32) if values.is_floating_point() else values
            self._given.append(values)
            self.operands.append(narrow)
        return self._rows[id(values)]

    def gradient(self, values: Tensor) -> Name:
        """An operand that rows without a gradient have no part in."""
        return self.row(values if self.kept is None else torch.where(self.kept, values, 0.0))

    def call(self, target: str, *args: Any) -> Name:
        name = Name(f"t{self._next}")
        self._next += 1
        self.steps.append(Step(name, target, args))
        return name


def gradient_program(
    program: Program,
    operands: Sequence[Tensor],
    by_value: Mapping[Name, Cotangent],
    wanted: Sequence[Name],
    kept: Tensor | None,
) -> tuple[Program, list[Tensor]]:
    """What makes a block's gradient of its logits.

    Args:
        program: the forward's.
        operands: the forward's.
        by_value: the cotangent of each value that is reduced, as `reductions.cotangents` makes it.
        wanted: the operands whose gradient is wanted, too.
        kept: bool [rows], the rows that have a gradient; None for all.

    Returns:
        A program that ends in ``block`` of the logit's gradient, then of each that is wanted, in
        every entry; and its operands. What is added in single columns of the logits' gradient are
        further arguments of its ``block``, which costs nothing in tiles that have no such column.

    Raises:
        UntiledError: a value that is reduced is a constant.
    """
    if program.is_plain:
        writer = _Writer(operands, 0, kept)
        cotangent = by_value[_Z]
        found = {_Z: _cotangent(writer, cotangent, {_Z: _Z})}
        at_indices = _at_indices(writer, cotangent)
    else:
        writer = _backward_writer(program, operands, kept)
        found = _through_program(writer, program, by_value)
        at_indices = []
    blocks = [Reduction("block", (_found(writer, found, _Z), *itertools.chain(*at_indices)))]
    blocks += [Reduction("block", (_found(writer, found, name),)) for name in wanted]
    return Program(tuple(writer.steps), tuple(blocks)), writer.operands


def _found(writer: _Writer, found: Mapping[Name, Name], name: Name) -> Name:
    return found.get(name) or writer.call("full_like", _Z, 0.0)


def _backward_writer(program: Program, operands: Sequence[Tensor], kept: Tensor | None) -> _Writer:
    backward = program.backward(operands)
    steps = (*backward.forward.steps, *backward.backward.steps)
    return _Writer(operands, 1 + max((int(step.name[1:]) for step in steps), default=-1), kept)


def _through_program(
    writer: _Writer, program: Program, by_value: Mapping[Name, Cotangent]
) -> dict[Name, Name]:
    backward: Backward = program.backward(writer.operands)
    writer.steps += backward.forward.steps
    made: dict[Name, Name] = {_Z: _Z}
    for root, name in zip(program.roots, backward.roots, strict=True):
        if not isinstance(name, Name):
            raise UntiledError(f"{root} is a constant")
        made[root] = name
    cotangents = {}
    for number, root in enumerate(program.roots):
        if root in by_value:
            cotangent = _cotangent(writer, by_value[root], made)
            of_root = _with_indices(writer, by_value[root], cotangent)
        else:
            of_root = writer.call("full_like", _Z, 0.0)
        cotangents[Name(f"g{number}")] = of_root

    def renamed(argument: Any) -> Any:
        return cotangents.get(argument, argument) if isinstance(argument, Name) else argument

    for step in backward.backward.steps:
        kwargs = tuple((key, renamed(value)) for key, value in step.kwargs)
        writer.steps.append(Step(step.name, step.target, tuple(map(renamed, step.args)), kwargs))
    return {name: renamed(value) for name, value in backward.gradients.items()}


def _cotangent(writer: _Writer, of: Cotangent, made: Mapping[Name, Name]) -> Name:
    """What `Cotangent.of_block` computes, in steps, but for what is added at indices; `made` says
    what the values are called."""
    call, row, gradient = writer.call, writer.row, writer.gradient
    value = made[of.name]
    terms: list[Name] = []
    if of.lse is not None:
        probability, factor = _probability(writer, value, of.lse)
        terms.append(call("mul.Tensor", probability, gradient(of.grad_lse * factor)))
    if of.grad_sum is not None:
        terms.append(gradient(of.grad_sum))
    for grad_mean, mean, y in of.means:
        assert of.lse is not None, "a mean is under a softmax"
        if y == of.name:
            shift = of.lse.to(torch.float32)  # near the values that have a probability
            near = call("sub.Tensor", value, row(shift))
            distance = call("sub.Tensor", near, row(mean - shift))
        else:
            distance = call("add.Tensor", row(-mean), made[y])
        weighted = call("mul.Tensor", distance, probability)
        terms.append(call("mul.Tensor", weighted, gradient(grad_mean * factor)))
    for grad_mean, lse, x in of.weights:
        mass, factor = _probability(writer, made[x], lse)
        terms.append(call("mul.Tensor", mass, gradient(grad_mean * factor)))
    if not terms or terms[0][0] == "r":
        terms.insert(0, call("full_like", _Z, 0.0))
    return functools.reduce(lambda total, term: call("add.Tensor", total, term), terms)


def _probability(writer: _Writer, value: Name, lse: Tensor) -> tuple[Name, Tensor]:
    """``exp(value - lse)`` of each entry, but for a factor of the rows, near 1, which belongs to
    what it is multiplied by."""
    offset, factor = exponent_of(lse)
    if writer.kept is not None:
        offset = torch.where(writer.kept, offset, -math.inf)
    exponent = writer.call("addcmul", writer.row(offset), value, LOG2_E)
    return writer.call("exp2", exponent), factor


def _at_indices(writer: _Writer, of: Cotangent) -> list[tuple[Name, Name]]:
    """Indices, and what is added to the cotangent there."""
    if not of.grad_at:
        return []
    pairs = zip(of.index.unbind(1), of.grad_index.unbind(1), strict=True)
    return [(writer.row(index), writer.gradient(grad)) for index, grad in pairs]


def _with_indices(writer: _Writer, of: Cotangent, cotangent: Name) -> Name:
    elsewhere = cotangent
    for index, grad in _at_indices(writer, of):
        here = writer.call("eq.Tensor", Name("j"), index)
        at_index = writer.call("add.Tensor", elsewhere, grad)
        cotangent = writer.call("where.self", here, at_index, cotangent)
    return cotangent
