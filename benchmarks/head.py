"""Measure time, peak memory and accuracy of the loss of one language-model head, method by method.

A step is ``F.cross_entropy(F.linear(input, linear_weight), target)`` and its gradients with respect
to ``input`` [tokens, hidden] and ``linear_weight`` [vocab, hidden]. Each method runs it in a
process of its own, with the same values:

* ``eager``, ``compile``: as written, without and with ``torch.compile``;
* ``auto_chunker``: ``torch.compile`` with Inductor's automatic chunking of the batch;
  ``auto_chunker_forced`` lifts the size and ratio below which it leaves a graph alone;
* ``linear_cross_entropy``: ``torch.nn.functional.linear_cross_entropy`` with its default options;
* ``liger_kernel``, ``cut_cross_entropy``: the fused losses of these packages (CUDA only);
* ``cce_inductor``: as written, under ``torch.compile`` with this package's backend;
  ``cce_inductor_sampled`` with a sampled gradient (``--sample-below``).

In each round, each method runs one step while the others wait, and the order rotates. Seconds are
the median over rounds; a ratio compares a method with ``compile`` in the same round. Memory is the
peak of one step minus the inputs and the gradients that the step leaves. Errors are ``norm(actual -
reference) / norm(reference)`` against a float64 reference that is computed in blocks of the
vocabulary. *Visited* is the share of the logits whose gradient is computed. A method that cannot
run, or that falls back to another implementation, gets a reason instead of numbers.

The logits are random unless they are those of a trained head (``trained_head.py``), whose sizes
are then its own::

    python benchmarks/head.py --dtype bfloat16 --json head.json --picture head.png
    python benchmarks/head.py --logits trained
    python benchmarks/head.py --logits trained --head head.pt --tokens 1024
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import EXACT_MEMORY, environment, peak_memory, timed, use_default_heap
from rich.console import Console
from rich.table import Table
from sampled import SAMPLED, add_sample_below
from torch import Tensor
from trained_head import trained_head

from cce_inductor.options import DEFAULT_WORKSPACE_BYTES

BASELINE = "compile"
OURS = "cce_inductor"
IGNORE_INDEX = -100
LOGITS_DEVIATION = {"random": 1.0, "peaked": 8.0}
TRAINED = "trained"
REFERENCE_BLOCK = 4096
OUT_OF_MEMORY = "DefaultCPUAllocator: "  # the beginning of the error of torch's CPU allocator
MIB = 2**20


@dataclass(frozen=True)
class Problem:
    """The shapes and values of the inputs, the same for each method."""

    tokens: int
    vocab: int
    hidden: int
    dtype: str
    device: str
    cast: bool
    ignored: float
    logits: str
    head: Path | None
    sample_below: float
    workspace_mib: int
    seed: int
    threads: int

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return input, weight and target; the first two require gradients."""
        input, linear_weight, target = self.loaded() if self.head else self.drawn()
        generator = torch.Generator().manual_seed(self.seed)
        target[torch.rand(len(target), generator=generator) < self.ignored] = IGNORE_INDEX
        place = {"device": self.device, "dtype": getattr(torch, self.dtype)}
        return (
            input.to(**place).requires_grad_(),
            linear_weight.to(**place).requires_grad_(),
            target.to(self.device),
        )

    def loaded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tensors of the file."""
        head = torch.load(self.head)
        return head["hidden"][: self.tokens], head["linear_weight"], head["target"][: self.tokens]

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return random tensors."""
        generator = torch.Generator().manual_seed(self.seed)
        deviation = LOGITS_DEVIATION[self.logits] / self.hidden**0.5
        input = torch.randn(self.tokens, self.hidden, generator=generator)
        linear_weight = torch.randn(self.vocab, self.hidden, generator=generator).mul_(deviation)
        return input, linear_weight, torch.randint(self.vocab, (self.tokens,), generator=generator)

    def loss(self, input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        """Return the loss as it is usually written."""
        logits = F.linear(input, linear_weight)
        return F.cross_entropy(logits.float() if self.cast else logits, target)


@torch.no_grad()
def reference(problem: Problem) -> dict[str, Tensor]:
    """Return loss and gradients in float64, computed in blocks of the vocabulary."""
    input, linear_weight, target = problem.inputs()
    input = input.double()
    blocks = list(linear_weight.split(REFERENCE_BLOCK))
    kept = target != IGNORE_INDEX
    share = kept / kept.sum().double()
    label = target.where(kept, 0)
    label_weight = linear_weight[label].double()

    log_sum = torch.full_like(share, -torch.inf)
    for block in blocks:
        log_sum = log_sum.logaddexp((input @ block.double().T).logsumexp(dim=1))
    loss = (share * (log_sum - (input * label_weight).sum(dim=1))).sum()

    d_input = -share[:, None] * label_weight
    d_weight = torch.empty_like(linear_weight, dtype=torch.float64)
    for block, d_block in zip(blocks, d_weight.split(REFERENCE_BLOCK), strict=True):
        block = block.double()
        d_logits = torch.exp(input @ block.T - log_sum[:, None]) * share[:, None]
        d_input += d_logits @ block
        torch.mm(d_logits.T, input, out=d_block)
    d_weight.index_add_(0, label, input * -share[:, None])
    return {"loss": loss, "d_input": d_input, "d_weight": d_weight}


class RefusedError(Exception):
    """The method ran, but fell back to another implementation."""


@dataclass(frozen=True)
class Method:
    """An implementation of the loss, and a check after the first step that it did not fall back."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    check_used: Callable[[Tensor], None] = lambda loss: None


def eager(problem: Problem) -> Method:
    return Method(problem.loss)


def compiled(problem: Problem) -> Method:
    return Method(torch.compile(problem.loss))


def auto_chunker(problem: Problem, **options: int) -> Method:
    # The first import registers operators that the second import needs.
    from torch._inductor import compile_fx, metrics  # noqa: F401
    from torch._inductor.fx_passes import auto_chunker as chunker

    reasons: list[str] = []
    chunk = chunker.chunk

    def chunk_or_tell(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
        try:
            return chunk(graph_module)
        except chunker.CantChunk as error:
            reasons.append(str(error))
            raise

    def check_used(loss: Tensor) -> None:
        if not metrics.num_auto_chunking:
            raise RefusedError("; ".join(reasons) or "the graph was left alone")

    chunker.chunk = chunk_or_tell
    settings = {f"auto_chunker.{name}": value for name, value in options.items()}
    settings["auto_chunker.enable"] = True
    return Method(torch.compile(problem.loss, options=settings), check_used)


def linear_cross_entropy(problem: Problem) -> Method:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions")

    def check_used(loss: Tensor) -> None:
        if "linear_cross_entropy" not in loss.grad_fn.name():
            raise RefusedError("fell back to linear and cross_entropy")

    options = torch.nn.LinearCrossEntropyOptions()
    return Method(partial(F.linear_cross_entropy, options=options), check_used)


def liger_kernel(problem: Problem) -> Method:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)
    return Method(lambda input, linear_weight, target: fused(linear_weight, input, target))


def cut_cross_entropy(problem: Problem) -> Method:
    from cut_cross_entropy import linear_cross_entropy as fused

    return Method(partial(fused, ignore_index=IGNORE_INDEX))


def cce_inductor(problem: Problem, *, sampled: bool = False) -> Method:
    import cce_inductor

    def check_used(loss: Tensor) -> None:
        reports = cce_inductor.reports()
        if not any(report.rewritten for report in reports):
            raise RefusedError("; ".join(report.reason for report in reports) or "found no loss")
        if sampled and not all(report.sampled for report in reports):
            raise RefusedError("; ".join(str(report.exact_because) for report in reports))

    options = {
        "min_logits_bytes": 0,
        "on_error": "raise",
        "sample_below": problem.sample_below if sampled else 0.0,
        "workspace_bytes": problem.workspace_mib * MIB,
    }
    return Method(torch.compile(problem.loss, backend=OURS, options=options), check_used)


METHODS: dict[str, Callable[[Problem], Method]] = {
    "eager": eager,
    BASELINE: compiled,
    "auto_chunker": auto_chunker,
    "auto_chunker_forced": partial(
        auto_chunker, output_size_threshold=0, amplify_ratio_threshold=0
    ),
    "linear_cross_entropy": linear_cross_entropy,
    "liger_kernel": liger_kernel,
    "cut_cross_entropy": cut_cross_entropy,
    OURS: cce_inductor,
    SAMPLED: partial(cce_inductor, sampled=True),
}
CUDA_ONLY = {"liger_kernel", "cut_cross_entropy"}


@dataclass(frozen=True)
class Failure:
    """Why a method has no numbers: a short kind for the table, and the detail."""

    kind: str
    detail: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        detail = f"{type(error).__name__}: {error}"[:1000]
        if isinstance(error, RefusedError):
            return cls("refused", str(error))
        if isinstance(error, ImportError):
            return cls("not importable", detail)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or OUT_OF_MEMORY in detail:
            return cls("out of memory", detail)
        return cls("failed", detail)

    @classmethod
    def of_exit(cls, exit_code: int) -> Failure:
        if exit_code >= 0:
            return cls("died", f"the process ended with status {exit_code}")
        name = signal.Signals(-exit_code).name
        guess = ", probably for want of memory" if name == "SIGKILL" else ""
        return cls("died", f"the process was ended by {name}{guess}")


class Session:
    """The worker's side: a method with its inputs."""

    def __init__(self, name: str, problem: Problem) -> None:
        torch.set_num_threads(problem.threads)
        self.device = torch.device(problem.device)
        self.input, self.linear_weight, self.target = problem.inputs()
        self.method = METHODS[name](problem)
        self.loss: Tensor | None = None

    def run_step(self) -> None:
        self.loss = self.method.loss(self.input, self.linear_weight, self.target)
        self.loss.backward()

    def forget_step(self) -> None:
        self.loss = self.input.grad = self.linear_weight.grad = None

    def warm_up(self, steps: int) -> float:
        """Run some steps, the first of which compiles; return the loss."""
        self.run_step()
        self.method.check_used(self.loss)
        for _ in range(steps - 1):
            self.forget_step()
            self.run_step()
        return self.loss.item()

    def step_peak_bytes(self) -> int:
        """Return the peak memory of a step above the inputs and the gradients that it leaves."""
        self.forget_step()
        with peak_memory(self.device) as peak_bytes:
            self.run_step()
            return peak_bytes() - self.input.grad.nbytes - self.linear_weight.grad.nbytes

    def prepare_timing(self) -> None:
        use_default_heap()
        self.forget_step()
        self.run_step()

    def step_seconds(self) -> float:
        self.forget_step()
        with timed(self.device) as seconds:
            self.run_step()
            return seconds()

    def share_visited(self) -> float | None:
        """Return the share of the logits whose gradient is computed in a step; None if the method
        does not sample."""
        import cce_inductor

        cce_inductor.share_visited()
        self.forget_step()
        self.run_step()
        return cce_inductor.share_visited()

    def errors(self, reference_path: Path) -> dict[str, float]:
        """Return the relative errors of the last step."""
        actual = {
            "loss": self.loss.detach(),
            "d_input": self.input.grad,
            "d_weight": self.linear_weight.grad,
        }
        expected = torch.load(reference_path, map_location=self.device)
        return {name: relative_error(actual[name], expected[name]) for name in actual}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def serve(connection: Connection, name: str, problem: Problem) -> None:
    """Run requests until one fails or the parent closes the connection; send each result."""
    try:
        session = Session(name, problem)
        while True:
            request, *arguments = connection.recv()
            connection.send(getattr(session, request)(*arguments))
    except EOFError:
        pass
    except Exception as error:
        connection.send(Failure.of(error))


class WorkerFailedError(Exception):
    """The worker has ended, or is about to."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


class Worker:
    """The parent's side of a session."""

    def __init__(self, name: str, problem: Problem) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=serve, args=(far_end, name, problem), daemon=True)
        self.process.start()
        far_end.close()

    def ask(self, request: str, *arguments: object) -> Any:
        try:
            self.connection.send((request, *arguments))
            reply = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            reply = Failure.of_exit(self.process.exitcode)
        if isinstance(reply, Failure):
            raise WorkerFailedError(reply)
        return reply

    def stop(self) -> None:
        self.connection.close()
        self.process.join()


