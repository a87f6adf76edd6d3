"""Train a small GPT on the source code of Python's standard library.

The corpus is already on the machine: every ``*.py`` file of the standard library of the
interpreter that runs this script, in sorted order. Installed packages are left out, and so
are the library's test suites: not every distribution ships them, and much of their text is
generated data. Every twentieth file is held out for validation. A byte-level BPE tokenizer
is trained on the other files; tokenizer and token ids are kept in ``--cache-dir``.

The model is a plain pre-norm transformer with learned positions, trained with AdamW and a
cosine learning-rate schedule::

    python train_gpt.py --steps 500 --out runs/base --metrics runs/base.jsonl

The only random numbers after initialisation are the positions of the training windows. The
state of their generator is part of the checkpoint, so a run continued with ``--resume`` and
otherwise the same arguments repeats the loss curve of a run that was never interrupted. Any
two runs with torch.compile can differ in the last digits of a loss, because compiled code
adds up the gradients of the embedding in no fixed order when it uses several threads.

Needs torch, numpy, tokenizers and tqdm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

DEFAULT_CACHE = Path("~/.cache/train_gpt")
END_OF_FILE = "<|endoffile|>"
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
HOLD_OUT_EVERY = 20
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end-of-file token
FINAL_LEARNING_RATE = 0.1  # as a fraction of --lr
ADAM_BETAS = (0.9, 0.95)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NORMS = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}


class UsageError(Exception):
    """Something the user asked for cannot be done; the message says what and why."""


# ------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class Corpus:
    """Token ids of the training and the validation files; ``key`` names this very corpus."""

    key: str
    train: Tensor
    validation: Tensor


def source_files(root: Path) -> list[Path]:
    """The Python files of the standard library at ``root``, without packages and tests."""
    files = sorted(
        path
        for path in root.rglob("*.py")
        if SKIPPED_DIRECTORIES.isdisjoint(path.relative_to(root).parts)
    )
    if len(files) < HOLD_OUT_EVERY:
        raise UsageError(f"found only {len(files)} Python files in {root}, too few to train on")
    return files


def corpus_key(texts: list[str], vocab_size: int) -> str:
    """A directory name that changes with the interpreter, the vocabulary and the text."""
    fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    return f"python{platform.python_version()}-bpe{vocab_size}-{fingerprint}"


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The token ids of all texts in one array, an end-of-file token after each text."""
    end = tokenizer.token_to_id(END_OF_FILE)
    ids = [token for text in tokenizer.encode_batch(texts) for token in (*text.ids, end)]
    return np.array(ids, dtype=np.int32)


def write_corpus(directory: Path, texts: list[str], vocab_size: int) -> None:
    """Write the tokenizer and both splits to ``directory``, which appears only when complete."""
    held_out = texts[::HOLD_OUT_EVERY]
    kept = [text for index, text in enumerate(texts) if index % HOLD_OUT_EVERY]
    tokenizer = train_tokenizer(kept, vocab_size)

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="partial-") as temporary:
        staging = Path(temporary, directory.name)
        staging.mkdir()
        tokenizer.save(str(staging / "tokenizer.json"))
        np.save(staging / "train.npy", encode(tokenizer, kept))
        np.save(staging / "validation.npy", encode(tokenizer, held_out))
        try:
            staging.rename(directory)
        except OSError:
            if not directory.is_dir():  # otherwise another process has written the same corpus
                raise


def load_corpus(cache_dir: Path, vocab_size: int) -> Corpus:
    """The tokenized standard library, from the cache where possible."""
    files = source_files(Path(sysconfig.get_paths()["stdlib"]))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    key = corpus_key(texts, vocab_size)
    directory = cache_dir / key
    if not directory.exists():
        print(f"tokenizing {len(texts)} files into {directory}", flush=True)
        write_corpus(directory, texts, vocab_size)
    return Corpus(
        key=key,
        train=torch.from_numpy(np.load(directory / "train.npy")),
        validation=torch.from_numpy(np.load(directory / "validation.npy")),
    )


class BatchSampler:
    """Endless random windows of a token stream, with the targets one token further on."""

    def __init__(self, tokens: Tensor, batch_size: int, block_size: int, seed: int) -> None:
        if len(tokens) <= block_size:
            raise UsageError(
                f"--block-size {block_size} needs more than the {len(tokens)} tokens of a split"
            )
        self.tokens = tokens
        self.batch_size = batch_size
        self.block_size = block_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        last_start = len(self.tokens) - self.block_size
        starts = torch.randint(last_start, (self.batch_size, 1), generator=self.generator)
        positions = starts + torch.arange(self.block_size)
        return self.tokens[positions].long(), self.tokens[positions + 1].long()


