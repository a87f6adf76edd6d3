"""The package is the same from a wheel, an sdist, an editable install and a plain clone.

`cce_inductor/kernels` and `cce_inductor/patterns` are symbolic links to folders beside the package,
so each way of installing has to follow them, and none may find the files of another checkout.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

# What builds the package here; pyproject.toml asks for the same version.
pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
PACKAGE = "cce_inductor"
FOLDERS = (PACKAGE, "kernels", "patterns")
FILES = ("pyproject.toml", "README.md", "LICENSE")

# Prints the file of each module: of what the import loads, and of what it does not load, too.
LOCATE = """
import importlib.util, json, pkgutil, sys
import cce_inductor.patterns, cce_inductor.kernels.triton.device
modules = pkgutil.walk_packages(cce_inductor.__path__, "cce_inductor.")
found = {name: importlib.util.find_spec(name).origin for _, name, _ in modules}
loaded = {n: m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "cce_inductor"}
print(json.dumps(found | loaded))
"""


def copy_checkout(path: Path) -> Path:
    """Copy what a build needs; links stay links."""
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, path / folder, symlinks=True, ignore=ignored)
    for file in FILES:
        shutil.copy(ROOT / file, path)
    return path


def package_files(checkout: Path) -> set[str]:
    """Return the files below the package, links followed, relative to the checkout."""
    return {
        Path(folder, file).relative_to(checkout).as_posix()
        for folder, _, files in os.walk(checkout / PACKAGE, followlinks=True)
        for file in files
        if not file.endswith(".pyc")
    }


def modules(checkout: Path) -> dict[str, str]:
    """Return the file of each module of the package, relative to the checkout."""
    files = [file for file in package_files(checkout) if file.endswith(".py")]
    return {
        file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in files
    }


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> None:
    """Run pip without the network: the setuptools that is installed here builds the package."""
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    run(sys.executable, "-m", "pip", *arguments, *offline, cwd=cwd)


class Environment:
    """A virtual environment that sees all packages of this one except cce_inductor.

    This environment's packages are on its path, but Python does not read `.pth` files there, so an
    editable install of cce_inductor in this environment has no effect.
    """

    def __init__(self, path: Path) -> None:
        venv.EnvBuilder(symlinks=True).create(path)
        self.python = path / "bin" / "python"
        variables = {"base": str(path), "platbase": str(path)}
        self.packages = Path(sysconfig.get_path("purelib", "venv", variables))
        (self.packages / "all_other_packages.pth").write_text(sysconfig.get_path("purelib"))

    def install(self, *requirement: str | Path) -> None:
        pip("install", *requirement, "--target", self.packages, cwd=self.packages)

    def module_files(self, *options: str, cwd: Path, **variables: str) -> dict[str, Path]:
        """Return the file of each module of the package as Python, started in `cwd`, finds it."""
        printed = run(self.python, *options, "-c", LOCATE, cwd=cwd, **variables)
        return {name: Path(file) for name, file in json.loads(printed).items()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def other_clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current folder of the commands; Python must not take its files for installed ones."""
    return copy_checkout(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked_sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = "import setuptools.build_meta, sys; setuptools.build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=checkout)
    (archive,) = folder.iterdir()
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def build_wheel(source: Path, folder: Path) -> Path:
    pip("wheel", source, "--wheel-dir", folder, cwd=source)
    (wheel,) = folder.iterdir()
    return wheel


def assert_all_modules_in(place: Path, found: dict[str, Path], checkout: Path) -> None:
    assert found == {name: place / file for name, file in modules(checkout).items()}


def test_wheel_and_sdist_have_every_file(checkout, wheel, unpacked_sdist):
    files = package_files(checkout)
    assert f"{PACKAGE}/py.typed" in files
    assert f"{PACKAGE}/kernels/triton/device.py" in files
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == files
    assert package_files(unpacked_sdist) == files


def test_wheel(checkout, wheel, other_clone, tmp_path):
    environment = Environment(tmp_path)
    environment.install(wheel)
    found = environment.module_files("-P", cwd=other_clone)
    assert_all_modules_in(environment.packages, found, checkout)


def test_wheel_of_the_sdist(checkout, unpacked_sdist, other_clone, tmp_path):
    environment = Environment(tmp_path / "environment")
    environment.install(build_wheel(unpacked_sdist, tmp_path / "wheel"))
    found = environment.module_files("-P", cwd=other_clone)
    assert_all_modules_in(environment.packages, found, checkout)


def test_editable_install(checkout, other_clone, tmp_path):
    environment = Environment(tmp_path)
    environment.install("--editable", checkout)
    found = environment.module_files("-P", cwd=other_clone)
    assert_all_modules_in(checkout, found, checkout)

    # A clone that comes first on `sys.path`, as the current folder or by PYTHONPATH, runs its own.
    found = environment.module_files(cwd=other_clone)
    assert_all_modules_in(other_clone, found, checkout)
    found = environment.module_files(cwd=tmp_path, PYTHONPATH=str(other_clone))
    assert_all_modules_in(other_clone, found, checkout)


def test_plain_clone(checkout, other_clone, tmp_path):
    environment = Environment(tmp_path)
    found = environment.module_files("-P", cwd=other_clone, PYTHONPATH=str(checkout))
    assert_all_modules_in(checkout, found, checkout)
