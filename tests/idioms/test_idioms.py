"""Each idiom has the expected outcome, and the numbers of eager PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import math
import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from cce_inductor.deferred.boundary import compile_with_deferral, deferral_for
from cce_inductor.options import Options
from cce_inductor.patterns.language import projection
from cce_inductor.reporting.report import LossReport
from cce_inductor.rewriting.rewrite import rewrite
from cce_inductor.testing import in_float64, relative_error

from .corpus import HIDDEN, IDIOMS, VOCABULARY, Idiom

SUBJECTS = [
    "autocast_and_dtypes",
    "contrastive",
    "control",
    "distillation",
    "hand_written",
    "heads",
    "in_place",
    "label_smoothing",
    "language_models",
    "masks_and_padding",
    "metrics",
    "reinforcement",
    "softcaps",
    "z_losses",
]
for subject in SUBJECTS:
    importlib.import_module(f".{subject}", __package__)

every_idiom = pytest.mark.parametrize(
    "idiom", IDIOMS.values(), ids=lambda idiom: f"{idiom.subject}-{idiom.name}"
)


@dataclasses.dataclass
class Outcome:
    """Results and gradients, in the order of the results, the arguments and the parameters."""

    results: list[Any]
    gradients: list[Tensor | None]

    def tensors(self) -> list[Any]:
        return [*self.results, *self.gradients]


def run(idiom: Idiom, code: Any, arguments: list[Any], parameters: list[Tensor]) -> Outcome:
    """Call the idiom; results are reduced with distinct weights, so that swaps are noticed."""
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad] + parameters
    torch.manual_seed(1)
    with idiom.around():
        results = tree_leaves(code(*arguments))
    total = sum(
        (result * torch.arange(1, result.numel() + 1).view(result.shape)).sum()
        for result in results
        if result.requires_grad
    )
    gradients: list[Tensor | None] = [None] * len(leaves)
    if isinstance(total, Tensor):
        gradients = list(torch.autograd.grad(total, leaves, allow_unused=True))
    return Outcome([result.detach() for result in results], gradients)


def eager(idiom: Idiom, seed: int = 0) -> Outcome:
    code, arguments = idiom.make(seed)
    return run(idiom, code, arguments, parameters_of(code))


def without_rounding(idiom: Idiom, seed: int = 0) -> Outcome:
    """Return the results of the idiom in float64, from the same values."""
    code, arguments = idiom.make(seed)
    arguments = [
        a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in arguments
    ]
    if isinstance(code, nn.Module):
        code = copy.deepcopy(code).double()
    plain = mock.patch.object(checkpoint, "checkpoint", lambda fn, *args, **_: fn(*args))
    with in_float64(), plain:
        return run(idiom, code, arguments, parameters_of(code))


def parameters_of(code: Any) -> list[Tensor]:
    return list(code.parameters()) if isinstance(code, nn.Module) else []


DRAWS = 4
"""Inputs for which eager's error is measured; the rewritten idiom runs on the first."""


@functools.cache
def compiled(name: str) -> tuple[Outcome, list[LossReport], list[GraphModule]]:
    """Return the outcome of the rewritten idiom, its reports, and its graphs after the pass."""
    idiom = IDIOMS[name]
    options = Options(min_logits_bytes=idiom.smallest, on_error="raise")
    reports: list[LossReport] = []
    graphs: list[GraphModule] = []

    def compiler(module, example_inputs):
        reports.extend(rewrite(module, options, deferral=deferral_for(module)))
        graphs.append(module)
        return module.forward

    def backend(module, example_inputs):
        return compile_with_deferral(compiler, module, example_inputs)

    torch._dynamo.reset()
    code, arguments = idiom.make()
    parameters = parameters_of(code)
    function = torch.compile(code, backend=backend, dynamic=idiom.dynamic)
    return run(idiom, function, arguments, parameters), reports, graphs


PRODUCTS = {getattr(spelling, "__name__", spelling) for spelling, _ in projection.items()}


