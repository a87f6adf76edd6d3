"""The runs of ``convergence.py``: one training of a small GPT with one way to make the gradient.

The model, the data and the trainer are those of ``examples/train_gpt.py``. Nothing but the loss
differs between the methods, and runs with the same seed have the same first weights and the same
batches. Only the head is rewritten by the package, and nothing is compiled by Inductor, so that
everything else is computed with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import sampled
import torch
import torch.nn.functional as F
from torch import Tensor
from trained_head import CACHE, EXAMPLES

import cce_inductor

sys.path.insert(0, str(EXAMPLES))
import train_gpt

# With three times this rate of AdamW, exact runs whose gradients are rounded drift apart by 0.05.
LEARNING_RATES = {"adamw": 1e-3, "sgd": 1.0}
MOMENTUM = 0.9  # of SGD, which has no weight decay
FINE_TUNING = 0.1  # of the learning rate, when training continues from a checkpoint
WARMUP = 0.05  # of the steps
CHECKPOINT_SEED = 1000
VALIDATION_SEED = 0
RARE_SHARE = 0.1  # of the tokens of the training text belong to the rare entries of the vocabulary
BLOCK = 1024  # vocabulary entries of a block whose logits the package computes together
FLOAT_BYTES = 4

EXACT = "exact"
AGAIN = "exact again"
ROUNDED = "exact rounded"
FILTERED = "filtered"
SAMPLED = ("sampled 1/64", "sampled 1/32", "sampled 1/16")
RECOMMENDED = f"sampled {sampled.RECOMMENDED}"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """What is trained, apart from the method."""

    start: str = "scratch"
    optimizer: str = "adamw"
    head: str = "untied"
    dtype: str = "float32"

    def __str__(self) -> str:
        return " ".join(astuple(self))


@dataclass(frozen=True)
class Run:
    """One training."""

    setting: Setting
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}, {self.method}, seed {self.seed}"


MAIN = Setting()
METHODS = {
    MAIN: (EXACT, AGAIN, ROUNDED, *SAMPLED, FILTERED),
    replace(MAIN, start="tuned"): (EXACT, ROUNDED, RECOMMENDED, FILTERED),
    replace(MAIN, optimizer="sgd"): (EXACT, ROUNDED, RECOMMENDED),
    replace(MAIN, head="tied"): (EXACT, ROUNDED, RECOMMENDED),
    replace(MAIN, dtype="bfloat16"): (EXACT, ROUNDED, RECOMMENDED),
}


def planned_runs(seeds: int) -> list[Run]:
    """Return all runs: the main comparison, then what changes one thing about it.

    All methods of a seed come before the next seed, so that there are pairs early.
    """
    return [
        Run(setting, method, seed)
        for setting, methods in METHODS.items()
        for seed in range(seeds)
        for method in methods
    ]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run. Only runs of the same sizes are compared."""

    vocabulary: int = 32768
    layers: int = 2
    heads: int = 4
    width: int = 128
    length: int = 128
    batch: int = 8
    steps: int = 360
    checkpoint_steps: int = 800
    every: int = 30
    validation_batches: int = 12


class Filtered(torch.autograd.Function):
    """The mean loss with the gradient of Cut Cross-Entropy's filter (arXiv 2411.09009).

    The vocabulary is sorted by the mean logit. In the backward, a tile of the gradient in which no
    entry, of the probabilities minus one at the target, reaches 2^-12 is left out. The paper
    computes the tiles in a kernel that skips them; this function only leaves them out, so its
    seconds say nothing. The paper itself advises against the filter for the gradient of the weight
    when a model is trained from scratch.
    """

    ROWS, COLUMNS, LEAST = 128, 256, 2.0**-12
    shares: ClassVar[list[float]] = []

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, hidden: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        order = (linear_weight @ hidden.mean(0)).argsort()
        weight, target = linear_weight[order], order.argsort()[target]
        lse = torch.cat(
            [(rows @ weight.T).float().logsumexp(1) for rows in hidden.split(Filtered.ROWS)]
        )
        ctx.save_for_backward(hidden, weight, target, lse, order)
        target_logit = torch.linalg.vecdot(hidden.float(), weight[target].float())
        return (lse - target_logit).mean()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, target, lse, order = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        kept_tiles = []
        for start in range(0, len(hidden), Filtered.ROWS):
            rows = slice(start, start + Filtered.ROWS)
            d_logits = ((hidden[rows] @ weight.T).float() - lse[rows, None]).exp_()
            d_logits[torch.arange(len(d_logits)), target[rows]] -= 1
            tiles = d_logits.split(Filtered.COLUMNS, dim=1)
            kept = torch.stack([tile.abs().amax() >= Filtered.LEAST for tile in tiles])
            kept_tiles.append(kept)
            d_logits *= kept.repeat_interleave(Filtered.COLUMNS)[: len(weight)]
            d_logits *= grad / len(hidden)
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[rows] = d_logits @ weight
            d_weight += d_logits.T @ hidden[rows]
        Filtered.shares.append(torch.cat(kept_tiles).float().mean().item())
        return d_hidden, torch.empty_like(d_weight).index_copy_(0, order, d_weight), None


