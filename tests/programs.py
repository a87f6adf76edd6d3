"""Random programs from a projection to losses, as readable source code.

A program is built line by line, and each line is run as it is added: a line that eager PyTorch
cannot run is left out, and the shapes of what the lines before it made are known. A rule adds
lines; rules are drawn until there are enough. The first rule of a table is the simplest one, to
which Hypothesis shrinks.
"""

from __future__ import annotations

import dataclasses
import itertools
import linecache
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

_number = itertools.count()
_NAMES = {"torch": torch, "F": F}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function in source code, and its arguments as expressions."""

    seed: int
    arguments: dict[str, str]
    lines: tuple[str, ...]
    dynamic: bool

    def __str__(self) -> str:
        return "\n".join(
            [
                *(
                    f"torch.manual_seed({self.seed + number}); {name} = {text}"
                    for number, (name, text) in enumerate(self.arguments.items())
                ),
                *(
                    f"torch._dynamo.maybe_mark_dynamic({name}, {dim})"
                    for name, dim in self.dynamic_dims()
                ),
                "",
                self.source,
            ]
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis shows a failing example."""
        for line in f"\n{self}".splitlines():
            printer.text(line)
            printer.break_()

    def dynamic_dims(self) -> list[tuple[str, int]]:
        """The row dimensions of inputs, targets and masks, where some are dynamic."""
        if not self.dynamic:
            return []
        values = zip(self.arguments, self.inputs(), strict=True)
        return [
            (name, dim)
            for name, value in values
            if name[0] in "xtpm"
            for dim in range(value.dim() - (name[0] == "x"))
        ]

    @property
    def source(self) -> str:
        body = textwrap.indent("\n".join(self.lines), "    ")
        return f"def program({', '.join(self.arguments)}):\n{body}\n"

    @property
    def exact(self) -> bool:
        """Whether everything is in float64."""
        text = str(self)
        return not any(word in text for word in ("float32", "float16", "float()"))

    def function(self) -> Callable[..., Any]:
        """The function, as a new code object with lines that can be shown."""
        filename = f"<program {next(_number)}>"
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(True), filename)
        namespace = dict(_NAMES)
        exec(compile(self.source, filename, "exec"), namespace)
        return namespace["program"]

    def inputs(self) -> list[Tensor]:
        texts = self.arguments.values()
        return [_evaluate(text, self.seed + number) for number, text in enumerate(texts)]


