"""DeferredLogits: a tensor that is computed when its values are first needed, or never."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from cce_inductor.deferred.autograd import deferred_product, to_plain
from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.deferred.dispatch import dispatch
from cce_inductor.deferred.flatten import PREFIX, flatten, unflatten
from cce_inductor.deferred.gradient import GradientTensor, NotByRowsError
from cce_inductor.deferred.gradient_dispatch import dispatch_gradient
from cce_inductor.deferred.overrides import override
from cce_inductor.deferred.tape import Call


class DeferredLogits(DeferredTensor):
    """Logits that a compiled function returned without having computed them.

    Shape, dtype, device, strides and ``requires_grad`` are those of the tensor that the function
    would have returned. Views, casts and pointwise functions of deferred logits are deferred too.
    Reductions over the vocabulary (a loss, ``argmax``, ``logsumexp``, ...) are computed block by
    block, with gradients. Anything else computes the values, once, and keeps them.

    Raises:
        StaleLogitsError: the values are needed, but a tensor they are computed from has changed.
    """

    def plain(self) -> Tensor:
        """Return the logits as a plain tensor with the same gradient, which shares their memory."""
        return to_plain(self)

    @classmethod
    @torch._dynamo.disable  # it is called between two graphs, and would be compiled as a third
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return override(func, args, kwargs or {})

    @classmethod
    @torch._dynamo.disable
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Call, ...] | None]:
        return flatten(self)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor],
        calls: tuple[Call, ...] | None,
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> Tensor:
        return unflatten(inner, calls, outer_size, outer_stride)

    def __getattr__(self, name: str) -> Any:
        """Return a tensor that ``__tensor_flatten__`` names, if that has not been called."""
        if name.startswith(PREFIX):
            flatten(self)
            if name in self.__dict__:
                return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class DeferredGradient(GradientTensor, DeferredLogits):
    """The gradient of deferred logits, which is computed when it is first used, or never.

    It is what hooks, ``retain_grad`` and `torch.autograd.grad` get. See `gradient`.
    """

    @classmethod
    @torch._dynamo.disable
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return dispatch_gradient(func, args, kwargs or {})


class NumberedLogits(DeferredLogits):
    """Logits that are never computed. See `row_gradients`."""

    def _values(self) -> Tensor:
        raise NotByRowsError

    def _materialize(self) -> Tensor:
        raise NotByRowsError


DeferredLogits._gradient_kind = DeferredGradient
DeferredLogits._numbered_kind = NumberedLogits


def defer(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return `recipe.operation.project` as deferred logits."""
    return deferred_product(DeferredLogits, input, linear_weight, linear_bias, dtype)
