"""Compute one small loss and its gradients on the GPU; `sanitizer` runs this program."""

from __future__ import annotations

import torch

from .methods import MIB, ours
from .problem import Problem


def main() -> None:
    problem = Problem(129, 1027, 64, torch.device("cuda"))
    input, weight, target = problem.inputs()
    loss = ours(MIB)(problem)(input.requires_grad_(), weight.requires_grad_(), target)
    loss.backward()
    torch.cuda.synchronize()
    print(f"loss {loss.item():.6f}")


if __name__ == "__main__":
    main()
