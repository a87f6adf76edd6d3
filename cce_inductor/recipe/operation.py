"""How deferred logits are computed: a projection, and the operations on its result.

Operations are ATen's, as they reach ``__torch_dispatch__``. Each refers to those whose results it
reads, so an operation on deferred logits costs nothing until its result is computed.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cce_inductor.recipe.stale import Guarded


def project(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``F.linear`` of operands that are cast to `dtype`, as autocast computes it."""
    bias = None if linear_bias is None else linear_bias.to(dtype)
    with torch.autocast(input.device.type, enabled=False):
        return F.linear(input.to(dtype), linear_weight.to(dtype), bias)


def strided(input: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a copy with other strides."""
    return input.new_empty_strided(input.shape, strides).copy_(input)


def map_arguments(function: Callable[[Any], Any], arguments: Any) -> Any:
    """Return arguments with `function` applied to all that are no tuples, lists or dicts.

    PyTorch's ``tree_map`` does this for more types. It leaves lists of its arguments to Python's
    garbage collector, and tensors in them stay alive until that runs.
    """
    if isinstance(arguments, (tuple, list)) and not isinstance(arguments, torch.Size):
        mapped = [map_arguments(function, each) for each in arguments]
        kind = type(arguments)
        return kind._make(mapped) if hasattr(kind, "_make") else kind(mapped)
    if isinstance(arguments, dict):
        return {name: map_arguments(function, each) for name, each in arguments.items()}
    return function(arguments)


def map_only(kind: type[Any], function: Callable[[Any], Any], arguments: Any) -> Any:
    """Return arguments with `function` applied to those of type `kind`; see `map_arguments`."""
    return map_arguments(lambda a: function(a) if isinstance(a, kind) else a, arguments)


def leaves_of(arguments: Any) -> list[Any]:
    """Return all arguments that are no tuples, lists or dicts, in the order of `map_arguments`."""
    if isinstance(arguments, (tuple, list)) and not isinstance(arguments, torch.Size):
        return [leaf for each in arguments for leaf in leaves_of(each)]
    if isinstance(arguments, dict):
        return [leaf for each in arguments.values() for leaf in leaves_of(each)]
    return [arguments]


_DEPTH = 25
"""Recursion limit: every 25th ancestor is computed first."""


@dataclasses.dataclass(eq=False)
class Operation:
    """One operation, with references to those before it.

    Attributes:
        function: an ATen overload, `project`, `strided` or ``operator.getitem``.
        args, kwargs: the arguments, with `Operation` or `Guarded` in the place of tensors.
        size: the number of elements of the result of `project`.
        memory: returns the `deferred.memory.Memory` of the result, None if that is gone.
        with_gradient: if this is the `without_gradient` of an operation, returns that operation.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: int = 0
    memory: Callable[[], Any] = lambda: None
    with_gradient: Callable[[], Operation | None] = lambda: None

    def keep_result_in(self, memory: Any) -> None:
        """Have `compute` of later operations use what `memory` holds, as long as it is alive."""
        self.memory = self.without_gradient.memory = weakref.ref(memory)

    @property
    def without_gradient(self) -> Operation:
        """The same operation on detached tensors, which keeps no autograd graph alive."""
        return self._made_without_gradient if self.requires_grad else self

    @functools.cached_property
    def _made_without_gradient(self) -> Operation:
        args, kwargs = map_arguments(
            lambda a: a.without_gradient if isinstance(a, Operation | Guarded) else a,
            (self.args, self.kwargs),
        )
        made = Operation(self.function, args, kwargs, size=self.size)
        made.with_gradient = weakref.ref(self)
        return made

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether all tensors that it reads are plain.

        They are not while a compiler traces, and then nothing can be deferred.
        """
        return all(argument.is_plain for argument in self.arguments)

    @functools.cached_property
    def requires_grad(self) -> bool:
        """Whether a tensor that it reads requires a gradient."""
        return any(argument.requires_grad for argument in self.arguments)

    @functools.cached_property
    def arguments(self) -> list[Operation | Guarded]:
        """The arguments that are tensors."""
        leaves = leaves_of((self.args, self.kwargs))
        return [each for each in leaves if isinstance(each, Operation | Guarded)]

    @property
    def sources(self) -> list[Guarded]:
        """The arguments that are tensors and no results of operations."""
        return [argument for argument in self.arguments if isinstance(argument, Guarded)]

    def history(self, ends: Callable[[Operation], bool] = lambda _: False) -> list[Operation]:
        """Return all operations up to this one, each after those that it reads.

        Args:
            ends: whether to leave out the operations before the given one.
        """
        found: dict[int, Operation] = {}
        pending = [self]
        while pending:
            operation = pending[-1]
            before = [] if ends(operation) else operation.arguments
            missing = [a for a in before if isinstance(a, Operation) and id(a) not in found]
            pending += missing
            if not missing:
                found[id(pending.pop())] = operation
        return list(found.values())

    def with_tensors(self, tensors: Mapping[int, Tensor], made: dict[int, Operation]) -> Operation:
        """Return the same operation on other tensors, which share the memory of the present ones.

        Args:
            tensors: by the identity of the `Guarded` that is replaced.
            made: the operations that have been made, by the identity of the present one. Given to
                several calls, it makes them share operations as the present ones do.
        """

        def replaced(argument: Any) -> Any:
            if isinstance(argument, Operation):
                return made[id(argument)]
            tensor = tensors.get(id(argument)) if isinstance(argument, Guarded) else None
            return argument if tensor is None else argument.with_tensor(tensor)

        history = self.history(lambda each: id(each) in made)
        for each in history:
            if id(each) not in made:
                args, kwargs = map_arguments(replaced, (each.args, each.kwargs))
                made[id(each)] = Operation(each.function, args, kwargs, size=each.size)
        for each in history:
            with_gradient = made.get(id(each.with_gradient()))
            if with_gradient is not None:
                made[id(each)].with_gradient = weakref.ref(with_gradient)
        return made[id(self)]

    def products(self) -> list[Operation]:
        """Return the projections in its history."""
        return [operation for operation in self.history() if operation.function is project]

    def compute(self) -> Any:
        """Return the result, without gradient.

        The results of earlier operations come from their memories where those are alive, so that
        each is computed once.
        """
        living = {
            id(each): memory
            for each in self.history()
            if each is not self and (memory := each.memory()) and not memory.root.is_materialized
        }
        for memory in list(living.values())[_DEPTH::_DEPTH]:
            memory.values()
        history = self.history(lambda each: id(each) in living)
        last_reader = {id(a): each for each in history for a in each.arguments}
        results: dict[int, Any] = {}
        for each in history:
            memory = living.get(id(each))
            results[id(each)] = each._run(results) if memory is None else memory.values()
            for argument in each.arguments:
                if last_reader[id(argument)] is each:
                    results.pop(id(argument), None)
        return results[id(self)]

    def _run(self, results: dict[int, Any]) -> Any:
        def value(argument: Any) -> Any:
            if isinstance(argument, Operation):
                return results[id(argument)]
            return argument.read() if isinstance(argument, Guarded) else argument

        args, kwargs = map_arguments(value, (self.args, self.kwargs))
        return self.function(*args, **kwargs)
