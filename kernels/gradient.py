"""The gradient of a logit, written down as a program.

`reductions.Cotangent` says what the gradients of a row's reductions make of a value; here the same
is a few pointwise steps on vectors of rows, so that one kernel can compute a block of logits and
their gradient without storing anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .program import Backward, Name, Program, Reduction, Step
from .reductions import Cotangent

_Z = Name("z")


class UntiledError(Exception):
    """A gradient that has no program."""


class _Writer:
    """A program as it grows, and its operands."""

    def __init__(self, operands: Sequence[Tensor], first: int):
        self.operands = list(operands)
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
        every entry; and its operands.

    Raises:
        UntiledError: a value that is reduced is a constant.
    """
    if program.is_plain:
        writer = _Writer(operands, 0)
        found = {_Z: _cotangent(writer, by_value[_Z], {_Z: _Z})}
    else:
        found = _through_program(writer := _backward_writer(program, operands), program, by_value)
    blocks = []
    for name in (_Z, *wanted):
        value = found.get(name) or writer.call("full_like", _Z, 0.0)
        if kept is not None:
            value = writer.call("where.self", writer.row(kept), value, 0.0)
        blocks.append(Reduction("block", (value,)))
    return Program(tuple(writer.steps), tuple(blocks)), writer.operands


def _backward_writer(program: Program, operands: Sequence[Tensor]) -> _Writer:
    backward = program.backward(operands)
    steps = (*backward.forward.steps, *backward.backward.steps)
    return _Writer(operands, 1 + max((int(step.name[1:]) for step in steps), default=-1))


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
        of_root = (
            _cotangent(writer, by_value[root], made)
            if root in by_value
            else writer.call("full_like", _Z, 0.0)
        )
        cotangents[Name(f"g{number}")] = of_root

    def renamed(argument: Any) -> Any:
        return cotangents.get(argument, argument) if isinstance(argument, Name) else argument

    for step in backward.backward.steps:
        kwargs = tuple((key, renamed(value)) for key, value in step.kwargs)
        writer.steps.append(Step(step.name, step.target, tuple(map(renamed, step.args)), kwargs))
    return {name: renamed(value) for name, value in backward.gradients.items()}


def _cotangent(writer: _Writer, of: Cotangent, made: Mapping[Name, Name]) -> Name:
    """What `Cotangent.of_block` computes, in steps; `made` says what the values are called."""
    call, row = writer.call, writer.row
    value = made[of.name]
    probability: Name | None = None
    if of.lse is not None:
        shift = of.lse.to(torch.float32)
        near = call("sub.Tensor", value, row(shift))
        log_probability = call("add.Tensor", near, row(shift - of.lse))
        probability = call("exp", log_probability)
        cotangent = call("mul.Tensor", probability, row(of.grad_lse))
    else:
        cotangent = call("full_like", _Z, 0.0)
    if of.grad_at:
        elsewhere = cotangent
        for index, grad in zip(of.index.unbind(1), of.grad_index.unbind(1), strict=True):
            here = call("eq.Tensor", Name("j"), row(index))
            at_index = call("add.Tensor", elsewhere, row(grad))
            cotangent = call("where.self", here, at_index, cotangent)
    if of.grad_sum is not None:
        cotangent = call("add.Tensor", cotangent, row(of.grad_sum))
    for grad_mean, mean, y in of.means:
        assert probability is not None, "a mean is under a softmax"
        if y == of.name:
            distance = call("sub.Tensor", near, row(mean - shift))
        else:
            distance = call("add.Tensor", row(-mean), made[y])
        term = call("mul.Tensor", call("mul.Tensor", distance, probability), row(grad_mean))
        cotangent = call("add.Tensor", cotangent, term)
    for grad_mean, lse, x in of.weights:
        mass = call("exp", call("sub.Tensor", made[x], row(lse)))
        cotangent = call("add.Tensor", cotangent, call("mul.Tensor", mass, row(grad_mean)))
    return cotangent
