"""Record the pointwise operators of a Python function of tensors as steps."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.program.text import Step, names_in, needed, step_target
from cce_inductor.torch_internals.capture import in_this_thread


def kind_of(dtype: torch.dtype) -> torch.dtype:
    """Return the widest dtype of the same kind. A program is differentiated once for each kind."""
    if dtype.is_floating_point:
        return torch.float64
    return torch.bool if dtype == torch.bool else torch.int64


class NotPointwiseError(Exception):
    """A recorded function calls an operator that is not pointwise, or has no derivative."""


class RandomError(NotPointwiseError):
    """A recorded function draws random numbers."""


_MAKE_SCALARS = frozenset(["full", "scalar_tensor", "zeros", "ones", "_efficientzerotensor"])
_MAKE_LIKE = frozenset(["full_like", "zeros_like", "ones_like", "empty_like", "zero"])
_MAKE_NEW = frozenset(["new_zeros", "new_ones", "new_full"])
_COPIES = frozenset(["detach", "alias", "clone", "lift_fresh_copy", "lift_fresh", "_to_copy"])
_FACTORY_OPTIONS = ("dtype", "layout", "device", "pin_memory", "memory_format")


def record(
    function: Callable[..., Any],
    inputs: Mapping[Name, torch.dtype],
    *,
    decompositions: Mapping[Any, Callable[..., Any]] = types.MappingProxyType({}),
    keeps_detach: bool = False,
) -> tuple[list[Step], list[Any]]:
    """Return the steps of a function of tensors without dimensions.

    The function runs in a thread of its own, because the caller may be below autograd or inside a
    trace with fake tensors; a new thread has the dispatcher's default state. Other threads are not
    affected, whereas the tracers of FX change PyTorch for all threads.

    Args:
        function: a function that takes a tensor for each of `inputs`.
        inputs: the dtype of each argument, by its name in the steps.
        decompositions: functions that replace operators which must not become steps.
        keeps_detach: whether ``detach`` becomes a step, which cuts the gradient of a program.

    Returns:
        The steps that the results need, and for each result its name, a number, or None.

    Raises:
        NotPointwiseError: an operator mixes elements or draws random numbers.
        Exception: what the function itself raises.
    """

    def run() -> tuple[list[Step], list[Any]]:
        recorder = _Recorder(decompositions, keeps_detach)
        tensors = [torch.full((), 0.5, dtype=torch.float64).to(d) for d in inputs.values()]
        for name, tensor in zip(inputs, tensors, strict=True):
            recorder.set(tensor, name)
        try:
            with in_this_thread(recorder):
                made = function(*tensors)
        except Exception:
            if recorder.error is None:
                raise
        # The function may have caught the recorder's error.
        if recorder.error is not None:
            raise recorder.error
        results = tree_leaves(made, is_leaf=lambda leaf: leaf is None)
        return recorder.steps_to([r if r is None else recorder.value(r) for r in results])

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(run).result()


class _Recorder(TorchDispatchMode):
    """Records the operators that this thread runs on tensors without dimensions.

    The value of a tensor is found by its storage: all views of a tensor without dimensions are the
    same element, so that a change in place changes each of them.

    Args:
        decompositions, keeps_detach: as for `record`.

    Attributes:
        error: an error of the recorder itself, not of the function that it records.
    """

    def __init__(self, decompositions: Mapping[Any, Callable[..., Any]], keeps_detach: bool):
        super().__init__()
        self.error: Exception | None = None
        self._decompositions = decompositions
        self._keeps_detach = keeps_detach
        self._steps: list[Step] = []
        self._values: dict[int, Any] = {}
        self._storages: list[Any] = []  # kept alive, so that no other storage gets their address
        self._detached: set[int] = set()

    def set(self, tensor: Tensor, value: Any) -> None:
        """Record that a tensor holds a value: a name or a number."""
        self._storages.append(tensor.untyped_storage())
        self._values[_address(tensor)] = value

    def value(self, tensor: Any) -> Any:
        """Return the name of the value that a tensor holds, or a number if no input affects it.

        Raises:
            NotPointwiseError: the tensor has dimensions, or it is no tensor.
        """
        if not isinstance(tensor, Tensor) or tensor.dim() > 0:
            raise NotPointwiseError(
                "it reads or returns a tensor that is not one value per element"
            )
        address = _address(tensor)
        return self._values[address] if address in self._values else tensor.item()

    def steps_to(self, results: list[Any]) -> tuple[list[Step], list[Any]]:
        """Return the steps that the results need, numbered from 0, and the results by name."""
        steps = needed(self._steps, names_in(results))
        names = {step.name: Name(f"t{number}") for number, step in enumerate(steps)}

        def renamed(value: Any) -> Any:
            return names.get(value, value) if isinstance(value, Name) else value

        numbered = [
            Step(
                names[step.name],
                step.target,
                tuple(map(renamed, step.args)),
                tuple((key, renamed(value)) for key, value in step.kwargs),
            )
            for step in steps
        ]
        return numbered, list(map(renamed, results))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._decompositions:
            with in_this_thread(self):
                return self._decompositions[func](*args, **kwargs)
        with self._own_errors():
            if _base(func) == "_local_scalar_dense" and not isinstance(self.value(args[0]), Name):
                return args[0].item()
            function = _functional(func)
            changed = (
                args[0] if function is not func else None
            )  # For some operators this is a list.
            if isinstance(changed, Tensor) and _address(changed) in self._detached:
                raise NotPointwiseError(f"{func} changes a detached tensor")
            value, dtype = self._recorded(function, args, kwargs)
        made = function(*args, **kwargs)
        result = made if function is func else func(*args, **kwargs)
        with self._own_errors():
            if not isinstance(result, Tensor) or result.dim() > 0:
                raise NotPointwiseError(str(func))
            if self._keeps_detach and _base(func) == "detach":
                result = self._detach(args[0])
            else:
                if dtype is None:
                    dtype = made.dtype
                    _check_range(function, value, dtype)
                self.set(result, self._converted(value, dtype, result))
        return result

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error
            raise

    def _recorded(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, torch.dtype | None]:
        """Return the value that an operator computes, and its dtype; None means the result's."""
        base = _base(function)
        if base in _COPIES:
            return self.value(args[0]), args[0].dtype
        if base in ("fill", "copy"):
            filler = args[1]
            if isinstance(filler, Tensor):
                return self.value(filler), filler.dtype
            return filler, None
        if base in _MAKE_SCALARS | _MAKE_LIKE | _MAKE_NEW:
            return _constant_of(base, args), None
        if not _is_pointwise(function):
            raise NotPointwiseError(str(function))
        named = {key: value for key, value in kwargs.items() if key not in _FACTORY_OPTIONS}
        return self._add(step_target(function), args, named), None

    def _add(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Name:
        name = Name(f"t{len(self._steps)}")
        values = tuple(map(self._argument, args))
        named = tuple((key, self._argument(value)) for key, value in kwargs.items())
        self._steps.append(Step(name, target, values, named))
        return name

    def _converted(self, value: Any, dtype: torch.dtype, holder: Tensor) -> Any:
        """Return a value of one dtype, converted to the dtype of the tensor that holds it.

        Raises:
            NotPointwiseError: no step does this conversion.
        """
        to = holder.dtype
        if not isinstance(value, Name):
            kind = bool if to == torch.bool else float if to.is_floating_point else int
            return value if type(value) is kind else holder.item()
        if dtype == to or (kind_of(dtype) == kind_of(to) and to not in _NARROW):
            return value
        if to == torch.bool:
            return self._add("ne.Scalar", (value, 0), {})
        if to in _NARROW and dtype != torch.bool:
            raise NotPointwiseError(f"it converts {dtype} to {to}, whose numbers wrap around")
        if dtype == torch.bool:
            number = float if to.is_floating_point else int
            return self._add("where.Scalar", (value, number(1), number(0)), {})
        if to.is_floating_point:
            return self._add("div.Tensor", (value, 1), {})
        raise NotPointwiseError(f"it converts {dtype} to {to}")

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self.value(argument)
        if argument is None or isinstance(argument, (bool, int, float, str)):
            return argument
        raise NotPointwiseError(f"it is given {argument}")

    def _detach(self, tensor: Tensor) -> Tensor:
        """Return a copy instead of an alias: the value with a gradient and the value without one
        must have storages of their own. Neither of the two may then change in place."""
        result = tensor.clone()
        value = self.value(tensor)
        self.set(result, self._add("detach", (tensor,), {}) if isinstance(value, Name) else value)
        self._detached |= {_address(tensor), _address(result)}
        return result


_NARROW = (torch.uint8, torch.int8, torch.int16)
_STAY_IN_RANGE = frozenset(
    [
        *("where", "maximum", "minimum", "clamp", "clamp_min", "clamp_max"),
        *("bitwise_and", "bitwise_or", "bitwise_xor"),
    ]
)


def _check_range(operator: Any, value: Any, dtype: torch.dtype) -> None:
    """Check that the result of an operator has not wrapped around: a program computes with wide
    integers, which do not wrap around where narrow ones do.

    Raises:
        NotPointwiseError: the result may have wrapped around.
    """
    if isinstance(value, Name) and dtype in _NARROW and _base(operator) not in _STAY_IN_RANGE:
        raise NotPointwiseError(f"{operator} of {dtype} may wrap around")


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _base(operator: Any) -> str:
    """Return the name of an ATen operator, without that of its overload."""
    return step_target(operator).split(".")[0]


def _functional(operator: Any) -> Any:
    """Return the operator that computes what an in-place operator writes; the operator itself if it
    writes nothing.

    Raises:
        NotPointwiseError: there is no such operator.
        RandomError: the operator draws random numbers.
    """
    if torch.Tag.nondeterministic_seeded in getattr(operator, "tags", ()):
        raise RandomError(str(operator))
    schema = getattr(operator, "_schema", None)
    if schema is None or operator.namespace != "aten":
        raise NotPointwiseError(str(operator))
    if not schema.is_mutable:
        return operator
    if str(schema.arguments[0].type) != "Tensor":
        raise NotPointwiseError(str(operator))  # a list of tensors
    packet = getattr(torch.ops.aten, _base(operator).removesuffix("_"), None)
    overloads = [] if packet is None else [getattr(packet, name) for name in packet.overloads()]
    for found in overloads:  # pow_.Scalar is the in-place form of pow.Tensor_Scalar
        if not found._schema.is_mutable and _signature(found) == _signature(operator):
            return found
    raise NotPointwiseError(str(operator))


def _signature(operator: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in operator._schema.arguments]


def _is_pointwise(target: Any) -> bool:
    """Whether ATen tags an operator, or the one whose derivative it is, as pointwise.

    Raises:
        RandomError: it draws random numbers.
    """
    tags = getattr(target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        raise RandomError(str(target))
    name = step_target(target).split(".")[0]
    if name.endswith("_backward") and hasattr(torch.ops.aten, name.removesuffix("_backward")):
        forward = getattr(torch.ops.aten, name.removesuffix("_backward"))
        return any(_is_pointwise(getattr(forward, o)) for o in forward.overloads())
    return torch.Tag.pointwise in tags or name == "leaky_relu"  # tagged from 2.12 on


def _constant_of(base: str, args: tuple[Any, ...]) -> Any:
    if "zero" in base or base == "empty_like":  # An empty tensor is filled next.
        return 0.0
    if "ones" in base:
        return 1.0
    return args[0] if base == "scalar_tensor" else args[-1]