@dataclass
class Result:
    """The measurements of one method, complete unless there is a failure."""

    method: str
    round_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    loss: float = 0.0
    visited: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.round_seconds)

    def ratios(self, baseline: Result) -> list[float]:
        """Return the seconds of each round divided by those of the baseline."""
        pairs = zip(self.round_seconds, baseline.round_seconds, strict=True)
        return [seconds / other for seconds, other in pairs]


class Race:
    """Runs the methods side by side; a method that fails drops out."""

    def __init__(self, names: Iterable[str]) -> None:
        self.results = {name: Result(name) for name in names}
        self.workers: dict[str, Worker] = {}

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers.values():
            worker.stop()

    def ask(
        self, names: Iterable[str], request: str, *arguments: object
    ) -> list[tuple[Result, Any]]:
        """Send a request to one worker after the other; return each result with its answer."""
        answers = []
        for name in names:
            if name not in self.workers:
                continue
            try:
                answer = self.workers[name].ask(request, *arguments)
            except WorkerFailedError as error:
                self.results[name].failure = error.failure
                self.workers.pop(name).stop()
            else:
                answers.append((self.results[name], answer))
        return answers

    def start(self, problem: Problem, warmup: int) -> None:
        """Start every worker, warm it up, and measure its memory."""
        for name in self.results:
            self.workers[name] = Worker(name, problem)
            for result, loss in self.ask([name], "warm_up", warmup):
                result.loss = loss
            for result, peak_bytes in self.ask([name], "step_peak_bytes"):
                result.peak_bytes = peak_bytes
            if name == SAMPLED:
                for result, share in self.ask([name], "share_visited"):
                    result.visited = share
            self.ask([name], "prepare_timing")

    def run_round(self, number: int) -> None:
        names = list(self.results)
        turn = number % len(names)
        for result, seconds in self.ask(names[turn:] + names[:turn], "step_seconds"):
            result.round_seconds.append(seconds)

    def check(self, reference_path: Path) -> None:
        for result, errors in self.ask(self.results, "errors", reference_path):
            result.errors = errors


