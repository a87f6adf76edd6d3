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

    def mm(a, b, out_dtype, *, out=None):
        assert out_dtype == torch.float32
        assert a.dtype == b.dtype
        assert a.dtype in NARROW
        called.append("mm" if out is None else "mm into out")
        product = a.float() @ b.float()
        return product if out is None else out.copy_(product)

    library = Library("aten", "IMPL")
    library.impl("mm.dtype", mm, "CPU")
    library.impl("mm.dtype_out", mm, "CPU")
    monkeypatch.setattr(wide_products, "applies", lambda dtype, device: dtype in NARROW)
    yield called
    library._destroy()


@pytest.fixture
def like_cuda(monkeypatch, wide_products_on_cpu):
    """Tensors of the CPU are computed as those of CUDA are."""
    monkeypatch.setattr(host, "runs_ahead", lambda device: True)
