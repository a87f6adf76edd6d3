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
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

OPERAND_KINDS = "rcsb"
_CONSTANTS = {"inf": math.inf, "nan": math.nan}
_OUTPUTS = {"max": 2, "topk": 2}
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
            values[a] if isinstance(a, Name) else torch.tensor(a, dtype=dtype) if is_tensor else a
            for a, is_tensor in zip(self.args, tensor_arguments(self.target), strict=False)
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
        return self.args[: 2 if self.kind in ("mean", "block") else 1]

    @property
    def outputs(self) -> int:
        return _OUTPUTS.get(self.kind, 1)

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
        # A new thread has the dispatcher's default state, whatever the caller is in the middle
        # of: a kernel below autograd, a trace with fake tensors.
        with ThreadPoolExecutor(max_workers=1) as thread:
            _differentiated[key] = thread.submit(_differentiate, program, operands).result()
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


REDUCTIONS = ("logsumexp", "sum", "mean", "gather", "index", "target", "max", "topk", "block")
INDEXED = ("gather", "index", "target")


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
    return tuple(str(argument.type) == "Tensor" for argument in schema.arguments)


def _tensor_if(wanted: bool, number: Any) -> Any:
    """A number as a tensor without dimensions, whose dtype gives way to any block's."""
    if not wanted:
        return number
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)


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

    def joint(
        inputs: list[Tensor], constants: list[Tensor], cotangents: list[Tensor]
    ) -> list[Tensor | None]:
        # 0-d tensors: a pointwise function of scalars replays on blocks of any shape.
        leaves = [value.clone().requires_grad_() for value in inputs]
        values = dict(zip((*floating, *others), (*leaves, *constants), strict=True))
        with torch.enable_grad():
            Schedule(program.steps, roots).run(values, in_place=False)
            made = [values[root] for root in roots]
            differentiable = [
                (value, cotangent)
                for value, cotangent in zip(made, cotangents, strict=True)
                if value.requires_grad
            ]
            gradients: Iterable[Tensor | None] = [None] * len(leaves)
            if differentiable:
                outputs, given = zip(*differentiable, strict=True)
                gradients = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
        return [*(value.detach() for value in made), *gradients]

    def example(*given: torch.dtype) -> list[Tensor]:
        return [torch.full((), 0.5, dtype=torch.float64).to(dtype) for dtype in given]

    wide = torch.float64
    constants = (torch.int64, *(dtypes[name] for name in others[1:]))
    traced = make_fx(joint)(
        example(*[wide] * len(floating)), example(*constants), example(*[wide] * len(roots))
    )
    inputs = [*floating, *others, *(Name(f"g{i}") for i in range(len(roots)))]
    steps, results = steps_of(traced, inputs)
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
    """A traced function holds an operator that is not pointwise."""


_MAKE_SCALARS = frozenset(["full", "scalar_tensor", "zeros", "ones", "_efficientzerotensor"])
_MAKE_LIKE = frozenset(
    ["full_like", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_full"]
)
_COPIES = frozenset(["detach", "alias", "clone", "lift_fresh_copy", "lift_fresh", "_to_copy"])
_FACTORY_OPTIONS = ("dtype", "layout", "device", "pin_memory", "memory_format")


def steps_of(traced: GraphModule, inputs: list[Any]) -> tuple[list[Step], list[Any]]:
    """The steps of a function of 0-d tensors that `make_fx` traced.

    Args:
        traced: the function.
        inputs: what its arguments are called; any objects.

    Returns:
        The steps, and for each result of the function its name, a number, or None.

    Raises:
        NotPointwiseError: an operator that mixes elements or draws random numbers.
    """
    values: dict[Node, Any] = {}
    arguments = iter(inputs)
    steps: list[Step] = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(arguments)
        elif node.op == "get_attr":
            values[node] = getattr(traced, str(node.target)).item()
        elif node.op == "output":
            results = torch.utils._pytree.tree_leaves(
                torch.fx.map_arg(node.args[0], lambda n: _Boxed(values[n])),
                is_leaf=lambda leaf: leaf is None,
            )
            return steps, [r.value if isinstance(r, _Boxed) else r for r in results]
        else:
            base = str(node.target).split(".")[1] if "." in str(node.target) else ""
            if base in _COPIES:
                values[node] = values[node.args[0]]
                continue
            if base in _MAKE_SCALARS | _MAKE_LIKE:
                values[node] = _constant_of(base, node, values)
                continue
            if base in ("fill", "fill_"):
                filler = node.args[1]
                values[node] = values[filler] if isinstance(filler, Node) else filler
                continue
            target = node.target
            if base.endswith("_") and not base.startswith("_"):
                target = overload(f"{base[:-1]}.{target._overloadname}")
            if not _is_pointwise(target):
                raise NotPointwiseError(str(node.target))
            args = tuple(values[a] if isinstance(a, Node) else a for a in node.args)
            kwargs = tuple(
                (k, values[a] if isinstance(a, Node) else a)
                for k, a in node.kwargs.items()
                if k not in _FACTORY_OPTIONS
            )
            values[node] = name = Name(f"t{len(steps)}")
            steps.append(Step(name, step_target(target), args, kwargs))
    raise AssertionError("a graph has an output")


def _is_pointwise(target: Any) -> bool:
    """Whether ATen says so of an operator, or of the one whose derivative it is."""
    tags = getattr(target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    name = step_target(target).split(".")[0]
    if name.endswith("_backward") and hasattr(torch.ops.aten, name.removesuffix("_backward")):
        forward = getattr(torch.ops.aten, name.removesuffix("_backward"))
        return any(_is_pointwise(getattr(forward, o)) for o in forward.overloads())
    return torch.Tag.pointwise in tags


@dataclasses.dataclass
class _Boxed:
    value: Any


def _constant_of(base: str, node: Node, values: dict[Node, Any]) -> Any:
    if "zero" in base or base == "empty_like":  # which is filled next
        return 0.0
    if "ones" in base:
        return 1.0
    number = node.args[0] if base == "scalar_tensor" else node.args[-1]
    return values[number] if isinstance(number, Node) else number
