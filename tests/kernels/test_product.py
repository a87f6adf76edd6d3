"""Matrix products that are wider than their operands."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cce_inductor.kernels.blockwise.product import WideProduct, operand_dtype
from cce_inductor.kernels.head import accumulation_dtype
from cce_inductor.torch_internals import onednn, wide_products
from cce_inductor.torch_internals.onednn import ROWS, TERMS

CPU = torch.device("cpu")
PRECISION = 2**-16


def operands(dtype, m=33, k=64, n=50):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator).to(dtype) for shape in ((m, k), (k, n)))


@pytest.mark.parametrize(
    ("dtype", "operand", "wide"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes(dtype, operand, wide):
    assert operand_dtype(dtype) == operand
    assert accumulation_dtype(dtype) == wide


@pytest.mark.parametrize("beta", [0, 1])
def test_bfloat16_loses_nothing_of_its_own_size(beta):
    a, b = operands(torch.bfloat16)
    exact = a.double() @ b.double()
    out = torch.full(exact.shape, 3.0)
    WideProduct(torch.bfloat16, out.numel(), CPU)(out, a, b, beta=beta)
    error = (out - 3.0 * beta - exact).norm() / exact.norm()
    assert error < PRECISION
    assert (exact.bfloat16() - exact).norm() / exact.norm() > 50 * error


@pytest.fixture
def zen_5(monkeypatch):
    """As on a processor on which oneDNN multiplies float32."""
    monkeypatch.setattr(onednn, "_amd_family", lambda: onednn.ZEN_5)


@pytest.mark.parametrize("beta", [0, 1])
def test_what_a_library_returns_wide_is_not_recovered(beta, wide_products_on_cpu):
    a, b = operands(torch.bfloat16)
    a[0, 0], a[1, 0] = math.inf, math.nan
    exact = a.double() @ b.double() + 3.0 * beta
    out = torch.full(exact.shape, 3.0 if beta else math.nan)
    product = WideProduct(torch.bfloat16, out.numel(), CPU)
    product(out, a, b, beta=beta, recovered=torch.tensor([2, 3]))
    assert wide_products_on_cpu == ["mm" if beta else "mm into out"]
    torch.testing.assert_close(out, exact.float(), equal_nan=True)
    # The scratch is for logits, which are rounded to the dtype of the operands.
    assert WideProduct.scratch_itemsize(torch.bfloat16, CPU) == 2
    rounded = product.rounded(a[2:], b, None, torch.empty(out.numel()))
    assert rounded.equal((a[2:] @ b).float())


def test_which_device_returns_wide_products():
    cuda = torch.device("cuda")
    assert not wide_products.applies(torch.float32, cuda)
    for dtype in (torch.bfloat16, torch.float16):
        has_kernels = torch.version.cuda is not None
        assert wide_products.applies(dtype, cuda) == has_kernels
        assert not wide_products.applies(dtype, CPU)


@pytest.fixture(params=[True, False], ids=["onednn", "no onednn"])
def either_library(request, zen_5):
    with torch.backends.mkldnn.flags(enabled=request.param):
        yield


def test_onednn_multiplies_where_it_is_faster(monkeypatch):
    families = {}
    for family in (0, 25, 26):
        monkeypatch.setattr(onednn, "_amd_family", lambda family=family: family)
        families[family] = onednn.applies(torch.float32, CPU)
        assert not onednn.applies(torch.bfloat16, CPU)
        assert not onednn.applies(torch.float32, torch.device("cuda"))
    has_512_bits = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert families == {0: False, 25: False, 26: has_512_bits}


@pytest.mark.parametrize("rows", [33, 64, 300])
@pytest.mark.parametrize("inner", [0, 64, 128, 300])
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_operands_are_multiplied_once(dtype, beta, inner, rows, either_library):
    a, b = operands(dtype, m=rows, k=inner)
    out = torch.full((rows, 50), 3.0, dtype=dtype)
    product = WideProduct(dtype, out.numel(), CPU)
    assert product.exact
    itemsize = WideProduct.scratch_itemsize(dtype, CPU)
    assert itemsize == (dtype.itemsize if product.by_onednn else 0)
    want = 3.0 * beta + a.double() @ b.double()
    product(out, a, b, beta=beta)
    torch.testing.assert_close(out, want.to(dtype), rtol=1e-5, atol=1e-4)


class OneDNN(TorchDispatchMode):
    """Records the input and weight of each product that oneDNN computes."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.operands.append(args[:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("view", ["row", "column", "step", "same"])
