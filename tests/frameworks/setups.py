"""Training loops of frameworks, as their users write them: tiny, on the CPU, vocabulary 32,768.

Each set-up is a function that trains, and calls what it is given with the loss of each step. It
imports its framework itself, so that those that are not installed do no harm.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, HIDDEN, BATCH, LENGTH, STEPS = 32768, 64, 4, 128, 8

OnStep = Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class Setup:
    """A training loop.

    Attributes:
        train: trains, and calls its argument with the loss of each step.
        packages: what it imports.
        install: the arguments of `cce_inductor.install`.
        loose: how far the losses may differ, relatively.
        rewritten: whether losses are rewritten. If not, the page says why.
        outcome: what the page says besides the measurements.
        processes: in how many processes it runs, with torchrun if there are several.
    """

    train: Callable[[OnStep], None]
    packages: tuple[str, ...] = ()
    install: dict[str, Any] = dataclasses.field(default_factory=dict)
    loose: float = 1e-4
    rewritten: bool = True
    outcome: str = ""
    processes: int = 1


SETUPS: dict[str, Setup] = {}


def setup(name: str, *packages: str, **arguments: Any) -> Callable[[Any], Any]:
    def register(train: Callable[[OnStep], None]) -> Callable[[OnStep], None]:
        SETUPS[name] = Setup(train, packages, **arguments)
        return train

    return register


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS, BATCH, LENGTH + 1)
    return list(torch.randint(3, VOCABULARY, shape, generator=generator))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for batch in tokens():
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layer(hidden).tanh()


class Model(nn.Module):
    """A model of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


# Plain PyTorch


class WithLoss(Model):
    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        return loss_of(super().forward(ids), target)


