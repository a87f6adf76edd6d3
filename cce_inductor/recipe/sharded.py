"""Weights that exist only for the time of their module's forward.

FSDP gathers the shards of a unit before its forward, and frees them afterwards unless the unit is
told otherwise, or is the outermost one, whose backward comes next.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from torch import Tensor

from cce_inductor.recipe.stale import has_memory
from cce_inductor.torch_internals.tensors import gathered_parameters


def is_sharded(tensors: Iterable[object]) -> bool:
    """Whether FSDP has gathered any of them, so that its options say how long they exist."""
    return any(True for _ in _units(tensors))


def is_freed_after_forward(tensors: Iterable[object]) -> bool:
    """Whether any is gone when the forward of its module is over, within which this is called."""
    return any(_units(tensors))


def _units(tensors: Iterable[object]) -> Iterator[bool]:
    """For each tensor that FSDP has gathered whether it frees it after the forward."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    gathered = {
        parameter.untyped_storage()._cdata: frees for parameter, frees in gathered_parameters()
    }
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not has_memory(tensor):
            continue
        storage = tensor.untyped_storage()._cdata
        if storage in gathered:
            yield gathered[storage]
        elif getattr(tensor._base, "_is_flat_param", False):
            yield _frees(tensor._base)


def _frees(flat_parameter: Any) -> bool:
    """Whether FSDP1 frees the parameter that those of a unit are views of.

    Only the unit knows, to which nothing leads but its forward, which is under way.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._flat_param import RESHARD_AFTER_FORWARD_HANDLE_STRATEGIES

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is FullyShardedDataParallel.forward.__code__:
            unit = frame.f_locals["self"]
            if unit._handle is not None and unit._handle.flat_param is flat_parameter:
                strategy = unit._handle._sharding_strategy
                return not unit._is_root and strategy in RESHARD_AFTER_FORWARD_HANDLE_STRATEGIES
        frame = frame.f_back
    return True
