"""The loss that is measured: its shapes and values, and a float64 reference."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PEAKED_LOSS = 2.0
"""The loss of peaked logits in nats, about that of a model trained on code."""

REFERENCE_BLOCK = 4096
SHAPE = {"cuda": (8192, 128256, 4096), "cpu": (256, 9000, 64)}


@dataclass(frozen=True)
class Problem:
    """``F.cross_entropy(F.linear(input, weight).float(), target)``.

    Attributes:
        tokens, vocabulary, hidden: sizes of the input [tokens, hidden] and of the weight
            [vocabulary, hidden].
        device: where the tensors are.
        peaked: whether the target has a high logit, as in a trained model.
        autocast: whether input and weight are float32, and cast to bfloat16 by `torch.autocast`;
            otherwise they are bfloat16.
    """

    tokens: int
    vocabulary: int
    hidden: int
    device: torch.device
    peaked: bool = False
    autocast: bool = False

    @classmethod
    def usual(cls, device: torch.device) -> Problem:
        return cls(*SHAPE[device.type], device)

    @property
    def flops(self) -> float:
        """The floating-point operations of one matrix product."""
        return 2.0 * self.tokens * self.vocabulary * self.hidden

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.autocast else torch.bfloat16

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return input [tokens, hidden], weight [vocabulary, hidden] and target [tokens]."""
        place = {
            "generator": torch.Generator(self.device).manual_seed(0),
            "device": self.device,
        }
        weight = torch.randn(self.vocabulary, self.hidden, **place).mul_(self.hidden**-0.5)
        input = torch.randn(self.tokens, self.hidden, **place)
        target = torch.randint(self.vocabulary, (self.tokens,), **place)
        if self.peaked:
            # The logsumexp of the other logits, which are normal with a standard deviation of 1.
            others = math.log(self.vocabulary) + 0.5
            input += (others - PEAKED_LOSS) * weight[target]
        return input.to(self.dtype), weight.to(self.dtype), target

    def autocasting(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def loss(self, input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """Return the loss as it is usually written."""
        with self.autocasting():
            return F.cross_entropy(F.linear(input, weight).float(), target)


@torch.no_grad()
def reference(input: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return loss and gradients in float64, computed in blocks of the vocabulary."""
    rows = input.double()
    share = 1.0 / len(target)
    log_sum = rows.new_full((len(target),), -math.inf)
    for block in weight.split(REFERENCE_BLOCK):
        log_sum = log_sum.logaddexp((rows @ block.double().t()).logsumexp(dim=1))
    of_target = weight[target].double()
    loss = (log_sum - (rows * of_target).sum(1)).mean()
    d_input = -share * of_target
    d_weight = torch.empty_like(weight, dtype=torch.float64)
    for block, d_block in zip(
        weight.split(REFERENCE_BLOCK), d_weight.split(REFERENCE_BLOCK), strict=True
    ):
        wide = block.double()
        dz = (rows @ wide.t()).sub_(log_sum[:, None]).exp_().mul_(share)
        d_input.addmm_(dz, wide)
        torch.mm(dz.t(), rows, out=d_block)
    d_weight.index_add_(0, target, rows, alpha=-share)
    return {"loss": loss, "input": d_input, "weight": d_weight}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative error of the norm, computed in blocks to save memory."""
    squares = [
        (ours.double() - theirs).square().sum()
        for ours, theirs in zip(
            actual.detach().split(REFERENCE_BLOCK), expected.split(REFERENCE_BLOCK), strict=True
        )
    ]
    return (torch.stack(squares).sum().sqrt() / expected.norm()).item()