class Rounded(torch.autograd.Function):
    """The same tensor, with a gradient that is rounded to bfloat16."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.bfloat16().to(grad.dtype)


def stored_loss(hidden: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """Return the loss as it is usually written."""
    return F.cross_entropy(F.linear(hidden, linear_weight).float(), target)


def make_loss(method: str, tokens: int) -> Loss:
    """Return the loss of a method, for so many tokens a step."""
    if method == FILTERED:
        return Filtered.apply
    options: dict[str, Any] = {"min_logits_bytes": 0, "on_error": "raise"}
    if method == AGAIN:  # The rows of a block are divided in two, and so are the sums over them.
        options["workspace_bytes"] = tokens * BLOCK * FLOAT_BYTES // 2
    elif method in SAMPLED:
        options["sample_below"] = float(Fraction(method.split()[-1]))
    torch._dynamo.reset()
    cce_inductor.clear_reports()
    loss = torch.compile(stored_loss, backend="cce_inductor_eager", options=options)
    if method == ROUNDED:
        return lambda hidden, linear_weight, target: loss(
            Rounded.apply(hidden), Rounded.apply(linear_weight), target
        )
    return loss


def check_used(method: str) -> None:
    """Raise an error if the package has not done what the method says."""
    if method == FILTERED:
        return
    (report,) = cce_inductor.reports()
    if not report.rewritten:
        raise RuntimeError(f"{method}: the loss was left alone: {report.reason}")
    if method in SAMPLED and not report.sampled:
        raise RuntimeError(f"{method}: the gradient is exact: {report.exact_because}")


def take_share(method: str) -> float | None:
    """Return the share of the gradient of the logits that was computed since the last call; None
    if the method computes all of it."""
    if method != FILTERED:
        return cce_inductor.share_visited()
    shares, Filtered.shares = Filtered.shares, []
    return sum(shares) / len(shares) if shares else None


def rare_entries(tokens: Tensor, vocabulary: int) -> Tensor:
    """Return which entries of the vocabulary are the least frequent ones that make up
    `RARE_SHARE` of the tokens, bool [vocabulary]."""
    counts = torch.bincount(tokens, minlength=vocabulary)
    order = counts.argsort(stable=True)
    rare = torch.zeros(vocabulary, dtype=torch.bool)
    rare[order] = counts[order].cumsum(0) <= RARE_SHARE * len(tokens)
    return rare


class Training:
    """A model that is trained as a run says, with the loss of its method.

    Args:
        run: the run.
        sizes: its sizes.
        corpus: the text.
        weights: the first weights; None to draw them.
    """

    def __init__(
        self,
        run: Run,
        sizes: Sizes,
        corpus: train_gpt.Corpus,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        self.run, self.sizes = run, sizes
        self.rare = rare_entries(corpus.train, sizes.vocabulary)
        held_out = train_gpt.BatchSampler(
            corpus.validation, sizes.batch, sizes.length, VALIDATION_SEED
        )
        self.validation_batches: Batches = list(islice(held_out, sizes.validation_batches))
        self.trainer = make_trainer(run, sizes, text_of(run.setting, corpus))
        self.model = self.trainer.model
        if weights is not None:
            self.model.load_state_dict(weights)
        self.model.lm_head.forward = lambda hidden: hidden
        self.loss = make_loss(run.method, sizes.batch * sizes.length)
        self.trainer.forward = self.forward

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        hidden = self.model(inputs).flatten(0, 1)
        return self.loss(hidden, self.model.lm_head.weight, target.flatten())

    def warm_up(self) -> None:
        """Compile the loss, and change nothing."""
        self.trainer.loss(self.validation_batches[0]).backward()
        self.trainer.optimizer.zero_grad()
        check_used(self.run.method)
        take_share(self.run.method)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the mean loss of all targets of the validation batches, and of the rare ones."""
        losses = []
        targets = torch.cat([target.flatten() for _, target in self.validation_batches])
        for inputs, target in self.validation_batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.trainer.args.autocast):
                logits = F.linear(self.model(inputs), self.model.lm_head.weight).flatten(0, 1)
                losses.append(F.cross_entropy(logits.float(), target.flatten(), reduction="none"))
        loss = torch.cat(losses)
        return {"loss": loss.mean().item(), "rare_loss": loss[self.rare[targets]].mean().item()}

    def points(self) -> Iterator[dict[str, Any]]:
        """Train, and yield what is recorded before the first step and after every few steps.

        Seconds are those of the steps alone: by the clock, and those that the processor worked for
        this process. The share is that of the steps since the last point.
        """
        self.warm_up()
        seconds = processor_seconds = 0.0
        yield {
            "step": 0,
            "seconds": 0.0,
            "processor_seconds": 0.0,
            **self.validate(),
            "share": None,
        }
        for step in range(1, self.trainer.args.steps + 1):
            began = time.process_time()
            seconds += self.trainer.update()["seconds"]
            processor_seconds += time.process_time() - began
            if step % self.sizes.every == 0 or step == self.trainer.args.steps:
                yield {
                    "step": step,
                    "seconds": round(seconds, 3),
                    "processor_seconds": round(processor_seconds, 3),
                    **self.validate(),
                    "share": take_share(self.run.method),
                }


