"""Measure a training step of unmodified Hugging Face models, with and without cce_inductor.

A step is ``torch.compile(model)(input_ids=ids, labels=ids).loss.backward()``. The models have a
small body and a large vocabulary, so most of the step is the head, whose logits the model returns.
Each method runs in a process of its own; the processes take their steps in turn::

    python benchmarks/models.py --picture build/models.png

Memory is the peak of a step above the weights and gradients. Time is a ratio to ``torch.compile``,
the median over the rounds. The gradient of every parameter is compared with eager's; those of
``cce_inductor_sampled`` are estimates (``--sample-below``). Needs transformers, psutil and rich,
and matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measure import EXACT_MEMORY, environment, peak_memory, timed, use_default_heap
from rich.console import Console
from rich.table import Table
from sampled import SAMPLED, add_sample_below

MODELS = ("llama", "gemma2", "gpt2")
BASELINE, OURS = "compile", "cce_inductor"
METHODS = ("eager", BASELINE, OURS, SAMPLED)
MIB = 1 << 20
TOLERANCE = 1e-4  # largest relative difference of a gradient from eager's


@dataclass(frozen=True)
class Problem:
    """The size of the models and batches, and where they run."""

    vocab: int
    hidden: int
    layers: int
    batch: int
    length: int
    threads: int
    device: str
    dtype: str
    sample_below: float


@dataclass
class Result:
    """The measurements of one method with one model."""

    model: str
    method: str
    peak_bytes: int = 0
    loss: float = 0.0
    error: float = 0.0
    reports: list[str] = field(default_factory=list)
    share_visited: float | None = None
    seconds: list[float] = field(default_factory=list)


def build(name: str, problem: Problem) -> torch.nn.Module:
    """Return the model with random weights, the same in each process."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": problem.vocab}
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_embd=problem.hidden,
            n_layer=problem.layers,
            n_head=4,
            n_positions=problem.length,
            use_cache=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **sizes,
        )
        return transformers.GPT2LMHeadModel(config)
    body = {
        "hidden_size": problem.hidden,
        "intermediate_size": 2 * problem.hidden,
        "num_hidden_layers": problem.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": problem.hidden // 4,
        "use_cache": False,
    }
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **body))
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, **body))


