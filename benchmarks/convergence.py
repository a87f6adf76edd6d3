"""Does a model train as well with a sampled gradient as with the exact one?

A run is one training of a small GPT. Its *method* makes the gradient of the loss:

* ``exact``; ``exact again`` with sums in another order, and ``exact rounded`` with gradients of
  hidden state and weight that are rounded to bfloat16: how far do two runs drift apart by rounding?
* ``sampled``: this package with ``sample_below``, see docs/sampling.md;
* ``filtered``: what is small is left out, as by the filter of Cut Cross-Entropy.

Runs of one seed have the same first weights and the same batches, so their losses are compared in
pairs. The main comparison trains from scratch, with AdamW, an untied head, in float32; each of the
others changes one of these: ``tuned`` continues from a checkpoint, which was trained exactly on
another text, with a tenth of the learning rate. The text and the model are those of
``examples/train_gpt.py``.

All runs take hours. Each one that ends is a line of the file of results, and is not made again, so
the benchmark can be interrupted, and continued with the same command::

    python benchmarks/convergence.py --list
    python benchmarks/convergence.py --minutes 60
    python benchmarks/convergence.py --only "seed 0" tuned
    python benchmarks/convergence.py --report

The report draws a picture for each setting beside the file of results. Its seconds are those that
the processor worked, in training alone. In one thread, these are the seconds of an idle machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from convergence_runs import (
    EXACT,
    MAIN,
    METHODS,
    RARE_SHARE,
    Run,
    Setting,
    Sizes,
    Training,
    checkpoint_path,
    first_weights,
    planned_runs,
    train_gpt,
)
from measure import environment
from rich.console import Console
from rich.table import Table

RESULTS = Path("docs/convergence.jsonl")
MARGIN = 1.25  # A run may take longer than others by so much.
SIZES = {
    "vocabulary": "entries of the vocabulary",
    "layers": "transformer layers",
    "heads": "attention heads of a layer",
    "width": "hidden size",
    "length": "tokens of a sequence",
    "batch": "sequences of a step",
    "steps": "steps of a run",
    "checkpoint_steps": "steps of the checkpoint that fine-tuning starts from",
    "every": "steps between records",
    "validation_batches": "batches of a validation",
}


@dataclass(frozen=True)
class Result:
    """What was recorded of a run.

    Attributes:
        points: the records, from the first step to the last.
        total_seconds: what the run took, with compilation and validation.
    """

    points: list[dict[str, Any]]
    total_seconds: float

    def curve(self, key: str) -> list[float]:
        """Return a number of each point that has it."""
        return [point[key] for point in self.points if point[key] is not None]

    def last(self, key: str) -> float:
        return self.curve(key)[-1]


Results = dict[str, Result]


def read_results(path: Path, sizes: Sizes) -> Results:
    """Return the results of runs of these sizes by the name of the run."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {
        record["name"]: Result(record["points"], record["total_seconds"])
        for record in records
        if record["sizes"] == asdict(sizes)
    }


