import pytest
import torch
from torch.library import Library

from cce_inductor.kernels.blockwise import host
from cce_inductor.torch_internals import wide_products

NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture
def wide_products_on_cpu(monkeypatch):
    """The CPU has the matrix products with an ``out_dtype`` that CUDA has. Returns a list of the
    operators that were called."""
    called = []

    def mm(a, b, out_dtype, *, out):
        assert out.dtype == out_dtype == torch.float32
        assert a.dtype == b.dtype
        assert a.dtype in NARROW
        called.append("mm")
        return out.copy_(a.float() @ b.float())

    def addmm(onto, a, b, out_dtype, *, beta=1, alpha=1, out):
        assert out.dtype == onto.dtype == out_dtype == torch.float32
        assert a.dtype == b.dtype
        assert a.dtype in NARROW
        assert beta == alpha == 1
        called.append("addmm")
        return out.copy_(onto + a.float() @ b.float())

    library = Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(wide_products, "applies", lambda dtype, device: dtype in NARROW)
    yield called
    library._destroy()


@pytest.fixture
def like_cuda(monkeypatch, wide_products_on_cpu):
    """Tensors of the CPU are computed as those of CUDA are."""
    monkeypatch.setattr(host, "runs_ahead", lambda device: True)
