"""Deferred logits with transformers, accelerate and torch.distributed."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Trainer, TrainingArguments

import cce_inductor
from cce_inductor.deferred.tensor import defer

pytestmark = pytest.mark.usefixtures("nothing_compiled")

VOCABULARY = 503


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def rows(count):
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        for ids in torch.randint(3, VOCABULARY, (count, 16), generator=generator)
    ]


def accuracy(prediction):
    predicted = prediction.predictions
    if predicted.ndim == 3:
        predicted = predicted.argmax(-1)
    return {"accuracy": float((predicted[:, :-1] == prediction.label_ids[:, 1:]).mean())}


def trained(directory, *, preprocess=None, **arguments):
    """Return all numbers that a Trainer logs."""
    torch._dynamo.reset()
    make = functools.partial(
        Trainer,
        args=TrainingArguments(
            output_dir=str(directory),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            torch_compile=True,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=rows(24),
        eval_dataset=rows(8),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=preprocess,
    )
    trainer = make(model=llama())
    trainer.train()
    logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    loaded = llama()  # a Trainer evaluates a model that it has trained without compiling it
    loaded.load_state_dict(trainer.model.state_dict())
    metrics = make(model=loaded).evaluate()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return logs, metrics["eval_loss"], metrics["eval_accuracy"], weights


TRAINERS = {
    "float32": {},
    "argmax in evaluation": {"preprocess": lambda logits, labels: logits.argmax(-1)},
    "accumulated bfloat16": {"gradient_accumulation_steps": 2, "bf16": True},
    "label smoothing": {"label_smoothing_factor": 0.1, "defer_logits": "always"},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer(name, tmp_path):
    arguments = dict(TRAINERS[name])
    options = {"min_logits_bytes": 0, "on_error": "raise"}
    options["defer_logits"] = arguments.pop("defer_logits", "with_loss")
    with cce_inductor.installed(**options):
        logs, loss, correct, weights = trained(tmp_path / "with", **arguments)
    reports = cce_inductor.reports()
    assert len(reports) > 1
    assert all(report.rewritten and report.deferred for report in reports)
    their_logs, their_loss, their_correct, their_weights = trained(
        tmp_path / "without", **arguments
    )
    loose = 2e-2 if "bf16" in arguments else 1e-4
    assert logs == pytest.approx(their_logs, rel=loose)
    assert loss == pytest.approx(their_loss, rel=loose)
    assert correct == pytest.approx(their_correct, abs=0.02 if "bf16" in arguments else 0)
    assert (weights - their_weights).norm() <= loose * their_weights.norm()


def test_accelerate_conversion_of_results():
    """accelerate converts results of a mixed-precision model to float32. They stay deferred."""
    from accelerate.utils import convert_outputs_to_fp32

    model = torch.compile(llama(), backend="cce_inductor_eager", options={"min_logits_bytes": 0})
    with torch.autocast("cpu", torch.bfloat16):
        batch = {name: value[None] for name, value in rows(1)[0].items()}
        output = convert_outputs_to_fp32(model.forward)(**batch)
    assert output.logits.dtype == torch.float32
    assert output.logits.is_deferred
    output.loss.backward()
    assert output.logits.is_deferred


def test_functional_call():
    model = llama()
    batch = {name: value[None] for name, value in rows(1)[0].items()}

    def loss_and_logits(parameters):
        output = torch.func.functional_call(model, parameters, kwargs=batch)
        return output.loss, output.logits

    parameters = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    parameters = {name: p.requires_grad_() for name, p in parameters.items()}
    code = torch.compile(
        loss_and_logits, backend="cce_inductor_eager", options={"min_logits_bytes": 0}
    )
    loss, logits = code(parameters)
    assert logits.is_deferred
    expected, their_logits = loss_and_logits(parameters)
    torch.testing.assert_close(loss, expected)
    mine = torch.autograd.grad(loss, list(parameters.values()))
    theirs = torch.autograd.grad(expected, list(parameters.values()))
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(logits.detach() + 0, their_logits.detach())


def test_generate():
    model = llama().eval()
    prompt = rows(2)[0]["input_ids"][None, :5]
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    expected = model.generate(prompt, **arguments)
    model.forward = torch.compile(
        model.forward,
        backend="cce_inductor_eager",
        options={"min_logits_bytes": 0, "defer_logits": "always"},
    )
    assert torch.equal(model.generate(prompt, **arguments), expected)
    assert any(report.deferred for report in cce_inductor.reports())
    torch.manual_seed(0)
    sampled = model.generate(prompt, **{**arguments, "do_sample": True, "top_k": 20})
    assert sampled.shape == expected.shape


@pytest.fixture
def group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(torch.nn.Module):
    """A model that is large enough for DistributedDataParallel to split it into buckets."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 64)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(6))
        self.head = torch.nn.Linear(64, VOCABULARY, bias=False)

    def forward(self, ids, labels):
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        logits = self.head(hidden)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


