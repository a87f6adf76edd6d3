"""Everything that wants a CUDA device, in under ten minutes: tests, times, memory, a training run.

1. `pytest tests/cuda`, and a small loss under compute-sanitizer where that is installed.
2. The head's loss by every method of `head.py` that can be imported, at four shapes, on random
   logits and on peaked ones as training makes them. Times are medians over rounds in which the
   methods take turns; memory is the peak of forward and backward above the inputs and gradients.
   The ceiling is the rate of the card's own matrix product of the same shape, in the same run; the
   fused loss has 4 such products to do, the others 3.
3. `examples/train_gpt.py` with and without this package: losses, memory, seconds a step.

    python benchmarks/gpu.py --output results

writes results/gpu.json and results/gpu.md. With ``--device cpu --shapes 256,2000,64 --parts head``
it runs anywhere, to see that it does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from head import BASELINE, CUDA_ONLY, METHODS, OURS, Failure, Method, Problem
from measure import environment, peak_memory, timed
from torch import Tensor

ROOT = Path(__file__).parents[1]
SHAPES = ["8192,128256,4096", "8192,256000,2304", "16384,151936,2048", "8192,50304,1024"]
KINDS = ("random", "peaked")
PEAKED_LOSS = 2.0
"""What peaked logits are made for, in nats: about what a trained model of code reaches."""

PARTS = ("tests", "head", "training")
TRAINING = [
    "--device",
    "cuda",
    "--dtype",
    "bfloat16",
    "--layers",
    "8",
    "--heads",
    "12",
    "--width",
    "768",
    "--block-size",
    "1024",
    "--batch-size",
    "16",
    "--steps",
    "300",
    "--eval-interval",
    "300",
]


def make_inputs(problem: Problem, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and target on the device; peaked logits favour the target."""
    generator = torch.Generator(problem.device).manual_seed(problem.seed)
    dtype = getattr(torch, problem.dtype)

    def normal(rows: int, scale: float) -> Tensor:
        shape = (rows, problem.hidden)
        return torch.randn(shape, generator=generator, device=problem.device).mul_(scale)

    weight = normal(problem.vocab, problem.hidden**-0.5)
    input = normal(problem.tokens, 1.0)
    place = {"generator": generator, "device": problem.device}
    target = torch.randint(problem.vocab, (problem.tokens,), **place)
    if kind == "peaked":
        others = torch.tensor(float(problem.vocab)).log().item() + 0.5  # of logits N(0, 1)
        input += (others - PEAKED_LOSS) * weight[target]
    return (
        input.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        target,
    )


class Contender:
    """A method, with what was measured of it."""

    def __init__(self, name: str, problem: Problem):
        self.name = name
        self.failure: Failure | None = None
        self.method: Method | None = None
        self.seconds: dict[str, list[float]] = {"forward": [], "both": []}
        self.peak = 0
        self.loss = 0.0
        try:
            if name in CUDA_ONLY and problem.device == "cpu":
                raise ImportError("it is for CUDA only")
            self.method = METHODS[name](problem)
        except Exception as error:
            self.failure = Failure.of(error)

    def step(
        self, inputs: tuple[Tensor, Tensor, Tensor], device: torch.device
    ) -> tuple[float, ...]:
        """Seconds of the forward and of forward and backward."""
        assert self.method is not None
        for tensor in inputs[:2]:
            tensor.grad = None
        with timed(device) as seconds:
            loss = self.method.loss(*inputs)
            forward = seconds()
            loss.backward()
            both = seconds()
        self.loss = loss.item()
        self.method.check_used(loss)
        return forward, both

    def measure(self, inputs: tuple[Tensor, Tensor, Tensor], device: torch.device) -> None:
        """One round."""
        if self.failure is not None:
            return
        try:
            forward, both = self.step(inputs, device)
            self.seconds["forward"].append(forward)
            self.seconds["both"].append(both)
        except Exception as error:
            self.failure = Failure.of(error)

    def prepare(self, inputs: tuple[Tensor, Tensor, Tensor], device: torch.device) -> None:
        """Compiles, then measures memory."""
        if self.failure is not None:
            return
        try:
            for _ in range(2):
                self.step(inputs, device)
            for tensor in inputs[:2]:
                tensor.grad = None
            with peak_memory(device) as peak:
                self.step(inputs, device)
                self.peak = peak() - sum(tensor.nbytes for tensor in inputs[:2])
        except Exception as error:
            self.failure = Failure.of(error)


def gemm_rate(problem: Problem, rounds: int) -> float:
    """Floating-point operations a second of one product of the loss's shape."""
    device = torch.device(problem.device)
    input, weight, _ = make_inputs(problem, "random")
    out = torch.empty(problem.tokens, problem.vocab, dtype=input.dtype, device=device)
    seconds = []
    with torch.no_grad():
        for _ in range(rounds + 2):
            with timed(device) as clock:
                torch.mm(input, weight.t(), out=out)
                seconds.append(clock())
    unit = 2 * problem.tokens * problem.vocab * problem.hidden
    return unit / statistics.median(seconds[2:])


