"""Logits that a graph returns: which of them it need not compute, and what it returns instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.fx import Node

from cce_inductor.kernels.statistics.logsumexp import LogSumExp
from cce_inductor.kernels.statistics.sum import Sum
from cce_inductor.options import Options
from cce_inductor.patterns.language.examples import example, is_exactly
from cce_inductor.patterns.language.expression import (
    Apply,
    Expression,
    Operand,
    detach_expression,
    is_detached,
    operands_of,
)
from cce_inductor.patterns.language.logits import Call, Logits, all_logits
from cce_inductor.patterns.language.rows import RowStatistic, is_reduced, nodes_of_projection
from cce_inductor.recipe.formula import Formula
from cce_inductor.recipe.operation import project
from cce_inductor.recipe.sharded import is_freed_after_forward
from cce_inductor.reporting import reasons
from cce_inductor.reporting.reasons import Reason
from cce_inductor.rewriting.findings import Findings
from cce_inductor.rewriting.mutation import UNKNOWN, storage_of


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a compiled function finds a tensor: in its arguments or in the graph's results."""

    among: Literal["arguments", "results"]
    position: int

    def read(self, arguments: Sequence[Any], results: Sequence[Any]) -> torch.Tensor:
        tensor: torch.Tensor = (arguments if self.among == "arguments" else results)[self.position]
        return tensor


@dataclasses.dataclass(frozen=True)
class DeferredOutput:
    """How to compute logits that a graph does not return any more.

    Attributes:
        formula: what is done to the product of `input` and `linear_weight`.
        input: where the input of the projection is found.
        linear_weight: where its weight is found.
        linear_bias: where its bias is found, None if it has none.
        operands: where the other tensors are found that the formula reads.
    """

    formula: Formula
    input: Source
    linear_weight: Source
    linear_bias: Source | None
    operands: tuple[Source, ...]

    def make(
        self,
        arguments: Sequence[Any],
        results: Sequence[Any],
        project: Callable[..., torch.Tensor] = project,
    ) -> torch.Tensor:
        """Return the logits.

        Args:
            arguments: the arguments of the rewritten graph.
            results: what it returned.
            project: multiplies input and weight, like `recipe.operation.project`.
        """

        def read(source: Source) -> torch.Tensor:
            return source.read(arguments, results)

        bias = None if self.linear_bias is None else read(self.linear_bias)
        dtype = self.formula.product_dtype
        made = project(read(self.input), read(self.linear_weight), bias, dtype)
        return self.formula(made, [read(operand) for operand in self.operands])


@dataclasses.dataclass
class Deferral:
    """Takes the logits that a graph need not return.

    Attributes:
        why_not: why it takes none, None if it does.
        arguments: examples of the graph's arguments.
        ends_in_break: whether a graph break follows, so that the function goes on after it.
        keeps_stale: whether the logits survive a change of the weight (``stale_logits="keep"``).
        outputs: for each result of the user's graph its position among the results of the rewritten
            graph, or how to compute it. None if the graph returns what it did.
    """

    why_not: Reason | None = None
    arguments: Sequence[Any] = ()
    ends_in_break: bool = False
    keeps_stale: bool = False
    outputs: list[int | DeferredOutput] | None = None


@dataclasses.dataclass(frozen=True)
class Returned:
    """Logits that a graph returns and need not compute.

    Attributes:
        node: the result.
        logits: what it holds.
        precedes_loss: whether a loss is expected to follow in code that the graph does not contain.
    """

    node: Node
    logits: Logits
    precedes_loss: bool = False

    @property
    def output(self) -> Node:
        return self.node.graph.output_node()

    @property
    def expression(self) -> Expression:
        """What is done to each logit, with each log-softmax as one step.

        A graph computes the logsumexp of a row first, and then what is made of it. Deferred logits
        are computed from one formula.
        """
        return _with_softmaxes(self.logits.expression)

    @property
    def row(self) -> RowStatistic:
        """A row that reads every tensor that the logits are made of."""
        return RowStatistic(Sum, self.logits, (self.expression,))

    @property
    def strides(self) -> tuple[int, ...] | None:
        """The strides of the logits, None if the matrix product has the same."""
        value = example(self.node)
        if _is_contiguous(value, self.logits.vocabulary_dim):
            return None
        return tuple(value.stride())