def write_result(path: Path, run: Run, sizes: Sizes, result: Result) -> None:
    """Append a line to the file of results."""
    record = {
        "name": run.name,
        **asdict(run),
        "sizes": asdict(sizes),
        "environment": environment(torch.device("cpu")),
        **asdict(result),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


# --------------------------------------------------------------------------------- running


def make_runs(
    runs: Sequence[Run], sizes: Sizes, path: Path, minutes: float, console: Console
) -> None:
    """Make the runs that have no result, until one would not fit the time that is left."""
    results = read_results(path, sizes)
    left = [run for run in runs if run.name not in results]
    end = time.perf_counter() + minutes * 60
    cache = train_gpt.parse_arguments([]).cache_dir.expanduser()
    corpus = train_gpt.load_corpus(cache, sizes.vocabulary)
    for number, run in enumerate(left, 1):
        seconds = expected_seconds(run, results)
        if run.setting.start == "tuned" and not checkpoint_path(sizes, corpus).exists():
            seconds *= 1 + sizes.checkpoint_steps / sizes.steps
        if time.perf_counter() + seconds > end:
            console.print(
                f"stopped before {run.name}, which may take {seconds / 60:.1f} minutes",
                highlight=False,
            )
            return
        with console.status(f"{number} of {len(left)}: {run.name}"):
            weights = first_weights(run, sizes, corpus)
            began = time.perf_counter()
            points = list(Training(run, sizes, corpus, weights).points())
            result = Result(points, round(time.perf_counter() - began, 3))
        write_result(path, run, sizes, result)
        results[run.name] = result
        console.print(
            f"{number} of {len(left)}: {run.name}: loss {result.last('loss'):.4f}, "
            f"{result.total_seconds / 60:.1f} minutes",
            highlight=False,
        )


def expected_seconds(run: Run, results: Results) -> float:
    """Return what a run may take, from the runs of its method, or else from all; 0 without any."""
    seconds = {name: result.total_seconds for name, result in results.items()}
    alike = [seconds[name] for name in seconds if f", {run.method}, " in name]
    return MARGIN * statistics.median(alike or seconds.values() or [0.0])


def list_table(runs: Sequence[Run], results: Results) -> Table:
    """Return which runs are done and which are left."""
    done = sum(run.name in results for run in runs)
    table = Table(title=f"{done} of {len(runs)} runs are done")
    table.add_column("run")
    for heading in ("minutes", "validation loss"):
        table.add_column(heading, justify="right")
    for run in runs:
        result = results.get(run.name)
        cells = ("left", "")
        if result is not None:
            cells = (f"{result.total_seconds / 60:.1f}", f"{result.last('loss'):.4f}")
        table.add_row(run.name, *cells)
    return table


# --------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Pairs:
    """The results of one method in one setting, each with the exact result of the same seed."""

    setting: Setting
    method: str
    pairs: list[tuple[Result, Result]]

    def differences(self, key: str) -> list[float]:
        """Return the last number of each run minus that of the exact run."""
        return [result.last(key) - exact.last(key) for result, exact in self.pairs]

    def ratio(self) -> float:
        """Return the time of the runs divided by that of the exact runs."""
        mine, exact = (
            sum(result.last("processor_seconds") for result in results)
            for results in zip(*self.pairs, strict=True)
        )
        return mine / exact

    def mean(self, key: str) -> list[float]:
        """Return the mean over the runs, point by point."""
        return mean_curve([result.curve(key) for result, _ in self.pairs])

    def mean_difference(self, key: str) -> list[float]:
        """Return the mean difference to the exact runs, point by point."""
        exact = mean_curve([exact.curve(key) for _, exact in self.pairs])
        return [a - b for a, b in zip(self.mean(key), exact, strict=True)]


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]


def find_pairs(runs: Sequence[Run], results: Results) -> Iterator[Pairs]:
    """Yield the pairs of each method that has any, setting by setting."""
    for setting, methods in METHODS.items():
        for method in methods:
            of_method = [run for run in runs if (run.setting, run.method) == (setting, method)]
            names = [(run.name, Run(setting, EXACT, run.seed).name) for run in of_method]
            pairs = [(results[a], results[b]) for a, b in names if a in results and b in results]
            if pairs:
                yield Pairs(setting, method, pairs)


def with_error(values: Sequence[float]) -> str:
    """Return the mean and, of several values, its standard error."""
    mean = f"{statistics.fmean(values):+.4f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def report_table(every: Sequence[Pairs], sizes: Sizes) -> Table:
    tokens = sizes.batch * sizes.length
    table = Table(
        title=f"Validation loss after {sizes.steps} steps of {tokens:,} tokens, minus that of "
        f"{EXACT} with the same seed\n(mean ± standard error; rare: the least frequent tokens, "
        f"{RARE_SHARE:.0%} of the text;\nshare visited: in the first and the last {sizes.every} "
        "steps)"
    )
    table.add_column("setting")
    table.add_column("method")
    for heading in ("seeds", "loss", "difference", "rare loss", "difference", "share visited"):
        table.add_column(heading, justify="right")
    table.add_column(f"seconds / {EXACT}", justify="right")
    before = None
    for each in every:
        if before is not None and each.setting != before:
            table.add_section()
        cells = [str(len(each.pairs))]
        for key in ("loss", "rare_loss"):
            is_baseline = each.method == EXACT
            difference = "" if is_baseline else with_error(each.differences(key))
            cells += [f"{each.mean(key)[-1]:.4f}", difference]
        shares = each.mean("share")
        cells.append(f"{shares[0]:.2f} to {shares[-1]:.2f}" if shares else "")
        name = str(each.setting) if each.setting != before else ""
        table.add_row(name, each.method, *cells, f"{each.ratio():.2f}")
        before = each.setting
    return table