@pytest.mark.parametrize("optimize", [False, True], ids=["whole", "buckets"])
@pytest.mark.parametrize(
    "arguments", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str
)
def test_distributed_data_parallel(group, monkeypatch, optimize, arguments):
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    model, expected = Model(), Model()
    with torch._dynamo.config.patch(optimize_ddp=optimize):
        parallel = DistributedDataParallel(model, bucket_cap_mb=0.02, **arguments)
        code = torch.compile(
            parallel, backend="cce_inductor", options={"min_logits_bytes": 0, "on_error": "raise"}
        )
        for _ in range(2):
            model.zero_grad()
            loss, logits = code(ids, labels)
            loss.backward()
    assert any(report.rewritten and report.deferred for report in cce_inductor.reports())
    assert logits.is_deferred
    their_loss, their_logits = expected(ids, labels)
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(logits.detach() + 0, their_logits.detach())


def test_fully_sharded_data_parallel(group):
    """The weight of the head exists from the forward to the backward, and is then freed."""
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    model, expected = Model(), Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    code = torch.compile(
        model, backend="cce_inductor", options={"min_logits_bytes": 0, "on_error": "raise"}
    )
    loss, logits = code(ids, labels)
    assert logits.is_deferred
    their_loss, their_logits = expected(ids, labels)
    assert torch.equal(logits.argmax(-1), their_logits.argmax(-1))
    loss.backward()
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)
    with pytest.raises(cce_inductor.StaleLogitsError, match="freed"):
        logits.argmax(-1)


class Head(torch.nn.Module):
    """A module of the user's: Dynamo compiles its forward separately if it is a unit of FSDP."""

    def __init__(self, bias=False, loss=False):
        super().__init__()
        self.projection = torch.nn.Linear(64, VOCABULARY, bias=bias)
        self.loss = loss

    def forward(self, hidden, labels):
        logits = self.projection(hidden) / 2
        if self.loss:
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits
        return logits


class WithHead(torch.nn.Module):
    """A model whose head is a `Head`."""

    def __init__(self, head, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 64)
        self.layer = torch.nn.Linear(64, 64)
        self.head = head()
        if tied:
            self.head.projection.weight = self.embedding.weight

    def forward(self, ids, labels):
        hidden = self.embedding(ids)
        output = self.head(hidden + self.layer(hidden).tanh(), labels)
        if isinstance(output, tuple):
            return output
        return F.cross_entropy(output.flatten(0, 1), labels.flatten()), output


def sharded_head(model, mesh, **arguments):
    fully_shard(model.head, mesh=mesh, **arguments)
    fully_shard(model, mesh=mesh)


def toggled(model, mesh):
    """The unit first keeps the weight, and frees it from the second step on."""
    sharded_head(model, mesh, reshard_after_forward=False)
    yield
    model.head.set_reshard_after_forward(True)