def head(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(arguments.device)
    for shape in arguments.shapes:
        tokens, vocab, hidden = map(int, shape.split(","))
        problem = Problem(
            tokens=tokens,
            vocab=vocab,
            hidden=hidden,
            dtype=arguments.dtype,
            device=arguments.device,
            cast=True,
            ignored=0.0,
            logits="unit",
            seed=0,
            threads=torch.get_num_threads(),
        )
        rate = gemm_rate(problem, arguments.rounds)
        unit = 2 * tokens * vocab * hidden
        torch._dynamo.reset()
        contenders = [Contender(name, problem) for name in arguments.methods]
        for kind in KINDS:
            inputs = make_inputs(problem, kind)
            for contender in contenders:
                contender.seconds = {"forward": [], "both": []}
                contender.prepare(inputs, device)
            for number in range(arguments.rounds):
                for at in range(len(contenders)):
                    contenders[(at + number) % len(contenders)].measure(inputs, device)
            for contender in contenders:
                row: dict[str, Any] = {
                    "tokens": tokens,
                    "vocabulary": vocab,
                    "hidden": hidden,
                    "logits": kind,
                    "method": contender.name,
                    "gemm_tflops": rate / 1e12,
                }
                if contender.failure is not None:
                    row["failure"] = f"{contender.failure.kind}: {contender.failure.detail}"
                else:
                    medians = {
                        name: statistics.median(each) for name, each in contender.seconds.items()
                    }
                    row |= {
                        "loss": contender.loss,
                        "forward_ms": medians["forward"] * 1e3,
                        "both_ms": medians["both"] * 1e3,
                        "peak_mib": contender.peak / 2**20,
                        "forward_share_of_gemm_rate": unit / medians["forward"] / rate,
                    }
                yield row
            del inputs


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time and memory over those of torch.compile at the same shape and logits."""
    key = ("tokens", "vocabulary", "hidden", "logits")
    baselines = {
        tuple(row[name] for name in key): row
        for row in rows
        if row["method"] == BASELINE and "failure" not in row
    }
    for row in rows:
        baseline = baselines.get(tuple(row[name] for name in key))
        if baseline is not None and "failure" not in row:
            row["time_ratio"] = row["both_ms"] / baseline["both_ms"]
            row["memory_ratio"] = row["peak_mib"] / baseline["peak_mib"]
    return rows


def tests() -> dict[str, Any]:
    """What pytest and compute-sanitizer say."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/cuda"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found: dict[str, Any] = {
        "pytest": ran.stdout.strip().splitlines()[-25:],
        "status": ran.returncode,
    }
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(sanitizer).exists():
        small = [*command, "-k", "test_numbers and 129"]
        ran = subprocess.run([sanitizer, *small], cwd=ROOT, capture_output=True, text=True)
        found["compute-sanitizer"] = ran.stdout.strip().splitlines()[-5:]
    return found


def training() -> dict[str, Any]:
    """The example with a larger model, with and without."""
    script = ROOT / "examples" / "train_gpt.py"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in {"torch.compile": [], OURS: ["--cce"]}.items():
            metrics = Path(folder) / f"{name}.jsonl"
            command = [sys.executable, str(script), *TRAINING, "--metrics", str(metrics), *flags]
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if ran.returncode:
                found[name] = {"failure": ran.stderr.strip().splitlines()[-5:]}
                continue
            found[name] = [json.loads(line) for line in metrics.read_text().splitlines()]
    return found


def markdown(results: dict[str, Any]) -> str:
    """Tables of the head's results, one for each shape."""
    where = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    lines = ["# On a GPU", "", f"Made by `python benchmarks/gpu.py`: {where}.", ""]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results.get("head", []):
        key = (row["tokens"], row["vocabulary"], row["hidden"], row["logits"], row["gemm_tflops"])
        groups.setdefault(key, []).append(row)
    for (tokens, vocabulary, hidden, logits, rate), rows in groups.items():
        lines += [
            f"## {tokens:,} tokens, vocabulary {vocabulary:,}, hidden {hidden:,}; {logits} logits",
            "",
            f"The card's product: {rate:.3g} TFLOP/s.",
            "",
            "| method | forward, ms | of the product's rate | forward and backward, ms | x compile "
            "| memory, MiB | x compile |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            if "failure" in row:
                lines.append(f"| {row['method']} | {row['failure'][:80]} | | | | | |")
                continue
            lines.append(
                f"| {row['method']} | {row['forward_ms']:.2f} "
                f"| {row['forward_share_of_gemm_rate']:.0%} | {row['both_ms']:.2f} "
                f"| {row.get('time_ratio', float('nan')):.2f} | {row['peak_mib']:,.0f} "
                f"| {row.get('memory_ratio', float('nan')):.3f} |"
            )
        lines.append("")
    if "tests" in results:
        lines += ["## Tests", "", "```", *results["tests"]["pytest"][-3:], "```", ""]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens,vocabulary,hidden")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", default="bfloat16", help="of input and weight")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9, help="of which the median is taken")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: there is no CUDA device; --device cpu --parts head runs without one")
    os.makedirs(arguments.output, exist_ok=True)
    started = time.time()
    results: dict[str, Any] = {"environment": environment(torch.device(arguments.device))}

    def save() -> None:
        results["seconds"] = time.time() - started
        (arguments.output / "gpu.json").write_text(json.dumps(results, indent=1))
        (arguments.output / "gpu.md").write_text(markdown(results) + "\n")

    if "head" in arguments.parts:
        results["head"] = []
        for row in head(arguments):
            results["head"].append(row)
            with_ratios(results["head"])
            save()
    if "tests" in arguments.parts:
        results["tests"] = tests()
        save()
    if "training" in arguments.parts:
        results["training"] = training()
    save()
    print((arguments.output / "gpu.md").read_text())


if __name__ == "__main__":
    main()
