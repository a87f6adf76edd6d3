"""Memory for tensor descriptors, in every thread and context, through Triton's own launcher."""

import contextvars
import threading

import pytest
import torch
import triton
from fake_cuda import Driver
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime._allocation import NullAllocator

from cce_inductor.torch_internals.patches import allocate_scratch_memory


@pytest.fixture(autouse=True)
def memory_of_the_cpu(monkeypatch):
    """It stands for the device's."""
    monkeypatch.setattr(NullAllocator, "__call__", NullAllocator.__call__)  # put back afterwards
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(90))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, dtype: empty(*size, dtype=dtype))


def scratch_of_a_launch():
    """What Triton's launcher hands to a kernel that needs 128 bytes a program, for 3 programs."""
    launches = []
    launcher = object.__new__(CudaLauncher)
    launcher.num_ctas = 1
    launcher.global_scratch_size, launcher.global_scratch_align = 128, 128
    launcher.profile_scratch_size, launcher.profile_scratch_align = 0, 1
    launcher.launch_cooperative_grid = launcher.launch_pdl = launcher.gsan_enabled = False
    launcher.arg_annotations, launcher.kernel_signature = None, b""
    launcher.launch = lambda *arguments: launches.append(arguments)
    launcher(3, 1, 1, 0, None, None, None, None, None)
    (found,) = (value for value in launches[0] if isinstance(value, torch.Tensor))
    return found


def in_context(function):
    return contextvars.Context().run(function)


def in_thread(function):
    found = []

    def run():
        try:
            found.append(function())
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_triton_itself_has_none_in_another_thread(monkeypatch):
    """So that the tests below see what they are about."""

    def refuse(self, size, alignment, stream):
        raise RuntimeError("no allocator was set")

    monkeypatch.setattr(NullAllocator, "__call__", refuse)
    assert "no allocator was set" in str(in_thread(scratch_of_a_launch))


@pytest.mark.parametrize("run", [in_thread, in_context])
def test_every_thread_and_context_has_an_allocator(run):
    allocate_scratch_memory()
    assert run(scratch_of_a_launch).numel() == 3 * 128


def test_an_allocator_that_was_set_is_used():
    allocate_scratch_memory()
    asked = []

    def theirs(size, alignment, stream):
        asked.append(size)
        return torch.empty(size, dtype=torch.int8, device="cuda")

    def launch():
        triton.set_allocator(theirs)
        scratch_of_a_launch()

    in_context(launch)
    assert asked == [3 * 128]