def _evaluate(text: str, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return eval(text, dict(_NAMES))


class _CannotRunError(Exception):
    """Eager PyTorch does not run the line, or the rule does not apply."""


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
        self.lines: list[str] = []
        self.results: list[str] = []
        self.logits: list[_Logits] = []
        self.namespace: dict[str, Any] = dict(_NAMES)
        self.names = itertools.count()
        self.indent = ""
        self.dtype = "torch.float64"

    # Choices.

    def choose(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def rarely(self, one_of: int = 4) -> bool:
        return self.draw(st.integers(0, one_of - 1)) == one_of - 1

    def number(self) -> str:
        return self.choose("2", "0.5", "-1.5", "3.0", "1", "0.25")

    # Code.

    def line(self, text: str) -> None:
        with torch.enable_grad() if not self.indent else torch.no_grad():
            try:
                exec(text, self.namespace)
            except Exception as error:
                raise _CannotRunError from error
        self.lines.append(self.indent + text)

    def new(self, expression: str, prefix: str = "v") -> str:
        """A new variable with the value of an expression."""
        name = f"{prefix}{next(self.names)}"
        self.line(f"{name} = {expression}")
        return name

    def argument(self, expression: str, prefix: str = "a") -> str:
        name = f"{prefix}{next(self.names)}"
        self.namespace[name] = _evaluate(expression, self.seed + len(self.arguments))
        self.arguments[name] = expression
        return name

    def tensor(self, shape: tuple[int, ...], prefix: str = "a") -> str:
        gradient = "" if self.rarely() else ", requires_grad=True"
        return self.argument(f"torch.randn({shape}, dtype={self.dtype}{gradient})", prefix)

    def constant(self, shape: tuple[int, ...], dtype: str) -> str:
        return self.argument(f"torch.randn({shape}, dtype={dtype})")

    def attempt(self, rule: Callable[..., None], *args: Any) -> bool:
        """Runs a rule, and takes back what it added if it cannot go on."""
        state = {name: value for name, value in vars(self).items() if name in _STATE}
        saved = {name: value.copy() for name, value in state.items()}
        indent = self.indent
        try:
            rule(self, *args)
        except _CannotRunError:
            vars(self).update(saved, indent=indent)
            return False
        return True

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
        """An index expression over the vocabulary."""
        return "[" + ":, " * logits.vocabulary_dim + which + "]"

    def along_vocabulary(self, logits: _Logits) -> tuple[int, ...]:
        """A shape that broadcasts over the rows."""
        dim, dimensions = logits.vocabulary_dim, len(self.shape(logits))
        ones = self.draw(st.integers(0, dim))
        return (1,) * ones + (self.vocabulary(logits),) + (1,) * (dimensions - 1 - dim)

    def last(self, logits: _Logits) -> tuple[str, int]:
        """The variable with its vocabulary last, and its size."""
        if logits.vocabulary_dim == len(self.shape(logits)) - 1:
            return logits.name, self.vocabulary(logits)
        moved = self.choose("movedim({}, -1)", "transpose({}, -1)").format(logits.vocabulary_dim)
        return self.new(f"{logits.name}.{moved}"), self.vocabulary(logits)

    def target(self, shape: tuple[int, ...], vocabulary: int, ignored: int | None = None) -> str:
        text = f"torch.randint({vocabulary}, {shape})"
        if ignored is not None and self.rarely(2):
            which = self.choose(f"torch.rand({shape}) < 0.4", "torch.tensor(True)")
            text += f".masked_fill({which}, {ignored})"
        return self.argument(text, "t")

    def result(self, expression: str) -> str:
        name = self.new(expression, "r")
        self.results.append(name)
        return name


_STATE = ("arguments", "lines", "results", "logits", "namespace")


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


def _change_operand(b: _Builder, name: str) -> None:
    """Changes what a projection has read, as `_projection` made possible."""
    how = b.choose("{}.mul_(2)", "{}.add_(1)", "{}.detach().zero_()", "{}[0] = 3", "{}.t().neg_()")
    b.line(how.format(name))


def _projection(b: _Builder) -> None:
    hidden = b.draw(st.integers(1, 5))
    vocabulary = b.draw(st.integers(2, 9))
    tokens = b.draw(st.sampled_from([3, 1, 2, 4, 5, 6, 0]))
    leading = b.choose((tokens,), (tokens,), (2, tokens), (1, tokens), (2, 1, tokens))
    x = b.tensor((*leading, hidden), "x")
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
        b.attempt(_change_operand, changed)


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
    "torch.where({z} > 0, {z}, {z} * 0.5)",
    "torch.where({z} > 0, {z}, 0.25)",
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
    which = b.choose(f":{vocabulary - 1}", ":-1", "1:", ":2")
    b.add_logits(z.name + b.columns(z, which), z.vocabulary_dim)


def _mask_columns(b: _Builder, z: _Logits) -> None:
    fill = b.choose("-torch.inf", "-1e4", "0.0", f"torch.finfo({z.name}.dtype).min")
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
    _without_gradient,
    _detach,
    _combine,
    _random,
    _mix_vocabulary,
)
_USUAL = BETWEEN.index(_without_gradient)

IN_PLACE = (
    "{z}.mul_({c})",
    "{z}.div_({c})",
    "{z} *= {c}",
    "{z} /= {c}",
    "{z} += {c}",
    "{z}.add_(1)",
    "{z}.tanh_()",
    "{z}.clamp_(-1, 1)",
    "{z}.div_(3).tanh_().mul_(3)",
    "F.relu({z}, inplace=True)",
    "{z}.neg_()",
    "{z}.zero_()",
    "{z}.copy_({z} * 2)",
    "torch.tanh({z}, out={z})",
)


def _change(b: _Builder, z: _Logits) -> None:
    """Changes logits, perhaps through a view, by a statement without users."""
    name = z.name
    if b.rarely(3):
        alias = b.choose(
            "{}.view(-1)", "{}[1:]", "{}.detach()", "{}.double()", "{}.mT", "{}[None]", "{}[..., 0]"
        )
        b.line(
            b.choose("{z}.mul_({c})", "{z}.tanh_()", "{z}.fill_({c})").format(
                z=alias.format(name), c=b.number()
            )
        )
    elif b.rarely(2):
        mask = b.argument(f"torch.rand({b.along_vocabulary(z)}) < 0.3", "m")
        bias = b.tensor(b.along_vocabulary(z), "b")
        fill = b.choose("-torch.inf", "-1e4", "0.0")
        text = b.choose(
            f"{name}.masked_fill_({mask}, {fill})",
            f"{name} += {bias}",
            f"{name}.add_({bias})",
            f"{name}{b.columns(z, '-1')} = {fill}",
            f"{name}{b.columns(z, '2:')} = {fill}",
            f"{name}[..., 1:] = {fill}",
            f"{name}[0] = {fill}",
            f"{name}{b.columns(z, ':1')} += 1",
        )
        b.line(text)
    else:
        b.line(b.choose(*IN_PLACE).format(z=name, c=b.number()))


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
        options.append(f"ignore_index={ignored}")
    if b.rarely(2):
        options.append(f"reduction={b.choose('mean', 'sum', 'none')!r}")
    if b.rarely():
        options.append(f"label_smoothing={b.choose(0.1, 0.0, 1.0)}")
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


def _escape(b: _Builder, z: _Logits) -> None:
    """The logits, or something of all of them, are a result too."""
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
)


