"""Run the steps of a program on a block, in little memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from cce_inductor.kernels.names import LOGIT, Name
from cce_inductor.kernels.program.text import Program, Step, overload

_IN_PLACE = frozenset(
    ["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "neg", "tanh", "sigmoid", "exp"]
)


def schedule(program: Program) -> Schedule:
    """Return the schedule of a program's steps, which compute its roots; the result is cached."""
    return _schedule_of_text(str(program))  # text tells 0.0 from -0.0, and 1 from True


@functools.lru_cache(maxsize=1024)
def _schedule_of_text(text: str) -> Schedule:
    program = Program.parse(text)
    return Schedule(program.steps, program.roots)


class Schedule:
    """Steps in order, and the values that each of them is the last to use.

    Args:
        steps: each after those that it uses.
        results: the values to keep.
    """

    def __init__(self, steps: tuple[Step, ...], results: tuple[Name, ...]):
        self.steps = steps
        self.has_aliases = any(step.target == "detach" for step in steps)
        last: dict[Name, int] = {}
        for number, step in enumerate(steps):
            last.update(dict.fromkeys(step.uses, number))
        self._last_used = [
            {use for use in step.uses if last[use] == number and use not in results}
            for number, step in enumerate(steps)
        ]

    def peak(self) -> int:
        """Return the largest number of blocks that exist at the same time, including the logits."""
        logits, live, most = LOGIT, set[Name](), 1
        for step, last_used in zip(self.steps, self._last_used, strict=True):
            first = step.args[0] if step.args else None
            over = step.target in _IN_PLACE and first in last_used and not self.has_aliases
            if over and first == logits:
                logits = step.name
            else:
                live.add(step.name)
            if over:
                live.discard(first)
            most = max(most, 1 + len(live))
            live -= last_used
        return most

    def run(self, values: dict[Name, Tensor], *, in_place: bool = True) -> None:
        """Add the result of each step to `values`.

        With `in_place`, a step writes over a block that no later step needs, and values that no
        later step needs are removed.
        """
        remove, in_place = in_place, in_place and not self.has_aliases
        block = values[LOGIT]
        for step, last_used in zip(self.steps, self._last_used, strict=True):
            # A number without dimensions does not change the dtype of a block.
            args, kwargs = step.arguments(values, torch.float64)
            first = step.args[0] if step.args else None
            writes_over = (
                in_place
                and step.target in _IN_PLACE
                and first in last_used
                and first.is_block
                and args[0].shape == block.shape
                and args[0].dtype == block.dtype
            )
            result = (_in_place(step.target) if writes_over else overload(step.target))(
                *args, **kwargs
            )
            if result.is_floating_point():  # A step that reads only numbers may have another dtype.
                result = result.to(block.dtype)
            values[step.name] = result
            if remove:
                for use in last_used:
                    if use.is_step:
                        del values[use]


def _in_place(target: str) -> Any:
    """Return the in-place variant of an operator."""
    name, _, overload_name = target.partition(".")
    return overload(f"{name}_.{overload_name}" if overload_name else f"{name}_")
