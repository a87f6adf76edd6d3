"""`benchmarks/gpu.py` on a machine without a GPU: its records, and how it handles failures."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu  # noqa: E402

NOT_INSTALLED = """\
import sys
sys.meta_path[:] = [
    finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")
]
"""
"""A `sitecustomize` that hides packages which are installed as links to their sources."""


def run(folder, *arguments):
    """Run gpu.py of a clone that is not installed; return results, output and seconds."""
    (folder / "sitecustomize.py").write_text(NOT_INSTALLED)
    began = time.monotonic()
    ran = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    results = json.loads((folder / "results" / "gpu.json").read_text())
    return results, ran.stdout, time.monotonic() - began


def has_a_number(result):
    return any(isinstance(value, (int, float)) for value in result.values())


def by_name(results, part):
    (found,) = [each for each in results["parts"] if each["part"] == part]
    return {result["name"]: result for result in found["results"]}


def test_every_part_on_the_cpu(tmp_path):
    # It takes one minute; four are enough on a busy machine.
    results, printed, _ = run(tmp_path, "--minutes", "4", "--output", "results")
    assert [part["part"] for part in results["parts"]] == [part.name for part in gpu.PARTS]
    for part in results["parts"]:
        assert part["results"] or "dropped" in part["status"]
        for result in part["results"]:
            assert "reason" in result or len(result) > 1

    imported = by_name(results, "versions")["environment"]["cce_inductor"]
    assert Path(imported).parents[1] == BENCHMARKS.parent
    assert has_a_number(by_name(results, "products")["library product"])
    for name in ("assertion", "kernels", "tests"):
        assert all("CUDA" in result["reason"] for result in by_name(results, name).values())

    head = by_name(results, "head")
    exact = head["float64 reference"]["loss"]
    methods = ["eager", "torch.compile", "cce_inductor, 64 MiB", "cce_inductor, 256 MiB"]
    assert head["cce_inductor_sampled"]["share_visited"] > 0
    for name in [*methods, "cce_inductor_sampled"]:
        assert head[name]["loss"] == pytest.approx(exact, rel=1e-4)
        assert head[name]["error_weight"] < 1e-2
        assert head[name]["ms"] > head[name]["forward_ms"] > 0
    assert "CUDA" in head["quack"]["reason"]

    table = (tmp_path / "results" / "gpu.md").read_text()
    assert table in printed
    for part in gpu.PARTS:
        assert f"| {part.name} " in table


def test_what_has_no_time_is_dropped(tmp_path):
    results, printed, seconds = run(tmp_path, "--minutes", "0.12", "--output", "results")
    assert seconds < 45  # all parts together would take minutes
    statuses = [part["status"] for part in results["parts"]]
    assert statuses[-1] == "was dropped: no time was left"
    assert statuses[-1] in printed


def test_an_installed_package_is_measured_if_asked_for(tmp_path):
    """The folders are arranged as in a wheel."""
    package = tmp_path / "cce_inductor"
    for folder in ("kernels", "patterns"):
        shutil.copytree(BENCHMARKS.parent / folder, package / folder)
    shutil.copytree(BENCHMARKS.parent / "cce_inductor", package, dirs_exist_ok=True)
    results, *_ = run(tmp_path, "--minutes", "0.3", "--output", "results", "--installed")
    imported = by_name(results, "versions")["environment"]["cce_inductor"]
    assert Path(imported).parent == package


def says(line, then="pass"):
    """Return the command of a part: it plans a result, writes a line, and continues."""
    lines = [{"plan": ["first", "second"]}, line]
    code = "".join(f"print({json.dumps(each)!r}, flush=True)\n" for each in lines)
    return ("-c", f"import os, subprocess, sys, time\n{code}{then}")


def test_trouble_costs_only_its_own_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SHARE_SECONDS", 3.0)
    first = {"name": "first", "ms": 1.0}
    outlives = f"subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    parts = [
        gpu.Part("crash", says(first, "print('my last words', file=sys.stderr); os.abort()"), 0.0),
        gpu.Part("hang", says(first, "time.sleep(60)"), 0.0),
        gpu.Part("broken", ("-c", "raise ValueError('of its own')"), 0.0),
        gpu.Part("child", says(first, outlives), 0.0),
        gpu.Part("fine", says({"name": "second", "reason": "because"}), 0.0),
    ]
    began = time.monotonic()
    gpu.Driver(tmp_path, "cpu", 40.0, dict(os.environ)).run(parts, {})
    assert time.monotonic() - began < 50  # the sleeping processes were not waited for

    results = json.loads((tmp_path / "gpu.json").read_text())
    found = {part["part"]: part for part in results["parts"]}
    assert found["crash"]["status"] == "failed: ended by SIGABRT"
    assert found["crash"]["last_lines"] == ["my last words"]
    assert found["hang"]["status"].startswith("was stopped after 3")
    for name in ("crash", "hang"):
        numbers, missing = found[name]["results"]
        assert numbers == first
        assert missing["reason"] == f"the part {found[name]['status']}"
    assert found["broken"]["status"] == "failed: exit status 1"
    assert found["broken"]["last_lines"][-1] == "ValueError: of its own"
    assert found["child"]["status"] == "ran"
    assert [result.get("reason") for result in found["fine"]["results"]] == [
        "the part ended without it",
        "because",
    ]

    table = (tmp_path / "gpu.md").read_text()
    assert "SIGABRT" in table
    assert "because" in table
