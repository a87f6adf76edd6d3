"""What a walk over a graph finds: what nodes hold, who consumes logits, why logits are kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.logits import (
    Logits,
    Projection,
    Value,
    all_logits,
    origins_of,
)
from cce_inductor.patterns.language.rows import AtRows, Row, RowStatistic, parts
from cce_inductor.patterns.language.site import Site
from cce_inductor.reporting.reasons import Reason
from cce_inductor.reporting.sizes import tensor_bytes
from cce_inductor.rewriting.mutation import UNKNOWN, storage_key, storage_of


@dataclasses.dataclass
class Consumer:
    """A node that reduces logits, or that computes a loss.

    Attributes:
        node: the node in the user's graph.
        is_loss: whether the operation is a loss by its name, whatever it reads.
        logits: the logits that it reads, None if its input is no projection of this graph.
        result: the value that replaces the node, None if nothing can.
        reason: why the node is left alone, None while there is no reason.
        after: the last node that changed the memory of the logits, if `node` is a view of them that
            was made before. Users of `node` that come later see `result`. None for the value that
            `node` has at first.
    """

    node: Node
    is_loss: bool
    logits: Logits | None = None
    result: Row | tuple[Row, ...] | None = None
    reason: Reason | None = None
    after: Node | None = None

    @property
    def place(self) -> Node:
        """The node of the user's graph before which the result is computed."""
        return self.node if self.after is None else self.after

    @property
    def statistics(self) -> list[RowStatistic]:
        """The reductions over the vocabulary that the result is made of."""
        return [part for part in parts(self.result) if isinstance(part, RowStatistic)]

    @property
    def projections(self) -> list[Projection]:
        """The projection of the logits that it reads, and those of other heads."""
        own = () if self.logits is None else self.logits.projections
        return [*own, *(each for statistic in self.statistics for each in statistic.projections)]

    @property
    def origins(self) -> tuple[Node, ...]:
        """The nodes whose matrix products it reads. Either all of them are replaced or none."""
        return origins_of(self.projections)

    @property
    def reduces(self) -> bool:
        """Whether it reads more of the logits than their shape."""
        return bool(self.statistics)

    @property
    def has_softmax(self) -> bool:
        """Whether it needs the normalizer of a softmax, as every loss over classes does."""
        return any(statistic.kind.has_softmax for statistic in self.statistics)


class KeptProjections:
    """The first reason why each projection that is not rewritten stays as it is."""

    def __init__(self) -> None:
        self.reasons: dict[Node, Reason] = {}

    def copy(self) -> KeptProjections:
        copied = KeptProjections()
        copied.reasons.update(self.reasons)
        return copied

    def add(self, of: Logits | Consumer, reason: Reason) -> None:
        for origin in of.origins:
            self.reasons.setdefault(origin, reason)

    def reason(self, of: Logits | Consumer) -> Reason | None:
        """Return why the projections of logits, or of what a consumer reads, stay; None if they
        need not."""
        known = map(self.reasons.get, of.origins)
        return next(filter(None, known), None)


