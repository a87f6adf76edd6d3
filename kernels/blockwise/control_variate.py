"""What stands in for the pairs of a row and a tile whose gradient is not computed.

Within a tile of the vocabulary, the softmax of a row resembles that of the center of its cluster,
the *profile*. So the gradient of a pair with mass m is near ``m * profile``, with the gradients of
a program's operands at the center likewise. This is known without computing the pair. It is added
for every pair, and subtracted, with the same weight, from each pair that is computed: the
expectation does not change, and the variance is that of the difference.

With the weight w of a pair, 0 if it is not computed, ``m * (1 - w) * profile`` is left to add. Its
products with weight and input are thin: a sum over the rows of a cluster first, or over the columns
of a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.centers import Centers, value_of
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.visits import Sample
from cce_inductor.kernels.head import Head
from cce_inductor.kernels.names import LOGIT, Name
from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.sampling import program_of
from cce_inductor.kernels.statistics.cotangent import Cotangent

ROWS_OF_CLUSTER = 128
"""The least number of rows of a cluster. A center costs as much as a row."""

MOST_DEPTH = 4
"""Rows are divided in half so many times at most, which makes 16 clusters."""


@dataclasses.dataclass(frozen=True)
class Term:
    """A term of a cotangent that is a number for each pair times a row of the vocabulary.

    Attributes:
        name: the value whose cotangent it belongs to.
        softmax: the value whose profile is the row; None for a row of ones.
        amount: the number for each pair, [clusters, size, tiles].
        input: its products with the input, [clusters, tiles, hidden].
        of_weight: the products of the row's gradient with the weight, [clusters, tiles, hidden].
    """

    name: Name
    softmax: Name | None
    amount: Tensor
    input: Tensor
    of_weight: Tensor


class ControlVariate:
    """The stand-ins of all terms of a gradient, and the terms that are the same in every column.

    Args:
        input: [rows, hidden].
        head: the head, with the part of its program that has a gradient, and the order.
        kept: the rows that are computed.
        sample: the pairs that are computed.
        cotangents: the cotangents of the program's values.
    """

    def __init__(
        self,
        input: Tensor,
        head: Head,
        kept: KeptRows,
        sample: Sample,
        cotangents: Mapping[Name, Cotangent],
    ):
        self._head, self._sample = head, sample
        self._centers = Centers(input, head, kept, depth_for(kept.count))
        self._terms: list[Term] = []
        input_of_clusters = self._centers.of_rows(kept.select(input).to(head.logit_dtype))
        for name, cotangent in cotangents.items():
            for softmax, factor in self._factors(name, cotangent):
                self._terms.append(self._term(name, softmax, factor, input_of_clusters))

    def _factors(self, name: Name, cotangent: Cotangent) -> Iterator[tuple[Name | None, Tensor]]:
        """Yield the softmax of each term of a cotangent, None for a row of ones, and its factor,
        float64 [rows, tiles] or [rows, 1]."""
        if cotangent.lse is not None:
            factor = cotangent.grad_lse.unsqueeze(1)
            for grad, mean, y in cotangent.means:
                factor = factor + grad.unsqueeze(1) * self._distance(name, y, mean)
            yield name, factor
        for grad, _, x in cotangent.probabilities:
            yield x, grad.unsqueeze(1)
        if cotangent.grad_sum is not None:
            yield None, cotangent.grad_sum.unsqueeze(1)

    def _term(self, name: Name, softmax: Name | None, factor: Tensor, input: Tensor) -> Term:
        """Return a term, given the hidden states of each cluster, [clusters, size, hidden]."""
        if softmax is None:
            amount = factor.expand(-1, self._head.tile_count)
        else:
            amount = factor * self._sample.masses[softmax] * (1.0 - self._sample.weight)
        by_cluster = self._centers.of_rows(amount.to(self._head.logit_dtype))
        by_cluster = by_cluster.where(self._centers.is_own.unsqueeze(2), 0.0)
        products = torch.bmm(by_cluster.transpose(1, 2), input)
        return Term(name, softmax, by_cluster, products, torch.zeros_like(products))

    def of_tile(
        self, number: int, tile: slice, weight: Tensor, bias: Tensor | None
    ) -> list[TileTerm]:
        """Return the terms in a tile, given its weight and bias."""
        values = self._centers.values(tile, weight, bias)
        return [TileTerm(term, number, self._gradients(term, values)) for term in self._terms]

    def _gradients(self, term: Term, values: dict[Name, Tensor]) -> dict[Name, Tensor]:
        """Return the gradients of the logits and operands of the centers, for a term's row."""
        if term.softmax is None:
            cotangent = torch.ones_like(values[LOGIT])
        else:
            cotangent = _profile(value_of(self._head.program, term.softmax, values))
        steps = derivative(program_of(self._head.program, term.name), self._head.operands)
        made = dict(values)
        steps.forward.run(made, in_place=False)
        made[Name("g0")] = cotangent
        steps.backward.run(made, in_place=False)
        gradients = {
            name: made[gradient].expand(cotangent.shape)
            for name, gradient in steps.gradients.items()
        }
        if term.softmax is None:
            return gradients
        return {name: each.nan_to_num(0.0, 0.0, 0.0) for name, each in gradients.items()}

    def add_to_input(self, total: Tensor) -> None:
        """Add the gradient of the input, [kept rows, hidden], once every tile is computed."""
        for term in self._terms:
            self._add_rows(total, torch.bmm(term.amount, term.of_weight))

    def _add_rows(self, total: Tensor, of_clusters: Tensor) -> None:
        """Add numbers of the rows of clusters, [clusters, size, ...]; rows of others have zeros."""
        total.index_add_(0, self._centers.rows.flatten(), of_clusters.flatten(0, 1).to(total.dtype))

    def add_to_rows(self, total: Tensor, each: TileTerm, name: Name) -> None:
        """Add a term's gradient of an operand with a number for each row, [kept rows]."""
        if name in each.gradients:
            sums = each.gradients[name].sum(1, keepdim=True)
            self._add_rows(total, each.term.amount[:, :, each.number] * sums)

    def _distance(self, x: Name, y: Name, mean: Tensor) -> Tensor:
        """Return about how far `y` is in each tile from its mean under the softmax of `x`,
        [rows, tiles]."""
        program = self._head.program
        parts = []
        for values in self._centers.of_tiles():
            at_center, of_y = value_of(program, x, values), value_of(program, y, values)
            of_tile = (_profile(at_center) * of_y.nan_to_num(0.0, 0.0, 0.0)).sum(1)
            if x == y:
                of_tile = of_tile - at_center.logsumexp(1)
            parts.append(of_tile.double())
        of_rows = self._centers.for_rows(torch.stack(parts, 1))
        if x == y:  # A row's values in a tile are about those of its center, plus a constant.
            of_rows = of_rows + self._sample.tile_lse[x].double()
        return (of_rows - mean.unsqueeze(1)).nan_to_num(0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class TileTerm:
    """A term in one tile.

    Attributes:
        term: the term.
        number: the number of the tile.
        gradients: the gradients of the logits and operands of the centers, [clusters, columns].
    """

    term: Term
    number: int
    gradients: Mapping[Name, Tensor]

    def columns(self, name: Name) -> Tensor | None:
        """Return the gradient of the logits or of an operand, summed over the rows, [columns]; None
        if it is 0."""
        gradient = self.gradients.get(name)
        if gradient is None:
            return None
        amounts = self.term.amount[:, :, self.number].sum(1)
        return amounts @ gradient

    def multiply(self, weight: Tensor) -> None:
        """Compute the product with the tile's weight, [columns, hidden]."""
        gradient = self.gradients.get(LOGIT)
        if gradient is not None:
            self.term.of_weight[:, self.number] = gradient @ weight.to(gradient.dtype)

    def outer(self) -> tuple[Tensor, Tensor] | None:
        """Return the factors of the gradient of the weight, [columns, clusters] and [clusters,
        hidden]; None if it is 0."""
        gradient = self.gradients.get(LOGIT)
        return None if gradient is None else (gradient.t(), self.term.input[:, self.number])


def depth_for(rows: int) -> int:
    """Return how many times rows are divided in half to make clusters."""
    return max(0, min(MOST_DEPTH, (rows // ROWS_OF_CLUSTER).bit_length() - 1))


def _profile(value: Tensor) -> Tensor:
    """Return the softmax of a value within a tile, [clusters, columns]; 0 where it is nan."""
    return value.softmax(1).nan_to_num(0.0)
