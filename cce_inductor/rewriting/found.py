"""What a walk over a graph finds: losses, the logits that nodes hold, and why some are kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.logits import Logits
from cce_inductor.patterns.language.rows import AtRows, Row, Statistic, parts
from cce_inductor.reporting.reasons import Reason
from cce_inductor.reporting.sizes import tensor_bytes
from cce_inductor.rewriting.mutation import (
    UNKNOWN,
    storage_key,
    storage_of,
)


@dataclasses.dataclass
class FoundLoss:
    """A node that reduces logits, or has a loss rule.

    Attributes:
        node: in the user's graph.
        is_loss: whether it means a loss by itself, whatever it reduces.
        logits: what its input was followed back to, None if that is no projection in this graph.
        result: what may stand in its place, None if nothing may.
        reason: why it is left alone, None while there is no reason to.
        after: for a view of logits that were changed in place since, the last node that did so:
            the users of `node` after that see `result`. None for the first value of `node`.
    """

    node: Node
    is_loss: bool
    logits: Logits | None = None
    result: Row | tuple[Row, ...] | None = None
    reason: Reason | None = None
    after: Node | None = None

    @property
    def place(self) -> Node:
        """The node in the user's graph before which the result is computed."""
        return self.node if self.after is None else self.after

    @property
    def reduces(self) -> bool:
        """Whether it reads more than the shape of the logits."""
        return any(isinstance(part, Statistic) for part in parts(self.result))

    @property
    def has_softmax(self) -> bool:
        """Whether it needs the normalizer of a softmax, as every loss over classes does."""
        return any(
            isinstance(part, Statistic) and part.kind in ("logsumexp", "mean")
            for part in parts(self.result)
        )


class Kept:
    """Why projections stay as they are; of several reasons the first."""

    def __init__(self) -> None:
        self.reasons: dict[Node, Reason] = {}

    def copy(self) -> Kept:
        copied = Kept()
        copied.reasons.update(self.reasons)
        return copied

    def add(self, logits: Logits, reason: Reason) -> None:
        for origin in logits.projection.origins:
            self.reasons.setdefault(origin, reason)

    def reason(self, logits: Logits) -> Reason | None:
        found = map(self.reasons.get, logits.projection.origins)
        return next(filter(None, found), None)


@dataclasses.dataclass
class Walk:
    """What a walk over a graph found.

    Attributes:
        losses: in the graph's order.
        dropped: reductions that need a softmax and are taken for a router's, not for a loss.
        values: every node that holds logits, or several in a tuple.
        assignments: nodes that change logits in place and have no other result.
        unused: nodes that read logits, and whose results nobody reads.
        looked_through: nodes that logits were combined with, and are of no use to them any more.
        returned: the nodes that hold logits and are returned by the graph.
        kept: why projections stay as they are, but for the returned ones.
        position: of every node in the graph.
        gradient_mode: what `torch.set_grad_enabled` was at each node.
        mutations: every change in place: where, of which storage, by which node.
    """

    losses: list[FoundLoss] = dataclasses.field(default_factory=list)
    dropped: list[FoundLoss] = dataclasses.field(default_factory=list)
    values: dict[Node, Any] = dataclasses.field(default_factory=dict)
    assignments: dict[Node, Logits] = dataclasses.field(default_factory=dict)
    unused: list[Node] = dataclasses.field(default_factory=list)
    looked_through: list[Node] = dataclasses.field(default_factory=list)
    returned: list[Node] = dataclasses.field(default_factory=list)
    kept: Kept = dataclasses.field(default_factory=Kept)
    position: dict[Node, int] = dataclasses.field(default_factory=dict)
    gradient_mode: dict[Node, object] = dataclasses.field(default_factory=dict)
    mutations: list[tuple[int, object, Node]] = dataclasses.field(default_factory=list)

    def is_changed(self, value: torch.Tensor) -> bool:
        """Whether anything changes a tensor, given by its example, in place."""
        return any(changed == storage_key(value) for _, changed, _ in self.mutations)

    def changed_before(self, row: Row, here: int, last: float) -> Node | None:
        """What changes a tensor that a row is made of between where the user's graph reads it,
        or `here` if that is not known, and `last`."""
        for node, first in self._reads(row, here):
            mutation = self.mutation_between(node, first, last)
            if mutation is not None:
                return mutation
        return None

    def _reads(self, row: Row, here: int) -> list[tuple[Node, int]]:
        """Every tensor that a row is made of, and where the user's graph reads it."""
        reads: list[tuple[Node, int]] = []
        for part in parts(row):
            if isinstance(part, Statistic):
                for node, reader in part.reads:
                    reads.append((node, here if reader is None else self.position[reader]))
            elif isinstance(part, AtRows):
                read = [each for each in parts(part.operand.source) if isinstance(each, Node)]
                reads += [(node, self.position[part.operand.reader]) for node in read]
        return reads

    def mutation_between(self, node: Node, first: float, last: float) -> Node | None:
        """What changes the node's storage in place between two positions."""
        storage = storage_of(node)
        for position, changed, mutation in self.mutations:
            if first < position < last and (changed == storage or changed is UNKNOWN):
                return mutation
        return None


def logits_bytes(logits: Logits) -> int | None:
    """`tensor_bytes` of the projection's result."""
    return tensor_bytes(example(logits.projection.node))
