"""The specification: the row statistics of Cut Cross-Entropy from logits that are stored.

Five lines of ordinary PyTorch. `blockwise` must agree with it to rounding; tests run it in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .modification import Modification


def row_statistics(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    logit_sum_weight: Tensor | None,
    ignore_index: int,
    modification: Modification,
) -> tuple[Tensor, Tensor, Tensor]:
    """``logsumexp`` over the vocabulary, the target's logit and the weighted sum of the logits.

    Args:
        input: [tokens, hidden].
        linear_weight: [vocabulary, hidden], the dtype of `input`.
        linear_bias: [vocabulary] or None.
        target: [tokens], int64, in [0, vocabulary) or `ignore_index`.
        logit_sum_weight: [vocabulary] or None for all ones.
        ignore_index: rows with this target are 0 in every statistic.
        modification: applied to each logit.

    Returns:
        ``(lse, target_logit, logit_sum)``, each [tokens].
    """
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    modification.apply_(logits)
    kept = target != ignore_index
    target_logit = logits.gather(1, target.where(kept, 0)[:, None]).squeeze(1)
    logit_sum = (logits if logit_sum_weight is None else logits * logit_sum_weight).sum(1)
    statistics = (torch.logsumexp(logits, 1), target_logit, logit_sum)
    lse, target_logit, logit_sum = (s.where(kept, 0.0) for s in statistics)
    return lse, target_logit, logit_sum
