"""The tree in CONTRIBUTING.md has each file of the package, with the first sentence about it.

Rules and statistics are left out: their folders have one line each.

After a change, update it with ``EXPECTTEST_ACCEPT=1 pytest tests/test_contributing.py``.
"""

import ast
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
TREE = re.compile(r"(?<=<!-- tree -->\n```\n).*?(?=```\n<!-- end of tree -->)", re.DOTALL)
COLUMN = 30  # where descriptions begin
COLLECTIONS = ("projections", "transforms", "reductions", "losses", "statistics")


def summary(file: Path) -> str:
    """Return the first sentence of a module's docstring, in one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    sentence = re.match(r".+?\.(?=\s|$)", " ".join(docstring.split()))
    assert sentence, f"{file.relative_to(ROOT)}: its docstring begins with no sentence"
    return sentence[0]


def line(name: str, depth: int, file: Path) -> str:
    return f"{'  ' * depth + name:<{COLUMN - 1}} {summary(file)}\n"


def tree(folder: Path, depth: int = 0) -> str:
    """Return a line for a package, and the lines of its modules and of the packages inside."""
    modules = [] if folder.name in COLLECTIONS else sorted(folder.glob("*.py"))
    packages = sorted(file.parent for file in folder.glob("*/__init__.py"))
    lines = [line(f"{folder.name}/", depth, folder / "__init__.py")]
    lines += [line(f.name, depth + 1, f) for f in modules if f.name != "__init__.py"]
    lines += [tree(package, depth + 1) for package in packages if not package.is_symlink()]
    return "".join(lines)


def test_tree():
    expected = "\n".join(tree(ROOT / name) for name in ("cce_inductor", "patterns", "kernels"))
    page = PAGE.read_text()
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        PAGE.write_text(TREE.sub(lambda _: expected, page))
    else:
        (found,) = TREE.findall(page)
        assert found == expected, "EXPECTTEST_ACCEPT=1 pytest tests/test_contributing.py updates it"