def run(problem: Problem, arguments: argparse.Namespace, console: Console) -> list[Result]:
    """Run all rounds and, unless `--no-check` is given, the check."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Race(arguments.methods) as race,
        console.status("compiling and warming up") as status,
    ):
        os.environ |= EXACT_MEMORY | {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "compiled"))}
        race.start(problem, arguments.warmup)
        for number in range(arguments.rounds):
            status.update(f"round {number + 1} of {arguments.rounds}")
            race.run_round(number)
        if arguments.check:
            status.update("checking against the float64 reference")
            reference_path = Path(folder, "reference.pt")
            torch.save(reference(problem), reference_path)
            race.check(reference_path)
        return list(race.results.values())


def find_baseline(results: Iterable[Result]) -> Result | None:
    found = (result for result in results if result.method == BASELINE and not result.failure)
    return next(found, None)


def table(problem: Problem, results: Sequence[Result]) -> Table:
    baseline = find_baseline(results)
    shape = f"{problem.tokens} tokens, vocabulary {problem.vocab}, hidden {problem.hidden}"
    cast = " logits cast to float32," if problem.cast else ""
    values = f"{problem.dtype},{cast} {problem.device}, {problem.threads} threads"
    columns = Table(title=f"{shape}, {values}")
    columns.add_column("method")
    headings = ("seconds", f"/ {BASELINE}", "min-max", "peak MiB", f"% of {BASELINE}")
    for heading in (*headings, "visited", "loss", "error: loss", "d_input", "d_weight"):
        columns.add_column(heading, justify="right")
    for result in results:
        columns.add_row(result.method, *cells(result, baseline))
    return columns


def cells(result: Result, baseline: Result | None) -> list[str]:
    if result.failure is not None:
        return [result.failure.kind]
    if baseline is None:
        ratio = ratio_range = memory_share = "-"
    else:
        ratios = result.ratios(baseline)
        ratio = f"{statistics.median(ratios):.2f}"
        ratio_range = f"{min(ratios):.2f}-{max(ratios):.2f}"
        memory_share = f"{result.peak_bytes / baseline.peak_bytes:.1%}"
    return [
        f"{result.seconds:.3f}",
        ratio,
        ratio_range,
        f"{result.peak_bytes / MIB:.1f}",
        memory_share,
        "-" if result.visited is None else f"{result.visited:.2f}",
        f"{result.loss:.6g}",
        *(f"{error:.1e}" for error in result.errors.values()),
    ]


def report(
    problem: Problem, arguments: argparse.Namespace, results: Sequence[Result]
) -> dict[str, Any]:
    """Return all numbers, for a JSON file."""
    baseline = find_baseline(results)
    methods = []
    for result in results:
        numbers = asdict(result)
        if result.failure is None:
            numbers["seconds"] = result.seconds
            if baseline is not None:
                numbers["ratios"] = result.ratios(baseline)
        methods.append(numbers)
    protocol = {"rounds": arguments.rounds, "warmup": arguments.warmup}
    return {
        "arguments": asdict(problem) | {"head": str(problem.head)} | protocol,
        "environment": environment(torch.device(problem.device)),
        "results": methods,
    }


def draw(title: str, results: Sequence[Result], path: Path) -> None:
    """Draw bars of time and memory; a method without numbers shows the reason."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    baseline = find_baseline(results)
    figure, (time_panel, memory_panel) = pyplot.subplots(
        1, 2, figsize=(11, 1.5 + 0.4 * len(results)), sharey=True, layout="constrained"
    )
    for row, result in enumerate(results):
        color = "tab:orange" if result.method in (OURS, SAMPLED) else "tab:blue"
        if result.failure is not None:
            for panel in (time_panel, memory_panel):
                place = panel.get_yaxis_transform()
                panel.text(0.02, row, result.failure.kind, transform=place, va="center")
            continue
        times = result.ratios(baseline) if baseline is not None else result.round_seconds
        middle = statistics.median(times)
        spread = [[middle - min(times)], [max(times) - middle]]
        time_bar = time_panel.barh(row, middle, xerr=spread, color=color, capsize=3)
        time_panel.bar_label(time_bar, fmt=" %.2f")
        memory_bar = memory_panel.barh(row, result.peak_bytes / MIB, color=color)
        memory_panel.bar_label(memory_bar, fmt=" %.1f")

    time_panel.set_yticks(range(len(results)), [result.method for result in results])
    time_panel.set_ylim(len(results) - 0.4, -0.6)
    time_panel.set_xlabel("seconds" if baseline is None else f"seconds, relative to {BASELINE}")
    time_panel.margins(x=0.15)
    memory_panel.set_xlabel("peak memory above inputs and gradients, MiB")
    memory_panel.set_xscale("log")
    memory_panel.margins(x=0.25)
    memory_panel.set_xlim(left=1)
    memory_panel.xaxis.set_major_formatter(ScalarFormatter())
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--cast",
        action=argparse.BooleanOptionalAction,
        help="cast the logits to float32 before the loss; default: unless they are float32",
    )
    parser.add_argument("--ignored", type=float, default=0.0, help="fraction of targets ignored")
    parser.add_argument(
        "--logits",
        choices=[*LOGITS_DEVIATION, TRAINED],
        default="random",
        help=f"their standard deviation: {LOGITS_DEVIATION}; or those of a trained model",
    )
    parser.add_argument(
        "--head", type=Path, help="file of a trained head; default: train one, and keep it"
    )
    add_sample_below(parser)
    parser.add_argument(
        "--workspace-mib",
        type=int,
        default=DEFAULT_WORKSPACE_BYTES // MIB,
        help="workspace_bytes, in MiB",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps that come first, at least one")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), help="default: all for the device"
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with the float64 reference",
    )
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--picture", type=Path, help="draw seconds and memory to this file")
    arguments = parser.parse_args()
    if arguments.head is not None and arguments.logits != TRAINED:
        parser.error(f"--head needs --logits {TRAINED}")
    if arguments.logits == TRAINED:
        arguments.head = arguments.head or trained_head()
        head = torch.load(arguments.head)
        arguments.tokens = min(arguments.tokens, len(head["target"]))
        arguments.vocab, arguments.hidden = head["linear_weight"].shape
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.cast is None:
        arguments.cast = arguments.dtype != "float32"
    if arguments.methods is None:
        on_cuda = arguments.device == "cuda"
        arguments.methods = [name for name in METHODS if on_cuda or name not in CUDA_ONLY]
    return arguments


def main() -> int:
    arguments = parse_arguments()
    problem = Problem(**{name: getattr(arguments, name) for name in Problem.__dataclass_fields__})
    torch.set_num_threads(problem.threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    results = run(problem, arguments, console)

    summary = table(problem, results)
    console.print(summary)
    failures = {result.method: result.failure for result in results if result.failure}
    for method, failure in failures.items():
        console.print(f"{method}: {failure.kind}: {failure.detail}", markup=False)
    if arguments.json:
        arguments.json.write_text(json.dumps(report(problem, arguments, results), indent=2) + "\n")
    if arguments.picture:
        draw(str(summary.title), results, arguments.picture)
    return int(not failures.keys().isdisjoint({BASELINE, OURS, SAMPLED}))


if __name__ == "__main__":
    sys.exit(main())