def draw(setting: Setting, every: Sequence[Pairs], path: Path) -> None:
    """Draw the loss against steps and time, its difference to exact, and the share visited."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (by_step, by_time), (differences, shares) = figure.subplots(2, 2)
    for each in every:
        style = {"color": f"C{METHODS[MAIN].index(each.method)}", "linewidth": 1.2}
        steps = each.mean("step")
        by_step.plot(steps, each.mean("loss"), label=each.method, **style)
        by_time.plot(each.mean("processor_seconds"), each.mean("loss"), **style)
        if each.method != EXACT:
            differences.plot(steps[1:], each.mean_difference("loss")[1:], **style)
            differences.plot(
                steps[1:], each.mean_difference("rare_loss")[1:], linestyle="dotted", **style
            )
        if each.mean("share"):
            shares.plot(steps[1:], each.mean("share"), **style)

    lowest = min(min(each.mean("loss")) for each in every)
    second = max(each.mean("loss")[1] for each in every)
    for axes, label in ((by_step, "step"), (by_time, "seconds of training")):
        axes.set(xlabel=label, ylabel="validation loss", ylim=(lowest - 0.05, second))
    by_step.legend()
    differences.axhline(0, color="C0", linewidth=0.8)
    differences.set(xlabel="step", ylabel=f"loss minus that of {EXACT} (dotted: rare tokens)")
    shares.set(xlabel="step", ylabel="share visited", ylim=(0, 1.05))
    for axes in (by_step, by_time, differences, shares):
        axes.grid(alpha=0.3)
    seeds = len(every[0].pairs)
    figure.suptitle(f"{setting}, mean of {seeds} seed{'s' if seeds > 1 else ''}", fontsize=11)
    figure.savefig(path, dpi=130)


def report(runs: Sequence[Run], sizes: Sizes, path: Path, console: Console) -> None:
    """Print the table and draw a picture for each setting."""
    every = list(find_pairs(runs, read_results(path, sizes)))
    console.print(report_table(every, sizes))
    for setting in METHODS:
        of_setting = [each for each in every if each.setting == setting]
        if of_setting:
            picture = path.with_name(f"{path.stem}-{str(setting).replace(' ', '-')}.png")
            draw(setting, of_setting, picture)
            console.print(f"wrote {picture}", highlight=False)


# ---------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show what is done and what is left")
    what.add_argument("--report", action="store_true", help="print the table, draw the pictures")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of a line for each run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop before this is over")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="runs with all of this in their name"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each method")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    group = parser.add_argument_group("sizes", "Runs of other sizes are other runs.")
    for field in fields(Sizes):
        option = f"--{field.name.replace('_', '-')}"
        group.add_argument(option, type=int, default=field.default, help=SIZES[field.name])
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in fields(Sizes)})
    runs = [
        run
        for run in planned_runs(arguments.seeds)
        if all(text in run.name for text in arguments.only)
    ]
    if arguments.list:
        console.print(list_table(runs, read_results(arguments.results, sizes)))
    elif arguments.report:
        report(runs, sizes, arguments.results, console)
    else:
        try:
            make_runs(runs, sizes, arguments.results, arguments.minutes, console)
        except KeyboardInterrupt:
            console.print("interrupted: the same command continues with this run")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
