"""Train the example GPT on the CPU: without ``--cce``, with it, and with a sampled gradient.

``examples/train_gpt.py`` runs in three processes, one after the other, with the same seed and
the same arguments. This script samples their resident memory, then prints a table, draws
memory over time, and writes the numbers as JSON next to the picture::

    python benchmarks/demo.py --picture build/demo/demo.png

It fails if a run fails, if nothing was rewritten, or if the losses with exact gradients differ by
more than a different order of float32 operations explains.

How memory is measured:

* It is the resident memory of the training process, including Python, torch and the compiler, but
  without Inductor's compile workers and the C++ compiler, which are other processes. The peak is
  the one recorded by the operating system; the picture shows samples taken every 10 ms.
* All runs do the same work: the tokenizer's cache is filled beforehand, and Inductor's cache is
  empty at the start of each run.

Needs psutil, rich and matplotlib in addition to the packages of the example.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sampled import RECOMMENDED

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "examples/train_gpt.py"  # relative to ROOT, the current folder of all runs
PICTURE = Path("build/demo/demo.png")

VOCABULARY = 32768
BLOCK_SIZE = 256
MODEL = {"layers": 4, "heads": 4, "width": 256, "block-size": BLOCK_SIZE}
TRAINING = {"device": "cpu", "dtype": "float32", "lr": 2e-3, "warmup": 10, "eval-batches": 2}

SAMPLING_INTERVAL = 0.01  # seconds
BASELINE, EXACT, SAMPLED = "torch.compile", "cce_inductor", "sampled"
OPTIONS = {
    BASELINE: [],
    EXACT: ["--cce"],
    SAMPLED: ["--cce", "--sample-below", str(float(RECOMMENDED))],
}
"""The options in which the runs differ, by the name of the run."""

COMPILED_STEPS = 3  # the first steps, excluded from the step time because they compile
ZOOMED_STEPS = 3  # steps in the right half of the picture
MIB = 1 << 20
WIDTH = 100  # of the table, where there is no terminal

# With exact gradients, runs compute the same sums in a different order. So do eager PyTorch and
# torch.compile, whose losses differ by less than 1e-5 in such a run.
TOLERANCE = 1e-3

# Executed by the measured process: the unchanged script, then a report of what only the process
# itself knows, which is its exact peak and the rewrites.
CHILD = """
import json, resource, runpy, sys

report, *sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")

package = sys.modules.get("cce_inductor")
fields = (
    "rewritten", "reason", "location", "loss", "logits_shape", "bytes_saved", "sampled",
    "exact_because",
)
share = package.share_visited() if package else None
heads = [{f: getattr(r, f) for f in fields} for r in package.reports()] if package else []
kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open(report, "w") as file:
    outcome = {"peak_mib": kibibytes / 1024, "reports": heads, "share_visited": share}
    json.dump(outcome, file, default=str)
