"""Parameters that exist only during the forward of their module.

FSDP gathers the shards of a unit before the unit's forward. It frees them after the forward, unless
it is configured not to (``reshard_after_forward=False``) or the unit is the outermost one, whose
backward comes next.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from torch import Tensor

from cce_inductor.recipe.stale import is_plain
from cce_inductor.torch_internals.callers import frees_after_forward
from cce_inductor.torch_internals.tensors import gathered_parameters


def is_sharded(tensors: Iterable[object]) -> bool:
    """Whether FSDP has gathered any of the tensors."""
    return any(True for _ in _freed(tensors))


def is_freed_after_forward(tensors: Iterable[object]) -> bool:
    """Whether FSDP frees any of the tensors after the forward that this is called in."""
    return any(_freed(tensors))


def _freed(tensors: Iterable[object]) -> Iterator[bool]:
    """Yield, for each tensor that FSDP has gathered, whether FSDP frees it after the forward."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    gathered = {
        parameter.untyped_storage()._cdata: frees for parameter, frees in gathered_parameters()
    }
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not is_plain(tensor):
            continue
        storage = tensor.untyped_storage()._cdata
        if storage in gathered:
            yield gathered[storage]
        elif getattr(tensor._base, "_is_flat_param", False):
            yield frees_after_forward(tensor._base)
