"""Every function of PyTorch has the same result on deferred logits as on a plain tensor.

`torch.overrides.get_testing_overrides` lists the functions with their arguments, whose values are
guessed from their names. If no guess works on a plain tensor, the errors are compared.
"""

import inspect
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import get_testing_overrides, resolve_name

from cce_inductor.deferred.tensor import DeferredLogits, defer

SIZE = 6  # of tokens and vocabulary: some functions want a square matrix


def other(*, dtype=torch.float32, positive=False, shape=(SIZE, SIZE)):
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(shape, generator=generator)
    if dtype == torch.int64:
        return torch.randint(SIZE, shape, generator=generator)
    return (value.abs() + 0.5 if positive else value).to(dtype)


VALUES = {
    "dim": [-1],
    "dim0": [0],
    "dim1": [1],
    "dims": [(0, 1), (0,)],
    "dtype": [torch.float64],
    "device": ["cpu"],
    "index": [lambda: other(dtype=torch.int64), lambda: other(dtype=torch.int64, shape=(SIZE,)), 1],
    "indices": [lambda: other(dtype=torch.int64)],
    "mask": [lambda: other() > 0],
    "condition": [lambda: other() > 0],
    "target": [
        lambda: other(dtype=torch.int64, shape=(SIZE,)),
        other,
        lambda: other(positive=True),
        lambda: other(shape=(SIZE,)).sign(),
    ],
    "size": [(SIZE * SIZE,), 2],
    "sizes": [(2, 3)],
    "shape": [(SIZE * SIZE,)],
    "repeats": [2],
    "chunks": [2],
    "split_size_or_sections": [3],
    "indices_or_sections": [2],
    "tensor_indices_or_sections": [2],
    "exponent": [2],
    "k": [2],
    "n": [1],
    "p": [2.0, 0.5],
    "q": [0.5],
    "min": [-0.5],
    "max": [0.5],
    "kthvalue": [2],
    "source": [other, 0],
    "start": [0],
    "length": [2],
    "step": [1],
    "bins": [5],
    "value": [0.5],
    "values": [other],
    "hook": [lambda: lambda grad: None],
    "memory_format": [torch.contiguous_format],
    "output_size": [3, (3, 3)],
    "kernel_size": [2],
    "stride": [(1, 6), 2],
    "pad": [(1, 1)],
    "num_classes": [-1],
    "normalized_shape": [(SIZE,)],
    "num_groups": [2],
    "upscale_factor": [1],
    "downscale_factor": [1],
    "equation": ["ij,jk->ik"],
    "weight": [other, lambda: other(shape=(SIZE,))],
    "var": [lambda: other(positive=True)],
    "full": [(SIZE, SIZE)],
    "fill_value": [1.0],
    "boundaries": [lambda: other(shape=(SIZE,)).sort().values],
    "margin": [1.0],
    "lambd": [1.0],
    "negative_slope": [0.1],
    "alpha": [0.5],
    "threshold": [0.1],
    "nan": [0.0],
    "ord": [2],
    "diagonal": [0],
    "shifts": [1],
    "k_": [1],
    "sorted_sequence": [lambda: other(shape=(SIZE,)).sort().values],
    "destination": [0],
    "src": [other],
    "vec": [lambda: other(shape=(SIZE,))],
    "vec1": [lambda: other(shape=(SIZE,))],
    "vec2": [lambda: other(shape=(SIZE,))],
    "destination_": [1],
    "num_samples": [1],
    "mean": [lambda: other(shape=(SIZE,))],
    "accumulate": [False],
    "reduce": ["sum"],
    "offsets": [(0,)],
    "kernel": [2],
    "groups": [2],
    "block_size": [1],
    "num_heads": [2],
    "tol": [1e-3],
    "rcond": [1e-3],
    "upper": [True],
    "out_int32": [False],
    "storage_offset": [0],
}
ANYTHING = [other, 1, lambda: other(positive=True), lambda: other(dtype=torch.int64), (0, 1)]


def functions():
    """Yield each function with its parameters. The first parameter takes the tensor."""
    for function, example in get_testing_overrides().items():
        parameters = list(inspect.signature(example).parameters.values())
        if parameters:
            name = resolve_name(function) or getattr(function, "__name__", str(function))
            yield pytest.param(function, parameters, id=name)