def returned_logits(
    findings: Findings, options: Options, deferral: Deferral | None
) -> tuple[list[Returned], list[tuple[Logits, Reason]]]:
    """Return the logits that can be deferred, and those that must be stored with the reason."""
    deferrable: list[Returned] = []
    stored: list[tuple[Logits, Reason]] = []
    for node in findings.returned:
        value = findings.values[node]
        reason = reasons.RETURNED
        if options.defer_logits == "never":
            reason = reasons.RETURNED_WITHOUT_DEFERRAL
        elif deferral is not None:
            why = deferral.why_not or _reason_to_store(node, findings, deferral)
            if why is None:
                precedes_loss = deferral.ends_in_break or example(node).requires_grad
                deferrable.append(Returned(node, findings.first_logits(node), precedes_loss))
                continue
            reason = reasons.not_deferred(why)
        stored += [(logits, reason) for logits in all_logits(value)]
    return deferrable, stored


def _reason_to_store(node: Node, findings: Findings, deferral: Deferral) -> Reason | None:
    value, logits = example(node), findings.values[node]
    if not isinstance(logits, Logits):
        return reasons.SEVERAL_LOGITS_RETURNED
    if not value.dtype.is_floating_point:
        return reasons.not_floating(value.dtype)
    returned = Returned(node, logits)
    operands = operands_of(returned.expression)
    if any(o.kind.varies_over_rows and o.kind.varies_over_columns for o in operands):
        return reasons.COMBINED_WITH_LARGE
    if any(is_reduced(operand.source) for operand in operands):
        return reasons.COMBINED_WITH_REDUCTION
    if not _is_contiguous(value, logits.vocabulary_dim) and not _is_static(value):
        return reasons.STRIDES_UNKNOWN
    if is_freed_after_forward(_arguments_read(returned, operands, deferral)):
        return reasons.FSDP_FREES_WEIGHT
    storage = storage_of(node)
    others = [*returned.output.all_input_nodes, *node.graph.find_nodes(op="placeholder")]
    if storage is UNKNOWN or any(o is not node and storage_of(o) == storage for o in others):
        return reasons.MEMORY_SHARED
    last = findings.position[returned.output]
    mutation = findings.changed_before(returned.row, last, last)
    if mutation is not None:
        return reasons.may_change_operand(mutation)
    return None


def _arguments_read(returned: Returned, operands: list[Operand], deferral: Deferral) -> list[Any]:
    """Return the arguments whose memory is read when the logits are computed."""
    nodes = [
        *nodes_of_projection(returned.logits.projection),
        *(operand.source for operand in operands),
    ]
    read = {storage_of(node) for node in nodes}
    placeholders = returned.node.graph.find_nodes(op="placeholder")
    return [
        value
        for node, value in zip(placeholders, deferral.arguments, strict=False)
        if storage_of(node) in read
    ]


def _with_softmaxes(expression: Expression) -> Expression:
    """Return an expression with ``z - logsumexp(z)`` written as ``log_softmax(z)``."""
    if not isinstance(expression, Apply):
        return expression
    first, *rest = expression.args
    if expression.target == "sub.Tensor" and isinstance(rest[0], Operand):
        source, has_gradient = rest[0].source, True
        if isinstance(source, Call) and source.target is torch.detach and is_detached(first):
            (source,), (first,), has_gradient = source.args, first.args, False
        is_normalizer = isinstance(source, RowStatistic) and source.kind is LogSumExp
        if is_normalizer and source.values == (first,):
            softmax = Apply("_log_softmax", (_with_softmaxes(first), -1, False))
            return softmax if has_gradient else detach_expression(softmax)
    args = tuple(_with_softmaxes(argument) for argument in expression.args)
    return Apply(expression.target, args, expression.kwargs)


def _is_contiguous(value: torch.Tensor, vocabulary_dim: int) -> bool:
    """Return whether a tensor is known to have the strides of a matrix product."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if str(expected) != str(stride) and not is_exactly(size, 1):
            return False
        expected = stride * size
    return vocabulary_dim == value.dim() - 1


def _is_static(value: torch.Tensor) -> bool:
    return all(isinstance(number, int) for number in (*value.shape, *value.stride()))


ARRIVED = "cce_inductor_arrived"
"""Key in the meta of a projection that computes a deferred argument of the function."""


def are_deferred_already(logits: Logits) -> bool:
    """Return whether the function got the logits deferred."""
    return all(ARRIVED in origin.meta for origin in logits.origins)


def is_worth_deferring(logits: Logits) -> bool:
    """Return whether logits without a loss are larger than the tensors they are made of."""
    return logits.projection.has_more_classes