def test_operands_of_any_strides(view, zen_5):
    a, b = operands(torch.float32, m=300, k=400, n=150)
    b = {
        "row": b,
        "column": b.t().contiguous().t(),
        "step": torch.stack([b, b], -1)[..., 0],
        "same": b[:, :1].expand_as(b),
    }[view]
    a = torch.stack([a, a])[1, :, ::2].t()
    b = b[:300]
    out = torch.empty(a.shape[0], b.shape[1])
    product = WideProduct(torch.float32, out.numel(), CPU)
    if not product.by_onednn:
        pytest.skip("oneDNN has no faster products here")
    with OneDNN() as used:
        product(out, a, b, beta=0)
    assert used.operands
    # It is slow for other strides.
    assert all(weight.is_contiguous() or weight.t().is_contiguous() for _, weight in used.operands)
    torch.testing.assert_close(out, a.contiguous() @ b.contiguous(), rtol=1e-5, atol=1e-4)


def test_onednn_computes_few_sizes(zen_5):
    """It keeps memory for each of them."""
    sizes = set()
    if not WideProduct(torch.float32, 1, CPU).by_onednn:
        pytest.skip("oneDNN has no faster products here")
    for rows in range(1, 700, 7):
        a, b = operands(torch.float32, m=rows, k=2 * TERMS, n=50)
        product = WideProduct(torch.float32, rows * 50, CPU)
        with OneDNN() as used:
            product.rounded(a, b, None, None)
            product(torch.empty(2 * TERMS, 50), a.t(), a @ b, beta=0)
        sizes |= {(input.shape, weight.shape) for input, weight in used.operands}
    assert 1 < len(sizes) <= 2 * len(ROWS)


@pytest.mark.parametrize("bias", ["none", "contiguous", "step", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "inner"), [(33, 64), (64, 256), (64, 300), (300, 128)])
def test_rounded_once(rows, inner, dtype, bias, either_library):
    a, b = operands(dtype, m=rows, k=inner)
    bias = {"none": None, "contiguous": b[0], "step": b.t()[:, 0], "same": b[0, :1].expand(50)}[
        bias
    ]
    product = WideProduct(dtype, rows * 50, CPU)
    memory = None if product.by_onednn else torch.empty(rows * 50, dtype=product.wide)
    out = product.rounded(a, b, bias, memory)
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    assert out.dtype == product.wide
    assert torch.equal(out, out.to(dtype).to(product.wide))
    assert (out - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_beta_0_does_not_read_the_result(dtype):
    a, b = operands(dtype)
    out = torch.full((33, 50), math.nan)
    WideProduct(dtype, out.numel(), CPU)(out, a, b, beta=0)
    assert out.isfinite().all()


def test_scratch_is_shared_by_smaller_results():
    a, b = operands(torch.bfloat16)
    product = WideProduct(torch.bfloat16, 33 * 50, CPU)
    out = torch.empty(7, 20)
    product(torch.empty(33, 50), a, b, beta=0)
    product(out, a[:7], b[:, :20], beta=0)
    exact = a[:7].double() @ b[:, :20].double()
    assert (out - exact).norm() / exact.norm() < PRECISION


@pytest.mark.parametrize("beta", [0, 1])
def test_infinite_and_nan_products_stay_what_they_are(beta):
    """And the others keep what rounding took from them."""
    a, b = operands(torch.bfloat16)
    a[0], a[1], b[:, 2] = math.inf, math.nan, torch.where(b[:, 2] > 0, math.inf, 1.0)
    exact = a.double() @ b.double()
    out = torch.full(exact.shape, 3.0)
    WideProduct(torch.bfloat16, out.numel(), CPU)(out, a, b, beta=beta)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())
    finite = exact.isfinite()
    assert finite.any()
    error = (out - 3.0 * beta - exact)[finite].norm() / exact[finite].norm()
    assert error < PRECISION
