"""Train with each framework, without and with cce_inductor, and write ``docs/frameworks.md``.

Each set-up of ``setups.py`` runs in processes of its own, once as it is and once after
``cce_inductor.install()``::

    pip install -e ".[test,frameworks]"
    python tests/frameworks/run.py --output docs/frameworks.md

Set-ups whose framework is not installed are left out. The page itself says how all of them are
measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setups import BATCH, LENGTH, SETUPS, VOCABULARY, Setup

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclasses.dataclass
class Measured:
    """What one run of a set-up printed."""

    losses: list[float]
    peak: int
    seconds: float | None
    computed: list[str]
    reports: list[dict[str, Any]]


def is_available(setup: Setup) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in setup.packages)


def measure(name: str, how: str) -> Measured:
    """Run a set-up.

    Args:
        name: of the set-up.
        how: "with" or "without" cce_inductor.

    Raises:
        RuntimeError: the run failed; the message contains what it wrote.
    """
    command = [sys.executable]
    processes = SETUPS[name].processes
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(HERE / "child.py"), name, how]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": str(2**16),
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            command, env=environment, cwd=HERE, capture_output=True, text=True, check=False
        )
    found = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if done.returncode or not found:
        raise RuntimeError(f"{name} {how}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return Measured(**json.loads(found[0].removeprefix("MEASURED ")))


def check(setup: Setup, theirs: Measured, ours: Measured) -> None:
    """Check that a set-up trains as before, and whether it was rewritten as it says.

    Raises:
        AssertionError: if not.
    """
    assert len(theirs.losses) == len(ours.losses) > 0
    for mine, expected in zip(ours.losses, theirs.losses, strict=True):
        assert abs(mine - expected) <= setup.loose * abs(expected), (ours.losses, theirs.losses)
    assert not ours.computed or not setup.rewritten, ours.computed
    if setup.rewritten:
        logits = BATCH * LENGTH * VOCABULARY * 2  # bytes of a copy in bfloat16
        assert theirs.peak - ours.peak > logits, (theirs.peak, ours.peak)


def row(name: str, setup: Setup, theirs: Measured, ours: Measured) -> str:
    arguments = ", ".join(f"{key}={value!r}" for key, value in setup.install.items())
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    time = "-"
    if theirs.seconds and ours.seconds:
        time = f"{ours.seconds / theirs.seconds:.2f}"
    return (
        f"| {name} | `install({arguments})` | {'yes' if setup.rewritten else 'no'} "
        f"| {theirs.peak / 2**20:.0f} | {ours.peak / 2**20:.0f} | {time} | {worst:.1e} |"
    )


def page(rows: list[str], notes: list[str], versions: list[str]) -> str:
    return "\n".join(
        [
            "# Frameworks",
            "",
            "What one must write for a training loop of a framework, and what one gets. Each loop",
            "is run as its users write it, as it is and after `cce_inductor.install()`, which is",
            f"the only change: a tiny model with a vocabulary of {VOCABULARY:,}, a batch of {BATCH}",
            f"rows of {LENGTH} tokens in float32 (64 MiB of logits), on a CPU. Peak memory is that",
            "of the third step; step time is the ratio of the fastest steps after it, which varies",
            "by a third on a shared machine. Losses differ by rounding. Made by:",
            "",
            "```bash",
            'pip install -e ".[test,frameworks]"',
            "pip install --no-deps litgpt==0.5.13 open_clip_torch==3.3.0 torchtune==0.6.1 torchao==0.9.0",
            "python tests/frameworks/run.py --results frameworks.json --only torchtune",
            "pip uninstall torchao   # PEFT requires another version",
            "python tests/frameworks/run.py --results frameworks.json --output docs/frameworks.md",
            "```",
            "",
            "| Loop | Before it | Rewritten | Peak without (MiB) | Peak with (MiB) | Step time, "
            "with / without | Largest relative difference of a loss |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            *notes,
            *(["", "Versions: " + ", ".join(versions) + "."] if versions else []),
            "",
        ]
    )


def measured(name: str, kept: dict[str, Any]) -> tuple[Measured, Measured]:
    """Return what a set-up measures without and with cce_inductor, from `kept` if it is there."""
    if name not in kept:
        kept[name] = [dataclasses.asdict(measure(name, how)) for how in ("without", "with")]
    theirs, ours = (Measured(**each) for each in kept[name])
    return theirs, ours


def versions_of(packages: set[str]) -> list[str]:
    names = importlib.metadata.packages_distributions()
    distributions = [names[package][0] for package in sorted(packages) if package in names]
    return [f"{each} {importlib.metadata.version(each)}" for each in distributions]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="measure the set-ups whose name contains this")
    parser.add_argument("--output", type=Path, help="write the page to this file")
    parser.add_argument(
        "--results",
        type=Path,
        help="keep what is measured in this file, and measure nothing again that it contains, so "
        "that frameworks which cannot be installed together are measured one after another",
    )
    arguments = parser.parse_args()
    kept: dict[str, Any] = {}
    if arguments.results and arguments.results.exists():
        kept = json.loads(arguments.results.read_text())
    rows, notes, packages, failed = [], [], {"torch"}, False
    for name, setup in SETUPS.items():
        if name not in kept and (arguments.only not in name or not is_available(setup)):
            print(f"{name}: left out", flush=True)
            continue
        theirs, ours = measured(name, kept)
        if arguments.results:
            arguments.results.write_text(json.dumps(kept))
        try:
            check(setup, theirs, ours)
        except AssertionError as error:
            failed = True
            print(f"{name}: FAILED: {error}", *(r["text"] for r in ours.reports), sep="\n")
        packages.update(setup.packages)
        rows.append(row(name, setup, theirs, ours))
        print(rows[-1], flush=True)
        if setup.outcome:
            notes.append(f"{name}: {setup.outcome}\n")
    if arguments.output:
        arguments.output.write_text(page(rows, notes, versions_of(packages)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