"""


class DemoError(Exception):
    """The demonstration failed; the message says how."""


@dataclass(frozen=True)
class Sample:
    """Resident memory at one moment, in seconds since training began."""

    seconds: float
    mib: float


@dataclass(frozen=True)
class Run:
    """The measurements of one training run."""

    peak_mib: float
    steps: list[dict[str, Any]]
    reports: list[dict[str, Any]]
    share_visited: float | None
    samples: list[Sample]

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]

    @property
    def rewrites(self) -> int:
        return sum(report["rewritten"] for report in self.reports)

    def difference(self, other: Run) -> float:
        """The largest absolute difference between two loss curves."""
        return max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))

    def summary(self) -> dict[str, float]:
        """The numbers of the table."""
        return {
            "peak_mib": self.peak_mib,
            "step_seconds": statistics.median(s["seconds"] for s in self.steps[COMPILED_STEPS:]),
            "first_step_seconds": self.steps[0]["seconds"],
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "validation_loss": self.steps[-1]["val_loss"],
        }


# ------------------------------------------------------------------------------- measuring


def script_arguments(steps: int, batch_size: int) -> list[str]:
    """Return the arguments that all runs have in common."""
    options = {
        **MODEL,
        **TRAINING,
        "vocab-size": VOCABULARY,
        "batch-size": batch_size,
        "steps": steps,
        "eval-interval": steps,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def prepare(arguments: list[str]) -> None:
    """Fill the tokenizer's cache in a process of its own."""
    command = [sys.executable, SCRIPT, *arguments, "--prepare-only"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise DemoError("the training script could not prepare its data")


def watch(process: subprocess.Popen[bytes], metrics: Path) -> list[Sample]:
    """Sample the memory of a process until it ends; training begins when ``metrics`` appears."""
    memory = psutil.Process(process.pid)
    start = None
    samples = []
    while resident := memory.memory_info().rss:  # nothing once it has ended
        now = time.perf_counter()
        if start is None and metrics.exists():
            start = now
        if start is not None:
            samples.append(Sample(now - start, resident / MIB))
        time.sleep(SAMPLING_INTERVAL)
    return samples


def measure(arguments: list[str]) -> Run:
    """Run the training script in a process of its own, with its own empty Inductor cache."""
    with tempfile.TemporaryDirectory() as temporary:
        metrics = Path(temporary, "metrics.jsonl")
        report = Path(temporary, "report.json")
        child = [sys.executable, "-P", "-c", CHILD, str(report)]
        command = [*child, SCRIPT, *arguments, "--metrics", str(metrics)]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(temporary, "inductor"))}
        with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
            samples = watch(process, metrics)
        if process.returncode:
            raise DemoError(f"the training script failed with exit status {process.returncode}")
        outcome = json.loads(report.read_text())
        steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    return Run(outcome["peak_mib"], steps, outcome["reports"], outcome["share_visited"], samples)


def check(runs: dict[str, Run]) -> None:
    """Raise DemoError unless losses with exact gradients agree, and another run was sampled."""
    baseline, exact, sampled = (runs[name] for name in (BASELINE, EXACT, SAMPLED))
    if not exact.rewrites:
        reasons = {report["reason"] for report in exact.reports} or {"no loss was found"}
        raise DemoError(f"--cce rewrote nothing: {'; '.join(sorted(map(str, reasons)))}")
    difference = exact.difference(baseline)
    if not difference <= TOLERANCE:
        raise DemoError(f"the losses differ by {difference:.1e}, more than {TOLERANCE:.0e}")
    if not any(report["sampled"] for report in sampled.reports):
        reasons = {report["exact_because"] for report in sampled.reports}
        raise DemoError(f"--sample-below sampled nothing: {'; '.join(sorted(map(str, reasons)))}")


# ------------------------------------------------------------------------------- reporting


def table(runs: dict[str, Run]) -> Table:
    """The runs side by side."""
    rows = {
        "peak_mib": ("Peak resident memory (MiB)", "{:,.0f}"),
        "step_seconds": ("Median step time (s)", "{:.2f}"),
        "first_step_seconds": ("First step, compiles (s)", "{:.1f}"),
        "first_loss": ("First training loss", "{:.6f}"),
        "last_loss": ("Last training loss", "{:.6f}"),
        "validation_loss": ("Validation loss", "{:.6f}"),
    }
    result = Table("", title="Training on the CPU")
    others = [name for name in runs if name != BASELINE]
    for heading in (BASELINE, *(column for name in others for column in (name, "ratio"))):
        result.add_column(heading, justify="right")

    def add_row(label: str, first: str, cells: list[tuple[str, str]]) -> None:
        result.add_row(label, first, *(cell for pair in cells for cell in pair))

    summaries = {name: run.summary() for name, run in runs.items()}
    for key, (label, style) in rows.items():
        first = summaries[BASELINE][key]
        numbers = [summaries[name][key] for name in others]
        cells = [(style.format(number), f"{number / first:.3f}") for number in numbers]
        add_row(label, style.format(first), cells)
    add_row("Rewrites", str(runs[BASELINE].rewrites), [(str(runs[o].rewrites), "") for o in others])
    differences = [runs[name].difference(runs[BASELINE]) for name in others]
    add_row("Largest loss difference", "", [(f"{each:.1e}", "") for each in differences])
    shares = [runs[name].share_visited for name in others]
    shown = ["" if share is None else f"{share:.2f}" for share in shares]
    add_row("Share of gradient computed", "", [(share, "") for share in shown])
    return result


