"""``stale_logits="keep"``: what deferred logits are computed from is copied before it changes.

An optimizer changes the weight of the head. Just before it does, logits that still exist and have
not been computed get a copy of the weight, which is freed with them.
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.recipe.operation import Operation
from cce_inductor.recipe.stale import Origin

_projections: WeakSet[Operation] = WeakSet()
"""The projections of all logits that `keep` was called with and that still exist."""


def keep(logits: DeferredTensor) -> None:
    """Have logits survive the steps of optimizers."""
    _register()
    for projection in logits._operation.products():
        _projections.add(projection.without_gradient)


@functools.cache
def _register() -> None:
    register_optimizer_step_pre_hook(_copy_before_step)


def _copy_before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    changing = {
        each.untyped_storage().data_ptr() for each in parameters if type(each) in _WITH_STORAGE
    }
    copies: dict[Origin, Tensor] = {}
    for projection in list(_projections):
        memory = projection.memory()
        if memory is None or memory.is_deferred:
            for source in projection.sources:
                source.keep(changing, copies)


_WITH_STORAGE = (Tensor, torch.nn.Parameter)
