"""What stands in for the pairs of a row and a block whose gradient is not computed.

Within a block of the vocabulary, the softmax of most rows resembles that of the mean hidden state,
the block's *profile*. So the gradient of a pair with mass m is near ``m * profile``, with the
gradients of a program's operands at the mean hidden state likewise. This is known without computing
the pair. It is added for every pair, and subtracted, with the same weight, from each pair that is
computed: the expectation does not change, and the variance is that of the difference.

With the weight w of a pair, 0 if it is not computed, ``m * (1 - w) * profile`` is left to add. Its
products with weight and input are thin: a sum over rows first, or over the block's columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.mean_row import MeanRow
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.visits import Sample
from cce_inductor.kernels.head import TILE, Head, tile_count
from cce_inductor.kernels.names import LOGIT, Name
from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.sampling import program_of
from cce_inductor.kernels.statistics.cotangent import Cotangent


class StandIn:
    """A gradient of the logits that is one row of the vocabulary times a number for each pair.

    Attributes:
        amount: the number for each pair, [rows, blocks]; [rows, 1] if all blocks have the same.
        amounts: its sum over the rows, [blocks].
        input: its product with the input, [blocks, hidden].

    Args:
        amount: see above.
        gradients: the gradients of the logit and the operands in the vocabulary's order, [1,
            vocabulary] or [1, 1].
        input: [rows, hidden].
        head: the head.
    """

    def __init__(self, amount: Tensor, gradients: Mapping[Name, Tensor], input: Tensor, head: Head):
        blocks = tile_count(head.vocabulary)
        self.amount = amount
        self.amounts = amount.sum(0).expand(blocks)
        self.input = (amount.t() @ input.to(amount.dtype)).expand(blocks, -1)
        self._is_same = amount.shape[1] == 1
        self._gradients, self._vocabulary = gradients, head.vocabulary
        shape = blocks, head.linear_weight.shape[1]
        self._of_input = torch.zeros(shape, dtype=amount.dtype, device=amount.device)

    def columns(self, name: Name, tile: slice) -> Tensor | None:
        """Return a part of the row, [columns]; None if the gradient of `name` is 0."""
        gradient = self._gradients.get(name)
        if gradient is None:
            return None
        return gradient.squeeze(0).expand(self._vocabulary)[tile]

    def multiply(self, number: int, tile: slice, weight: Tensor) -> None:
        """Compute the product of a block of the row with its weights, [columns, hidden]."""
        columns = self.columns(LOGIT, tile)
        if columns is not None:
            torch.mv(weight.to(columns.dtype).t(), columns, out=self._of_input[number])

    def add_to_input(self, total: Tensor) -> None:
        """Add the gradient of the input, [rows, hidden], once all blocks are multiplied."""
        of_input = self._of_input.sum(0, keepdim=True) if self._is_same else self._of_input
        total.addmm_(self.amount.to(total.dtype), of_input.to(total.dtype))

    def of_rows(self, name: Name) -> Tensor | None:
        """Return the sum of the gradient of an operand over each row, [rows]."""
        gradient = self._gradients.get(name)
        if gradient is None:
            return None
        blocks = len(self.amounts)
        padding = blocks * TILE - self._vocabulary
        every = torch.nn.functional.pad(gradient.squeeze(0).expand(self._vocabulary), (0, padding))
        sums = every.view(blocks, TILE).sum(1)
        return self.amount.squeeze(1) * sums.sum() if self._is_same else self.amount @ sums


class ControlVariate:
    """The stand-ins of all terms of a gradient.

    Args:
        input: [rows, hidden].
        head: the head, with the part of its program that has a gradient, and the order.
        kept: the rows that are computed.
        sample: the pairs that are computed.
    """

    def __init__(self, input: Tensor, head: Head, kept: KeptRows, sample: Sample):
        self._head, self._input, self._sample = head, kept.select(input), sample
        self._mean_row = MeanRow(input, head, kept)
        self._profiles = {x: _profile(self._mean_row.value(head.program, x)) for x in sample.masses}
        self._left = 1.0 - sample.weight

    def stand_ins(self, cotangents: Mapping[Name, Cotangent]) -> list[StandIn]:
        """Return a stand-in for each term of the cotangents that is in proportion to a softmax, and
        one that is the term itself for each that is the same in every column."""
        made = []
        for name, cotangent in cotangents.items():
            if cotangent.lse is not None:
                factor = cotangent.grad_lse.unsqueeze(1)
                for grad, mean, y in cotangent.means:
                    factor = factor + grad.unsqueeze(1) * self._distance(name, y, mean)
                made.append(self._of_softmax(name, name, factor))
            for grad, _, x in cotangent.probabilities:
                made.append(self._of_softmax(name, x, grad.unsqueeze(1)))
            if cotangent.grad_sum is not None:
                gradients = self._gradients(name, torch.ones_like(self._mean_row.values[LOGIT]))
                made.append(self._stand_in(cotangent.grad_sum.unsqueeze(1), gradients))
        return made

    def _of_softmax(self, name: Name, x: Name, factor: Tensor) -> StandIn:
        gradients = {
            each: gradient.nan_to_num(0.0, 0.0, 0.0)
            for each, gradient in self._gradients(name, self._profiles[x][0]).items()
        }
        return self._stand_in(factor * self._sample.masses[x] * self._left, gradients)

    def _stand_in(self, amount: Tensor, gradients: Mapping[Name, Tensor]) -> StandIn:
        return StandIn(amount.to(self._head.logit_dtype), gradients, self._input, self._head)

    def _gradients(self, name: Name, cotangent: Tensor) -> dict[Name, Tensor]:
        """Return the gradients of the logit and the operands for the cotangent of a value, [1,
        vocabulary], at the mean hidden state."""
        program = program_of(self._head.program, name)
        steps = derivative(program, self._head.operands)
        values = dict(self._mean_row.values)
        steps.forward.run(values, in_place=False)
        values[Name("g0")] = cotangent
        steps.backward.run(values, in_place=False)
        return {each: values[gradient] for each, gradient in steps.gradients.items()}

    def _distance(self, x: Name, y: Name, mean: Tensor) -> Tensor:
        """Return about how far `y` is in each block from its mean under the softmax of `x`,
        [rows, blocks]."""
        profile, block_lse = self._profiles[x]
        value = self._mean_row.value(self._head.program, y).nan_to_num(0.0, 0.0, 0.0)
        blocks = len(block_lse)
        padded = torch.nn.functional.pad(profile * value, (0, blocks * TILE - value.shape[1]))
        of_block = padded.view(blocks, TILE).sum(1).double()
        if x == y:  # A row's values in a block are about those of the mean row, plus a constant.
            of_block = of_block - block_lse.double() + self._sample.tile_lse[x].double()
        return (of_block - mean.unsqueeze(1)).nan_to_num(0.0, 0.0, 0.0)


def _profile(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax of a value [1, vocabulary] within each block, and the logsumexp of each
    block, [blocks]. Both are finite."""
    vocabulary, blocks = value.shape[1], tile_count(value.shape[1])
    padding = blocks * TILE - vocabulary
    padded = torch.nn.functional.pad(value.squeeze(0), (0, padding), value=-torch.inf)
    by_block = padded.view(blocks, TILE)
    profile = by_block.softmax(1).nan_to_num_(0.0)
    return profile.view(1, -1)[:, :vocabulary], by_block.logsumexp(1).nan_to_num_(0.0, 0.0, 0.0)