def title(batch_size: int) -> str:
    """The model in two lines."""
    tokens = batch_size * BLOCK_SIZE
    logits = tokens * VOCABULARY * 4 / MIB
    return (
        f"GPT of {MODEL['layers']} layers, width {MODEL['width']}, float32; "
        f"vocabulary {VOCABULARY:,}, {tokens:,} tokens per step\n"
        f"(one float32 tensor of logits: {logits:,.0f} MiB)"
    )


def draw(runs: dict[str, Run], heading: str, path: Path) -> None:
    """Draw memory over the whole run, and over a few steps in its middle."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    whole, zoomed = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for label, run in runs.items():
        seconds = [sample.seconds for sample in run.samples]
        memory = [sample.mib for sample in run.samples]
        whole.plot(seconds, memory, label=label, linewidth=0.8)

        shown = run.steps[len(run.steps) // 2 :][:ZOOMED_STEPS]
        begin, end = shown[0]["elapsed"] - shown[0]["seconds"], shown[-1]["elapsed"]
        inside = [sample for sample in run.samples if begin <= sample.seconds <= end]
        zoomed.plot([sample.seconds - begin for sample in inside], [s.mib for s in inside])

    figure.suptitle(heading, fontsize=11)
    whole.set(xlabel="seconds since training began", ylabel="resident memory (MiB)", ylim=(0, None))
    whole.set_title("whole run, compilation first", fontsize=10)
    whole.legend(loc="lower right")
    zoomed.set(xlabel="seconds")
    zoomed.set_title(f"{ZOOMED_STEPS} steps in the middle", fontsize=10)
    for axes in (whole, zoomed):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def write_numbers(path: Path, arguments: list[str], runs: dict[str, Run]) -> None:
    """Write everything but the memory samples as JSON."""
    numbers: dict[str, Any] = {
        "arguments": arguments,
        "python": platform.python_version(),
        "torch": version("torch"),
        "cpus": os.cpu_count(),
        "runs": {
            name: {
                **run.summary(),
                "largest_loss_difference": run.difference(runs[BASELINE]),
                "share_visited": run.share_visited,
                "steps": run.steps,
                "reports": run.reports,
            }
            for name, run in runs.items()
        },
    }
    path.write_text(json.dumps(numbers, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each run")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of a step")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where to draw the picture")
    args = parser.parse_args()
    if args.steps < COMPILED_STEPS + ZOOMED_STEPS:
        parser.error(f"--steps must be at least {COMPILED_STEPS + ZOOMED_STEPS}")
    return args


def main() -> None:
    args = parse_arguments()
    if find_spec("cce_inductor") is None:
        raise DemoError(
            "cce_inductor is not installed; run: pip install -e '.[examples,benchmarks]'"
        )
    arguments = script_arguments(args.steps, args.batch_size)
    prepare(arguments)
    runs = {}
    for number, (name, options) in enumerate(OPTIONS.items(), 1):
        print(f"{number}/{len(OPTIONS)}: {args.steps} steps, {name}", flush=True)
        runs[name] = measure([*arguments, *options])

    Console(width=None if sys.stdout.isatty() else WIDTH).print(table(runs))
    draw(runs, title(args.batch_size), args.picture)
    numbers = args.picture.with_suffix(".json")
    write_numbers(numbers, arguments, runs)
    print(f"wrote {args.picture} and {numbers}")
    check(runs)


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        raise SystemExit(f"error: {error}") from None
