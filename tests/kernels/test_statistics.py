"""Every statistic: all of its implementations agree with its reference.

`cases.STATISTICS` has a program for each. The Triton templates are tested in `tests/templates`.
"""

import functools
import itertools

import pytest
import torch
from cases import (
    ROWS,
    STATISTICS,
    UNUSUAL,
    assert_agrees,
    case,
    gradients_of,
    random,
    unusual_case,
    unusual_values,
)

from cce_inductor.kernels import all_statistics
from cce_inductor.kernels.blockwise import engine
from cce_inductor.kernels.head import TILE
from cce_inductor.kernels.output import Output
from cce_inductor.kernels.statistics.base import Statistic
from cce_inductor.kernels.statistics.numerics import exp_
from cce_inductor.kernels.statistics.template_lines import TemplateLines
from cce_inductor.kernels.triton import tiled

VOCABULARY = 2 * TILE + 300
BLOCKWISE = functools.partial(gradients_of, engine.compute_statistics, engine.compute_gradients)
TILED = functools.partial(
    gradients_of, functools.partial(tiled.compute_statistics, tile=128), tiled.compute_gradients
)


def test_every_statistic_has_a_program():
    defined = {name for name, kind in Output.by_name.items() if issubclass(kind, Statistic)}
    assert STATISTICS.keys() == defined


@pytest.mark.parametrize("vocabulary", [5, VOCABULARY])
@pytest.mark.parametrize("name", STATISTICS)
def test_blockwise(name, vocabulary):
    assert_agrees(BLOCKWISE, *case(STATISTICS[name], vocabulary))


@pytest.mark.parametrize("name", STATISTICS)
def test_tiles_of_a_template(name):
    input, head = case(STATISTICS[name], VOCABULARY, dtype=torch.float32)
    if all(statistic.has_template for statistic in head.program.statistics):
        assert tiled.reason_against(head) is None
        assert_agrees(TILED, input, head, rtol=2e-4, atol=1e-3)
    else:
        assert tiled.reason_against(head) == f"{name} has no template"


@pytest.mark.parametrize("vocabulary", [5, VOCABULARY])
@pytest.mark.parametrize(("name", "kind"), UNUSUAL)
def test_unusual_values(name, kind, vocabulary):
    values = unusual_values(vocabulary)[kind]
    assert_agrees(BLOCKWISE, *unusual_case(STATISTICS[name], values))
    narrow = unusual_case(STATISTICS[name], values, dtype=torch.float32)
    assert_agrees(TILED, *narrow, rtol=2e-4, atol=1e-3)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_template_stores_what_a_tile_has(name):
    """A statistic writes as many numbers as it declares; the values at indices are one tensor."""
    _, head = case(STATISTICS[name])
    if not all(statistic.has_template for statistic in head.program.statistics):
        return
    indices = [
        ("INDEX", statistic.index_of(head.operands).dim()) for statistic in head.program.indexed
    ]
    lines = TemplateLines(dict.fromkeys(head.program.roots, "z"), indices)
    for position, statistic in enumerate(head.program.statistics):
        statistic.write(lines, position)
    declared = sum(len(each.tile_dtypes) for each in head.program.statistics)
    assert len(lines.outputs) == declared + len(indices) - 1  # Inductor stores the first number


def values_of(program, vocabulary, hide=()):
    """Random values for what the statistics of a program read, with -inf in some columns."""
    values = {name: random(ROWS, vocabulary, seed=at) for at, name in enumerate(program.roots)}
    for columns in hide:
        values[program.roots[-1]][:, columns] = -torch.inf
    return values


def part_of(program, values, indices, columns):
    """The parts of all statistics of some columns."""
    numbers = {
        statistic: statistic.of_tile(
            [values[name][:, columns].clone() for name in statistic.values],
            columns,
            indices.get(statistic),
            exp_,
        )
        for statistic in program.statistics
    }
    return all_statistics.parts(numbers)


@pytest.mark.parametrize("cut", [[], [1], [100], [7, 150, 299]])
@pytest.mark.parametrize("hide", [[], [slice(0, 100)]])
@pytest.mark.parametrize("name", STATISTICS)
def test_parts_combine(name, hide, cut):
    """However the columns are divided, among tiles or among devices, the results are the same."""
    vocabulary = 300
    _, head = case(STATISTICS[name], vocabulary)
    program = head.program
    values = values_of(program, vocabulary, hide)
    indices = all_statistics.prepared_indices(program, head.operands, vocabulary)
    expected = part_of(program, values, indices, slice(0, vocabulary))

    edges = [0, *cut, vocabulary]
    ranges = [slice(*pair) for pair in itertools.pairwise(edges)]
    parts = [part_of(program, values, indices, columns) for columns in ranges]
    stacked = {
        statistic: tuple(map(torch.stack, zip(*(each[statistic] for each in parts), strict=True)))
        for statistic in program.statistics
    }
    found = all_statistics.results(all_statistics.combined(stacked), indices)
    for statistic, wanted in all_statistics.results(expected, indices).items():
        for ours, theirs in zip(found[statistic], wanted, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("name", STATISTICS)
def test_no_columns_change_nothing(name):
    _, head = case(STATISTICS[name], 300)
    program = head.program
    indices = all_statistics.prepared_indices(program, head.operands, 300)
    part = part_of(program, values_of(program, 300), indices, slice(0, 300))
    device = torch.device("cpu")
    stacked = {
        statistic: tuple(
            map(
                torch.stack,
                zip(statistic.nothing(ROWS, device, indices.get(statistic)), each, strict=True),
            )
        )
        for statistic, each in part.items()
    }
    for statistic, combined in all_statistics.combined(stacked).items():
        for ours, theirs in zip(combined, part[statistic], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