def stored_logits(module: GraphModule) -> list[str]:
    """Return the nodes that still compute a [rows, vocabulary] product, or one with a gradient."""
    found = []
    for graph in [module, *(m for m in module.modules() if isinstance(m, GraphModule))]:
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if node.op not in ("call_function", "call_method") or not isinstance(value, Tensor):
                continue
            if [a.op for a in node.all_input_nodes] == [
                "placeholder"
            ]:  # for example a transposed weight
                continue
            shape = tuple(value.shape)
            rows_and_vocabulary = VOCABULARY in shape and HIDDEN not in shape
            if not rows_and_vocabulary or value.numel() <= 4 * VOCABULARY:
                continue
            name = node.target if node.op == "call_method" else node.target.__name__
            if value.is_floating_point() and (value.requires_grad or name in PRODUCTS):
                found.append(f"{node.name}: {shape}")
    return found


@every_idiom
def test_verdict(idiom):
    _, reports, graphs = compiled(idiom.name)
    said = "\n".join(map(str, reports)) or "nothing is reported"
    if idiom.graphs is not None:
        assert len(graphs) == idiom.graphs
    if idiom.rewritten:
        assert reports, said
        assert all(report.rewritten for report in reports), said
        stored = [line for module in graphs for line in stored_logits(module)]
        assert len(stored) <= idiom.stored, stored
        return
    losses = [report for report in reports if not report.loss.endswith("> returned")]
    assert not any(report.rewritten for report in losses), said
    if idiom.reason is not None:
        assert reports, said
        assert any(re.search(idiom.reason, str(report.reason)) for report in reports), said


@every_idiom
def test_numbers(idiom):
    got, _, _ = compiled(idiom.name)
    draws = [(eager(idiom, seed), exact(idiom, seed)) for seed in range(DRAWS)]
    theirs, reference = draws[0]
    assert len(got.results) == len(theirs.results)
    values = zip(got.tensors(), theirs.tensors(), reference.tensors(), strict=True)
    for position, (ours, their, exactly) in enumerate(values):
        if their is None or ours is None:
            # A zero gradient may be a tensor of zeros or None.
            assert their is None or not their.any()
            assert ours is None or not ours.any()
        elif not ours.is_floating_point():
            assert torch.equal(ours, their)
        else:
            drawn = [(a.tensors()[position], b.tensors()[position]) for a, b in draws]
            errors = [relative_error(a.nan_to_num(), b.nan_to_num()) for a, b in drawn]
            assert_as_accurate(idiom, ours, their, exactly, errors)


def exact(idiom: Idiom, seed: int) -> Outcome:
    """Return the idiom's results in float64, or eager's if other random numbers would be drawn."""
    return eager(idiom, seed) if idiom.random else without_rounding(idiom, seed)


def assert_as_accurate(
    idiom: Idiom, ours: Tensor, their: Tensor, reference: Tensor, errors: list[float]
) -> None:
    """Allow twice eager's usual distance from float64, and a little in case eager was lucky.

    `errors` are eager's distances for several inputs: for a single one, its luck may be great.
    """
    assert ours.shape == their.shape
    assert ours.dtype == their.dtype
    assert torch.equal(ours.isnan(), their.isnan())
    ours, their, reference = (tensor.double().nan_to_num() for tensor in (ours, their, reference))
    if torch.equal(ours, their):
        return
    if (ours - reference).norm() <= 1e-3 * lucky(idiom):  # zero, except for rounding
        return
    usual = math.sqrt(sum(error**2 for error in errors) / len(errors))
    error = relative_error(ours, reference)
    assert error <= 2 * usual + lucky(idiom), f"error {error:.2e}, eager's {usual:.2e}"


def lucky(idiom: Idiom) -> float:
    """Return by how much eager's error may be below the precision of its dtypes by luck."""
    code, arguments = idiom.make()
    tensors = [a for a in [*arguments, *parameters_of(code)] if isinstance(a, Tensor)]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if idiom.rounded is not None:
        dtypes.add(idiom.rounded)
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return coarsest if coarsest > 1e-6 else 8 * coarsest
