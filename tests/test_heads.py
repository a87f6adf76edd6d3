"""Heads that nobody compiled: `cce_inductor.defer`, and ``install(eager_heads=True)``."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import cce_inductor
from cce_inductor import heads

HIDDEN, VOCABULARY = 8, 50
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(autouse=True)
def _everything_is_large():
    torch._dynamo.reset()
    cce_inductor.clear_reports()
    with cce_inductor.installed(min_logits_bytes=0, on_error="raise"):
        yield


class Model(nn.Module):
    def __init__(self, *, bias=False, tied=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, dtype=dtype)
        self.layer = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype)
        if tied:
            self.head.weight = self.embedding.weight

    def hidden(self, ids):
        hidden = self.embedding(ids)
        return hidden + self.layer(hidden).tanh()

    def forward(self, ids):
        return self.head(self.hidden(ids))


def loss_of(logits):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())


def assert_same(model, expected, losses=loss_of, loose=1e-5):
    """Check loss and gradients of a model with deferred logits against those of another."""
    for each in (model, expected):
        each.zero_grad()
    mine, theirs = losses(model(IDS)), losses(expected(IDS))
    torch.testing.assert_close(mine, theirs, rtol=loose, atol=loose)
    mine.backward()
    theirs.backward()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=loose, atol=loose)


@pytest.mark.parametrize("arguments", [{}, {"bias": True}, {"tied": True}], ids=str)
def test_loss_in_eager_code(arguments, computed):
    model = Model(**arguments)
    assert cce_inductor.defer(model.head) is model.head
    logits = model(IDS)
    assert logits.is_deferred
    assert_same(model, Model(**arguments))
    assert not computed
    assert torch.equal(logits.argmax(-1), Model(**arguments)(IDS).argmax(-1))
    assert logits.is_deferred


def test_compiled_loss(computed):
    model = Model()
    cce_inductor.defer(model.head)
    code = torch.compile(loss_of)
    assert_same(
        model, Model(), losses=lambda z: (code if hasattr(z, "is_deferred") else loss_of)(z)
    )
    assert not computed
    assert any(report.rewritten for report in cce_inductor.reports())


def test_compiled_blocks_and_eager_head():
    """Regional compilation: accelerate's ``compile_regions``, torchtitan's blocks."""
    model = Model()
    model.layer.compile()
    cce_inductor.defer(model.head)
    assert model(IDS).is_deferred
    assert_same(model, Model())


def test_compiled_head():
    model, expected = Model(), Model()
    cce_inductor.defer(model.head)
    code = torch.compile(model)
    assert code(IDS).is_deferred
    loss_of(code(IDS)).backward()
    loss_of(expected(IDS)).backward()
    torch.testing.assert_close(model.head.weight.grad, expected.head.weight.grad)
    model.head.compile()
    assert_same(model, expected)


class Chunked(nn.Module):
    """torchtune's: the head is applied to chunks of the hidden state."""

    def __init__(self):
        super().__init__()
        self.model = Model()

    def forward(self, ids):
        return [self.model.head(chunk) for chunk in self.model.hidden(ids).chunk(3, dim=1)]


def chunked_loss(chunks):
    losses = [
        F.cross_entropy(chunk.flatten(0, 1).float(), target.flatten(), reduction="sum")
        for chunk, target in zip(chunks, IDS.chunk(3, dim=1), strict=True)
    ]
    return sum(losses) / IDS.numel()


def test_chunks_count_together(computed):
    size = IDS.numel() * VOCABULARY * 4
    model = Chunked()
    cce_inductor.defer(model.model.head)
    for least, is_deferred in ((size, True), (size + 1, False)):
        with cce_inductor.installed(min_logits_bytes=least):
            chunks = model(IDS)
            assert all(hasattr(chunk, "is_deferred") == is_deferred for chunk in chunks)
            assert_same(model, Chunked(), losses=chunked_loss)
    assert not computed


def test_compiled_loss_of_a_chunk():
    """torchtune compiles the loss of a chunk, whose logits alone are small."""
    size = IDS.numel() * VOCABULARY * 4
    model, expected = Chunked(), Chunked()
    cce_inductor.defer(model.model.head)
    code = torch.compile(lambda z, t: F.cross_entropy(z.float(), t, reduction="sum"))
    with cce_inductor.installed(min_logits_bytes=size, on_error="raise"):
        chunks = [chunk.reshape(-1, VOCABULARY) for chunk in model(IDS)]
        targets = [target.flatten() for target in IDS.chunk(3, dim=1)]
        loss = sum(map(code, chunks, targets)) / IDS.numel()
    loss.backward()
    chunked_loss(expected(IDS)).backward()
    (report,) = cce_inductor.reports()
    assert report.rewritten
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, expected = Model(), Model()
    cce_inductor.defer(model.head)
    with torch.autocast("cpu", dtype):
        assert model(IDS).dtype == expected(IDS).dtype == dtype
        assert_same(model, expected, loose=2e-2)


