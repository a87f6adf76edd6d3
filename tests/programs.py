"""Random programs from a projection to losses, as readable source code.

A program is built line by line. Each line is executed as it is added, so the shapes of earlier values
are known, and a line that eager PyTorch cannot execute is dropped. Each rule adds lines. The first
rule of a table is the simplest, because Hypothesis shrinks towards it.

Some programs are called several times, with different numbers and batch sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
import linecache
import operator
import re
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

_number = itertools.count()
_LIBRARY = torch.library.Library("cce_inductor_programs", "DEF")
_LIBRARY.define("halve(Tensor(a!) x) -> ()")


@torch.library.impl(_LIBRARY, "halve", "CompositeExplicitAutograd")
def _halve(x: Tensor) -> None:
    x.mul_(0.5)


_NAMES = {
    "torch": torch,
    "F": F,
    "operator": operator,
    "halve": torch.ops.cce_inductor_programs.halve,
}
_BATCH = 11
"""The batch size of the first call. No other number in a program has this value."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A function in source code, and its arguments.

    Attributes:
        seed: the seed of the first argument; each further argument adds 1.
        arguments: the tensor arguments, as expressions.
        numbers: the number arguments, with their value in each call.
        sizes: the value of the variable `size` of the expressions in each call.
        lines: the body of the function.
        dynamic: whether the row dimensions are marked as dynamic.
    """

    seed: int
    arguments: dict[str, str]
    numbers: dict[str, tuple[float, ...]]
    sizes: tuple[int, ...]
    lines: tuple[str, ...]
    dynamic: bool

    def __str__(self) -> str:
        tensors = [
            f"torch.manual_seed({self.seed + number}); {name} = {text}"
            for number, (name, text) in enumerate(self.arguments.items())
        ]
        marks = [
            f"torch._dynamo.maybe_mark_dynamic({name}, {dim})" for name, dim in self.dynamic_dims()
        ]
        if self.calls == 1:
            return "\n".join([*tensors, *marks, "", self.source])
        names = ["size", *self.numbers]
        values = list(zip(self.sizes, *self.numbers.values(), strict=True))
        call = f"program({', '.join([*self.arguments, *self.numbers])})"
        loop = textwrap.indent("\n".join([*tensors, *marks, call]), "    ")
        return f"{self.source}\nfor {', '.join(names)} in {values}:\n{loop}\n"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the program when Hypothesis shows a failing example."""
        for line in f"\n{self}".splitlines():
            printer.text(line)
            printer.break_()

    def dynamic_dims(self) -> list[tuple[str, int]]:
        """Return the row dimensions of inputs, targets and masks if they are dynamic."""
        if not self.dynamic:
            return []
        values = zip(self.arguments, self.tensors(), strict=True)
        return [
            (name, dim)
            for name, value in values
            if name[0] in "xtpm"
            for dim in range(value.dim() - (name[0] == "x"))
        ]

    @property
    def source(self) -> str:
        body = textwrap.indent("\n".join(self.lines), "    ")
        return f"def program({', '.join([*self.arguments, *self.numbers])}):\n{body}\n"

    @property
    def calls(self) -> int:
        """The number of calls."""
        return len(self.sizes)

    @property
    def exact(self) -> bool:
        """Whether all values are float64."""
        text = str(self)
        return not any(word in text for word in ("float32", "float16", "float()"))

    def function(self) -> Callable[..., Any]:
        """Compile the function; its source lines are available to tracebacks."""
        filename = f"<program {next(_number)}>"
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(True), filename)
        namespace = dict(_NAMES)
        exec(compile(self.source, filename, "exec"), namespace)
        return namespace["program"]

    def tensors(self, call: int = 0) -> list[Tensor]:
        texts, size = self.arguments.values(), self.sizes[call]
        return [_evaluate(text, self.seed + number, size) for number, text in enumerate(texts)]

    def inputs(self, call: int = 0) -> list[Any]:
        """Return the arguments of a call."""
        return [*self.tensors(call), *(values[call] for values in self.numbers.values())]


def _evaluate(text: str, seed: int, size: int = _BATCH) -> Tensor:
    torch.manual_seed(seed)
    return eval(text, {**_NAMES, "size": size})


class _CannotRunError(Exception):
    """Eager PyTorch cannot execute the line, or the rule does not apply."""


@dataclasses.dataclass(frozen=True)
class _Logits:
    """A variable that holds logits, and the dimension of its vocabulary."""

    name: str
    vocabulary_dim: int


