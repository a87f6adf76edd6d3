"""Logits that the forward stores, so that the backward need not compute them again.

The part of a workspace that exceeds the default size holds the logits of the first tiles of the
vocabulary, for all rows. With a share f of the logits, a step computes 4 - f matrix products, where
unfused code computes 3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from cce_inductor.kernels import sampling
from cce_inductor.kernels.blockwise.product import operand_dtype
from cce_inductor.kernels.head import Head
from cce_inductor.options import DEFAULT_WORKSPACE_BYTES


def stored_dtype(head: Head) -> torch.dtype:
    """Return the narrowest dtype that holds the logits: that of the product if they are rounded to
    it."""
    dtype, bias = operand_dtype(head.compute_dtype), head.linear_bias
    return dtype if bias is None or bias.dtype == dtype else head.logit_dtype


def stored_shape(head: Head, rows: Any) -> tuple[Any, ...]:
    """Return the shape of the logits that are stored, in blocks of one tile and all rows."""
    return head.stored_tiles, rows, head.tile


def stored_bytes(head: Head, rows: Any) -> int:
    """Return the bytes of the logits that are stored."""
    if not head.stored_tiles:
        return 0
    return int(math.prod(stored_shape(head, rows)) * stored_dtype(head).itemsize)


def room(workspace_bytes: Any) -> Any:
    """Return the bytes of a workspace that logits may be stored in; none if it is not positive."""
    return workspace_bytes - DEFAULT_WORKSPACE_BYTES


def with_stored_tiles(head: Head, rows: Any) -> Head:
    """Return a head whose workspace is divided between blocks and the logits of some tiles.

    No logits are stored if the number of rows or the size of the vocabulary changes, if the
    gradient is sampled or has no softmax, and on other devices than the CPU.

    Args:
        head: a head with a gradient. Only the dtypes, shapes and devices of its tensors matter.
        rows: the number of rows, an int if it is known.
    """
    is_static = isinstance(rows, int) and isinstance(head.vocabulary, int)
    on_cpu = head.linear_weight.device.type == "cpu"
    if room(head.workspace_bytes) <= 0 or not is_static or rows == 0 or not on_cpu:
        return head
    if sampling.applies(head) or not head.program.normalizers:
        return head
    of_tile = stored_bytes(dataclasses.replace(head, stored_tiles=1), rows)
    tiles = min(room(head.workspace_bytes) // of_tile, head.tile_count)
    rest = head.workspace_bytes - tiles * of_tile
    return dataclasses.replace(head, stored_tiles=tiles, workspace_bytes=rest)
