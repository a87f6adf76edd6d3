"""The form of a computation on deferred logits: all that its rewritten graph depends on.

Computations that differ only in their numbers of rows have the same form. The graph of a form has
symbols in the place of those numbers, like a graph that Dynamo captures with dynamic shapes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cce_inductor.deferred.tape import Call, Number, Tape, add_calls
from cce_inductor.options import Options, options_in_force
from cce_inductor.patterns.language.examples import example
from cce_inductor.recipe.operation import project, strided
from cce_inductor.torch_internals.capture import ThreadFakeTensorMode
from cce_inductor.torch_internals.symbols import Description, Size, Term

PYTORCH_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)
"""Raised by functions of PyTorch for wrong arguments, and for results that depend on values."""


class Form(NamedTuple):
    """The form of the calls on a tape.

    Attributes:
        calls: the calls, with `Size` in the place of numbers that depend on the number of rows.
        tensors: what the calls read.
        terms: what each number is that a `Size` stands for, None if it is a symbol.
    """

    calls: tuple[Call, ...]
    tensors: tuple[Description, ...]
    terms: tuple[Term | None, ...]
    grad_enabled: bool
    default_dtype: torch.dtype
    autocast_device: str
    autocast_dtype: torch.dtype | None
    workspace_bytes: int
    sample_below: float

    @classmethod
    def of(cls, tape: Tape) -> tuple[Form, tuple[int, ...]]:
        """Return the form of the calls on a tape, and the number that each `Size` stands for."""
        device = tape.tensors[0].device.type
        sizes = _SizesOfTape(tape)
        form = cls(
            calls=tuple(map(sizes.in_call, tape.calls)),
            tensors=tuple(map(sizes.of_tensor, tape.tensors)),
            terms=tuple(sizes.terms),
            grad_enabled=torch.is_grad_enabled(),
            default_dtype=torch.get_default_dtype(),
            autocast_device=device,
            autocast_dtype=(
                torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            ),
            workspace_bytes=options_in_force().workspace_bytes,
            sample_below=options_in_force().sample_below,
        )
        return form, tuple(sizes.numbers)

    @property
    def options(self) -> Options:
        """The options that the pass runs with."""
        return Options(
            min_logits_bytes=0,
            workspace_bytes=self.workspace_bytes,
            sample_below=self.sample_below,
            on_error="raise",
        )

    def graph(
        self, numbers: Sequence[Any], environment: ShapeEnv | None
    ) -> tuple[GraphModule, Callable[[Any], Any]]:
        """Return the calls as a graph, and the type of its result.

        The inputs of the graph are the tensors, followed by the numbers that each `Size` stands
        for. Its outputs are the parts of the result.

        Args:
            numbers: what each `Size` stands for; integers or symbols.
            environment: the environment of the symbols, None if they are integers.

        Raises:
            RuntimeError, TypeError, ValueError, IndexError: a call does not accept its arguments.
        """
        graph = Graph()

        def placeholder(name: str, value: Any) -> Node:
            node = graph.placeholder(name)
            node.meta["example_value"] = value
            return node

        # Without Python's dispatcher, `linear` and others ask for sizes as integers.
        with ThreadFakeTensorMode(shape_env=environment), enable_python_dispatcher():
            tensors = [
                placeholder(f"tensor_{at}", tensor.example(numbers))
                for at, tensor in enumerate(self.tensors)
            ]
            sizes = [placeholder(f"size_{at}", number) for at, number in enumerate(numbers)]
            result = add_calls(graph, self.calls, tensors, sizes)
        value = example(result)
        if isinstance(value, Tensor):
            graph.output((result,))
            return GraphModule({}, graph), _only
        parts = []
        for number, part in enumerate(value):
            node = graph.call_function(operator.getitem, (result, number))
            node.meta["example_value"] = part
            parts.append(node)
        graph.output(tuple(parts))
        return GraphModule({}, graph), type(value)


_only = operator.itemgetter(0)


class _SizesOfTape:
    """Finds the numbers on a tape that depend on the number of rows.

    These are sizes of tensors, and arguments that are sizes, but not the sizes of a weight. Equal
    numbers get the same `Size`, as with Dynamo. So that more sizes are known to be equal, some
    numbers are known from others: the number of all rows of a hidden state, and one less than any
    size, which is the number of rows after a shift by one.

    Attributes:
        numbers: what each `Size` stands for.
        terms: see `Form`.
    """

    def __init__(self, tape: Tape) -> None:
        products = [call for call in tape.calls if call.function is project]
        self._fixed = {size for call in products for size in _shape(tape, call.args[1])}
        self.numbers: list[int] = []
        self.terms: list[Term | None] = []
        self._known: dict[int, Size] = {}
        for call in products:
            rows = map(self._size, _shape(tape, call.args[0])[:-1])
            factors = tuple(size.number for size in rows if isinstance(size, Size))
            if len(factors) > 1:
                self._add_term(Term(factors))

    def _add(self, number: int, term: Term | None) -> Size:
        if number not in self._known:
            self._known[number] = Size(len(self.numbers))
            self.numbers.append(number)
            self.terms.append(term)
        return self._known[number]

    def _add_term(self, term: Term) -> Size:
        number = term.of(self.numbers)
        assert isinstance(number, int), "only `Versions` has symbols"
        return self._add(number, term)

    def _size(self, number: int) -> int | Size:
        if number < -1:
            size = self._size(-number)
            return self._add_term(Term((size.number,), -1)) if isinstance(size, Size) else number
        if number in self._fixed or not 1 < number < _LARGEST:
            return number
        if number not in self._known:
            size = self._add(number, None)
            if number > 2:
                self._add_term(Term((size.number,), offset=-1))
        return self._known[number]

    def of_tensor(self, tensor: Tensor) -> Description:
        return Description.of(tensor, self._size)

    def in_call(self, call: Call) -> Call:
        at = _arguments_that_are_sizes(call.function)
        if not at:
            return call
        return call._replace(
            args=tuple(self._argument(a) if n in at else a for n, a in enumerate(call.args)),
            kwargs=tuple((n, self._argument(a) if n in at else a) for n, a in call.kwargs),
        )

    def _argument(self, value: Any) -> Any:
        if type(value) is tuple:  # not a `Ref`
            return tuple(map(self._argument, value))
        if isinstance(value, Number) and type(value.value) is int:
            size = self._size(value.value)
            return size if isinstance(size, Size) else value
        return value


_LARGEST = 2**62
"""Larger numbers mean "to the end" as the end of a slice."""


def _shape(tape: Tape, tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor that a projection reads."""
    return tuple(tape.tensors[tensor.number].shape)


@functools.lru_cache(maxsize=1024)
def _arguments_that_are_sizes(function: Any) -> frozenset[int | str]:
    """Return the positions and names of the arguments of a function that are sizes."""
    if function is strided:
        return frozenset({1})
    if not isinstance(function, torch._ops.OpOverload):
        return frozenset()
    return frozenset(
        key
        for position, argument in enumerate(function._schema.arguments)
        if argument.name != "step" and _is_size(argument.real_type)
        for key in (position, argument.name)
    )


def _is_size(kind: Any) -> bool:
    """Whether an argument of this type may be symbolic."""
    return kind.kind() == "SymIntType" or any(map(_is_size, kind.containedTypes()))