def candidates(parameters):
    """Return guesses for the arguments after the first, the most likely ones first."""
    required = [p for p in parameters[1:] if p.default is inspect.Parameter.empty]
    named = [p for p in required if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    named = [p for p in named if p.kind is not inspect.Parameter.VAR_KEYWORD]
    choices = [VALUES.get(p.name) or ANYTHING for p in named]
    return itertools.islice(itertools.product(*choices), 24)


def made(value):
    return value() if callable(value) and not isinstance(value, torch.dtype) else value


def tensors(*, train):
    """Return deferred logits and their leaves, then a plain tensor and its leaves."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(SIZE, 4, generator=generator)
    weight = torch.randn(SIZE, 4, generator=generator)
    pairs = []
    for _ in range(2):
        leaves = [hidden.clone().requires_grad_(train), weight.clone().requires_grad_(train)]
        pairs.append((leaves[0] * 1.0, leaves))
    (mine, my_leaves), (theirs, their_leaves) = pairs
    deferred = defer(mine, my_leaves[1], None, torch.float32)
    plain = F.linear(theirs, their_leaves[1])
    return deferred, my_leaves, plain, their_leaves


def outcome(function, tensor, arguments, *, several=False):
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = [tensor, tensor] if several else tensor
            return function(first, *map(made, arguments)), None
    except Exception as error:
        return None, error


def assert_same(got, want):
    if isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
        assert got.requires_grad == want.requires_grad
        if want.is_sparse or want.layout != torch.strided:
            got, want = got.to_dense(), want.to_dense()
        if want.is_quantized:
            got, want = got.dequantize(), want.dequantize()
        assert got.stride() == want.stride()
        plain = got._values() if isinstance(got, DeferredLogits) else got.detach()
        torch.testing.assert_close(plain, want.detach(), rtol=1e-4, atol=1e-4, equal_nan=True)
    elif isinstance(want, (tuple, list)):
        assert type(got) is type(want)
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    elif isinstance(want, (bool, int, str, torch.dtype, torch.device, torch.layout, type(None))):
        assert got == want
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-4, nan_ok=True)
    else:
        assert type(got) is type(want)


UNLIKE = {
    # Uninitialized memory, addresses, text, and autograd nodes.
    "torch.empty_like",
    "torch.fbgemm_pack_gemm_matrix_fp16",
    "torch.Tensor.__format__",
    "torch.Tensor.__repr__",
    "torch.Tensor._cdata.__get__",
    "torch.Tensor._grad_fn.__get__",
    "torch.Tensor.const_data_ptr",
    "torch.Tensor.data_ptr",
    "torch.Tensor.grad_fn.__get__",
}


DESTRUCTIVE = {"torch.dequantize", "torch.Tensor.dequantize"}
"""On a plain tensor these return the tensor itself, and its backward raises an error."""


def takes_several(parameters):
    return parameters[0].name in ("tensors", "args", "operands")


def first_that_works(function, parameters, *, train):
    """Return arguments, the result of `tensors`, and the outcome on the plain tensor."""
    for arguments in candidates(parameters):
        made = tensors(train=train)
        want, error = outcome(function, made[2], arguments, several=takes_several(parameters))
        if error is None:
            break
    return arguments, made, want, error


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("function", "parameters"), list(functions()))
def test_same_as_plain(function, parameters, train):
    arguments, made, want, error = first_that_works(function, parameters, train=train)
    deferred, my_leaves, plain, their_leaves = made
    got, my_error = outcome(function, deferred, arguments, several=takes_several(parameters))
    assert type(my_error) is type(error), (arguments, my_error, error)
    name = resolve_name(function)
    if name not in UNLIKE:
        assert_same(got, want)
    # In-place functions had the same effect, on values and on gradients.
    assert_same(deferred, plain)
    if plain.requires_grad and plain.dtype.is_floating_point and name not in DESTRUCTIVE:
        weights = torch.arange(plain.numel()).reshape(plain.shape)
        _, my_error = outcome(backward, deferred, (weights,))
        _, error = outcome(backward, plain, (weights,))
        assert type(my_error) is type(error), (my_error, error)
        for mine, theirs in zip(my_leaves, their_leaves, strict=True):
            assert_same(mine.grad, theirs.grad)


def backward(tensor, weights):
    (tensor * weights).sum().backward()


def test_the_guesses_are_good():
    """Most functions work with some guess, so that more than errors is compared."""
    worked = [first_that_works(*given.values, train=False)[3] is None for given in functions()]
    assert sum(worked) > 0.65 * len(worked), f"{sum(worked)} of {len(worked)}"
