"""What the forward saves for the backward beside its results."""

from __future__ import annotations

from typing import Any

import torch

from cce_inductor.kernels import sampling
from cce_inductor.kernels.head import Head
from cce_inductor.kernels.statistics.logsumexp import LogSumExp
from cce_inductor.kernels.stored import stored_dtype, stored_shape


def saved_normalizers(head: Head) -> tuple[LogSumExp, ...]:
    """Return the logsumexps whose part of each tile, [rows, tiles], is saved: the first, or all if
    the gradient is sampled."""
    normalizers = head.program.normalizers
    return normalizers if sampling.applies(head) else normalizers[:1]


def saved_tensors(head: Head, rows: Any) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """Return the shape and dtype of every tensor that is saved.

    These are the parts of `saved_normalizers` in the logit dtype. The order of the vocabulary
    follows, [vocabulary], if the gradient is sampled, and the logits of `Head.stored_tiles` if
    there are some, [tiles, rows, tile].
    """
    shape = rows, head.tile_count
    saved: list[tuple[tuple[Any, ...], torch.dtype]] = [
        (shape, head.logit_dtype) for _ in saved_normalizers(head)
    ]
    if sampling.applies(head):
        saved.append(((head.vocabulary,), torch.int64))
    if head.stored_tiles:
        saved.append((stored_shape(head, rows), stored_dtype(head)))
    return saved