class _Builder:
    def __init__(self, draw: Callable[..., Any]):
        self.draw = draw
        self.seed = draw(st.integers(0, 3))
        self.arguments: dict[str, str] = {}
        self.numbers: dict[str, tuple[float, ...]] = {}
        self.lines: list[str] = []
        self.results: list[str] = []
        self.logits: list[_Logits] = []
        self.views: list[str] = []
        self.namespace: dict[str, Any] = dict(_NAMES)
        self.names = itertools.count()
        self.indent = ""
        self.dtype = "torch.float64"
        self.symbolic = False
        self.batched = False

    # Choices.

    def choose(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def rarely(self, one_of: int = 4) -> bool:
        return self.draw(st.integers(0, one_of - 1)) == one_of - 1

    def number(self) -> str:
        """Return a factor or an offset, constant or varying."""
        number = self.choose("2", "0.5", "-1.5", "3.0", "1", "0.25")
        if self.rarely():
            return self.varying(number, *self.choose((2, 3, 4), (-2, 0, 5)))
        return self.varying(number, 0.75, 1.5, 3.0)

    def varying(self, constant: object, *values: float) -> str:
        """Return a constant, or in a symbolic program often a number that differs in each call."""
        if not self.symbolic or self.rarely(3):
            return str(constant)
        name = f"n{next(self.names)}"
        self.numbers[name] = values
        self.namespace[name] = values[0]
        return name

    # Code.

    def sized(self, text: str) -> str:
        """Replace the batch size in the text by a variable if it differs in each call."""
        return re.sub(rf"\b{_BATCH}\b", "size", text) if self.batched else text

    def line(self, text: str) -> None:
        text = self.sized(text)
        with torch.enable_grad() if not self.indent else torch.no_grad():
            try:
                exec(text, self.namespace)
            except Exception as error:
                raise _CannotRunError from error
        self.lines.append(self.indent + text)

    def new(self, expression: str, prefix: str = "v") -> str:
        """Assign an expression to a new variable, and return its name."""
        name = f"{prefix}{next(self.names)}"
        self.line(f"{name} = {expression}")
        return name

    def argument(self, expression: str, prefix: str = "a") -> str:
        name = f"{prefix}{next(self.names)}"
        expression = self.sized(expression)
        self.namespace[name] = _evaluate(expression, self.seed + len(self.arguments))
        self.arguments[name] = expression
        return name

    def tensor(self, shape: tuple[int, ...], prefix: str = "a") -> str:
        gradient = "" if self.rarely() else ", requires_grad=True"
        return self.argument(f"torch.randn({shape}, dtype={self.dtype}{gradient})", prefix)

    def constant(self, shape: tuple[int, ...], dtype: str) -> str:
        return self.argument(f"torch.randn({shape}, dtype={dtype})")

    def attempt(self, rule: Callable[..., None], *args: Any) -> bool:
        """Apply a rule; if it fails, undo what it added and return False."""
        state = {name: value for name, value in vars(self).items() if name in _STATE}
        saved = {name: value.copy() for name, value in state.items()}
        indent = self.indent
        try:
            rule(self, *args)
        except _CannotRunError:
            vars(self).update(saved, indent=indent)
            self._run_again()
            return False
        return True

    def _run_again(self) -> None:
        """Compute all values again, because the failed line may have changed some."""
        self.namespace = dict(_NAMES)
        for number, (name, text) in enumerate(self.arguments.items()):
            self.namespace[name] = _evaluate(text, self.seed + number)
        self.namespace.update((name, values[0]) for name, values in self.numbers.items())
        body = [*self.lines, f"{self.indent}pass"]
        exec("\n".join(body), self.namespace)

    def require_gradients(self) -> None:
        """Raise _CannotRunError if eager's backward rejects the in-place changes."""
        names = dict.fromkeys([*self.results, *self.views, *(z.name for z in self.logits)])
        values = [self.value(name) for name in names]
        leaves = [x for x in map(self.value, self.arguments) if x.requires_grad]
        try:
            roots = [value.double().sum() for value in values if value.requires_grad]
            if roots and leaves:
                torch.autograd.grad(roots, leaves, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise _CannotRunError from error

    # What is known of a variable.

    def value(self, name: str) -> Tensor:
        return self.namespace[name]

    def shape(self, logits: _Logits) -> tuple[int, ...]:
        return tuple(self.value(logits.name).shape)

    def vocabulary(self, logits: _Logits) -> int:
        return self.shape(logits)[logits.vocabulary_dim]

    def rows(self, logits: _Logits) -> tuple[int, ...]:
        shape = list(self.shape(logits))
        del shape[logits.vocabulary_dim]
        return tuple(shape)

    def dtype_of(self, name: str) -> str:
        return str(self.value(name).dtype)

    def require(self, condition: bool) -> None:
        if not condition:
            raise _CannotRunError

    def add_logits(self, expression: str, vocabulary_dim: int) -> None:
        name = self.new(expression, "z")
        dimensions = self.value(name).dim()
        self.logits.append(_Logits(name, vocabulary_dim % dimensions if dimensions else 0))

    def columns(self, logits: _Logits, which: str) -> str:
        """Return an index expression over the vocabulary."""
        return "[" + ":, " * logits.vocabulary_dim + which + "]"

    def along_vocabulary(self, logits: _Logits) -> tuple[int, ...]:
        """Return a shape that broadcasts over the rows."""
        dim, dimensions = logits.vocabulary_dim, len(self.shape(logits))
        ones = self.draw(st.integers(0, dim))
        return (1,) * ones + (self.vocabulary(logits),) + (1,) * (dimensions - 1 - dim)

    def last(self, logits: _Logits) -> tuple[str, int]:
        """Return a variable with the vocabulary as its last dimension, and the vocabulary's size."""
        if logits.vocabulary_dim == len(self.shape(logits)) - 1:
            return logits.name, self.vocabulary(logits)
        moved = self.choose("movedim({}, -1)", "transpose({}, -1)").format(logits.vocabulary_dim)
        return self.new(f"{logits.name}.{moved}"), self.vocabulary(logits)

    def target(self, shape: tuple[int, ...], vocabulary: int, ignored: int | None = None) -> str:
        if shape == (vocabulary,) and self.rarely(2):
            return self.new(f"torch.arange({vocabulary})", "t")
        text = f"torch.randint({vocabulary}, {shape})"
        if ignored is not None and self.rarely(2):
            which = self.choose(f"torch.rand({shape}) < 0.4", "torch.tensor(True)")
            text += f".masked_fill({which}, {ignored})"
        return self.argument(text, "t")

    def result(self, expression: str) -> str:
        name = self.new(expression, "r")
        self.results.append(name)
        return name


_STATE = ("arguments", "numbers", "lines", "results", "logits", "views")


# Projections.


def _linear(b: _Builder, x: str, w: str, vocabulary: int) -> None:
    bias = f", {b.tensor((vocabulary,), 'b')}" if b.rarely(3) else ""
    call = b.choose("F.linear({}, {}{})", "torch._C._nn.linear({}, {}{})")
    b.add_logits(call.format(x, w, bias), -1)


def _matmul(b: _Builder, x: str, w: str, vocabulary: int) -> None:
    turned = b.choose(".T", ".t()", ".transpose(0, 1)", ".mT", ".permute(1, 0)", ".T.contiguous()")
    call = b.choose("{} @ {}", "torch.matmul({}, {})", "{}.matmul({})", "torch.mm({}, {})")
    b.add_logits(call.format(x, w + turned), -1)


def _transposed_parameter(b: _Builder, x: str, w: str, vocabulary: int) -> None:
    hidden = b.value(w).shape[1]
    b.add_logits(f"{x} @ {b.tensor((hidden, vocabulary), 'w')}", -1)


def _vocabulary_first(b: _Builder, x: str, w: str, vocabulary: int) -> None:
    b.require(b.value(x).dim() == 2)
    b.add_logits(f"{w} @ {x}.T", 0)


def _addmm(b: _Builder, x: str, w: str, vocabulary: int) -> None:
    b.require(b.value(x).dim() == 2)
    bias = b.tensor(b.choose((vocabulary,), (1, vocabulary), (1,), (len(b.value(x)), 1)), "b")
    factors = b.choose("", "", ", beta=2", ", alpha=0.5")
    b.add_logits(f"torch.addmm({bias}, {x}, {w}.t(){factors})", -1)


def _einsum(b: _Builder, x: str, w: str, vocabulary: int) -> None:
    rows = "nmk"[: b.value(x).dim() - 1]
    result = b.choose(rows + "v", "v" + rows)
    b.add_logits(f'torch.einsum("{rows}h,vh->{result}", {x}, {w})', result.index("v"))


def _bmm(b: _Builder, x: str, w: str, vocabulary: int) -> None:
    b.require(b.value(x).dim() == 3)
    batch = b.value(x).shape[0]
    expanded = b.choose(
        f"{w}.t().unsqueeze(0).expand({batch}, -1, -1)",
        f"{w}.T.expand({batch}, -1, -1)",
        f"{w}.T[None].repeat({batch}, 1, 1)",
    )
    if b.rarely(3):
        b.add_logits(f"torch.baddbmm({b.tensor((vocabulary,), 'b')}, {x}, {expanded})", -1)
    else:
        b.add_logits(f"torch.bmm({x}, {expanded})", -1)


PROJECTIONS = (
    _linear,
    _matmul,
    _transposed_parameter,
    _vocabulary_first,
    _addmm,
    _einsum,
    _bmm,
)

INPUTS = ("{x} * 2", "{x}.detach()", "{x}.clone()", "{x}.tanh()", "{x}[:]", "{x}.relu()")
WEIGHTS = (
    "{w} * 0.5",
    "{w}.clone()",
    "F.normalize({w}, dim=-1)",
    "{w}.detach()",
    "torch.cat([{w}[1:], {w}[:1]])",
    "{w}[:, :]",
    "{w}.flip(0)",
    "{w} + 0",
    "{w}.t().contiguous().t()",
)


def _projection(b: _Builder) -> None:
    hidden = b.draw(st.integers(1, 5))
    vocabulary = b.draw(st.integers(2, 9))
    tokens = b.draw(st.sampled_from([3, 1, 2, 4, 5, 6, 0]))
    leading = b.choose((tokens,), (tokens,), (2, tokens), (1, tokens), (2, 1, tokens))
    if b.batched or b.rarely(5):  # every row has a class of its own
        vocabulary = _BATCH if b.batched else vocabulary
        leading = (vocabulary,)
    x = b.tensor((*leading, hidden), "x")
    if b.batched and not b.lines:
        b.lines.append(f"size = {x}.shape[0]")
        b.namespace["size"] = _BATCH
    w = b.tensor((vocabulary, hidden), "w")
    if b.rarely(3):
        x = b.new(b.choose(*INPUTS).format(x=x))
    if b.rarely(3):
        w = b.new(b.choose(*WEIGHTS).format(w=w))
    changed = None
    if b.rarely(8):  # with a gradient for both, eager would keep and miss what is changed
        copied = b.choose(w, x)
        x = b.new(f"{x}.{'clone' if copied == x else 'detach'}()")
        w = b.new(f"{w}.{'clone' if copied == w else 'detach'}()")
        changed = w if b.lines[-1].endswith("clone()") else x
    if b.rarely(12):
        b.indent = "    "
        b.lines.append("with torch.no_grad():")
    if not b.attempt(b.choose(*PROJECTIONS), x, w, vocabulary):
        _linear(b, x, w, vocabulary)
    b.indent = ""
    if changed is not None:
        b.attempt(_write_operand, changed)


# Between projection and loss.

SCALINGS = (
    "{z} * {c}",
    "{c} * {z}",
    "{z} / {c}",
    "{c} * torch.tanh({z} / {c})",
    "30 * torch.tanh({z} / 30)",
    "{z}.div(3.0).tanh().mul(3.0)",
)
POINTWISE = (
    "{c} - {z}",
    "{z} + {c}",
    "-{z}",
    "torch.tanh({z})",
    "{c} * torch.tanh({z} / {d})",
    "{c} * torch.sigmoid({z} / {d})",
    "23 * torch.sigmoid(({z} + 5) / 7.5)",
    "15 * {z} * torch.rsqrt({z} * {z} + 225)",
    "{z} * torch.rsqrt({z}.square() + 4)",
    "{z}.clamp(-1, 1.5)",
    "{z}.clamp(max=0.5)",
    "{z}.clamp(min={c})",
    "torch.clamp({z}, -{c}, {d})",
    "F.softplus({z})",
    "torch.exp({z} * 0.1)",
    "{z}.abs()",
    "{z}.sin()",
    "{z} ** 2",
    "F.relu({z})",
    "F.gelu({z})",
    "F.silu({z})",
    "F.hardtanh({z})",
    "F.leaky_relu({z}, 0.1)",
    "F.leaky_relu({z}, {c})",
    "F.hardtanh({z}, -{c}, 4.0)",
    "torch.where({z} > 0, {z}, {z} * 0.5)",
    "torch.where({z} > 0, {z}, {c})",
    "torch.where({z} > {c}, {z} * {d}, {z})",
    "{z}.abs() ** {c}",
    "torch.maximum({z}, {z} * 2)",
    "torch.lerp({z}, {z} * {z}, 0.5)",
    "{z}.nan_to_num()",
    "torch.addcmul({z}, {z}, {z}, value=0.1)",
)


def _pointwise(b: _Builder, z: _Logits) -> None:
    text = b.choose(*SCALINGS) if b.rarely(2) else b.choose(*POINTWISE)
    b.add_logits(text.format(z=z.name, c=b.number(), d=b.number()), z.vocabulary_dim)


def _cast(b: _Builder, z: _Logits) -> None:
    dtype = "torch.float32" if b.dtype != "torch.float64" else "torch.float64"
    cast = b.choose(
        ".double()",
        f".to({dtype})",
        f".to(dtype={dtype}, copy=True)",
        f".type_as({z.name})",
        ".cpu()",
        *([".float()"] if b.dtype != "torch.float64" else []),
    )
    b.add_logits(z.name + cast, z.vocabulary_dim)


def _copy(b: _Builder, z: _Logits) -> None:
    how = b.choose(".contiguous()", ".clone()", ".view_as({0})", ".alias()", " + 0")
    b.add_logits(z.name + how.format(z.name), z.vocabulary_dim)


def _flatten(b: _Builder, z: _Logits) -> None:
    b.require(z.vocabulary_dim == len(b.shape(z)) - 1)
    vocabulary = b.vocabulary(z)
    how = b.choose(
        f".view(-1, {vocabulary})",
        f".reshape(-1, {z.name}.size(-1))",
        ".flatten(0, -2)",
        f".view(-1, {z.name}.shape[-1])",
        f".reshape({', '.join(map(str, b.shape(z)[::-1][1:]))}, {vocabulary})",
        ".unflatten(0, (-1, 1))",
        ".unflatten(0, (1, -1))",
    )
    b.add_logits(z.name + how, -1)


def _move(b: _Builder, z: _Logits) -> None:
    dimensions = len(b.shape(z))
    order = list(b.draw(st.permutations(range(dimensions))))
    where = order.index(z.vocabulary_dim)
    if b.rarely(2):
        b.add_logits(f"{z.name}.permute({', '.join(map(str, order))})", where)
        return
    first, second = b.draw(st.integers(0, dimensions - 1)), b.draw(st.integers(0, dimensions - 1))
    where = {first: second, second: first}.get(z.vocabulary_dim, z.vocabulary_dim)
    b.add_logits(f"{z.name}.transpose({first}, {second})", where)


def _unsqueeze(b: _Builder, z: _Logits) -> None:
    dim = b.draw(st.integers(0, len(b.shape(z))))
    b.require(len(b.shape(z)) < 5)
    b.add_logits(f"{z.name}.unsqueeze({dim})", z.vocabulary_dim + (dim <= z.vocabulary_dim))


def _squeeze(b: _Builder, z: _Logits) -> None:
    dims = [dim for dim, size in enumerate(b.shape(z)) if size == 1 and dim != z.vocabulary_dim]
    b.require(bool(dims))
    dim = b.choose(*dims)
    b.add_logits(f"{z.name}.squeeze({dim})", z.vocabulary_dim - (dim < z.vocabulary_dim))


def _row_dim(b: _Builder, z: _Logits) -> int:
    dims = [dim for dim in range(len(b.shape(z))) if dim != z.vocabulary_dim]
    b.require(bool(dims))
    return b.choose(*dims)


def _slice(b: _Builder, z: _Logits) -> None:
    dim = _row_dim(b, z)
    which = b.choose("1:", ":-1", "::2", ":", "-2:", "None:2", "1:-1")
    ellipsis = dim < z.vocabulary_dim == len(b.shape(z)) - 1 and b.rarely()
    prefix = "..., " if ellipsis else ":, " * dim
    suffix = ", :" * (len(b.shape(z)) - 1 - dim) if ellipsis else ""
    b.add_logits(f"{z.name}[{prefix}{which}{suffix}]", z.vocabulary_dim)


def _select(b: _Builder, z: _Logits) -> None:
    dim = _row_dim(b, z)
    how = b.choose(f"[{':, ' * dim}0]", f".select({dim}, -1)", f"[{':, ' * dim}-1]")
    b.add_logits(z.name + how, z.vocabulary_dim - (dim < z.vocabulary_dim))


def _index(b: _Builder, z: _Logits) -> None:
    dim = _row_dim(b, z)
    size = b.shape(z)[dim]
    b.require(size > 0)
    index = b.argument(f"torch.randint({size}, ({b.draw(st.integers(0, 4))},))", "i")
    how = b.choose(f"[{':, ' * dim}{index}]", f".index_select({dim}, {index})")
    b.add_logits(z.name + how, z.vocabulary_dim)


def _mask_rows(b: _Builder, z: _Logits) -> None:
    b.require(z.vocabulary_dim == len(b.shape(z)) - 1 > 0)
    count = b.draw(st.integers(1, z.vocabulary_dim))
    mask = b.argument(f"torch.rand({b.shape(z)[:count]}) < 0.6", "m")
    b.add_logits(f"{z.name}[{mask}]", z.vocabulary_dim - count + 1)


def _rearrange_rows(b: _Builder, z: _Logits) -> None:
    dim = _row_dim(b, z)
    how = b.choose(
        "torch.cat([{z}, {z}], {d})",
        "{z}.chunk(2, {d})[0]",
        "{z}.split(1, {d})[-1]",
        "{z}.narrow({d}, 0, 1)",
        "{z}.flip({d})",
        "{z}.roll(1, {d})",
    )
    b.add_logits(how.format(z=z.name, d=dim), z.vocabulary_dim)


def _bias(b: _Builder, z: _Logits) -> None:
    bias = b.tensor(b.along_vocabulary(z), "b")
    b.add_logits(
        b.choose("{0} + {1}", "{1} + {0}", "{0} - {1}").format(z.name, bias), z.vocabulary_dim
    )


def _scale(b: _Builder, z: _Logits) -> None:
    if b.rarely(2):
        scale = b.tensor(b.choose((), (1,)), "s")
    else:
        shape = list(b.shape(z))
        shape[z.vocabulary_dim] = 1
        gradient = "" if b.rarely() else ".requires_grad_()"
        scale = b.argument(f"(torch.rand({tuple(shape)}, dtype={b.dtype}) + 0.5){gradient}", "s")
    how = b.choose("{0} * {1}", "{0} / {1}", "{1} * {0}", "{0} * {1}.exp()", "{0}.mul({1})")
    b.add_logits(how.format(z.name, scale), z.vocabulary_dim)


def _fewer_columns(b: _Builder, z: _Logits) -> None:
    vocabulary = b.vocabulary(z)
    b.require(vocabulary > 2)
    which = b.choose(f":{vocabulary - 1}", ":-1", "1:", ":2", ":{n}", "{n}:")
    if "{n}" in which:
        which = which.format(n=b.varying(1, 1, 2, 3))
    b.add_logits(z.name + b.columns(z, which), z.vocabulary_dim)


def _mask_columns(b: _Builder, z: _Logits) -> None:
    fill = b.choose("-torch.inf", "-1e4", "0.0", f"torch.finfo({z.name}.dtype).min", b.number())
    shape = b.along_vocabulary(z)
    mask = f"torch.rand({shape}) < 0.3"
    if "finfo" in fill:  # no sum holds the loss of a row of nothing else: a limit in the README
        mask = f"({mask}) & (torch.arange({b.vocabulary(z)}).view({shape}) > 0)"
    mask = b.argument(mask, "m")
    how = b.choose(
        "{z}.masked_fill({m}, {f})",
        "torch.where({m}, {f}, {z})",
        "torch.where(~{m}, {z}, {f})",
        "{z} + torch.zeros(()).to({z}.dtype).masked_fill({m}, {f})",
    )
    b.add_logits(how.format(z=z.name, m=mask, f=fill), z.vocabulary_dim)


MARGINS = (
    "{z} - {c} * F.one_hot({t}, {v})",
    "torch.where({t}[..., None] == torch.arange({v}), {z} - {c}, {z})",
    "torch.where(F.one_hot({t}, {v}).bool(), {z} * {c}, {z})",
    "{z}.scatter(-1, {t}[..., None], {c})",
    "{z}.scatter(-1, {t}[..., None], {z}.gather(-1, {t}[..., None]) - {c})",
    "{c} * ({z} - F.one_hot({t}, {v}).to({z}.dtype) * {d})",
)


def _margin(b: _Builder, z: _Logits) -> None:
    """Another value for one entry of each row."""
    last, vocabulary = b.last(z)
    target = b.target(tuple(b.value(last).shape[:-1]), vocabulary)
    text = b.choose(*MARGINS).format(z=last, t=target, v=vocabulary, c=b.number(), d=b.number())
    b.add_logits(text, -1)


def _detach(b: _Builder, z: _Logits) -> None:
    b.add_logits(f"{z.name}.detach()", z.vocabulary_dim)


def _without_gradient(b: _Builder, z: _Logits) -> None:
    b.lines.append(f"with {b.choose('torch.no_grad()', 'torch.set_grad_enabled(False)')}:")
    b.indent = "    "
    b.choose(_pointwise, _bias, _scale)(b, z)
    b.indent = ""


def _random(b: _Builder, z: _Logits) -> None:
    how = b.choose(
        "F.dropout({0}, 0.5)", "{0} + torch.rand_like({0})", "torch.dropout({0}, 0.3, True)"
    )
    b.add_logits(how.format(z.name), z.vocabulary_dim)


def _combine(b: _Builder, z: _Logits) -> None:
    other = b.choose(*b.logits)
    b.require(b.shape(other) == b.shape(z) and other.vocabulary_dim == z.vocabulary_dim)
    how = b.choose("{0} + {1}", "{0} - {1}.detach()", "{0} * {1}", "torch.maximum({0}, {1})")
    b.add_logits(how.format(z.name, other.name), z.vocabulary_dim)


def _mix_vocabulary(b: _Builder, z: _Logits) -> None:
    """Something that is no pointwise function and keeps the shape."""
    how = b.choose(
        "{z} - {z}.max({d}, keepdim=True).values",
        "{z} - {z}.mean({d}, keepdim=True)",
        "{z} - {z}.logsumexp({d}, keepdim=True)",
        "F.log_softmax({z}, {d})",
        "F.layer_norm({z}, {z}.shape[-1:])",
        "{z}.cumsum({d})",
        "{z}.flip({d})",
    )
    b.add_logits(how.format(z=z.name, d=z.vocabulary_dim), z.vocabulary_dim)


BETWEEN = (
    _pointwise,
    _cast,
    _copy,
    _flatten,
    _pointwise,
    _slice,
    _move,
    _bias,
    _scale,
    _select,
    _unsqueeze,
    _squeeze,
    _index,
    _mask_rows,
    _fewer_columns,
    _mask_columns,
    _rearrange_rows,
    _margin,
    _without_gradient,
    _detach,
    _combine,
    _random,
    _mix_vocabulary,
)
_USUAL = BETWEEN.index(_without_gradient)

# Views, and changes in place.

VIEWS = (
    "{z}.diagonal()",
    "{z}[..., 1:]",
    "{z}[1:]",
    "{z}[0]",
    "{z}[..., 0]",
    "{z}.detach()",
    "{z}.view(-1)",
    "{z}.unsqueeze(0)",
    "{z}.t()",
    "{z}.transpose(0, -1)",
    "{z}.narrow(-1, 0, 2)",
    "{z}.narrow(0, 1, 2)",
    "{z}.select(-1, {n})",
    "{z}[:, :{n}]",
    "{z}.t().diagonal()",
    "{z}.diagonal(1)",
    "{z}[1:, 1:].diagonal()",
    "torch.diagonal({z}, 0, -1, -2)",
    "{z}.expand(2, *{z}.shape)",
    "{z}.expand(1, *{z}.shape)[0]",
    "{z}.split(2, -1)[0]",
    "{z}.unbind(0)[0]",
    "{z}.unbind(-1)[1]",
    "{z}.chunk(2)[1]",
    "{z}.tensor_split(2, -1)[1]",
    "{z}.as_strided((2,), (1,))",
    "{z}.as_strided({z}.shape, {z}.stride())",
    "{z}.reshape(-1)",
    "{z}.flatten()",
    "{z}.contiguous()",
    "{z}.to({z}.dtype)",
    "{z}.data",
    "{z}.view_as({z})",
    "{z}.view({z}.dtype)",
    "{z}.movedim(0, -1)",
    "{z}.unfold(-1, 2, 1)",
    "{z}.squeeze()",
    "{z}[..., ::2]",
    "{z}[None, ..., 1]",
    "{z}.diag()",
)
READS = (
    "{u}.sum()",
    "({u} * {c}).square().mean()",
    "{u}.clone()",
    "{u} * {c}",
    "{u}.logsumexp(-1)",
    "({z}.logsumexp(-1) - {u}).mean()",
    "{u}.detach().exp()",
    "F.relu({z} - {u}[:, None] + {c}).sum(-1)",
    "{u}.log_softmax(-1).sum()",
    "{u}",
)
THROUGH = (
    "{}",
    "{}.detach()",
    "{}.diagonal()",
    "{}[..., 1:]",
    "{}.clone()",
    "{}.view(-1)",
    "{}[1:]",
    "{}.mT",
    "{}.data",
    "{}[None]",
    "{}[..., 0]",
    "{}.double()",
    "{}.select(0, -1)",
    "{}.contiguous()",
    "{}.as_strided((2,), (1,))",
    "{}.expand(1, *{}.shape)",
)
WRITES = (
    "{u}.mul_({c})",
    "{u}.sub_({c})",
    "{u}.fill_({c})",
    "{u} -= {c}",
    "{u} *= {c}",
    "{u} /= {c}",
    "{u} += {c}",
    "{u}.zero_()",
    "{u}[...] = {c}",
    "{u}[:] = {a}",
    "{u}.copy_({a})",
    "{u}.sub_({a})",
    "{u}.mul_({a}.exp())",
    "{u}[0] = {c}",
    "{u}[..., -1] = {c}",
    "{u}[..., :1] += {c}",
    "{u}[..., {n}:] = -1e4",
    "{u}.tanh_()",
    "{u}.div_(3).tanh_().mul_(3)",
    "{u}.neg_()",
    "{u}.exp_()",
    "{u}.clamp_(-1, {c})",
    "{u}.clamp_(max={c})",
    "F.relu({u}, inplace=True)",
    "F.leaky_relu({u}, 0.1, True)",
    "torch.relu_({u})",
    "{u}.copy_({u} * 2)",
    "{u}.sub_({u} * 0.5)",
    "{u}.add_({u}.detach(), alpha={c})",
    "torch.tanh({u}, out={u})",
    "torch.add({u}.detach(), 1, out={u}.detach())",
    "{u}.masked_fill_({m}, {c})",
    "{u}[{m}] = {c}",
    "{u}.masked_fill_({u} > 0, {c})",
    "{u}[{u} < 0] = {c}",
    "{u}.fill_diagonal_({c})",
    "{u}.index_fill_(0, {i}, {c})",
    "{u}.index_fill_(-1, {i}, {c})",
    "{u}.index_put_(({i},), torch.zeros((), dtype={u}.dtype))",
    "{u}[{i}] = {c}",
    "{u}[{i}, {i}] -= {c}",
    "{u}.scatter_(-1, {k}, {c})",
    "{u}.scatter_add_(-1, {k}, {a})",
    "{u}.index_copy_(0, {i}[:1], {a}[:1])",
    "operator.imul({u}, {c})",
    "{u}.__isub__({c})",
    "torch._foreach_mul_([{u}], 2)",
    "halve({u})",
    "{u}.addcmul_({u}.detach(), {a}, value={c})",
    "{u}.lerp_({a}, 0.5)",
    "{u}.nan_to_num_()",
    "F.dropout({u}, 0.0, inplace=True)",
    "{u}.set_({a})",
    "{u}.t_()",
    "{u}.squeeze_()",
)
WRITES_TO_OPERANDS = (
    "{a}.mul_(2)",
    "{a}.zero_()",
    "{a}[0] = 3",
    "{a}.t().neg_()",
    "{a}.copy_({a} * 2)",
    "{a}.__imul__(2)",
    "halve({a})",
    "torch.add({a}, 1, out={a})",
    "F.embedding(torch.tensor([0]), {a}, max_norm=0.1)",
    "F.batch_norm({a}.clone(), {a}[0], {a}[-1], training=True)",
    "torch._foreach_neg_([{a}])",
    "F.relu({a}, inplace=True)",
)
WRITES_TO_INDICES = (
    "{a}.clamp_(max=0)",
    "{a}.zero_()",
    "{a}[0] = 0",
    "{a}[:1].fill_(1)",
    "{a}.copy_({a}.flip(0))",
    "{a} %= 2",
)
WRITES_TO_MASKS = ("{a}.logical_not_()", "{a}.fill_(True)", "{a}[...] = False", "{a} |= True")


def _view(b: _Builder, z: _Logits) -> None:
    """Another name of the memory of logits, or of a part of it."""
    of = b.choose(z.name, z.name, *b.views)
    b.views.append(b.new(b.choose(*VIEWS).format(z=of, n=b.varying(1, 1, 2, 0)), "u"))


def _read(b: _Builder, z: _Logits) -> None:
    """What a view holds now is a result."""
    u = b.choose(*reversed(b.views), z.name)
    b.result(b.choose(*READS).format(u=u, z=z.name, c=b.number()))


def _add_view(b: _Builder, z: _Logits) -> None:
    u = b.choose(*reversed(b.views), f"{z.name}.diagonal()")
    how = b.choose("{z} - {u}[:, None]", "{z} * {u}[:, None]", "{z} - {u}", "{z} + {u}.detach()")
    b.add_logits(how.format(z=z.name, u=u), z.vocabulary_dim)


def _write(b: _Builder, z: _Logits) -> None:
    """Changes logits in place, by any name of theirs, or a copy of them."""
    u = b.choose(z.name, *reversed(b.views), *(other.name for other in b.logits))
    if b.rarely(3):
        u = b.choose(*THROUGH).replace("{}", u)
    text = b.choose(*WRITES)
    values = {"u": u, "c": b.number(), "n": b.varying(1, 1, 2, 0)}
    try:
        value = eval(u, b.namespace)
    except Exception as error:
        raise _CannotRunError from error
    shape = tuple(value.shape)
    if "{a}" in text:
        values["a"] = b.tensor(shape, "a")
    if "{m}" in text:
        values["m"] = b.argument(f"torch.rand({shape}) < 0.3", "m")
    if "{i}" in text:
        b.require(bool(shape) and min(shape) > 0)
        values["i"] = b.argument(f"torch.randint({min(shape)}, (2,))", "i")
    if "{k}" in text:
        b.require(bool(shape) and shape[-1] > 0)
        values["k"] = b.argument(f"torch.randint({shape[-1]}, {(*shape[:-1], 1)})", "k")
    if b.rarely():
        b.lines.append("with torch.no_grad():")
        b.indent = "    "
    b.line(text.format(**values))
    b.indent = ""
    b.require_gradients()


def _write_operand(b: _Builder, name: str) -> None:
    """Changes a tensor that a program was given or has computed: a weight, a target, a mask."""
    value = b.value(name)
    if value.is_floating_point():
        how = b.choose(*WRITES_TO_OPERANDS)
        name += b.choose("", "", ".detach()", ".data", "[:]")
    else:
        how = b.choose(*(WRITES_TO_MASKS if value.dtype == torch.bool else WRITES_TO_INDICES))
        name += b.choose("", "", "[:]", ".view(-1)")
    if b.rarely(3):
        b.lines.append("with torch.no_grad():")
        b.indent = "    "
    b.line(how.format(a=name))
    b.indent = ""
    b.require_gradients()


def _write_argument(b: _Builder, z: _Logits) -> None:
    _write_operand(b, b.choose(*reversed(b.arguments)))


# Losses.


def _cross_entropy(b: _Builder, z: _Logits) -> None:
    shape, vocabulary, name = b.shape(z), b.vocabulary(z), z.name
    if z.vocabulary_dim != min(1, len(shape) - 1):
        if b.rarely(2):
            order = [z.vocabulary_dim]
            order[1:1] = [dim for dim in range(len(shape)) if dim != z.vocabulary_dim]
            order[0], order[1] = order[1], order[0]
            name = b.new(f"{name}.permute({', '.join(map(str, order))})")
        else:
            last, _ = b.last(z)
            name = b.new(f"{last}.reshape(-1, {vocabulary})")
    shape = tuple(b.value(name).shape)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    options = []
    ignored = b.choose(-100, -100, 0, vocabulary - 1, vocabulary + 2, -1)
    if ignored != -100:
        options.append(f"ignore_index={b.varying(ignored, ignored, 1, -1)}")
    if b.rarely(2):
        options.append(f"reduction={b.choose('mean', 'sum', 'none')!r}")
    if b.rarely():
        smoothing = b.varying(b.choose(0.1, 0.0, 1.0), 0.1, 0.3, 0.2)
        options.append(f"label_smoothing={smoothing}")
    if b.rarely():
        options.append(
            f"weight={b.argument(f'torch.rand({vocabulary}, dtype={b.dtype_of(name)})', 'c')}"
        )
    if b.rarely(8):
        dim = min(1, len(shape) - 1)
        options = [option for option in options if "ignore" not in option]
        target = b.argument(f"torch.rand({shape}, dtype={b.dtype_of(name)}).softmax({dim})", "p")
    else:
        target = b.target(rows, vocabulary, ignored)
    call = b.choose("F.cross_entropy({})", "torch.nn.CrossEntropyLoss({1})({0})")
    if "{1}" in call and not any("weight=" in option for option in options):
        b.result(call.format(f"{name}, {target}", ", ".join(options)))
    else:
        b.result(f"F.cross_entropy({', '.join([name, target, *options])})")


def _log_softmax(b: _Builder, name: str, dim: str = "-1") -> str:
    return b.choose(
        "F.log_softmax({}, dim={})", "torch.log_softmax({}, {})", "{}.log_softmax({})"
    ).format(name, dim)


def _nll(b: _Builder, z: _Logits) -> None:
    last, vocabulary = b.last(z)
    flat = b.new(f"{last}.reshape(-1, {vocabulary})")
    ignored = b.choose(-100, 0)
    target = b.target(tuple(b.value(flat).shape[:1]), vocabulary, ignored)
    reduction = b.choose("mean", "sum", "none")
    b.result(
        f"F.nll_loss({_log_softmax(b, flat)}, {target}, ignore_index={ignored}, reduction={reduction!r})"
    )


def _gathered(b: _Builder, name: str, target: str) -> str:
    """The entry of each row at its target."""
    return b.choose(
        f"{name}.gather(-1, {target}.unsqueeze(-1)).squeeze(-1)",
        f"torch.gather({name}, dim=-1, index={target}[..., None])[..., 0]",
        f"torch.take_along_dim({name}, {target}[..., None], -1).squeeze(-1)",
    )


def _reduced(b: _Builder, text: str) -> str:
    return b.choose(
        f"{text}.mean()", f"{text}.sum()", text, f"-{text}.mean()", f"{text}.square().mean()"
    )


def _gather(b: _Builder, z: _Logits) -> None:
    last, vocabulary = b.last(z)
    target = b.target(tuple(b.value(last).shape[:-1]), vocabulary)
    log_probabilities = b.new(_log_softmax(b, last))
    b.result(_reduced(b, _gathered(b, log_probabilities, target)))


def _logsumexp(b: _Builder, z: _Logits) -> None:
    dim = b.choose(z.vocabulary_dim, z.vocabulary_dim - len(b.shape(z)))
    text = b.choose(
        "{}.logsumexp({})",
        "torch.logsumexp({}, dim={})",
        "{}.logsumexp({}, keepdim=True)",
        "{}.exp().sum({}).log()",
    )
    text = text.format(z.name, dim)
    b.result(
        b.choose(f"{text}.pow(2).mean()", f"({text} ** 2).sum() * 1e-2", text, f"{text}.mean()")
    )


def _gather_minus_logsumexp(b: _Builder, z: _Logits) -> None:
    last, vocabulary = b.last(z)
    target = b.target(tuple(b.value(last).shape[:-1]), vocabulary)
    picked = b.new(_gathered(b, last, target))
    total = b.new(f"torch.logsumexp({last}, dim=-1)")
    b.result(_reduced(b, f"({b.choose(f'{picked} - {total}', f'{total} - {picked}')})"))


def _by_hand(b: _Builder, z: _Logits) -> None:
    last, vocabulary = b.last(z)
    target = b.target(tuple(b.value(last).shape[:-1]), vocabulary)
    largest = b.choose(
        "{0}.max(-1, keepdim=True).values",
        "{0}.amax(-1, keepdim=True)",
        "{0}.detach().amax(-1, True)",
        "{0}.max(dim=-1, keepdim=True)[0].detach()",
    )
    largest = b.new(largest.format(last))
    shifted = b.new(f"{last} - {largest}")
    if b.rarely(2):
        total = b.new(f"{shifted}.exp().sum(-1)")
        b.result(_reduced(b, f"({total}.log() - {_gathered(b, shifted, target)})"))
    else:
        probabilities = b.new(f"{shifted}.exp() / {shifted}.exp().sum(-1, keepdim=True)")
        b.result(_reduced(b, f"{_gathered(b, probabilities, target)}.log()"))


def _one_hot(b: _Builder, z: _Logits) -> None:
    last, vocabulary = b.last(z)
    target = b.target(tuple(b.value(last).shape[:-1]), vocabulary)
    one_hot = b.new(f"F.one_hot({target}, {vocabulary})" + b.choose("", f".to({last}.dtype)"))
    b.result(_reduced(b, f"({one_hot} * {_log_softmax(b, last)}).sum(-1)"))


def _label_smoothing(b: _Builder, z: _Logits) -> None:
    last, vocabulary = b.last(z)
    target = b.target(tuple(b.value(last).shape[:-1]), vocabulary, -100)
    log_probabilities = b.new("-" + _log_softmax(b, last))
    padding = b.new(f"{target}.eq(-100)")
    safe = b.new(f"{target}.clamp(min=0)")
    nll = b.new(f"{_gathered(b, log_probabilities, safe)}.masked_fill({padding}, 0.0)")
    smooth = b.new(f"{log_probabilities}.{b.choose('sum', 'mean')}(-1).masked_fill({padding}, 0.0)")
    if b.rarely(2):
        active = b.new(f"{padding}.numel() - {padding}.long().sum()")
        b.result(f"0.9 * {nll}.sum() / {active} + 0.1 * {smooth}.sum() / ({active} * {vocabulary})")
    else:
        b.result(
            f"(1 - 0.1 - 0.1 / {vocabulary - 1}) * {nll}.sum() + 0.1 / {vocabulary - 1} * {smooth}.sum()"
        )


def _entropy(b: _Builder, z: _Logits) -> None:
    last, _ = b.last(z)
    probabilities = b.new(b.choose("F.softmax({}, dim=-1)", "{}.softmax(-1)").format(last))
    text = b.choose(
        "(torch.logsumexp({z}, -1) - ({p} * {z}).sum(-1))",
        "-({p} * torch.log_softmax({z}, -1)).sum(-1)",
        "-({p} * {p}.log()).sum(dim=-1)",
        "torch.special.entr({p}).sum(-1)",
    )
    b.result(_reduced(b, text.format(z=last, p=probabilities)))


def _accuracy(b: _Builder, z: _Logits) -> None:
    last, vocabulary = b.last(z)
    target = b.target(tuple(b.value(last).shape[:-1]), vocabulary)
    best = b.choose(
        "{}.argmax(-1)",
        "torch.argmax({}, dim=-1)",
        "{}.max(-1).indices",
        "{}.max(dim=-1)[1]",
        "{}.detach().argmax(-1)",
        "{}.topk(1).indices.squeeze(-1)",
    )
    best = best.format(last)
    b.result(
        b.choose(
            f"({best} == {target}).double().mean()",
            best,
            f"{last}.max(-1).values",
            f"{last}.amax(-1).sum()",
        )
    )


def _kl_div(b: _Builder, z: _Logits) -> None:
    last, _ = b.last(z)
    shape, dtype = tuple(b.value(last).shape), b.dtype_of(last)
    teacher = b.argument(f"torch.randn({shape}, dtype={dtype}).softmax(-1)", "p")
    reduction = b.choose("batchmean", "sum", "none", "mean")
    if b.rarely(3):
        b.result(
            f"F.kl_div({_log_softmax(b, last)}, {teacher}.log(), reduction={reduction!r}, log_target=True)"
        )
    elif b.rarely(3):
        b.result(_reduced(b, f"-({teacher} * {_log_softmax(b, last)}).sum(-1)"))
    else:
        b.result(f"F.kl_div({_log_softmax(b, last)}, {teacher}, reduction={reduction!r})")


def _contrastive(b: _Builder, z: _Logits) -> None:
    """A loss of square logits whose targets are on the diagonal."""
    text = b.choose(
        "{z}.logsumexp(1) - {z}.diagonal()",
        "F.cross_entropy({z}, torch.arange({n})) + F.cross_entropy({z}.t(), torch.arange({n}))",
        "F.cross_entropy({z}.t(), torch.arange({n}))",
        "-{z}.log_softmax(-1).diagonal()",
        "-torch.diag({z}.log_softmax(1))",
        "F.relu({c} + {z} - {z}.diagonal()[:, None]).sum(1)",
        "-{z}.log_softmax(-1)[torch.arange({n}), torch.arange({n})]",
    )
    b.require(len(b.shape(z)) == 2 and len(set(b.shape(z))) == 1)
    text = text.format(z=z.name, n=b.vocabulary(z), c=b.number())
    b.result(_reduced(b, f"({text})"))


def _largest(b: _Builder, z: _Logits) -> None:
    last, _ = b.last(z)
    text = b.choose("{z}.topk({k}).values.sum(-1)", "{z}.logsumexp(-1) - {z}.topk({k})[0].sum(-1)")
    b.result(_reduced(b, f"({text.format(z=last, k=b.varying(1, 1, 2, 2))})"))


def _escape(b: _Builder, z: _Logits) -> None:
    """Return the logits, or a function of all of them, as well."""
    how = b.choose("", ".detach()", ".softmax(-1)")
    b.results.append(b.new(z.name + how) if how else z.name)


LOSSES = (
    _cross_entropy,
    _cross_entropy,
    _cross_entropy,
    _nll,
    _gather,
    _logsumexp,
    _gather_minus_logsumexp,
    _by_hand,
    _one_hot,
    _label_smoothing,
    _entropy,
    _accuracy,
    _kl_div,
    _largest,
)


def _loss(b: _Builder, z: _Logits) -> None:
    if b.rarely(12):
        b.lines.append("with torch.no_grad():")
        b.indent = "    "
    square = len(b.shape(z)) == 2 and len(set(b.shape(z))) == 1
    b.choose(*LOSSES, *[_contrastive] * 8 * square)(b, z)
    b.indent = ""


def _change_loss(b: _Builder, z: _Logits) -> None:
    b.require(bool(b.results))
    loss = b.choose(*b.results)
    auxiliary = b.choose(*b.arguments)
    text = b.choose(
        "{r} += 1",
        "{r} = {r} * {c}",
        "{r} += {a}.sum()",
        "{r}.mul_(2)",
        "{r}.detach().zero_()",
        "{r} = {r} * {a}.sum()",
    )
    b.line(text.format(r=loss, a=auxiliary, c=b.number()))


HAZARDS = (_write, _loss, _write, _change_loss, _escape, _write_argument)
ALIASES = (_view, _write, _read, _write, _write_argument, _view, _write, _add_view, _read)
KINDS = (
    ((), BETWEEN[:_USUAL]),
    (HAZARDS, BETWEEN),
    (ALIASES, (*ALIASES, *BETWEEN[:_USUAL])),
)
"""The kinds of programs: rules that may change or keep logits, and rules before the loss."""


@st.composite
def programs(draw: Callable[..., Any]) -> Program:
    """Programs with one or two projections and at least one loss; a third has no hazards."""
    b = _Builder(draw)
    b.dtype = b.choose(*["torch.float64"] * 8, "torch.float32", "torch.bfloat16")
    b.symbolic, b.batched = b.rarely(5), b.rarely(12)
    _projection(b)
    hazards, between = b.choose(*KINDS)
    for _ in range(b.choose(0, 1, 2, 3, 4, 6)):
        z = b.logits[-1] if not b.rarely(6) else b.choose(*b.logits)
        b.attempt(b.choose(*hazards) if hazards and b.rarely(3) else b.choose(*between), z)
    if b.rarely(12):
        b.attempt(_projection)
    b.attempt(_loss, b.logits[-1] if not b.rarely(6) else b.choose(*b.logits))
    for _ in range(b.choose(0, 0, 1, 2)):
        b.attempt(b.choose(*hazards or (_loss,)), b.choose(*b.logits))
    if not b.results:
        b.attempt(_logsumexp, b.logits[0])
    b.lines.append(f"return ({''.join(f'{name}, ' for name in dict.fromkeys(b.results))})")
    sizes = (_BATCH, 13, 16) if b.batched else (_BATCH,) * (3 if b.numbers else 1)
    return Program(b.seed, b.arguments, b.numbers, sizes, tuple(b.lines), b.rarely(8))
