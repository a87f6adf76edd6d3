"""The lines of the Triton template that compute the statistics of a tile.

A statistic writes its lines with `TemplateLines`. A tile is computed in several blocks of BLOCK_V
columns, one after another. `templates/statistics.jinja` shows where the lines are inserted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cce_inductor.kernels.names import Name

MINUS_INFINITY = 'float("-inf")'


@dataclasses.dataclass(frozen=True)
class Masses:
    """The variables that hold the masses ``exp(x - greatest)`` of a value.

    Attributes:
        greatest: the greatest value of each row in the blocks so far.
        mass: the masses of this block.
        total: the sum of the masses of the blocks so far.
        update: the line that adds to `total`.
        rescale: a format string. It rescales a sum of masses from the `greatest` of the previous
            blocks to the `greatest` that includes this block.
    """

    greatest: str
    mass: str
    total: str
    update: str
    rescale: str


class TemplateLines:
    """The lines of all statistics of a program.

    Args:
        values: the variable of each value of the program.
        indices: the argument of each index operand, in order, and its number of indices per row.

    Attributes:
        before: lines before the first block of a tile.
        updates: lines for each block, after its product. They may use `rows`, `row_inside`,
            `columns`, `inside` (whether a column is in the vocabulary), `first_column`, BLOCK_M,
            BLOCK_V, EVEN_V, and the functions of `kernels.triton.device`.
        after: lines that store the numbers after the last block.
        outputs: the arguments of the kernel that these lines write. Inductor itself stores the
            first number.
        targets: the variables that hold class indices.
    """

    def __init__(self, values: Mapping[Name, str], indices: list[tuple[str, int]]):
        self._values = values
        self._indices = iter(indices)
        self.before: list[str] = []
        self.updates: list[str] = []
        self.after: list[str] = []
        self.outputs: list[str] = []
        self.targets: list[str] = []
        self._has_first = False
        self._masses: dict[Name, Masses] = {}
        self._sums: dict[Name, tuple[str, str]] = {}

    def begin(self, name: str, value: str, dtype: str = "float32") -> str:
        """Declare a variable of one number per row; return its name.

        Args:
            name: the variable.
            value: its first value as Triton source, `MINUS_INFINITY` or "0.0" for example.
            dtype: its dtype in Triton.
        """
        self.before.append(f"{name} = tl.full([BLOCK_M], {value}, tl.{dtype})")
        return name

    def inside(self, value: Name, fill: str) -> str:
        """Return the expression of a value in float32, with `fill` beyond the vocabulary: the
        Triton source of a number that does not change the statistic."""
        return f"device.only({self._values[value]}, inside, {fill}, EVEN_V)"

    def store(self, variable: str) -> None:
        """Store one number of each row."""
        if self._has_first:
            argument = f"NUMBER{len(self.outputs)}"
            self.outputs.append(argument)
            place = f"{argument} + tile_of_statistics * M + rows"
            self.after.append(f"tl.store({place}, {variable}, mask=row_inside)")
            return
        self._has_first = True
        self.after.append(
            f'{{{{store_output(("tile_of_statistics", "rows"), "{variable}", "row_inside", '
            'indent_width=8, val_shape=("BLOCK_M",))}}'
        )

    def sum(self, value: Name) -> str:
        """Return the variable that holds the sum of a value over the blocks so far."""
        return self._sum(value)[0]

    def sum_update(self, value: Name) -> str:
        """Return the line that adds to `sum`."""
        return self._sum(value)[1]

    def _sum(self, value: Name) -> tuple[str, str]:
        if value not in self._sums:
            name = self.begin(f"sum_{value}", "0.0")
            update = f"{name} += tl.sum({self.inside(value, '0.0')}, 1)"
            self.updates.append(update)
            self._sums[value] = name, update
        return self._sums[value]

    def masses(self, x: Name) -> Masses:
        """Return the variables of a softmax, whose lines are written once."""
        if x not in self._masses:
            greatest = self.begin(f"greatest_{x}", MINUS_INFINITY)
            total = self.begin(f"total_{x}", "0.0")
            low, before, mass = f"low_{x}", f"before_{x}", f"mass_{x}"
            rescale = f"device.rescaled({{}}, {before}, {greatest})"
            update = f"{total} = {rescale.format(total)} + tl.sum({mass}, 1)"
            self.updates += [
                f"{low} = {self.inside(x, MINUS_INFINITY)}",
                f"{before} = {greatest}",
                f"{greatest} = tl.maximum({greatest}, tl.max({low}, 1))",
                f"{mass} = device.mass_of(device.above({low}, {greatest}))",
                update,
            ]
            self._masses[x] = Masses(greatest, mass, total, update, rescale)
        return self._masses[x]

    def weighted_sum(
        self,
        number: int,
        *,
        before: str,
        weights: str,
        y: str,
        rescale: str,
        total: str,
        size: str,
    ) -> None:
        """Write the lines of a weighted sum of `y`, two numbers (see `numerics.center_of`).

        Args:
            number: the number of the statistic.
            before: the line that adds to the sum of the weights, which these lines must precede.
            weights, y: the weights and values of this block.
            rescale: a format string that scales a sum over the previous blocks to this block's
                weights.
            total: the sum of the weights of the previous blocks.
            size: the sum of the absolute values of those weights.
        """
        center, weighted = f"center{number}", f"weighted{number}"
        self.begin(center, "0.0")
        self.begin(weighted, "0.0")
        block = f"weights{number}, y{number}"
        place = self.updates.index(before)
        self.updates[place:place] = [
            f"{block} = {weights}, {y}",
            f"nearer{number} = device.nearer({center}, {size}, {block})",
            f"{weighted} = {rescale.format(weighted)} "
            f"+ device.moved({center}, nearer{number}, {total}, {block})",
            f"{center} = nearer{number}",
        ]
        self.store(center)
        self.store(weighted)

    def at_indices(self, number: int, value: Name, *, is_target: bool) -> None:
        """Write the lines that store the value at each index of the next argument in this tile."""
        argument, width = next(self._indices)
        x, out = self._values[value], f"OUT{number}"
        self.outputs.append(out)
        for k in range(width):
            index = f"index{number}_{k}"
            place = f'{argument} + rows * {{{{stride("{argument}", 0)}}}}'
            place += f' + {k} * {{{{stride("{argument}", 1)}}}}'
            self.before.append(f"{index} = tl.load({place}, mask=row_inside, other=-1)")
            if is_target:
                self.targets.append(index)
            # These lines come first, so that the values are no longer needed when later lines
            # compute their exponentials.
            self.updates[:0] = [
                f"if device.any_in({index}, first_column, BLOCK_V):",
                f"    found = device.at({x}, columns, {index})",
                f"    here = ({index} >= first_column) & ({index} < first_column + BLOCK_V)",
                f"    here &= row_inside & ({index} < V)",
                f"    tl.store({out} + rows * {width} + {k}, found, mask=here)",
            ]
