"""Run `tests/cuda`, distributed over several pytest processes that share the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .results import NEEDS_CUDA, Results, arguments

ROOT = Path(__file__).parents[2]
TESTS = "tests/cuda"
PROCESSES = max(1, min(8, (os.cpu_count() or 1) // 2))


def command() -> list[str]:
    # -P: cce_inductor is imported from PYTHONPATH, not from the current folder.
    pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return [*pytest, "-p", "gpu_parts.dealt", "--rootdir", str(ROOT), TESTS]


def run(results: Results) -> None:
    reading, writing = os.pipe()
    processes = []
    for number in range(PROCESSES):
        environment = os.environ | {
            "DEALT": f"{number}/{PROCESSES}/{writing}",
            "TORCHINDUCTOR_COMPILE_THREADS": "2",  # for each process
        }
        processes.append(
            subprocess.Popen(command(), cwd=ROOT, env=environment, pass_fds=[writing], stdout=2)
        )
    os.close(writing)
    counts: dict[str, int] = {}
    with os.fdopen(reading) as lines:
        for line in lines:
            tell(results, line, counts)
    for number, process in enumerate(processes):
        status = process.wait()
        name = f"pytest process {number + 1} of {PROCESSES}"
        if status < 0 or status > 1:  # 1 means that tests failed
            results.reason(name, f"it ended with status {status}")
        else:
            results.number(name, status=status, detail=True)


def tell(results: Results, line: str, counts: dict[str, int]) -> None:
    """Record one line that the plugin has written."""
    try:
        test = json.loads(line)
    except json.JSONDecodeError:
        return  # incomplete: its process died while writing it
    name, outcome = test["test"].removeprefix(f"{TESTS}/"), test["outcome"]
    counts[outcome] = counts.get(outcome, 0) + 1
    if outcome == "planned":
        results.plan(name)
    elif outcome == "passed":
        results.number(name, outcome=outcome, seconds=test["seconds"], detail=True)
    else:
        results.reason(name, f"{outcome}: {test['why']}")
    results.number("all tests", **counts)


def main() -> None:
    device, results, _ = arguments()
    if device.type != "cuda":
        results.reason("all tests", NEEDS_CUDA)
        return
    results.plan("all tests")
    run(results)


if __name__ == "__main__":
    main()
