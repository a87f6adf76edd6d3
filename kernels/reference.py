"""The specification: what a program says about each row, from logits that are stored.

Ordinary PyTorch, with its own gradients. `blockwise` must agree with it to rounding; tests run it
in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.program.text import Program, position


def reduce(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
) -> list[Tensor]:
    """The results of the program's reductions, in order.

    Args:
        input: [rows, hidden].
        linear_weight: [vocabulary, hidden], the dtype of `input`.
        linear_bias: [vocabulary] or None.
        operands: what `program` names: [rows] or an index's [rows, k], [vocabulary], [], or
            [rows, vocabulary].
        program: what is computed.
    """
    z = torch.nn.functional.linear(input, linear_weight, linear_bias)
    values: dict[str, Tensor] = {"z": z, "j": torch.arange(z.shape[1], device=z.device)}
    for name, at in program.operands.items():
        values[name] = operands[at].unsqueeze(1) if name[0] == "r" else operands[at]
    for step in program.steps:
        values[step.name] = step.run(values, z.dtype)

    results: list[Tensor] = []
    for reduction in program.reductions:
        x, (_, *rest) = values[reduction.value].expand(z.shape), reduction.args
        if reduction.kind == "logsumexp":
            results.append(torch.logsumexp(x.to(z.dtype), 1))
        elif reduction.kind == "sum":
            results.append(x.sum(1))
        elif reduction.kind == "mean":
            results.append((torch.softmax(x.to(z.dtype), 1) * values[rest[0]]).sum(1))
        elif reduction.kind == "dot":
            results.append((x * values[rest[0]]).sum(1))
        elif reduction.kind == "gather":
            results.append(x.gather(1, operands[position(rest[0])]))
        elif reduction.kind == "index":
            results.append(x[torch.arange(len(x), device=x.device), operands[position(rest[0])]])
        elif reduction.kind == "target":
            target = operands[position(rest[0])]
            kept = target != rest[1]
            found = x.gather(1, target.where(kept, 0).unsqueeze(1)).squeeze(1)
            results.append(found.where(kept, 0.0))
        else:
            results += x.max(1) if reduction.kind == "max" else x.topk(rest[0], 1)
    return results
