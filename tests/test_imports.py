"""Modules import in one direction, without cycles.

Imports inside functions and under `TYPE_CHECKING` count as well.
"""

import ast
import graphlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "cce_inductor"

# The packages, lowest first: a module may import from its own package and from the lines above. "" is
# the package itself, whose names are imported on first use.
LAYERS = (
    ("surprise", "torch_internals"),
    ("options",),
    ("reporting",),
    ("kernels",),
    ("operators",),
    ("functional", "patterns", "recipe"),
    ("rewriting",),
    ("deferred",),
    ("heads",),
    ("installation",),
    ("backends", "explanation"),
    ("__main__", "testing"),
    ("",),
)
LEVELS = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def package_modules() -> dict[str, Path]:
    """Return the file of each module by its full name."""
    modules = {}
    for folder in (PACKAGE, "kernels", "patterns"):
        for file in (ROOT / folder).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            name = name.removesuffix(".__init__")
            modules[name if folder == PACKAGE else f"{PACKAGE}.{name}"] = file
    return modules


MODULES = package_modules()


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Yield the modules of the package that a file imports, each with its line."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: imports are absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in submodules]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name in MODULES)


EDGES = {
    (module, imported): f"{file.relative_to(ROOT)}:{line}: {module} imports {imported}"
    for module, file in MODULES.items()
    for imported, line in imports(file)
}


def room(module: str) -> str:
    """Return the folder or module directly below the package."""
    return module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]


def test_every_room_has_a_layer():
    assert {room(module) for module in MODULES} == set(LEVELS)


def test_no_cycle():
    graph: dict[str, list[str]] = {}
    for module, imported in EDGES:
        graph.setdefault(module, []).append(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1][::-1]
        edges = itertools.pairwise(cycle)
        pytest.fail("a cycle of imports:\n" + "\n".join(EDGES[edge] for edge in edges))


def test_imports_point_down():
    wrong = [
        text
        for (module, imported), text in EDGES.items()
        if room(module) != room(imported) and LEVELS[room(module)] <= LEVELS[room(imported)]
    ]
    assert not wrong, "against the order of LAYERS:\n" + "\n".join(wrong)
