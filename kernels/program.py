"""What is computed from a logit, written down: a pointwise function, then reductions over the row.

A program is text, so that it can be an operator's argument, a cache key and a line that a person
reads. Cross-entropy under a softcap of 30 is

    t0 = div.Tensor(z, 30.0); t1 = tanh(t0); t2 = mul.Tensor(t1, 30.0);
    logsumexp(t2); target(t2, r0, -100)

Each statement before the reductions applies one pointwise ATen operator. Names:

- ``z``: the logit; ``j``: its place in the vocabulary
- ``r0``: operand 0, which has one value (or some, for an index) a row; ``c0``: one value a
  vocabulary entry; ``s0``: one value; ``b0``: one value a logit
- ``t0``: the result of a statement

Reductions, whose results are the operator's, one after another:

- ``logsumexp(x)``, ``sum(x)``: over the vocabulary
- ``mean(x, y)``: of `y` under the probabilities ``softmax(x)``; `x` is also under a logsumexp
- ``dot(q, y)``: the sum of ``q * y``; `q` is also under a sum
- ``gather(x, r0)``: `x` at the indices r0, [rows, k]
- ``index(x, r0)``: the same for [rows], where a negative index counts from the end
- ``target(x, r0, ignore_index)``: the same for class indices [rows]; 0 where one is ignored
- ``max(x)``: two results, the greatest value and its first index
- ``topk(x, k)``: two results, [rows, k] each, greatest first
- ``block(x)``: `x` itself; only in what `kernels.gradient` writes
- ``block(x, y, r0, ...)``: `y`, which is `x` but in the columns of a row's indices r0, ...
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..compat import in_this_thread

OPERAND_KINDS = "rcsb"
_CONSTANTS = {"inf": math.inf, "nan": math.nan}
_OUTPUTS = {"max": 2, "topk": 2}
WEIGHTED = {"mean": "logsumexp", "dot": "sum"}
"""Weighted sums, and how their weights are reduced."""
TOPK_LIMIT = 1024
"""The largest k of ``topk``."""


class Name(str):
    """A value in a program, as opposed to a string constant."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """``name = target(*args, **kwargs)``; `target` names an ATen overload, "div.Tensor"."""

    name: Name
    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def uses(self) -> list[Name]:
        return [a for a in (*self.args, *dict(self.kwargs).values()) if isinstance(a, Name)]

    @property
    def call(self) -> str:
        return _call_text(self.target, self.args, self.kwargs)

    def run(self, values: Mapping[Any, Tensor], dtype: torch.dtype) -> Tensor:
        """Its result from those it uses; a number where the operator wants a tensor has `dtype`."""
        args = [
            values[a] if isinstance(a, Name) else _tensor_if(wanted, a, dtype)
            for a, wanted in zip(self.args, tensor_arguments(self.target), strict=False)
        ]
        kwargs = {key: values[a] if isinstance(a, Name) else a for key, a in self.kwargs}
        result: Tensor = overload(self.target)(*args, **kwargs)
        return result

    def __str__(self) -> str:
        return f"{self.name} = {self.call}"


@dataclasses.dataclass(frozen=True)
class Reduction:
    """``kind(*args)``; the first argument is the value that is reduced."""

    kind: str
    args: tuple[Any, ...]

    @property
    def value(self) -> Name:
        return Name(self.args[0])

    @property
    def values(self) -> tuple[Name, ...]:
        return self.args[: 2 if self.kind in (*WEIGHTED, "block") else 1]

    @property
    def outputs(self) -> int:
        return _OUTPUTS.get(self.kind, 1)

    @property
    def weights(self) -> Reduction:
        """For one in `WEIGHTED`, the reduction of its weights, which the program has as well."""
        return Reduction(WEIGHTED[self.kind], (self.value,))

    def __str__(self) -> str:
        return _call_text(self.kind, self.args, ())


def _call_text(target: str, args: Iterable[Any], kwargs: Iterable[tuple[str, Any]]) -> str:
    shown = [*map(_text, args), *(f"{name}={_text(value)}" for name, value in kwargs)]
    return f"{target}({', '.join(shown)})"


def _text(value: Any) -> str:
    return str(value) if isinstance(value, Name) else repr(value)


@dataclasses.dataclass(frozen=True)
class Program:
    """Pointwise steps in order, then reductions of what they made."""

    steps: tuple[Step, ...]
    reductions: tuple[Reduction, ...]

    @classmethod
    def parse(cls, text: str) -> Program:
        """The inverse of ``str``.

        Raises:
            ValueError: `text` is not a program.
        """
        return _parse(text)

    def __str__(self) -> str:
        return "; ".join(map(str, (*self.steps, *self.reductions)))

    @property
    def roots(self) -> tuple[Name, ...]:
        """The values that are reduced, each once."""
        return tuple(dict.fromkeys(v for reduction in self.reductions for v in reduction.values))

    @property
    def outputs(self) -> list[tuple[int, Reduction]]:
        """Every reduction, with the position of its first result."""
        counts = [reduction.outputs for reduction in self.reductions]
        return list(zip(itertools.accumulate(counts, initial=0), self.reductions, strict=False))

    @property
    def is_plain(self) -> bool:
        """Whether what is reduced are the logits themselves."""
        return not self.steps and set(self.roots) == {"z"}

    @functools.cached_property
    def operands(self) -> dict[Name, int]:
        """Operands that the steps read, and their position in the list of operands."""
        uses = [use for step in self.steps for use in step.uses]
        return {use: position(use) for use in (*uses, *self.roots) if use[0] in OPERAND_KINDS}

    @functools.cached_property
    def reads_columns(self) -> bool:
        """Whether an entry's place in the vocabulary matters."""
        return "j" in self.roots or any("j" in step.uses for step in self.steps)

    def reached(self, outputs: Iterable[bool]) -> set[Name]:
        """What has a gradient if these of the program's outputs do: no path to it is detached."""
        found: set[Name] = set()
        wanted = iter(outputs)
        for reduction in self.reductions:
            of_reduction = [next(wanted) for _ in range(reduction.outputs)]
            if True in of_reduction:
                found.update(reduction.values)
        for step in reversed(self.steps):
            if step.name in found and step.target != "detach":
                found.update(step.uses)
        return found

    @functools.cached_property
    def forward(self) -> Schedule:
        return Schedule(self.steps, self.roots)

    def backward(self, operands: Sequence[Tensor]) -> Backward:
        """The pointwise function with its derivative, for operands of such dtypes."""
        return differentiated(self, tuple(_kind(operand.dtype) for operand in operands))


