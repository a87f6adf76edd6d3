"""Assertions for the tests of a model: its losses are rewritten, and its results are correct.

    from cce_inductor.testing import assert_matches_eager, assert_rewritten

    def test_head():
        assert_rewritten(model, ids, labels)
        assert_matches_eager(model, ids, labels)

The inputs of a test are small, so everything here runs with ``min_logits_bytes=0``; its gradients
are compared with exact ones, so ``sample_below=0``; and ``on_error="raise"``. The other options are
those of `install` if it is in force. Nothing that is compiled here stays in Dynamo's caches.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cce_inductor import backends
from cce_inductor.explanation import Explanation, explain_with
from cce_inductor.options import Options, options_in_force
from cce_inductor.reporting.log import log
from cce_inductor.reporting.report import LossReport
from cce_inductor.torch_internals.temporary import (
    preserved_random_state,
    temporarily_compiled,
    uncompiled,
)

__all__ = [
    "assert_matches_eager",
    "assert_not_rewritten",
    "assert_rewritten",
    "in_float64",
    "relative_error",
]


def assert_rewritten(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[LossReport]:
    """Assert that ``fn(*args, **kwargs)`` has a loss, and that each of its losses is rewritten.

    The function runs once, as for `explain`.

    Args:
        fn: a function or module, compiled or not.
        *args, **kwargs: its arguments.

    Returns:
        One report for each loss.

    Raises:
        AssertionError: no loss is found, or one is left alone. The message has the reasons.
        Exception: whatever `fn` or the pass raises.
    """
    explanation = _explain(fn, args, kwargs)
    if not explanation.losses or not all(loss.rewritten for loss in explanation.losses):
        raise AssertionError(f"not every loss is rewritten:\n{explanation}")
    return explanation.losses


def assert_not_rewritten(
    fn: Callable[..., Any], /, *args: Any, reason: str | None = None, **kwargs: Any
) -> list[LossReport]:
    """Assert that no loss of ``fn(*args, **kwargs)`` is rewritten, and that no graph changes.

    The function runs once, as for `explain`.

    Args:
        fn: a function or module, compiled or not.
        *args, **kwargs: its arguments.
        reason: a regular expression that `re.search` must find in the reason of every loss. At
            least one loss must exist then. None accepts any reason, or no loss.

    Returns:
        One report for each loss.

    Raises:
        AssertionError: a loss was rewritten, a graph changed, or a reason does not match.
        Exception: whatever `fn` or the pass raises.
    """
    explanation = _explain(fn, args, kwargs)
    losses = explanation.losses
    if any(loss.rewritten for loss in losses):
        raise AssertionError(f"a loss is rewritten:\n{explanation}")
    if any(graph.before != graph.after for graph in explanation.graphs):
        raise AssertionError(f"a graph changed, although no loss is rewritten:\n{explanation}")
    if reason is not None and not (
        losses and all(re.search(reason, loss.reason or "") for loss in losses)
    ):
        raise AssertionError(f"not every loss is left alone because of {reason!r}:\n{explanation}")
    return losses


def assert_matches_eager(
    fn: Callable[..., Any],
    /,
    *args: Any,
    backend: str = "cce_inductor_eager",
    slack: float = 1.25,
    **kwargs: Any,
) -> list[LossReport]:
    """Assert that the compiled `fn` gives what eager gives, and is as near to float64 as eager.

    It compares the tensors in the result, and the gradients of every parameter and every tensor
    that requires one in `fn` and its arguments. `fn` may be a module, a method of one, or a
    function; modules and tensors are looked for in its closure, and in its arguments through lists,
    tuples and dicts, but not among global variables. Each run has its own copies of them and the
    same state of the random number generators. In the float64 run, `fn` also casts to
    float64 where it casts to a floating dtype. A result that is no scalar is reduced with
    distinct weights before its gradient is taken, so that swapped rows are noticed.

    A loss that is left alone is no failure here; `assert_rewritten` checks that.

    Args:
        fn: a function or module, compiled or not.
        *args, **kwargs: its arguments.
        backend: ``"cce_inductor_eager"``, or ``"cce_inductor"`` to compile with Inductor, too.
        slack: how many times eager's error is allowed, because rounding is random. Errors are
            relative, in the Euclidean norm. One unit in the last place of the dtype is allowed as
            well (64 units for float64, in which eager's error is not known).

    Returns:
        One report for each loss.

    Raises:
        AssertionError: the result differs from eager's in structure, shape, dtype or values.
        TypeError: there is no tensor in the result of `fn`.
        ValueError: `backend` is another one.
        Exception: whatever `fn` or the pass raises.
    """
    compile_graph = _BACKENDS.get(backend)
    if compile_graph is None:
        raise ValueError(f"backend must be one of {tuple(_BACKENDS)}, got {backend!r}")
    chosen = dataclasses.asdict(_options())

    def compile_with_options(module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_graph(module, example_inputs, options=chosen)

    fn = uncompiled(fn)
    before = log.count
    ours = _Copy(fn, args, kwargs)
    with temporarily_compiled(ours.fn, compile_with_options) as compiled:
        got = ours.run(compiled)
    eager = _Copy(fn, args, kwargs)
    with preserved_random_state():
        expected = eager.run(eager.fn)
    reference = _Copy(fn, args, kwargs, exact=True)
    with preserved_random_state(), in_float64():
        exact = reference.run(reference.fn)

    if not any(isinstance(value, Tensor) for value in expected.values()):
        raise TypeError("there is no tensor in the result of the function")
    if not got.keys() == expected.keys() == exact.keys():
        raise AssertionError(f"eager gives {list(expected)}, the compiled function {list(got)}")
    for name, value in expected.items():
        _assert_as_accurate(name, got[name], value, exact[name], slack)
    return log.since(before)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Run a with-block in float64: functions of PyTorch cast to float64 where they are given
    another floating dtype, and new tensors are float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _CastsToFloat64():
            yield
    finally:
        torch.set_default_dtype(default)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return ``|value - reference| / |reference|`` in the Euclidean norm; absolute if that is 0.

    Where the reference is not finite the value must be the same, otherwise the error is infinite.
    """
    value, reference = value.detach().double(), reference.detach().double()
    finite = reference.isfinite()
    if not torch.allclose(value[~finite], reference[~finite], equal_nan=True):
        return float("inf")
    difference = (value[finite] - reference[finite]).norm()
    norm = reference[finite].norm()
    error = (difference / norm if norm > 0 else difference).item()
    return float("inf") if error != error else error


_BACKENDS: Mapping[str, Callable[..., Any]] = {
    "cce_inductor_eager": backends.cce_inductor_eager,
    "cce_inductor": backends.cce_inductor,
}


def _options() -> Options:
    return dataclasses.replace(
        options_in_force(), min_logits_bytes=0, sample_below=0.0, on_error="raise"
    )


def _explain(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    return explain_with(_options(), fn, *args, **kwargs)


def _assert_as_accurate(
    name: str, ours: Tensor | None, eager: Tensor | None, exact: Tensor | None, slack: float
) -> None:
    if ours is None or eager is None or exact is None:
        if not (ours is eager is exact is None):
            raise AssertionError(
                f"{name} is {_kind(ours)}, {_kind(eager)} in eager, {_kind(exact)} in float64"
            )
        return
    if (ours.shape, ours.dtype) != (eager.shape, eager.dtype):
        raise AssertionError(f"{name} is {_kind(ours)}, {_kind(eager)} in eager")
    if not ours.is_floating_point():
        if not torch.equal(ours, eager):
            raise AssertionError(f"{name} is {ours}, {eager} in eager")
        return
    ulp = torch.finfo(ours.dtype).eps * (64 if ours.dtype == torch.float64 else 1)
    error, allowed = relative_error(ours, exact), slack * relative_error(eager, exact) + ulp
    if error > allowed:
        raise AssertionError(
            f"{name} has an error of {error:.3g}, and {allowed:.3g} is allowed: {slack:g} times "
            f"eager's {relative_error(eager, exact):.3g}, plus {ulp:.3g} for rounding"
        )


def _kind(value: Tensor | None) -> str:
    return "absent" if value is None else f"{value.dtype} {tuple(value.shape)}"


class _CastsToFloat64(TorchFunctionMode):
    CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.CASTS:
            return args[0].double()
        return func(*map(self._raised, args), **pytree.tree_map(self._raised, kwargs or {}))

    @staticmethod
    def _raised(value: Any) -> Any:
        floating = isinstance(value, torch.dtype) and value.is_floating_point
        return torch.float64 if floating else value


class _Copy:
    """A copy of a function and its arguments, with their modules and tensors, for one run.

    Attributes:
        fn, args, kwargs: the copies.
        leaves: the tensors whose gradients are taken, by name.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        exact: bool = False,
    ):
        self._exact = exact
        self._memo: dict[int, Any] = {}
        self.leaves: dict[str, Tensor] = {}
        self.args = self._copy(args, "args")
        self.kwargs = self._copy(kwargs, "kwargs")
        self.fn = self._copy(fn, "fn")

    def _copy(self, value: Any, name: str) -> Any:
        paths, structure = pytree.tree_flatten_with_path(value)
        copies = [self._copy_leaf(leaf, name + pytree.keystr(path)) for path, leaf in paths]
        return pytree.tree_unflatten(copies, structure)

    def _copy_leaf(self, value: Any, name: str) -> Any:
        if isinstance(value, nn.Module):
            return self._copy_module(value, name)
        if isinstance(value, Tensor):
            return self._copy_tensor(value, name)
        if isinstance(value, functools.partial):
            args = self._copy(value.args, name)
            return functools.partial(
                self._copy(value.func, name), *args, **self._copy(value.keywords, name)
            )
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self._copy_module(value.__self__, name))
        if isinstance(value, types.FunctionType):
            return self._copy_function(value, name)
        return value

    def _copy_module(self, module: nn.Module, name: str) -> nn.Module:
        copied = copy.deepcopy(module, self._memo)
        if self._exact:
            copied.double()
        for parameter_name, parameter in copied.named_parameters():
            self._add_leaf(parameter, f"{name}.{parameter_name}")
        return copied

    def _copy_tensor(self, tensor: Tensor, name: str) -> Tensor:
        if id(tensor) in self._memo:
            copied: Tensor = self._memo[id(tensor)]
            return copied
        if tensor.is_leaf:
            copied = copy.deepcopy(tensor, self._memo)
            copied.grad = None
        else:
            copied = copy.deepcopy(tensor.detach(), self._memo).requires_grad_(tensor.requires_grad)
            self._memo[id(tensor)] = copied
        if self._exact and copied.is_floating_point():
            copied.data = copied.data.double()
        self._add_leaf(copied, name)
        return copied

    def _copy_function(self, fn: types.FunctionType, name: str) -> types.FunctionType:
        if not fn.__closure__ or id(fn) in self._memo:
            known: types.FunctionType = self._memo.get(id(fn), fn)
            return known
        cells = tuple(types.CellType() for _ in fn.__closure__)
        copied = types.FunctionType(
            fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, cells
        )
        copied.__kwdefaults__ = fn.__kwdefaults__
        self._memo[id(fn)] = copied
        for variable, old, new in zip(fn.__code__.co_freevars, fn.__closure__, cells, strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                new.cell_contents = self._copy(old.cell_contents, f"{name}.{variable}")
        return copied

    def _add_leaf(self, tensor: Tensor, name: str) -> None:
        if tensor.requires_grad and not any(tensor is leaf for leaf in self.leaves.values()):
            self.leaves[name] = tensor

    def run(self, fn: Callable[..., Any]) -> dict[str, Tensor | None]:
        """Return the result and the gradients by name. `fn` is `self.fn`, compiled or not."""
        outputs = {
            "result" + pytree.keystr(path): value
            for path, value in pytree.tree_flatten_with_path(fn(*self.args, **self.kwargs))[0]
            if isinstance(value, Tensor)
        }
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for value in outputs.values():
            if value.requires_grad:
                index = torch.arange(count, count + value.numel(), device=value.device)
                weights = 1 + (index.double() * 0.6180339887498949) % 1
                total = total.to(value.device) + (value.double() * weights.view(value.shape)).sum()
                count += value.numel()
        gradients: Sequence[Tensor | None] = [None] * len(self.leaves)
        if total.requires_grad and self.leaves:
            gradients = torch.autograd.grad(total, list(self.leaves.values()), allow_unused=True)
        named = zip(self.leaves, gradients, strict=True)
        return {
            **{name: value.detach() for name, value in outputs.items()},
            **{f"gradient of {name}": gradient for name, gradient in named},
        }