def test_dtypes():
    for dtype in (torch.float64, torch.bfloat16):
        model = Model(dtype=dtype)
        cce_inductor.defer(model.head)
        assert model(IDS).dtype == dtype
        assert_same(model, Model(dtype=dtype), loose=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_undefer():
    model = Model()
    cce_inductor.defer(model.head)
    cce_inductor.defer(model.head)
    assert cce_inductor.undefer(model) is model
    assert type(model(IDS)) is torch.Tensor
    assert "forward" not in model.head.__dict__
    cce_inductor.undefer(model.head)


def test_state_dict_and_copies():
    model = Model()
    cce_inductor.defer(model.head)
    assert model.state_dict().keys() == Model().state_dict().keys()
    other = copy.deepcopy(model)
    other.head.weight.data.zero_()
    logits = other(IDS)
    assert logits.is_deferred
    assert logits.detach().abs().max() == 0
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded(IDS)) is torch.Tensor  # it needs nothing of this package
    torch.testing.assert_close(loaded(IDS), model(IDS) + 0)


class Lora(nn.Module):
    """PEFT's layer: the base layer, and adapters by name."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(1)
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(HIDDEN, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, VOCABULARY, bias=False)})

    def forward(self, hidden):
        low = self.lora_A["default"](hidden)
        return self.base_layer(hidden) + self.lora_B["default"](low) * 0.5


def test_lora(computed):
    model, expected = Model(), Model()
    for each in (model, expected):
        each.head = Lora(each.head)
        each.head.base_layer.weight.requires_grad_(False)
    cce_inductor.defer(model.head)
    assert model(IDS).is_deferred
    for each in (model, expected):
        loss_of(each(IDS)).backward()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    cce_inductor.undefer(model.head)
    assert type(model(IDS)) is torch.Tensor


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(3, 4),
        nn.Sequential(nn.Linear(3, 4)),
        nn.Bilinear(3, 4, 5),
        torch.ao.nn.quantized.dynamic.Linear(3, 4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules(module):
    with pytest.raises(TypeError, match=f"takes the head of a model.*{type(module).__name__}"):
        cce_inductor.defer(module)


def test_quantized_weight():
    head = nn.Linear(4, 8)
    head.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"not a floating-point matrix but torch\.int8"):
        cce_inductor.defer(head)


def test_errors_of_the_module():
    head = nn.Linear(HIDDEN, VOCABULARY)
    cce_inductor.defer(head)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        head(torch.zeros(2, HIDDEN + 1))
    with pytest.raises(RuntimeError, match="same dtype"):
        head(torch.zeros(2, HIDDEN, dtype=torch.float64))
    assert head(torch.zeros(HIDDEN)).shape == (VOCABULARY,)


def test_functorch():
    head = nn.Linear(HIDDEN, VOCABULARY)
    cce_inductor.defer(head)
    hidden = torch.randn(3, HIDDEN)
    found = torch.vmap(torch.func.grad(lambda x: head(x[None]).logsumexp(-1).sum()))(hidden)
    cce_inductor.undefer(head)
    expected = torch.vmap(torch.func.grad(lambda x: head(x[None]).logsumexp(-1).sum()))(hidden)
    torch.testing.assert_close(found, expected)


def test_every_head():
    model = Model()
    with cce_inductor.installed(min_logits_bytes=0, eager_heads=True):
        assert model(IDS).is_deferred
        assert type(model.layer(torch.zeros(2, HIDDEN))) is torch.Tensor
        assert_same(model, copy.deepcopy(model), losses=loss_of)
        with cce_inductor.installed(min_logits_bytes=2**20, eager_heads=True):
            assert type(model(IDS)) is torch.Tensor
    assert type(model(IDS)) is torch.Tensor
    with pytest.raises(TypeError, match="eager_heads must be a bool"):
        cce_inductor.Options(eager_heads=1)


@pytest.fixture
def mesh(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["defer", "shard"])
@pytest.mark.parametrize("unit", ["root", "kept", "freed"])
def test_fully_sharded(first, unit, mesh, computed, caplog):
    heads._warn_of_freed_weight.cache_clear()
    model, expected = Model(), Model()
    if first == "defer":
        cce_inductor.defer(model.head)
    if unit != "root":
        fully_shard(model.head, mesh=mesh, reshard_after_forward=unit == "freed")
    fully_shard(model, mesh=mesh)
    if first == "shard":
        cce_inductor.defer(model.head)
    for _ in range(2):
        model.zero_grad()
        expected.zero_grad()
        logits = model(IDS)
        assert hasattr(logits, "is_deferred") == (unit != "freed")
        mine, theirs = loss_of(logits), loss_of(expected(IDS))
        torch.testing.assert_close(mine, theirs)
        mine.backward()
        theirs.backward()
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one.grad.full_tensor(), other.grad)
    assert not computed
    assert caplog.text.count("FSDP frees the weight") == (unit == "freed")