def _loss(b: _Builder, z: _Logits) -> None:
    if b.rarely(12):
        b.lines.append("with torch.no_grad():")
        b.indent = "    "
    b.choose(*LOSSES)(b, z)
    b.indent = ""


def _change_loss(b: _Builder, z: _Logits) -> None:
    b.require(bool(b.results))
    loss = b.choose(*b.results)
    auxiliary = b.choose(*b.arguments)
    text = b.choose(
        "{r} += 1",
        "{r} += {a}.sum()",
        "{r}.mul_(2)",
        "{r}.detach().zero_()",
        "{r} = {r} * {a}.sum()",
    )
    b.line(text.format(r=loss, a=auxiliary))


def _change_argument(b: _Builder, z: _Logits) -> None:
    """Changes an argument of the program: a target, a weight, an index."""
    name = b.choose(*reversed(b.arguments))
    if b.value(name).is_floating_point():
        b.line(f"{name}{b.choose('', '.detach()')}.mul_(2)")
    elif b.value(name).dtype == torch.bool:
        b.line(f"{name}.logical_not_()")
    else:
        b.line(f"{name}.clamp_(max=0)")


HAZARDS = (_change, _loss, _change, _change_loss, _escape, _change_argument)


@st.composite
def programs(draw: Callable[..., Any]) -> Program:
    """Programs with one projection or two, and at least one loss; half of them without hazards."""
    b = _Builder(draw)
    b.dtype = b.choose(*["torch.float64"] * 8, "torch.float32", "torch.bfloat16")
    _projection(b)
    hazards, between = (HAZARDS, BETWEEN) if b.rarely(2) else ((), BETWEEN[:_USUAL])
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
    return Program(b.seed, b.arguments, tuple(b.lines), b.rarely(8))