@setup("PyTorch, loss in the model")
def loss_inside(on_step: OnStep) -> None:
    model = torch.compile(WithLoss())
    optimizer = optimizer_of(model)
    for ids, target in batches():
        loss = model(ids, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


@setup("PyTorch, loss outside of the model")
def loss_outside(on_step: OnStep) -> None:
    model = torch.compile(Model())
    optimizer = optimizer_of(model)
    for ids, target in batches():
        loss = loss_of(model(ids), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


@setup("PyTorch without torch.compile", install={"eager_heads": True})
def eager(on_step: OnStep) -> None:
    model = Model()
    optimizer = optimizer_of(model)
    for ids, target in batches():
        loss = loss_of(model(ids), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


# Hugging Face


def llama_config(**arguments: Any) -> Any:
    import transformers

    return transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": LENGTH,
            "use_cache": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **arguments,
        }
    )


def llama(**arguments: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config(**arguments))


def train_with_trainer(model: Any, on_step: OnStep, **arguments: Any) -> None:
    import transformers

    class Reporting(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            if "loss" in logs:
                on_step(logs["loss"])

    rows = [{"input_ids": row[:-1], "labels": row[:-1]} for batch in tokens() for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "per_device_train_batch_size": BATCH,
            "max_steps": STEPS,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "torch_compile": True,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**{**options, **arguments}),
            train_dataset=rows,
            eval_dataset=rows[:BATCH],
            callbacks=[Reporting()],
        )
        trainer.train()
        if arguments.get("eval_strategy") is None:
            on_step(trainer.evaluate()["eval_loss"])


@setup("transformers Trainer", "transformers")
def trainer(on_step: OnStep) -> None:
    train_with_trainer(llama(), on_step)


@setup("transformers Trainer, bfloat16", "transformers", loose=2e-2)
def trainer_bf16(on_step: OnStep) -> None:
    train_with_trainer(llama(), on_step, bf16=True)


@setup("transformers Trainer, gradient accumulation", "transformers")
def trainer_accumulation(on_step: OnStep) -> None:
    train_with_trainer(
        llama(), on_step, gradient_accumulation_steps=2, per_device_train_batch_size=BATCH // 2
    )


@setup("transformers Trainer, label smoothing", "transformers")
def trainer_smoothing(on_step: OnStep) -> None:
    train_with_trainer(llama(), on_step, label_smoothing_factor=0.1)


@setup("transformers Trainer, GPT-2", "transformers")
def trainer_gpt2(on_step: OnStep) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=1,
        n_head=2,
        n_positions=LENGTH,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    train_with_trainer(transformers.GPT2LMHeadModel(config), on_step)


@setup("transformers, T5", "transformers")
def t5(on_step: OnStep) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=32,
        d_ff=128,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    code = torch.compile(model)
    optimizer = optimizer_of(model)
    for ids, target in batches():
        loss = code(input_ids=ids, labels=target).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


@setup("PEFT, LoRA on the head", "transformers", "peft")
def peft(on_step: OnStep) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
    torch.manual_seed(0)
    model = get_peft_model(llama(), config)
    code = torch.compile(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for ids, _ in batches():
        loss = code(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


@setup("accelerate", "accelerate")
def accelerate(on_step: OnStep) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, dynamo_backend="inductor")
    model = Model()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    for ids, target in batches():
        loss = loss_of(model(ids), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


@setup("accelerate, regional compilation", "accelerate", install={"eager_heads": True})
def accelerate_regional(on_step: OnStep) -> None:
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    plugin = TorchDynamoPlugin(backend="inductor", use_regional_compilation=True)
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
    model = Model()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    for ids, target in batches():
        loss = loss_of(model(ids), target)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


# TRL


def texts(columns: int) -> list[list[str]]:
    """Return columns of random words, one row for each example."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY - 10, (columns, BATCH * STEPS, 60), generator=generator)
    return [[" ".join(map(str, row)) for row in column] for column in rows.tolist()]


def preferences() -> dict[str, Any]:
    """Return prompts with a chosen and a rejected completion."""
    return dict(zip(("prompt", "chosen", "rejected"), texts(3), strict=True))


def conversations() -> dict[str, Any]:
    pairs = zip(*texts(2), strict=True)
    roles = ("user", "assistant")
    return {
        "messages": [
            [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]
            for pair in pairs
        ]
    }


def train_with_trl(
    trainer: Any,
    config: Any,
    on_step: OnStep,
    data: dict[str, Any],
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> None:
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names = [*special.values(), *map(str, range(VOCABULARY - len(special)))]
    words = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"

    class Reporting(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            if "loss" in logs:
                on_step(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        trainer(
            model=llama(),
            args=config(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                max_steps=STEPS,
                logging_steps=1,
                max_length=LENGTH,
                torch_compile=True,
                use_cpu=True,
                bf16=False,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                dataloader_pin_memory=False,
                **(options or {}),
            ),
            train_dataset=Dataset.from_dict(data),
            processing_class=transformers.PreTrainedTokenizerFast(
                tokenizer_object=words, chat_template=template, **special
            ),
            callbacks=[Reporting()],
            **arguments,
        ).train()


@setup("TRL, CPO", "trl")
def cpo(on_step: OnStep) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    train_with_trl(CPOTrainer, CPOConfig, on_step, preferences())


@setup("TRL, ORPO", "trl")
def orpo(on_step: OnStep) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    train_with_trl(ORPOTrainer, ORPOConfig, on_step, preferences())


def train_with_gkd(on_step: OnStep) -> None:
    """Distill from a teacher with another hidden size, on the data as it is (``lmbda=0``)."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    train_with_trl(
        GKDTrainer,
        GKDConfig,
        on_step,
        conversations(),
        {"lmbda": 0.0},
        teacher_model=llama(hidden_size=2 * HIDDEN),
    )


@setup(
    "TRL, GKD",
    "trl",
    outcome="the teacher's logits need no gradient, so they are stored, as they would be in "
    "inference; those of the student are not.",
)
def gkd(on_step: OnStep) -> None:
    train_with_gkd(on_step)


@setup("TRL, GKD, both heads deferred", "trl", install={"defer_logits": "always"})
def gkd_of_two_heads(on_step: OnStep) -> None:
    train_with_gkd(on_step)


# Lightning


@setup("Lightning Trainer", "lightning")
def lightning_trainer(on_step: OnStep) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: Any, index: int) -> Tensor:
            ids, target = batch
            return loss_of(self.model(ids), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            on_step(outputs["loss"])

    module = Module()
    module.model = torch.compile(module.model)
    with tempfile.TemporaryDirectory() as folder:
        lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, torch.utils.data.DataLoader(list(batches()), batch_size=None))


@setup("Lightning Fabric", "lightning")
def fabric(on_step: OnStep) -> None:
    from lightning.fabric import Fabric

    lightning = Fabric(accelerator="cpu", devices=1)
    model = torch.compile(Model())
    model, optimizer = lightning.setup(model, optimizer_of(model))
    for ids, target in batches():
        loss = loss_of(model(ids), target)
        lightning.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


@setup("litgpt pretrain", "litgpt", "lightning")
def litgpt(on_step: OnStep) -> None:
    """The loop of ``litgpt.pretrain.fit``, with its model and its loss."""
    from lightning.fabric import Fabric
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    torch.manual_seed(0)
    lightning = Fabric(accelerator="cpu", devices=1)
    config = Config(
        block_size=LENGTH,
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        n_layer=1,
        n_head=2,
        n_embd=HIDDEN,
    )
    model = lightning.setup(torch.compile(GPT(config)))
    optimizer = lightning.setup_optimizers(optimizer_of(model))
    for ids, target in batches():
        loss = chunked_cross_entropy(model(ids), target)
        lightning.backward(loss)
        lightning.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


# torchtune and torchtitan


@setup("torchtune, chunked loss", "torchtune", "torchao", install={"eager_heads": True})
def torchtune(on_step: OnStep) -> None:
    """As ``full_finetune_single_device`` compiles them: each layer, and the loss of a chunk."""
    from torchtune.models.llama3 import llama3
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.training import compile_loss, compile_model

    torch.manual_seed(0)
    model = llama3(
        vocab_size=VOCABULARY,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        embed_dim=HIDDEN,
        max_seq_len=LENGTH,
    )
    loss_fn = CEWithChunkedOutputLoss()
    compile_model(model, verbose=False)
    compile_loss(loss_fn, verbose=False)
    model.set_num_output_chunks(loss_fn.num_output_chunks)
    optimizer = optimizer_of(model)
    for ids, target in batches():
        loss = loss_fn(model(tokens=ids), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


@setup("torchtitan's loss, compiled blocks", install={"eager_heads": True})
def torchtitan(on_step: OnStep) -> None:
    """torchtitan compiles each block and the loss, and leaves the head as it is."""
    model = Model()
    for block in model.blocks:
        block.compile(fullgraph=True)

    def cross_entropy_loss(pred: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            pred.flatten(0, 1).float(), labels.flatten(0, 1), reduction="sum", ignore_index=-100
        )

    loss_fn = torch.compile(cross_entropy_loss)
    optimizer = optimizer_of(model)
    for ids, target in batches():
        loss = loss_fn(model(ids), target) / target.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


# Other libraries


@setup("x-transformers", "x_transformers")
def x_transformers(on_step: OnStep) -> None:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    torch.manual_seed(0)
    model = AutoregressiveWrapper(
        TransformerWrapper(
            num_tokens=VOCABULARY,
            max_seq_len=LENGTH + 1,
            attn_layers=Decoder(dim=HIDDEN, depth=1, heads=2),
        )
    )
    code = torch.compile(model)
    optimizer = optimizer_of(model)
    for batch in tokens():
        loss = code(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


PAIRS, FEATURES = 4096, 64


def train_on_pairs(step: Any, optimizer: torch.optim.Optimizer, on_step: OnStep) -> None:
    """Train by the loss `step` of random pairs, as contrastive learning does."""
    for _ in range(STEPS):
        loss = step(torch.randn(PAIRS, 32), torch.randn(PAIRS, 32))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


@setup("open_clip, ClipLoss", "open_clip")
def open_clip(on_step: OnStep) -> None:
    # The package imports torchvision, which its losses do not use.
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).with_name("loss.py")
    found = importlib.util.spec_from_file_location("open_clip_loss", file)
    assert found is not None
    assert found.loader is not None
    losses = sys.modules["open_clip_loss"] = importlib.util.module_from_spec(found)
    found.loader.exec_module(losses)

    torch.manual_seed(0)
    image, text = nn.Linear(32, FEATURES), nn.Linear(32, FEATURES)
    scale = nn.Parameter(torch.tensor(2.66))
    loss_fn = losses.ClipLoss()
    optimizer = torch.optim.AdamW([*image.parameters(), *text.parameters(), scale], lr=1e-3)

    @torch.compile
    def step(one: Tensor, other: Tensor) -> Tensor:
        images, texts = F.normalize(image(one), dim=-1), F.normalize(text(other), dim=-1)
        return loss_fn(images, texts, scale.exp())

    train_on_pairs(step, optimizer, on_step)


@setup("sentence-transformers, MultipleNegativesRankingLoss", "sentence_transformers")
def sentence_transformers(on_step: OnStep) -> None:
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    torch.manual_seed(0)
    embed = nn.Linear(32, FEATURES)
    loss_fn = MultipleNegativesRankingLoss(model=embed)
    optimizer = torch.optim.AdamW(embed.parameters(), lr=1e-3)

    @torch.compile
    def step(anchors: Tensor, positives: Tensor) -> Tensor:
        embeddings = [embed(anchors), embed(positives)]
        return loss_fn.compute_loss_from_embeddings(embeddings, labels=None)

    train_on_pairs(step, optimizer, on_step)


@setup(
    "pytorch-metric-learning, ArcFace",
    "pytorch_metric_learning",
    rewritten=False,
    outcome="the margin is put in with a boolean mask as large as the logits, which breaks the graph "
    "and needs their values.",
)
def metric_learning(on_step: OnStep) -> None:
    from pytorch_metric_learning.losses import ArcFaceLoss

    torch.manual_seed(0)
    model = nn.Linear(32, HIDDEN)
    loss_fn = ArcFaceLoss(num_classes=VOCABULARY, embedding_size=HIDDEN)
    optimizer = torch.optim.AdamW([*model.parameters(), *loss_fn.parameters()], lr=1e-3)

    @torch.compile
    def step(inputs: Tensor, target: Tensor) -> Tensor:
        return loss_fn(model(inputs), target)

    for _, target in batches():
        loss = step(torch.randn(target.numel(), 32), target.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


# torch.distributed


def distributed(train: Callable[[OnStep], None]) -> Callable[[OnStep], None]:
    """Run `train` in a process group. The launcher starts as many processes as ``WORLD_SIZE``."""

    def run(on_step: OnStep) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        try:
            train(on_step)
        finally:
            dist.destroy_process_group()

    return run


def train_outside(model: nn.Module, parameters: Any, on_step: OnStep) -> None:
    train(lambda ids, target: loss_of(model(ids), target), parameters, on_step)


def train(step: Callable[..., Tensor], parameters: Any, on_step: OnStep) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    rank = int(os.environ["RANK"])
    for ids, target in batches():
        loss = step(ids.roll(rank, 1), target.roll(rank, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss)


@setup("DDP, two processes", processes=2)
@distributed
def ddp(on_step: OnStep) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(Model())
    train_outside(torch.compile(model), model.parameters(), on_step)


@setup("FSDP2, the model is one unit with the loss in it", processes=2)
@distributed
def fsdp2_with_loss(on_step: OnStep) -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(WithLoss())
    train(torch.compile(model), model.parameters(), on_step)


@setup("FSDP2, the model is one unit", processes=2)
@distributed
def fsdp2(on_step: OnStep) -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(Model())
    train_outside(torch.compile(model), model.parameters(), on_step)


def shard(model: nn.Module, policy: dict[str, Any], **of_head: Any) -> nn.Module:
    """Make units of the blocks, of the head if arguments for it are given, and of the rest.

    Dynamo does not compile the forward of such a model, only its blocks.
    """
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        block.compile()
        fully_shard(block, **policy)
    if of_head:
        fully_shard(model.head, **of_head, **policy)
    return fully_shard(model, **policy)


@setup("FSDP2, each block is a unit", install={"eager_heads": True}, processes=2)
@distributed
def fsdp2_blocks(on_step: OnStep) -> None:
    model = shard(Model(), {})
    train_outside(model, model.parameters(), on_step)


@setup("FSDP2, mixed precision", install={"eager_heads": True}, loose=2e-2, processes=2)
@distributed
def fsdp2_mixed(on_step: OnStep) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(Model(), {"mp_policy": policy})
    train_outside(model, model.parameters(), on_step)


@setup(
    "FSDP2, the head is a unit that keeps its weight", install={"eager_heads": True}, processes=2
)
@distributed
def fsdp2_kept(on_step: OnStep) -> None:
    model = shard(Model(), {}, reshard_after_forward=False)
    train_outside(model, model.parameters(), on_step)


@setup(
    "FSDP2, the head is a unit that frees its weight",
    install={"eager_heads": True},
    rewritten=False,
    outcome="the weight does not exist any more when the loss is computed. Pass "
    "`reshard_after_forward=False` for the head, or make it a part of the root unit.",
    processes=2,
)
@distributed
def fsdp2_freed(on_step: OnStep) -> None:
    model = shard(Model(), {}, reshard_after_forward=True)
    train_outside(model, model.parameters(), on_step)