# ----------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model."""

    vocab_size: int
    block_size: int
    layers: int
    heads: int
    width: int
    norm: str
    tie: bool

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> GPTConfig:
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """The position-wise feed-forward layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(x)))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = norm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.block_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = NORMS[config.norm](config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie:
            self.lm_head.weight = self.token_embedding.weight
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights as in GPT-2: smaller where a layer writes to the residual stream."""
        residual_std = 0.02 / math.sqrt(2 * self.config.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = residual_std if name.endswith(".out") else 0.02
                nn.init.normal_(module.weight, std=std)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """The mean cross-entropy loss, or without ``targets`` the logits."""
        positions = torch.arange(idx.size(1), device=idx.device)
        x = self.token_embedding(idx) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        x = self.final_norm(x)
        logits = self.lm_head(x)
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


# -------------------------------------------------------------------------------- training


def make_optimizer(model: GPT, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings, but not the gains and biases of norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=ADAM_BETAS, fused=True)


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """The rate of update ``step`` (from 1): linear warm-up, then a cosine to a tenth."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is CUDA where there is a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class Trainer:
    """A model, its optimizer and its data, advanced one update at a time."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus) -> None:
        self.args = args
        self.corpus_key = corpus.key
        self.device = choose_device(args.device)
        self.step = 0

        sampling = (args.batch_size, args.block_size, args.seed)
        self.batches = BatchSampler(corpus.train, *sampling)
        held_out = BatchSampler(corpus.validation, *sampling)
        self.validation_batches = list(islice(held_out, args.eval_batches))

        torch.manual_seed(args.seed)
        self.model = GPT(GPTConfig.from_arguments(args)).to(self.device, DTYPES[args.dtype])
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.optimizer = make_optimizer(self.model, args.lr, args.weight_decay)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of one batch."""
        inputs, targets = (tensor.to(self.device) for tensor in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.autocast):
            return self.forward(inputs, targets)

    def update(self) -> dict[str, Any]:
        """Make one optimizer step and return what happened in it."""
        args = self.args
        started = time.perf_counter()
        self.step += 1
        lr = learning_rate(self.step, args.lr, args.warmup, args.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        total = torch.zeros((), device=self.device)
        for _ in range(args.grad_accumulation):
            loss = self.loss(next(self.batches)) / args.grad_accumulation
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), args.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

        mean_loss = total.item()  # waits for the device
        seconds = time.perf_counter() - started
        return {"step": self.step, "loss": mean_loss, "seconds": seconds, "lr": lr}

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss of the validation batches."""
        self.model.eval()
        losses = [self.loss(batch).item() for batch in self.validation_batches]
        self.model.train()
        return sum(losses) / len(losses)

    def save(self, path: Path) -> None:
        """Write a checkpoint that replaces the previous one only when it is complete."""
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "config": asdict(self.model.config),
                "corpus": self.corpus_key,
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "batches": self.batches.generator.get_state(),
            },
            partial,
        )
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of a model of the same shape on the same corpus."""
        if not path.is_file():
            raise UsageError(f"--resume: there is no checkpoint at {path}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["config"] != asdict(self.model.config):
            raise UsageError(f"--resume: {path} is of another model: {checkpoint['config']}")
        if checkpoint["corpus"] != self.corpus_key:
            raise UsageError(f"--resume: {path} is of another corpus: {checkpoint['corpus']}")
        self.step = checkpoint["step"]
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.batches.generator.set_state(checkpoint["batches"])


def open_metrics(path: Path, last_step: int) -> TextIO:
    """Open a file for JSON lines, keeping those of an earlier run up to step ``last_step``."""
    lines = path.read_text().splitlines() if last_step and path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= last_step]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w", buffering=1)
    file.writelines(f"{line}\n" for line in kept)
    return file


def train(trainer: Trainer, metrics: TextIO, checkpoint: Path | None) -> None:
    """Make the updates that are left, with their validations, checkpoints and metrics."""
    args = trainer.args
    tokens = args.grad_accumulation * args.batch_size * args.block_size
    started = time.perf_counter()
    with tqdm(total=args.steps, initial=trainer.step, unit="step") as progress:
        while trainer.step < args.steps:
            record = trainer.update()
            record["elapsed"] = time.perf_counter() - started
            progress.set_postfix_str(
                f"loss {record['loss']:.3f}, {tokens / record['seconds']:,.0f} tokens/s, "
                f"lr {record['lr']:.1e}",
                refresh=False,
            )
            progress.update()

            is_last = trainer.step == args.steps
            if is_last or trainer.step % args.eval_interval == 0:
                record["val_loss"] = trainer.validate()
                progress.write(f"step {trainer.step}: validation loss {record['val_loss']:.4f}")
            metrics.write(json.dumps(record) + "\n")
            if checkpoint and (is_last or trainer.step % args.checkpoint_interval == 0):
                trainer.save(checkpoint)


# ---------------------------------------------------------------------------- command line


def positive(number: type) -> Callable[[str], Any]:
    """An argparse type for numbers above zero."""

    def parse(text: str) -> Any:
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value

    parse.__name__ = number.__name__  # argparse names it in its error messages
    return parse


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line or ``arguments``, with combinations that make no sense turned down."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_arguments(parser.add_argument_group("data"))
    add_model_arguments(parser.add_argument_group("model"))
    add_training_arguments(parser.add_argument_group("training"))
    add_output_arguments(parser.add_argument_group("output"))
    args = parser.parse_args(arguments)

    if args.vocab_size < SMALLEST_VOCABULARY:
        parser.error(f"--vocab-size must be at least {SMALLEST_VOCABULARY}")
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not divisible by --heads {args.heads}")
    if args.autocast and args.dtype != "float32":
        parser.error("--autocast is for a model in float32")
    if args.cce and not args.compile:
        parser.error("--cce rewrites what torch.compile compiles, so it needs --compile")
    if args.sample_below and not args.cce:
        parser.error("--sample-below is an option of --cce")
    if args.resume and args.out is None:
        parser.error("--resume needs --out, the directory of the checkpoint")
    return args


def add_data_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--vocab-size", type=positive(int), default=32768, help="entries of the tokenizer")
    add("--cache-dir", type=Path, default=DEFAULT_CACHE, help="where token ids are kept")
    add("--prepare-only", action="store_true", help="fill the cache and stop")


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--layers", type=positive(int), default=6, help="transformer layers")
    add("--heads", type=positive(int), default=6, help="attention heads of a layer")
    add("--width", type=positive(int), default=384, help="size of the residual stream")
    add("--block-size", type=positive(int), default=256, help="tokens of a sequence")
    add("--norm", choices=NORMS, default="rmsnorm", help="normalisation layer")
    add(
        "--tie",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="share the weight of the output head with the token embedding",
    )


def add_training_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--steps", type=positive(int), default=1000, help="optimizer steps")
    add("--batch-size", type=positive(int), default=16, help="sequences of a batch")
    add("--grad-accumulation", type=positive(int), default=1, help="batches of a step")
    add("--lr", type=positive(float), default=1e-3, help="highest learning rate")
    add("--warmup", type=positive(int), default=50, help="steps of linear warm-up")
    add("--weight-decay", type=float, default=0.1, help="decay of matrices and embeddings")
    add("--grad-clip", type=positive(float), default=1.0, help="norm to clip to; inf for none")
    add("--seed", type=int, default=0, help="seed of the weights and of the batches")
    add("--dtype", choices=DTYPES, default="float32", help="type of the weights")
    add("--autocast", action="store_true", help="compute in bfloat16 with float32 weights")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto prefers cuda")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use torch.compile",
    )
    add("--cce", action="store_true", help="install cce_inductor before compiling")
    add("--sample-below", type=float, default=0.0, help="option of cce_inductor; 0 is exact")


def add_output_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--eval-interval", type=positive(int), default=100, help="steps between validations")
    add("--eval-batches", type=positive(int), default=8, help="batches of a validation")
    add("--metrics", type=Path, default=Path(os.devnull), help="file for a JSON line per step")
    add("--out", type=Path, help="directory for the checkpoint")
    add("--checkpoint-interval", type=positive(int), default=200, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")


def main() -> None:
    args = parse_arguments()
    corpus = load_corpus(args.cache_dir.expanduser(), args.vocab_size)
    if args.prepare_only:
        return
    if args.cce:
        import cce_inductor

        cce_inductor.install(sample_below=args.sample_below)

    trainer = Trainer(args, corpus)
    checkpoint = args.out and args.out / "checkpoint.pt"
    if args.resume:
        trainer.load(checkpoint)
    elif checkpoint:
        args.out.mkdir(parents=True, exist_ok=True)
    with open_metrics(args.metrics, trainer.step) as metrics:
        train(trainer, metrics, checkpoint)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
