"""The derivative of a program's pointwise function, as steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.names import COLUMN, LOGIT, Name
from cce_inductor.kernels.program.schedule import Schedule
from cce_inductor.kernels.program.text import Program, names_in, needed
from cce_inductor.kernels.program.tracing import NotPointwiseError, kind_of, record


def derivative(program: Program, operands: Sequence[Tensor]) -> Derivative:
    """Return the derivative of a program's steps, cached by the kinds of the operands' dtypes.

    Raises:
        NotPointwiseError: the derivative has an operator that is not pointwise.
    """
    dtypes = tuple(kind_of(operand.dtype) for operand in operands)
    return _derivative_of_text(str(program), dtypes)  # text tells 0.0 from -0.0, and 1 from True


@functools.lru_cache(maxsize=1024)
def _derivative_of_text(text: str, dtypes: tuple[torch.dtype, ...]) -> Derivative:
    return _differentiate(Program.parse(text), dtypes)


@dataclasses.dataclass(frozen=True)
class Derivative:
    """The steps of a program, and those of their vector-Jacobian product.

    Attributes:
        forward: computes the roots.
        roots: the names of the roots in these steps, in the order of `Program.roots`; a number for
            a root that is constant.
        backward: computes `gradients` from the cotangents ``g0``, ``g1``, ... of the roots.
        gradients: the name of the gradient of the logit ``z`` and of each operand; a gradient that
            is 0 has no entry.
        connected: ``z`` and the operands that have a gradient, even if it is 0.
    """

    forward: Schedule
    roots: tuple[Name | float, ...]
    backward: Schedule
    gradients: Mapping[Name, Name]
    connected: frozenset[Name]

    @property
    def peak(self) -> int:
        """The largest number of blocks that exist at the same time."""
        shared = {use for step in self.backward.steps for use in step.uses}
        kept = len(shared & {step.name for step in self.forward.steps})
        return self.forward.peak() + self.backward.peak() + kept + len(self.roots)


def _differentiate(program: Program, operands: tuple[torch.dtype, ...]) -> Derivative:
    roots = program.roots
    dtypes = {name: operands[name.position] for name in program.operands}
    floating = [LOGIT, *(name for name in dtypes if dtypes[name].is_floating_point)]
    others = [COLUMN, *(name for name in dtypes if not dtypes[name].is_floating_point)]
    cotangents = [Name(f"g{number}") for number in range(len(roots))]
    arguments = dict.fromkeys((*floating, *cotangents), torch.float64)
    arguments |= {name: dtypes.get(name, torch.int64) for name in others}

    def joint(*given: Tensor) -> list[Tensor | None]:
        # The steps are recorded on tensors without dimensions, and run on blocks of any shape.
        values = dict(zip(arguments, given, strict=True))
        leaves = [values[name].clone().requires_grad_() for name in floating]
        values.update(zip(floating, leaves, strict=True))
        gradients: Iterable[Tensor | None] = [None] * len(leaves)
        try:
            Schedule(program.steps, roots).run(values, in_place=False)
            made = [values[root] for root in roots]
            differentiable = [
                (value, values[cotangent])
                for value, cotangent in zip(made, cotangents, strict=True)
                if value.requires_grad
            ]
            if differentiable:
                outputs, given = zip(*differentiable, strict=True)
                gradients = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
        except RuntimeError as error:  # An operator has no derivative.
            raise NotPointwiseError(f"its derivative fails: {error}") from error
        return [*(value.detach() for value in made), *gradients]

    steps, results = record(joint, arguments)
    made = tuple(results[: len(roots)])
    gradients = {
        name: result
        for name, result in zip(floating, results[len(roots) :], strict=True)
        if isinstance(result, Name)  # None means no gradient, and a number can only be 0.
    }
    after = set(cotangents)
    for step in steps:
        if any(use in after for use in step.uses):
            after.add(step.name)
    first = needed([s for s in steps if s.name not in after], names_in(made))
    second = needed(steps, tuple(gradients.values()))
    forward_steps = {step.name for step in first}
    second = [step for step in second if step.name not in forward_steps]
    needed_later = {use for step in second for use in step.uses} | set(gradients.values())
    return Derivative(
        Schedule(tuple(first), (*names_in(made), *needed_later)),
        made,
        Schedule(tuple(second), tuple(gradients.values())),
        gradients,
        frozenset(
            name
            for name, result in zip(floating, results[len(roots) :], strict=True)
            if result is not None
        ),
    )
