"""The head of a trained model, with hidden states and targets of text that it has not seen.

Trained logits are what a sampled gradient profits from, and random ones are not like them. The
model is that of ``examples/train_gpt.py``, trained for a few hundred steps. This takes some ten
minutes on two cores, once: the head is kept in a cache. Other heads can be given as files that
`torch.load` reads, a dictionary with

* ``hidden``: [tokens, hidden], the input of the head;
* ``linear_weight``: [vocabulary, hidden];
* ``target``: [tokens], class indices.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CACHE = Path("~/.cache/cce_inductor")
STEPS = 600
TOKENS = 4096
ARGUMENTS = {
    "vocab-size": 32768,
    "layers": 3,
    "heads": 4,
    "width": 256,
    "block-size": 256,
    "batch-size": 4,
    "steps": STEPS,
    "lr": 3e-3,
    "warmup": 20,
    "eval-batches": 8,
    "device": "cpu",
}


def trained_head() -> Path:
    """Return the file of the trained head, after training the model if it is not in the cache."""
    sys.path.insert(0, str(EXAMPLES))
    import train_gpt

    values = " ".join(f"--{name} {value}" for name, value in ARGUMENTS.items())
    arguments: argparse.Namespace = train_gpt.parse_arguments([*values.split(), "--no-tie"])
    corpus = train_gpt.load_corpus(arguments.cache_dir.expanduser(), arguments.vocab_size)
    path = CACHE.expanduser() / f"trained_head-{corpus.key}-{STEPS}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        trainer = train_gpt.Trainer(arguments, corpus)
        with open("/dev/null", "w") as nowhere:
            train_gpt.train(trainer, nowhere, None)
        partial = path.with_suffix(".partial")
        torch.save(_head_of(trainer), partial)
        partial.replace(path)
    return path


@torch.no_grad()
def _head_of(trainer: object) -> dict[str, torch.Tensor]:
    """Return the head with its inputs and targets in the validation batches."""
    model = trainer.model
    hidden, targets = [], []
    with model.lm_head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0])):
        for inputs, target in trainer.validation_batches:
            model(inputs)
            targets.append(target.flatten())
    return {
        "hidden": torch.cat([each.flatten(0, -2) for each in hidden])[:TOKENS].clone(),
        "linear_weight": model.lm_head.weight.detach().clone(),
        "target": torch.cat(targets)[:TOKENS].clone(),
    }