@dataclasses.dataclass
class Findings:
    """What a walk over a graph found.

    Attributes:
        stored: projections that are known to be stored, from an earlier walk: other logits read
            theirs as a tensor.
        values: what each node holds that holds logits.
        consumers: the nodes that reduce logits or compute a loss, in the order of the graph.
        routers: softmaxes that are taken for those of a router, not for part of a loss.
        kept: why projections stay as they are. Being returned is not among the reasons.
        returned: the nodes with logits that the graph returns.
        unused: nodes that read logits, and whose own results nobody reads.
        assignments: nodes that change logits in place and return nothing.
        looked_through: nodes that make tensors as large as the logits out of smaller ones, and that
            are not needed any more.
        reduced: for each node that is computed from a reduction, the projections that were reduced.
        position: the position of each node in the graph.
        gradient_mode: what `torch.set_grad_enabled` was last called with before each node.
        mutations: each change in place: its position, the storage, and the node.
    """

    stored: frozenset[Node] = frozenset()
    values: dict[Node, Value] = dataclasses.field(default_factory=dict)
    consumers: list[Consumer] = dataclasses.field(default_factory=list)
    routers: list[Consumer] = dataclasses.field(default_factory=list)
    kept: KeptProjections = dataclasses.field(default_factory=KeptProjections)
    returned: list[Node] = dataclasses.field(default_factory=list)
    unused: list[Node] = dataclasses.field(default_factory=list)
    assignments: dict[Node, Value] = dataclasses.field(default_factory=dict)
    looked_through: list[Node] = dataclasses.field(default_factory=list)
    reduced: dict[Node, set[Node]] = dataclasses.field(default_factory=dict)
    position: dict[Node, int] = dataclasses.field(default_factory=dict)
    gradient_mode: dict[Node, object] = dataclasses.field(default_factory=dict)
    mutations: list[tuple[int, object, Node]] = dataclasses.field(default_factory=list)

    # What the walk records

    def add(self, consumer: Consumer) -> None:
        """Record a consumer, and that its node is computed from the logits it reduces."""
        self.consumers.append(consumer)
        reduced = (each for statistic in consumer.statistics for each in statistic.projections)
        self.reduced.setdefault(consumer.node, set()).update(origins_of(reduced))

    def keep(self, nodes: Sequence[Node], reason: Reason) -> None:
        """Record why all logits that `nodes` hold must be stored."""
        for node in nodes:
            for logits in all_logits(self.values[node]):
                self.kept.add(logits, reason)

    # What rules and the rest of the pass ask

    def stored_beside(self) -> set[Node]:
        """Return the projections that must be stored and whose logits a loss reads beside logits
        that need not be."""
        stored: set[Node] = set()
        for consumer in self.consumers:
            if consumer.logits is not None:
                own = consumer.logits.projection.origins
                if not any(map(self.kept.reasons.get, own)):
                    stored.update(set(consumer.origins).difference(own))
        return stored & self.kept.reasons.keys()

    def site(self, node: Node) -> Site:
        """Return the node as its rule sees it."""
        site = Site(node, self.values, self._is_late, self._changes_later, self._is_stored)
        site.looked_through = self.looked_through
        return site

    def first_logits(self, node: Node) -> Logits:
        """Return the logits that a node holds, or the first of several."""
        return all_logits(self.values[node])[0]

    def is_changed(self, value: torch.Tensor) -> bool:
        """Return whether any node changes a tensor, given by its example, in place."""
        return any(changed == storage_key(value) for _, changed, _ in self.mutations)

    def changed_before(self, row: Row | tuple[Row, ...], here: int, last: float) -> Node | None:
        """Return a node that changes a tensor which a row is made of, None if there is none.

        Only changes count that come after the user's graph reads the tensor and before `last`. If
        it is not known where the graph reads it, the reading is taken to be at `here`.
        """
        for node, first in self._reads(row, here):
            mutation = self.mutation_between(node, first, last)
            if mutation is not None:
                return mutation
        return None

    def mutation_between(self, node: Node, first: float, last: float) -> Node | None:
        """Return a node between two positions that changes the storage of `node` in place."""
        storage = storage_of(node)
        for position, changed, mutation in self.mutations:
            if first < position < last and (changed == storage or changed is UNKNOWN):
                return mutation
        return None

    def _reads(self, row: Row | tuple[Row, ...], here: int) -> list[tuple[Node, int]]:
        """Return each tensor that a row is made of, with the position at which it is read."""
        reads: list[tuple[Node, int]] = []
        for part in parts(row):
            if isinstance(part, RowStatistic):
                for node, reader in part.reads:
                    reads.append((node, here if reader is None else self.position[reader]))
            elif isinstance(part, AtRows):
                read = [each for each in parts(part.operand.source) if isinstance(each, Node)]
                reads += [(node, self.position[part.operand.reader]) for node in read]
        return reads

    def _is_late(self, node: Node, logits: Logits) -> bool:
        """Return whether a node is computed from a reduction of the same projection."""
        return not self.reduced.get(node, set()).isdisjoint(logits.origins)

    def _is_stored(self, logits: Logits) -> bool:
        return not self.stored.isdisjoint(logits.origins)

    def _changes_later(self, node: Node) -> bool:
        return self.mutation_between(node, self.position[node], math.inf) is not None


def logits_bytes(logits: Logits) -> int | None:
    """Return the bytes of the projection's result, None if they are known only at run time."""
    return tensor_bytes(example(logits.projection.node))
