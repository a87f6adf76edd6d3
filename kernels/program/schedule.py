"""In which order steps run, and when each result is needed for the last time."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cce_inductor.kernels.program.text import (
    Name,
    Program,
    Step,
    overload,
    tensor_arguments,
    tensor_if,
)

_IN_PLACE = frozenset(
    ["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "neg", "tanh", "sigmoid", "exp"]
)


def schedule(program: Program) -> Schedule:
    """The steps of a program, which make the values that are reduced; computed once."""
    return _schedule_of_text(str(program))  # text, in which 0.0 and -0.0, 1 and True differ


@functools.lru_cache(maxsize=1024)
def _schedule_of_text(text: str) -> Schedule:
    program = Program.parse(text)
    return Schedule(program.steps, program.roots)


class Schedule:
    """Steps, and when the result of each is needed for the last time.

    Args:
        steps: in order.
        results: the values that are wanted.
    """

    def __init__(self, steps: tuple[Step, ...], results: tuple[Name, ...]):
        self.steps = steps
        self.results = results
        self.has_aliases = any(step.target == "detach" for step in steps)
        last: dict[Name, int] = {}
        for number, step in enumerate(steps):
            last.update(dict.fromkeys(step.uses, number))
        self._dying = [
            {use for use in step.uses if last[use] == number and use not in results}
            for number, step in enumerate(steps)
        ]

    def peak(self) -> int:
        """Blocks that exist at the same time at most; that of the logits always does."""
        logits, live, most = Name("z"), set[Name](), 1
        for step, dying in zip(self.steps, self._dying, strict=True):
            first = step.args[0] if step.args else None
            over = step.target in _IN_PLACE and first in dying and not self.has_aliases
            if over and first == logits:
                logits = step.name
            else:
                live.add(step.name)
            if over:
                live.discard(first)
            most = max(most, 1 + len(live))
            live -= dying
        return most

    def run(self, values: dict[Name, Tensor], *, in_place: bool = True) -> None:
        """Adds the result of each step to `values`.

        With `in_place`, a step writes over a block that it is the last to need, and what is
        needed no more is dropped.
        """
        drop, in_place = in_place, in_place and not self.has_aliases
        block = values[Name("z")]
        for step, dying in zip(self.steps, self._dying, strict=True):
            function = overload(step.target)
            args = [
                values[a] if isinstance(a, Name) else tensor_if(wanted, a)
                for a, wanted in zip(step.args, tensor_arguments(step.target), strict=False)
            ]
            kwargs = {k: values[a] if isinstance(a, Name) else a for k, a in step.kwargs}
            first = step.args[0] if step.args else None
            if (
                step.target in _IN_PLACE
                and in_place
                and first in dying
                and first[0] in "zt"
                and args[0].shape == block.shape
                and args[0].dtype == block.dtype
            ):
                name, _, overload_name = step.target.partition(".")
                function = getattr(torch.ops.aten, f"{name}_")
                function = getattr(function, overload_name or "default")
            result = function(*args, **kwargs)
            if result.is_floating_point():  # of numbers alone it may have another dtype
                result = result.to(block.dtype)
            values[step.name] = result
            for use in dying:
                if drop and use[0] == "t":
                    del values[use]