def position(operand: Name) -> int:
    """An operand's position in the list of operands, which its name ends with."""
    return int(operand[1:])


def _kind(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point:
        return torch.float64
    return torch.bool if dtype == torch.bool else torch.int64


def differentiated(program: Program, operands: tuple[torch.dtype, ...]) -> Backward:
    """A program's pointwise function with its derivative, computed once.

    Args:
        operands: the dtype of each, float64 for all floating ones.

    Raises:
        NotPointwiseError: the derivative has an operator that is not pointwise.
    """
    key = (str(program), operands)  # text, in which 0.0 and -0.0, 1 and True differ
    if key not in _differentiated:
        _differentiated[key] = _differentiate(program, operands)
    return _differentiated[key]


_differentiated: dict[tuple[str, tuple[torch.dtype, ...]], Backward] = {}


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Program:
    steps: list[Step] = []
    reductions: list[Reduction] = []
    try:
        for statement in ast.parse(text.replace(";", "\n").replace("\n ", "\n").strip()).body:
            if isinstance(statement, ast.Assign):
                (variable,) = statement.targets
                assert isinstance(variable, ast.Name)
                target, args, kwargs = _call(statement.value)
                overload(target)
                steps.append(Step(Name(variable.id), target, args, kwargs))
            else:
                assert isinstance(statement, ast.Expr)
                kind, args, _ = _call(statement.value)
                reductions.append(Reduction(kind, args))
    except (AssertionError, AttributeError, KeyError, SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is not a program over logits: {error}") from None
    unknown = {r.kind for r in reductions} - set(REDUCTIONS)
    if unknown or not reductions:
        raise ValueError(f"{text!r} is not a program over logits: reductions are {REDUCTIONS}")
    return Program(tuple(steps), tuple(reductions))


INDEXED = ("gather", "index", "target")
REDUCTIONS = ("logsumexp", "sum", "mean", "dot", *INDEXED, "max", "topk", "block")


def _call(node: ast.expr) -> tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    assert isinstance(node, ast.Call)
    args = tuple(_value(argument) for argument in node.args)
    kwargs = tuple((str(keyword.arg), _value(keyword.value)) for keyword in node.keywords)
    return ast.unparse(node.func), args, kwargs


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _CONSTANTS[node.id] if node.id in _CONSTANTS else Name(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Name):
        return -_CONSTANTS[node.operand.id]
    return ast.literal_eval(node)


def overload(target: str) -> Any:
    """The ATen operator that a step names."""
    name, _, overload_name = target.partition(".")
    return getattr(getattr(torch.ops.aten, name), overload_name or "default")


@functools.cache
def tensor_arguments(target: str) -> tuple[bool, ...]:
    """For each positional argument of a step's operator whether it must be a tensor."""
    schema = overload(target)._schema
    return tuple("Tensor" in str(argument.type) for argument in schema.arguments)


def _tensor_if(wanted: bool, number: Any, dtype: torch.dtype | None = None) -> Any:
    """A number as a tensor without dimensions, whose dtype gives way to any block's if none is
    asked for."""
    if not wanted or number is None:
        return number
    if dtype is None and isinstance(number, float):
        dtype = torch.float64
    return torch.tensor(number, dtype=dtype)


def step_target(operator: Any) -> str:
    """How a step names an ATen operator."""
    return str(operator).removeprefix("aten.").removesuffix(".default")


_IN_PLACE = frozenset(
    ["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "neg", "tanh", "sigmoid", "exp"]
)


class Schedule:
    """Steps, and when the result of each is needed for the last time.

    Args:
        steps: in order.
        results: the values that are wanted.
    """

    def __init__(self, steps: tuple[Step, ...], results: tuple[Name, ...]):
        self.steps = steps
        self.results = results
        self.has_aliases = any(step.target == "detach" for step in steps)
        last: dict[Name, int] = {}
        for number, step in enumerate(steps):
            last.update(dict.fromkeys(step.uses, number))
        self._dying = [
            {use for use in step.uses if last[use] == number and use not in results}
            for number, step in enumerate(steps)
        ]

    def peak(self) -> int:
        """Blocks that exist at the same time at most; that of the logits always does."""
        logits, live, most = Name("z"), set[Name](), 1
        for step, dying in zip(self.steps, self._dying, strict=True):
            first = step.args[0] if step.args else None
            over = step.target in _IN_PLACE and first in dying and not self.has_aliases
            if over and first == logits:
                logits = step.name
            else:
                live.add(step.name)
            if over:
                live.discard(first)
            most = max(most, 1 + len(live))
            live -= dying
        return most

    def run(self, values: dict[Name, Tensor], *, in_place: bool = True) -> None:
        """Adds the result of each step to `values`.

        With `in_place`, a step writes over a block that it is the last to need, and what is
        needed no more is dropped.
        """
        drop, in_place = in_place, in_place and not self.has_aliases
        block = values[Name("z")]
        for step, dying in zip(self.steps, self._dying, strict=True):
            function = overload(step.target)
            args = [
                values[a] if isinstance(a, Name) else _tensor_if(wanted, a)
                for a, wanted in zip(step.args, tensor_arguments(step.target), strict=False)
            ]
            kwargs = {k: values[a] if isinstance(a, Name) else a for k, a in step.kwargs}
            first = step.args[0] if step.args else None
            if (
                step.target in _IN_PLACE
                and in_place
                and first in dying
                and first[0] in "zt"
                and args[0].shape == block.shape
                and args[0].dtype == block.dtype
            ):
                name, _, overload_name = step.target.partition(".")
                function = getattr(torch.ops.aten, f"{name}_")
                function = getattr(function, overload_name or "default")
            result = function(*args, **kwargs)
            if result.is_floating_point():  # of numbers alone it may have another dtype
                result = result.to(block.dtype)
            values[step.name] = result
            for use in dying:
                if drop and use[0] == "t":
                    del values[use]


@dataclasses.dataclass(frozen=True)
class Backward:
    """The program's pointwise function again, and its vector-Jacobian product.

    Attributes:
        forward: makes the `roots`.
        roots: what the values that are reduced are called here, in the order of `Program.roots`;
            a number for one that is constant.
        backward: from the cotangents ``g0``, ``g1``, ... of the roots to `gradients`.
        gradients: by ``z`` or operand, what its gradient is called; none where it is 0.
        connected: ``z`` and the operands that have a gradient, be it 0.
    """

    forward: Schedule
    roots: tuple[Name | float, ...]
    backward: Schedule
    gradients: Mapping[Name, Name]
    connected: frozenset[Name]

    @property
    def peak(self) -> int:
        """Blocks that exist at the same time at most."""
        shared = {use for step in self.backward.steps for use in step.uses}
        kept = len(shared & {step.name for step in self.forward.steps})
        return self.forward.peak() + self.backward.peak() + kept + len(self.roots)


def _differentiate(program: Program, operands: tuple[torch.dtype, ...]) -> Backward:
    roots = program.roots
    dtypes = {name: operands[at] for name, at in program.operands.items()}
    floating = [Name("z"), *(name for name in dtypes if dtypes[name].is_floating_point)]
    others = [Name("j"), *(name for name in dtypes if not dtypes[name].is_floating_point)]
    cotangents = [Name(f"g{number}") for number in range(len(roots))]
    arguments = dict.fromkeys((*floating, *cotangents), torch.float64)
    arguments |= {name: dtypes.get(name, torch.int64) for name in others}

    def joint(*given: Tensor) -> list[Tensor | None]:
        # 0-d tensors: a pointwise function of scalars replays on blocks of any shape.
        values = dict(zip(arguments, given, strict=True))
        leaves = [values[name].clone().requires_grad_() for name in floating]
        values.update(zip(floating, leaves, strict=True))
        gradients: Iterable[Tensor | None] = [None] * len(leaves)
        try:
            Schedule(program.steps, roots).run(values, in_place=False)
            made = [values[root] for root in roots]
            differentiable = [
                (value, values[cotangent])
                for value, cotangent in zip(made, cotangents, strict=True)
                if value.requires_grad
            ]
            if differentiable:
                outputs, given = zip(*differentiable, strict=True)
                gradients = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
        except RuntimeError as error:  # what an operator says
            raise NotPointwiseError(f"its derivative fails: {error}") from error
        return [*(value.detach() for value in made), *gradients]

    steps, results = record(joint, arguments)
    made = tuple(results[: len(roots)])
    gradients = {
        name: result
        for name, result in zip(floating, results[len(roots) :], strict=True)
        if isinstance(result, Name)  # else there is none, or it is 0
    }
    after: set[Name] = {Name(f"g{i}") for i in range(len(roots))}
    for step in steps:
        if any(use in after for use in step.uses):
            after.add(step.name)
    first = _needed([s for s in steps if s.name not in after], _names(made))
    second = _needed(steps, tuple(gradients.values()))
    forward_steps = {step.name for step in first}
    second = [step for step in second if step.name not in forward_steps]
    needed_later = {use for step in second for use in step.uses} | set(gradients.values())
    return Backward(
        Schedule(tuple(first), (*_names(made), *needed_later)),
        made,
        Schedule(tuple(second), tuple(gradients.values())),
        gradients,
        frozenset(
            name
            for name, result in zip(floating, results[len(roots) :], strict=True)
            if result is not None
        ),
    )


def _names(values: Iterable[Any]) -> tuple[Name, ...]:
    return tuple(value for value in values if isinstance(value, Name))


def _needed(steps: list[Step], results: tuple[Name, ...]) -> list[Step]:
    wanted = set(results)
    kept = []
    for step in reversed(steps):
        if step.name in wanted:
            kept.append(step)
            wanted.update(step.uses)
    return kept[::-1]


class NotPointwiseError(Exception):
    """A function that is recorded holds an operator that is not pointwise, or fails."""


class RandomError(NotPointwiseError):
    """A traced function draws random numbers."""


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
    """The steps that a function of tensors without dimensions consists of.

    The function runs in a thread of its own, which has the dispatcher's default state, whatever
    the caller is in the middle of: a kernel below autograd, a trace with fake tensors. Other
    threads notice nothing, whereas the tracers of FX change PyTorch for all of them.

    Args:
        function: is called with a tensor for each of `inputs`.
        inputs: the dtype of each argument, by its name in the steps.
        decompositions: for operators that are not to be steps, functions that do the same.
        keeps_detach: whether ``detach`` is a step, which cuts the gradient of a program.

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
        # The function may have caught the recorder's error and gone on.
        if recorder.error is not None:
            raise recorder.error
        results = tree_leaves(made, is_leaf=lambda leaf: leaf is None)
        return recorder.steps_to([r if r is None else recorder.value(r) for r in results])

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(run).result()


class _Recorder(TorchDispatchMode):
    """Writes down the operators that this thread runs on tensors without dimensions.

    It knows by its storage what a tensor holds. All views of a tensor without dimensions are the
    same element, so a change in place is seen in each of them.

    Args:
        decompositions, keeps_detach: as for `record`.

    Attributes:
        error: what went wrong in the recorder, as opposed to the function that it records.
    """

    def __init__(self, decompositions: Mapping[Any, Callable[..., Any]], keeps_detach: bool):
        super().__init__()
        self.error: Exception | None = None
        self._decompositions = decompositions
        self._keeps_detach = keeps_detach
        self._steps: list[Step] = []
        self._values: dict[int, Any] = {}
        self._storages: list[Any] = []  # kept, so that no other storage gets the same address
        self._detached: set[int] = set()

    def set(self, tensor: Tensor, value: Any) -> None:
        """Says that a tensor holds a value: a name or a number."""
        self._storages.append(tensor.untyped_storage())
        self._values[_address(tensor)] = value

    def value(self, tensor: Any) -> Any:
        """The name of what a tensor holds, or its number if that does not depend on the inputs.

        Raises:
            NotPointwiseError: it has dimensions, or is no tensor.
        """
        if not isinstance(tensor, Tensor) or tensor.dim() > 0:
            raise NotPointwiseError("it takes or makes something else than one value of each")
        address = _address(tensor)
        return self._values[address] if address in self._values else tensor.item()

    def steps_to(self, results: list[Any]) -> tuple[list[Step], list[Any]]:
        """The steps that the results need, numbered from 0, and the results by these names."""
        steps = _needed(self._steps, _names(results))
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
            changed = args[0] if function is not func else None  # a list of them, for some
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
        """What an operator makes, and the dtype that this has, None for that of its result."""
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
        """A value of a dtype as a tensor holds it that may have another.

        Raises:
            NotPointwiseError: no step rounds it so.
        """
        to = holder.dtype
        if not isinstance(value, Name):
            kind = bool if to == torch.bool else float if to.is_floating_point else int
            return value if type(value) is kind else holder.item()
        if dtype == to or (_kind(dtype) == _kind(to) and to not in _NARROW):
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
        """A tensor of its own: what holds two values, with a gradient and without, could not be
        told apart by its storage. Neither may change then."""
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
    """A program computes with wide integers, which do not wrap around where narrow ones do.

    Raises:
        NotPointwiseError: the result may have wrapped around.
    """
    if isinstance(value, Name) and dtype in _NARROW and _base(operator) not in _STAY_IN_RANGE:
        raise NotPointwiseError(f"{operator} of {dtype} may wrap around")


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _base(operator: Any) -> str:
    """The name of an ATen operator without its overload's."""
    return step_target(operator).split(".")[0]


def _functional(operator: Any) -> Any:
    """The operator that makes what another writes into its first argument, itself if it writes
    nothing.

    Raises:
        NotPointwiseError: there is none.
        RandomError: it draws random numbers.
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
    """Whether ATen says so of an operator, or of the one whose derivative it is.

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
    return torch.Tag.pointwise in tags or name == "leaky_relu"  # which has the tag from 2.12


def _constant_of(base: str, args: tuple[Any, ...]) -> Any:
    if "zero" in base or base == "empty_like":  # which is filled next
        return 0.0
    if "ones" in base:
        return 1.0
    return args[0] if base == "scalar_tensor" else args[-1]