def text_of(setting: Setting, corpus: train_gpt.Corpus) -> train_gpt.Corpus:
    """Return the text that a run is trained on: fine-tuning sees another half than its
    checkpoint."""
    middle = len(corpus.train) // 2
    parts = {"checkpoint": corpus.train[:middle], "tuned": corpus.train[middle:]}
    return replace(corpus, train=parts.get(setting.start, corpus.train))


def make_trainer(run: Run, sizes: Sizes, corpus: train_gpt.Corpus) -> train_gpt.Trainer:
    """Return the trainer of the example for a run, before its loss and weights are replaced."""
    setting = run.setting
    steps = sizes.checkpoint_steps if setting.start == "checkpoint" else sizes.steps
    rate = LEARNING_RATES[setting.optimizer] * (FINE_TUNING if setting.start == "tuned" else 1)
    options = {
        "vocab-size": sizes.vocabulary,
        "layers": sizes.layers,
        "heads": sizes.heads,
        "width": sizes.width,
        "block-size": sizes.length,
        "batch-size": sizes.batch,
        "steps": steps,
        "lr": rate,
        "warmup": max(1, round(WARMUP * steps)),
        "seed": run.seed,
        "eval-batches": 1,
        "device": "cpu",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    arguments += ["--no-compile", "--tie" if setting.head == "tied" else "--no-tie"]
    arguments += ["--autocast"] if setting.dtype == "bfloat16" else []
    trainer = train_gpt.Trainer(train_gpt.parse_arguments(arguments), corpus)
    if setting.optimizer == "sgd":
        parameters = trainer.model.parameters()
        trainer.optimizer = torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM)
    return trainer


def checkpoint_path(sizes: Sizes, corpus: train_gpt.Corpus) -> Path:
    """Return the file of the checkpoint that fine-tuning starts from."""
    sizes = replace(sizes, steps=0, every=0, validation_batches=0)  # It does not depend on these.
    digest = hashlib.sha256(json.dumps(asdict(sizes)).encode()).hexdigest()[:16]
    return CACHE.expanduser() / f"convergence-{corpus.key}-{digest}.pt"


def first_weights(run: Run, sizes: Sizes, corpus: train_gpt.Corpus) -> dict[str, Tensor] | None:
    """Return the weights that a run starts from, after training the checkpoint if there is none;
    None if they are drawn."""
    if run.setting.start != "tuned":
        return None
    path = checkpoint_path(sizes, corpus)
    if not path.exists():
        setting = replace(MAIN, start="checkpoint")
        training = Training(Run(setting, EXACT, CHECKPOINT_SEED), sizes, corpus)
        for _ in training.points():
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(training.model.state_dict(), partial)
        partial.replace(path)
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights
