"""Each question of `torch_internals.callers`, asked by the code it is about and by other code."""

import operator
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.distributed import DDPOptimizer
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.testing._internal.distributed.fake_pg import FakeStore

from cce_inductor.deferred.tensor import defer
from cce_inductor.torch_internals import callers
from cce_inductor.torch_internals.tensors import without_torch_function


def logits():
    return defer(torch.randn(3, 8) * 1.0, torch.randn(50, 8), None, torch.float32)


def called_by_torch(question):
    """Return the answer to a question that a function of PyTorch asks."""

    class Asks(torch.nn.Module):
        forward = staticmethod(question)

    return Asks()()


def test_in_torch():
    """A package whose name begins with "torch" is not PyTorch."""
    inside = torch.nn.functional.__file__
    beside = inside.replace(os.path.join("torch", "nn"), os.path.join("torchtune", "nn"))
    assert callers.in_torch(inside)
    assert not callers.in_torch(beside)


def test_users_frame():
    here = sys._getframe()
    assert callers.users_frame() is here
    assert called_by_torch(callers.users_frame).f_code is called_by_torch.__code__


def test_is_torch_asking():
    assert not callers.is_torch_asking()
    assert called_by_torch(callers.is_torch_asking)
    assert not torch._dynamo.disable(callers.is_torch_asking)()


def test_is_autograd_asking():
    ask = torch.autograd.function.once_differentiable(operator.methodcaller("__call__"))
    with torch.no_grad():
        assert ask(callers.is_autograd_asking)
    assert not called_by_torch(callers.is_autograd_asking)
    assert not callers.is_autograd_asking()


def test_is_compiler_asking():
    assert not callers.is_compiler_asking()
    assert not called_by_torch(callers.is_compiler_asking)
    assert torch._dynamo.external_utils.wrap_inline(callers.is_compiler_asking)()
    assert not eval("ask()", {"ask": callers.is_compiler_asking})
    program = compile("ask()", "<string>", "eval")
    assert not eval(program, {"ask": callers.is_compiler_asking})
    evaluated = torch._dynamo.external_utils.wrap_inline(eval)
    assert evaluated(program, {"ask": callers.is_compiler_asking})


DATA = """
import torch
from cce_inductor.backends import cce_inductor_eager
from cce_inductor.deferred.tensor import defer

def logits():
    return defer(torch.ones(3, 8) * 1.0, torch.ones(50, 8), None, torch.float32)

def read(logits):
    return type(logits.data).__name__, logits.is_deferred

print("module", type((z := logits()).data).__name__, z.is_deferred)
print("function", *read(logits()))
print("called by Dynamo's code", *torch._dynamo.external_utils.wrap_inline(read)(logits()))

@torch.compile(backend=cce_inductor_eager)
def largest(z):
    return (z.data * 2).amax(-1).sum()

z = logits()
assert largest(z) == 48
print("compiled", z.is_deferred)
"""


@pytest.mark.parametrize("how", ["script", "-c", "exec"])
def test_data_is_the_same_in_every_program(how, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(DATA if how == "script" else f"exec({DATA!r})")
    arguments = ["-c", DATA] if how == "-c" else [str(script)]
    run = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.stdout.splitlines() == [
        "module Tensor False",
        "function Tensor False",
        "called by Dynamo's code Tensor False",
        "compiled True",
    ], run.stderr


def test_is_tracing_transform():
    found = []

    def function(x):
        found.append(callers.is_tracing_transform())
        return x

    torch.func.grad(function)(torch.ones(()))
    function(None)
    assert found == [True, False]


class ViewBackwards(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, grad: grad)


READING_MEMORY = {
    "data_ptr": torch.Tensor.data_ptr,
    "storage": lambda z: z.untyped_storage()[0],
    "dlpack": torch.utils.dlpack.to_dlpack,
}


@pytest.mark.parametrize("read", READING_MEMORY.values(), ids=READING_MEMORY)
def test_is_about_memory(read):
    with pytest.raises((RuntimeError, NotImplementedError)) as error, without_torch_function():
        read(logits())
    assert callers.is_about_memory(error.value)


def test_is_about_memory_of_other_errors():
    with pytest.raises(RuntimeError) as error, without_torch_function():
        logits().view(7)
    assert not callers.is_about_memory(error.value)


TABLE = {torch.Tensor: 2}


def test_guarded_dictionaries():
    found = []

    def backend(module, example_inputs):
        found.extend(callers.guarded_dictionaries())
        return module

    torch.compile(lambda x: x * TABLE[torch.Tensor], backend=backend)(torch.ones(3))
    assert any(each is TABLE for each in found)
    assert not list(callers.guarded_dictionaries())


def test_is_whole_graph():
    parts = []

    def part(module, example_inputs):
        parts.append(callers.is_whole_graph(module))
        return module

    def split(module, example_inputs):
        assert callers.is_whole_graph(module)
        return DDPOptimizer(1, part, first_bucket_cap=1).compile_fn(module, example_inputs)

    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    torch.compile(model, backend=split)(torch.ones(2, 8))
    assert len(parts) > 1
    assert not any(parts)


@pytest.fixture
def two_processes():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_frees_after_forward(strategy, two_processes):
    found = []

    class Inner(torch.nn.Linear):
        def forward(self, input):
            found.append(callers.frees_after_forward(self.weight._base))
            return super().forward(input)

    def shard(module):
        return FullyShardedDataParallel(
            module,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy[strategy],
        )

    shard(torch.nn.Sequential(Inner(8, 8), shard(Inner(8, 8))))(torch.ones(2, 8))
    assert found == [False, strategy == "FULL_SHARD"]