REDUCED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FREED = {
    "alone": (Head, sharded_head),
    "with a bias": (functools.partial(Head, bias=True), sharded_head),
    "with the loss": (functools.partial(Head, loss=True), sharded_head),
    "by request": (Head, functools.partial(sharded_head, reshard_after_forward=True)),
    "in bfloat16": (Head, functools.partial(sharded_head, mp_policy=REDUCED)),
    "on the CPU": (
        Head,
        functools.partial(sharded_head, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    ),
    "from the second step on": (Head, toggled),
    "a part of the head": (
        Head,
        lambda model, mesh: [fully_shard(m, mesh=mesh) for m in (model.head.projection, model)],
    ),
}


def steps(model, code, change=None, count=3):
    """Return losses, maxima of logits, and gradients of some steps."""
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for number in range(count):
        if change is not None and number == 1:
            next(change, None)
        model.zero_grad()
        loss, logits = code(ids.roll(number, 1), ids.roll(number - 1, 1))
        found += [loss.detach().float(), logits.detach().float().amax(-1)]
        loss.backward()
        for parameter in model.parameters():
            gradient = parameter.grad
            found.append(gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient)
    return found


@pytest.mark.parametrize("name", FREED)
def test_weight_that_is_freed_after_the_forward(name, group):
    """The logits are computed while the weight exists, so that reading them later is no error."""
    head, shard = FREED[name]
    model, expected = WithHead(head), WithHead(head)
    change = shard(model, init_device_mesh("cpu", (1,)))
    change = change if hasattr(change, "__next__") else None
    if change is not None:
        next(change)
    options = {"min_logits_bytes": 0, "on_error": "raise", "defer_logits": "always"}
    code = torch.compile(model, backend="cce_inductor_eager", options=options)
    found = steps(model, code, change)
    loose = 3e-2 if "bfloat16" in name else 1e-5
    torch.testing.assert_close(found, steps(expected, expected), rtol=loose, atol=loose)
    if change is None:
        assert not any(report.deferred for report in cce_inductor.reports())
    if name == "with the loss":
        (report,) = cce_inductor.reports()
        assert "FSDP frees the weight after the forward of its module" in report.reason


STAYING = {
    "the outermost unit": (Head, False, lambda model, mesh: fully_shard(model, mesh=mesh)),
    "tied": (Head, True, lambda model, mesh: fully_shard(model, mesh=mesh)),
    "by request": (Head, False, functools.partial(sharded_head, reshard_after_forward=False)),
    "with the loss": (
        functools.partial(Head, loss=True),
        False,
        functools.partial(sharded_head, reshard_after_forward=False),
    ),
    "other units are freed": (
        Head,
        False,
        lambda model, mesh: [fully_shard(m, mesh=mesh) for m in (model.layer, model)],
    ),
    "not sharded": (Head, False, lambda model, mesh: None),
}


@pytest.mark.parametrize("name", STAYING)
def test_weight_that_stays(name, group):
    head, tied, shard = STAYING[name]
    model, expected = WithHead(head, tied), WithHead(head, tied)
    shard(model, init_device_mesh("cpu", (1,)))
    options = {"min_logits_bytes": 0, "on_error": "raise", "defer_logits": "always"}
    code = torch.compile(model, backend="cce_inductor_eager", options=options)
    torch.testing.assert_close(steps(model, code), steps(expected, expected))
    assert any(report.deferred for report in cce_inductor.reports())


@pytest.fixture
def two_processes():
    """This process and a fake one, whose data is arbitrary."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


FSDP1 = functools.partial(
    FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu")
)
NOT_AFTER_FORWARD = ShardingStrategy.SHARD_GRAD_OP


@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize(
    ("wrap_head", "stays"),
    [
        (FSDP1, False),
        (functools.partial(FSDP1, sharding_strategy=NOT_AFTER_FORWARD), True),
        (lambda head: head, True),
    ],
)
def test_first_version_of_fully_sharded_data_parallel(
    wrap_head, stays, has_gradient, two_processes
):
    """The outermost unit keeps its weights until the backward, others only with SHARD_GRAD_OP."""
    model = WithHead(Head)
    model.head = wrap_head(model.head)
    model = FSDP1(model)
    options = {"min_logits_bytes": 0, "on_error": "raise", "defer_logits": "always"}
    code = torch.compile(model, backend="cce_inductor_eager", options=options)
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(has_gradient):
        loss, logits = code(ids, ids)
    if has_gradient:
        loss.backward()
    assert logits.shape == (2, 16, VOCABULARY)
    assert any(report.deferred for report in cce_inductor.reports()) == stays


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrized(model):
    torch.nn.utils.parametrize.register_parametrization(model.head.projection, "weight", Doubled())


def normalized(model):
    torch.nn.utils.parametrizations.weight_norm(model.head.projection)


def offloaded(model):
    from accelerate import cpu_offload

    cpu_offload(model.head, execution_device="cpu")


@pytest.mark.parametrize("made", [parametrized, normalized, offloaded])
def test_weight_that_is_made_for_the_call(made):
    """Deferred logits keep the weight alive, although the module does not."""
    model, expected = WithHead(Head), WithHead(Head)
    if made is not offloaded:
        made(expected)
    made(model)
    options = {"min_logits_bytes": 0, "on_error": "raise", "defer_logits": "always"}
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(made is not offloaded):
        loss, logits = torch.compile(model, backend="cce_inductor_eager", options=options)(ids, ids)
        their_loss, their_logits = expected(ids, ids)
    assert any(report.deferred for report in cce_inductor.reports())
    assert logits.is_deferred
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(logits.detach() + 0, their_logits.detach())
    if loss.requires_grad:
        loss.backward()
        their_loss.backward()
        for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_gathered(group):
    """Metrics gather logits from all processes."""
    model = Model()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        code = torch.compile(model, backend="cce_inductor_eager", options={"min_logits_bytes": 0})
        expected = model(ids, ids)[1]
        for gather in (all_gather, all_gather_into, broadcast, gather_object):
            _, logits = code(ids, ids)
            assert logits.is_deferred
            torch.testing.assert_close(gather(logits), expected)


def all_gather(logits):
    (result,) = results = [torch.empty_like(logits)]
    dist.all_gather(results, logits)
    return result


def all_gather_into(logits):
    result = torch.empty(logits.shape)
    dist.all_gather_into_tensor(result, logits)
    return result


def broadcast(logits):
    dist.broadcast(logits, 0)
    return logits + 0


def gather_object(logits):
    results = [None]
    dist.all_gather_object(results, {"logits": logits})
    return results[0]["logits"]


def test_results_that_a_later_replay_overwrote():
    """With CUDA graphs, access to an overwritten result is an error. It stays one."""
    hidden = torch.randn(6, 8)
    for look in (
        torch.Tensor.norm,
        lambda logits: logits.argmax(-1),
        lambda logits: logits[0].cpu(),
    ):
        logits = defer(hidden.clone(), torch.randn(50, 8), None, torch.float32)
        torch._C._set_throw_on_mutable_data_ptr(logits._operation.arguments[0].tensor)
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            look(logits)
