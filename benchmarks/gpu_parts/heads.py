"""Measure time, memory and accuracy of the loss of one head with each method, in three cases.

- ``head``: (8192 tokens, vocabulary 128256, hidden 4096), bfloat16, random logits.
- ``autocast``: the same with float32 weights under `torch.autocast`.
- ``peaked``: (16384, 151936, 2048), with logits as in a trained model.

A step computes the loss and both gradients. Memory is the peak of a step above the inputs and the
gradients. Errors are relative to float64. For the sampled gradient (docs/sampling.md), the share of
the logits whose gradient was computed is recorded. At the end, each method is profiled.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cce_inductor import share_visited

from .methods import BASELINE, CUDA_ONLY, METHODS, MIB, Loss
from .problem import SHAPE, Problem, reference, relative_error
from .profiling import kernel_times
from .results import NEEDS_CUDA, Fields, Results, arguments, described
from .timing import Stopwatch, peak_memory, turns

CASES: dict[str, Callable[[torch.device], Problem]] = {
    "head": Problem.usual,
    "autocast": lambda device: Problem(*SHAPE[device.type], device, autocast=True),
    "peaked": lambda device: Problem(
        *((16384, 151936, 2048) if device.type == "cuda" else SHAPE["cpu"]), device, peaked=True
    ),
}

KERNELS = 12
"""How many kernels of each method are listed, the longest first."""


class Head:
    """The measurements of one problem, method by method."""

    def __init__(self, results: Results, problem: Problem) -> None:
        self.results, self.problem = results, problem
        self.device = problem.device
        self.input, self.weight, self.target = problem.inputs()
        self.input.requires_grad_()
        self.weight.requires_grad_()
        self.exact: dict[str, Tensor] = {}
        self.methods: dict[str, Loss] = {}

    def measure(self) -> None:
        names = [name for name in METHODS if self.device.type == "cuda" or name not in CUDA_ONLY]
        self.results.plan("float64 reference", *METHODS)
        self.results.attempt("float64 reference", self.compute_reference)
        for name in METHODS:
            if name in names:
                self.results.attempt(name, lambda name=name: self.prepare(name))
            else:
                self.results.reason(name, NEEDS_CUDA)
        self.race()
        if self.device.type == "cuda":
            self.profile()

    def compute_reference(self) -> Fields:
        began = time.perf_counter()
        self.exact = reference(self.input, self.weight, self.target)
        loss = self.exact["loss"].item()
        return {"loss": loss, "seconds": time.perf_counter() - began, "detail": True}

    def forget(self) -> None:
        self.input.grad = self.weight.grad = None

    def step(self, loss: Loss, watch: Stopwatch | None = None) -> Tensor:
        self.forget()
        result = loss(self.input, self.weight, self.target)
        if watch is not None:
            watch.mark()
        result.backward()
        if watch is not None:
            watch.mark()
        return result.detach()

    def prepare(self, name: str) -> Fields:
        """Compile a method, and measure what one step is enough for: memory and errors."""
        began = time.perf_counter()
        loss = METHODS[name](self.problem)
        self.step(loss)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        fields: Fields = {"first_step_s": time.perf_counter() - began}
        self.step(loss)
        self.forget()
        share_visited()  # of the steps until now
        with peak_memory(self.device) as peak:
            result = self.step(loss)
            peak_bytes = peak()
        gradients = {"input": self.input.grad, "weight": self.weight.grad}
        fields["mib"] = None
        if peak_bytes is not None:
            stay = sum(gradient.nbytes for gradient in gradients.values())
            fields |= {
                "mib": (peak_bytes - stay) / MIB,
                "mib_with_gradients": peak_bytes / MIB,
            }
        fields["loss"] = result.item()
        fields["share_visited"] = share_visited()
        if self.exact:
            exact = self.exact["loss"].item()
            fields["error_loss"] = abs(fields["loss"] - exact) / abs(exact)
            for which, gradient in gradients.items():
                fields[f"error_{which}"] = relative_error(gradient, self.exact[which])
        del gradients
        self.forget()
        self.methods[name] = loss
        return fields

    def race(self) -> None:
        """Measure time in rounds in which each method runs one step."""
        samples: dict[str, list[list[float]]] = {name: [] for name in self.methods}
        for names in turns(list(samples), self.device):
            for name in [name for name in names if name in samples]:
                try:
                    watch = Stopwatch(self.device)
                    self.step(self.methods[name], watch)
                    samples[name].append(watch.milliseconds())
                except Exception as error:
                    self.results.reason(name, described(error))
                    del samples[name]
            medians = {
                name: [statistics.median(column) for column in zip(*each, strict=True)]
                for name, each in samples.items()
                if each
            }
            for name, (forward, both) in medians.items():
                fields: Fields = {"forward_ms": forward, "ms": both, "rounds": len(samples[name])}
                if BASELINE in medians and name != BASELINE:
                    fields |= {"ratio": both / medians[BASELINE][1], "against": BASELINE}
                self.results.number(name, **fields)
            if self.results.left() <= 0:
                return

    def profile(self) -> None:
        """Record the time of each kernel of each method."""
        for name, loss in self.methods.items():
            if self.results.left() <= 0:
                return
            try:
                times = kernel_times(lambda loss=loss: self.step(loss), calls=2)
            except Exception as error:
                self.results.number(name, kernels=described(error))
            else:
                longest = list(times.items())[:KERNELS]
                self.results.number(name, kernels=dict(longest), kernels_ms=sum(times.values()))


def main() -> None:
    device, results, case = arguments(tuple(CASES))
    problem = CASES[case](device)
    shape = [problem.tokens, problem.vocabulary, problem.hidden]
    results.number("shape", shape=shape, dtype=str(problem.dtype), detail=True)
    Head(results, problem).measure()
    results.end()


if __name__ == "__main__":
    main()