def work(connection: Connection, name: str, method: str, problem: Problem, folder: str) -> None:
    """Measure one method: send its result, then the seconds of each requested step."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(problem.threads)
    device = torch.device(problem.device)
    model = build(name, problem).to(device, getattr(torch, problem.dtype)).train()
    shape = (problem.batch, problem.length)
    ids = torch.randint(3, problem.vocab, shape, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids.to(device), "labels": ids.to(device)}
    result = Result(name, method)
    if method in (OURS, SAMPLED):
        import cce_inductor

        cce_inductor.install(sample_below=problem.sample_below if method == SAMPLED else 0.0)
    code = model if method == "eager" else torch.compile(model)

    def step() -> Any:
        output = code(**batch)
        output.loss.backward()
        return output

    result.loss = float(step().loss.detach())
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    expected = Path(folder, f"{name}.pt")
    if method == "eager":
        torch.save(gradients, expected)
    else:
        result.error = max(
            float((gradients[n] - wanted).norm() / wanted.norm().clamp_min(1e-12))
            for n, wanted in torch.load(expected).items()
        )
    del gradients
    model.zero_grad()
    step()
    model.zero_grad()
    with peak_memory(device) as peak:
        step()
        result.peak_bytes = peak() - sum(
            p.grad.nbytes for p in model.parameters() if p.grad is not None
        )
    if method in (OURS, SAMPLED):
        result.reports = [str(report) for report in cce_inductor.reports()]
        result.share_visited = cce_inductor.share_visited()
    use_default_heap()
    connection.send(result)
    while connection.recv() == "step":
        model.zero_grad()
        with timed(device) as seconds:
            step()
            connection.send(seconds())


def measure(name: str, problem: Problem, rounds: int, folder: str) -> list[Result]:
    context = multiprocessing.get_context("spawn")
    workers, results = [], []
    for method in METHODS:
        mine, theirs = context.Pipe()
        arguments = (theirs, name, method, problem, folder)
        worker = context.Process(target=work, args=arguments)
        worker.start()
        theirs.close()
        results.append(mine.recv())
        workers.append((worker, mine))
    for number in range(rounds + 1):
        for (_, connection), result in zip(workers, results, strict=True):
            connection.send("step")
            seconds = connection.recv()
            if number:  # the first step after the change of the heap is a warm-up
                result.seconds.append(seconds)
    for worker, connection in workers:
        connection.send("stop")
        worker.join()
    return results


def ratios(result: Result, results: list[Result]) -> list[float]:
    baseline = baseline_of(result, results).seconds
    return [mine / theirs for mine, theirs in zip(result.seconds, baseline, strict=True)]


def baseline_of(result: Result, results: list[Result]) -> Result:
    return next(r for r in results if (r.model, r.method) == (result.model, BASELINE))


def table(problem: Problem, results: list[Result]) -> Table:
    shape = (
        f"{problem.batch}x{problem.length} tokens, vocabulary {problem.vocab}, "
        f"hidden {problem.hidden}, {problem.layers} layers"
    )
    columns = Table(title=f"{shape}, {problem.dtype}, {problem.device}, {problem.threads} threads")
    columns.add_column("model")
    columns.add_column("method")
    for heading in ("seconds", f"/ {BASELINE}", "min-max", "peak MiB", f"{BASELINE} / it"):
        columns.add_column(heading, justify="right")
    for heading in ("visited", "loss", "gradients' error"):
        columns.add_column(heading, justify="right")
    for result in results:
        times = ratios(result, results)
        share = baseline_of(result, results).peak_bytes / result.peak_bytes
        columns.add_row(
            result.model,
            result.method,
            f"{statistics.median(result.seconds):.3f}",
            f"{statistics.median(times):.2f}",
            f"{min(times):.2f}-{max(times):.2f}",
            f"{result.peak_bytes / MIB:.0f}",
            f"{share:.1f}",
            "" if result.share_visited is None else f"{result.share_visited:.2f}",
            f"{result.loss:.6f}",
            "" if result.method == "eager" else f"{result.error:.1e}",
        )
    return columns


def draw(problem: Problem, results: list[Result], path: Path) -> None:
    """Draw the peak memory of each model, without and with cce_inductor."""
    from matplotlib.figure import Figure

    shown = {BASELINE: "torch.compile", OURS: "with cce_inductor"}
    models = list(dict.fromkeys(result.model for result in results))
    figure = Figure(figsize=(7, 0.9 + 0.7 * len(models)), layout="constrained")
    panel = figure.subplots()
    for offset, (method, label) in zip((-0.2, 0.2), shown.items(), strict=True):
        own = [r for r in results if r.method == method]
        places = [models.index(r.model) + offset for r in own]
        bars = panel.barh(places, [r.peak_bytes / MIB for r in own], 0.38, label=label)
        panel.bar_label(bars, fmt=" %.0f MiB")
    panel.set_yticks(range(len(models)), models)
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.set_xlabel(
        f"peak memory of a step above weights and gradients, MiB\n{problem.batch}x{problem.length} "
        f"tokens, vocabulary {problem.vocab}, {problem.dtype}"
    )
    panel.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    add_sample_below(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--picture", type=Path, help="draw peak memory to this file")
    arguments = parser.parse_args()
    names = {name: getattr(arguments, name) for name in Problem.__dataclass_fields__}
    problem = Problem(**names)
    unknown = set(arguments.models) - set(MODELS)
    if unknown:
        parser.error(f"unknown model {unknown.pop()!r}; there are {', '.join(MODELS)}")
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= EXACT_MEMORY | {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "compiled"))}
        for name in arguments.models:
            results += measure(name, problem, arguments.rounds, folder)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(problem, results))
    for result in results:
        for report in result.reports:
            console.print(f"{result.model}: {report}", markup=False, highlight=False)
    if arguments.json:
        everything = {
            "problem": vars(problem),
            "environment": environment(torch.device(problem.device)),
            "results": [vars(result) for result in results],
        }
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n")
    if arguments.picture:
        draw(problem, results, arguments.picture)
    exact = [r for r in results if r.method != SAMPLED and problem.dtype == "float32"]
    wrong = [r for r in exact if r.error > TOLERANCE]
    for result in wrong:
        console.print(f"{result.model}: a gradient differs from eager's by {result.error:.1e}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
