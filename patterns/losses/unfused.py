"""Losses over classes that have no rule. A report names them if they read logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import Node

UNFUSED_LOSSES = frozenset(
    [
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.ctc_loss,
        F.multi_margin_loss,
        F.multilabel_margin_loss,
        F.multilabel_soft_margin_loss,
        F.soft_margin_loss,
        torch.binary_cross_entropy_with_logits,
        torch.ctc_loss,
    ]
)


def is_unfused(node: Node) -> bool:
    """Whether a node is a loss without a rule."""
    return node.op == "call_function" and node.target in UNFUSED_LOSSES
