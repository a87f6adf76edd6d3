"""Train and evaluate a Llama with the Trainer of transformers, without and with cce_inductor.

The data is that of ``examples/train_gpt.py``: the source code of Python's standard library. The two
runs differ in one line, ``cce_inductor.install()`` before the training code. They run in processes
of their own, one after the other::

    python benchmarks/trainer.py

The table shows the losses and metrics of the Trainer, the peak resident memory of the process, and
the median time of a step after the compilation. The script fails if a number differs by more than a
different order of float32 operations explains, or if nothing was rewritten.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-3
COMPILED_STEPS = 3  # the first steps, excluded from the step time because they compile


def child(arguments: argparse.Namespace) -> None:
    """Train once, and print the numbers as JSON."""
    import torch
    import transformers

    sys.path.insert(0, str(ROOT / "examples"))
    import train_gpt

    torch.manual_seed(0)
    corpus = train_gpt.load_corpus(arguments.cache_dir.expanduser(), arguments.vocab)

    def rows(tokens: torch.Tensor, count: int) -> list[dict[str, torch.Tensor]]:
        starts = torch.arange(count) * arguments.length
        windows = [tokens[start : start + arguments.length].long() for start in starts]
        return [{"input_ids": window, "labels": window} for window in windows]

    if arguments.cce:
        import cce_inductor

        cce_inductor.install()

    config = transformers.LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    def accuracy(prediction: Any) -> dict[str, float]:
        right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": float(right.mean())}

    with tempfile.TemporaryDirectory() as folder:
        make = functools.partial(
            transformers.Trainer,
            args=transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=arguments.batch,
                per_device_eval_batch_size=arguments.batch,
                max_steps=arguments.steps,
                logging_steps=1,
                learning_rate=1e-3,
                torch_compile=True,
                use_cpu=True,
                bf16=arguments.bf16,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows(corpus.train, arguments.batch * arguments.steps),
            eval_dataset=rows(corpus.validation, arguments.batch * 4),
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
            callbacks=[Clock()],
        )
        trainer = make(model=transformers.LlamaForCausalLM(config))
        trainer.train()
        # A Trainer evaluates the model that it has trained without compiling it, but compiles a
        # model that was loaded.
        loaded = transformers.LlamaForCausalLM(config)
        loaded.load_state_dict(trainer.model.state_dict())
        metrics = make(model=loaded).evaluate()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    numbers = {
        "Peak resident memory (MiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "Median step time (s)": statistics.median(seconds[COMPILED_STEPS:]),
        "First training loss": losses[0],
        "Last training loss": losses[-1],
        "Evaluation loss": metrics["eval_loss"],
        "Evaluation accuracy": metrics["eval_accuracy"],
    }
    reports = []
    if arguments.cce:
        reports = [str(report) for report in cce_inductor.reports() if report.rewritten]
    print(json.dumps({"numbers": numbers, "losses": losses, "reports": reports}))


def run(cce: bool, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", *(["--cce"] if cce else [])]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/train_gpt"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cce", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return 0

    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as folder:
        plain = run(False, f"{folder}/plain")
        ours = run(True, f"{folder}/cce")
    table = Table(title="Trainer(torch_compile=True) on the CPU")
    table.add_column("")
    for heading in ("as it is", "after install()", "ratio"):
        table.add_column(heading, justify="right")
    for name, number in plain["numbers"].items():
        mine = ours["numbers"][name]
        table.add_row(name, f"{number:,.5g}", f"{mine:,.5g}", f"{mine / number:.3f}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    for report in ours["reports"]:
        console.print(report, markup=False, highlight=False)
    worst = max(abs(a - b) for a, b in zip(plain["losses"], ours["losses"], strict=True))
    console.print(f"largest difference of a training loss: {worst:.1e}")
    if not ours["reports"]:
        console.print("nothing was rewritten")
        return 1
    return int(worst > (0.05 if arguments.bf16 else TOLERANCE))


if __name__ == "__main__":
    sys.exit(main())
