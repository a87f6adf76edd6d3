"""Inductor's CUDA code, written and compiled on a machine without a GPU."""

import re

import pytest
import torch
from ahead_of_time import templates_in
from cce_inductor.kernels import lowering
from expecttest import assert_expected_inline
from fake_cuda import PROCESSORS, SHARED_MEMORY, output_code
from resources import DTYPES, KINDS, PROGRAMS, compiled, every_config, gradient, statistics

from cce_inductor import tiling

BF16, F32 = torch.bfloat16, torch.float32
CROSS_ENTROPY = PROGRAMS["cross-entropy"]
EVERY_CONFIG = [
    (capability, dtype, kind, number)
    for capability in PROCESSORS
    for dtype in (BF16, F32)
    for kind in KINDS
    for number in range(len(every_config(kind, dtype, capability)))
]


@pytest.fixture(autouse=True)
def with_templates():
    tiling.register()


def calls(code):
    """The calls of kernels and the buffers they write, one a line."""
    lines = [line.strip() for line in code.splitlines()]
    called = re.compile(
        r"\.run\(|^buf\d+ = (empty_strided|buf|torch\.ops)|extern_kernels\.|add_product_"
    )
    found = [line for line in lines if called.search(line) and not line.startswith("#")]
    found = [line.split(";  ")[0] for line in found if "import" not in line]
    names: dict[str, str] = {}
    lines = []
    for line in found:
        alias = re.fullmatch(r"(buf\d+) = (buf\d+)", line)
        if alias:
            names[alias[1]] = names[alias[2]]
            continue
        for name in re.findall(r"\bbuf\d+\b", line):
            names.setdefault(name, f"buffer{len(set(names.values()))}")
        lines.append(re.sub(r"\bbuf\d+\b", lambda match: names[match[0]], line))
    text = re.sub(r"\bs\d+\b", "tokens", "\n".join(lines))
    text = re.sub(r"(empty_strided_cuda\(\([^)]*\)), \([^)]*\)", r"\1", text)
    return text.replace("raw_stream0", "stream0") + "\n"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", PROCESSORS)
def test_default_configuration(capability, dtype, program, kind):
    found = compiled(kind, PROGRAMS[program], dtype, capability)
    assert found.spilled == 0
    assert found.shared <= SHARED_MEMORY[capability]
    half = dtype != F32
    assert found.tma_loads == (half and capability >= 90)
    product = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    if half:
        assert found.tensor_cores == product[capability]


@pytest.mark.parametrize(("capability", "dtype", "kind", "number"), EVERY_CONFIG)
def test_configuration_fits(capability, dtype, kind, number):
    config = every_config(kind, dtype, capability)[number]
    found = compiled(kind, CROSS_ENTROPY, dtype, capability, config)
    assert found.shared <= SHARED_MEMORY[capability]


def test_forward():
    code = output_code(*statistics(CROSS_ENTROPY, BF16))
    assert_expected_inline(
        calls(code),
        """\
buffer0 = empty_strided_cuda((256, 8192), torch.float32)
buffer1 = empty_strided_cuda((8192, 1), torch.float32)
buffer2 = empty_strided_cuda((8192, 1), torch.int32)
triton_poi_fused_0.run(target_1, buffer2, 8192, stream=stream0)
buffer3 = empty_strided_cuda((256, 8192), torch.float32)
triton_tem_fused_1.run(input_1, weight_1, buffer2, buffer0, buffer1, buffer3, 132, 1, 1, stream=stream0)
buffer4 = empty_strided_cuda((1, 8192, 2), torch.float64)
triton_red_fused_2.run(buffer3, buffer0, buffer4, 16384, 128, stream=stream0)
buffer5 = empty_strided_cuda((1, 8192), torch.float64)
triton_per_fused_3.run(buffer4, buffer5, 8192, 2, stream=stream0)
triton_red_fused_4.run(buffer3, buffer0, buffer5, buffer6, 16384, 128, stream=stream0)
buffer7 = empty_strided_cuda((8192, ), torch.float64)
buffer8 = buffer7; del buffer7  # reuse
buffer9 = empty_strided_cuda((8192, ), torch.float64)
triton_per_fused_5.run(buffer8, buffer6, target_1, buffer5, buffer1, buffer9, 8192, 2, stream=stream0)
""",
    )


def test_backward_reuses_its_workspace():
    code = output_code(*gradient(CROSS_ENTROPY, BF16, 256 * 2**20))
    assert_expected_inline(
        calls(code),
        """\
buffer0 = empty_strided_cuda((), torch.int32)
triton_poi_fused_0.run(buffer0, 1, stream=stream0)
buffer1 = empty_strided_cuda((), torch.int32)
triton_poi_fused_1.run(buffer1, 1, stream=stream0)
buffer2 = empty_strided_cuda((8192, ), torch.float32)
triton_poi_fused_2.run(arg0_1, buffer2, 8192, stream=stream0)
buffer3 = empty_strided_cuda((8192, ), torch.float32)
triton_poi_fused_3.run(arg1_1, buffer3, 8192, stream=stream0)
buffer4 = empty_strided_cuda((8192, 1), torch.int32)
buffer5 = empty_strided_cuda((8192, ), torch.bool)
triton_poi_fused_4.run(arg6_1, buffer4, buffer5, 8192, stream=stream0)
buffer6 = empty_strided_cuda((8192, ), torch.float32)
buffer7 = empty_strided_cuda((8192, ), torch.float32)
triton_poi_fused_5.run(arg2_1, buffer6, buffer7, 8192, stream=stream0)
buffer8 = empty_strided_cuda((8192, 16384), torch.bfloat16)
triton_tem_fused_6.run(arg4_1, arg5_1, buffer0, buffer5, buffer4, buffer6, buffer7, buffer2, buffer3, buffer8, 132, 1, 1, stream=stream0)
buffer9 = torch.ops.cce_inductor.add_product.default(None, buffer8, reinterpret_tensor(arg5_1, (16384, 4096), (4096, 1), 0))
buffer10 = empty_strided_cuda((32768, 4096), torch.bfloat16)
extern_kernels.mm(reinterpret_tensor(buffer8, (16384, 8192), (1, 16384), 0), arg4_1, out=buffer11)
buffer12 = buffer8; del buffer8  # reuse
triton_tem_fused_6.run(arg4_1, arg5_1, buffer1, buffer5, buffer4, buffer6, buffer7, buffer2, buffer3, buffer12, 132, 1, 1, stream=stream0)
torch.ops.cce_inductor.add_product_.default(buffer9, buffer12, reinterpret_tensor(arg5_1, (16384, 4096), (4096, 1), 67108864))
buffer13 = empty_strided_cuda((8192, 4096), torch.bfloat16)
triton_poi_fused_7.run(buffer9, buffer13, 33554432, stream=stream0)
extern_kernels.mm(reinterpret_tensor(buffer12, (16384, 8192), (1, 16384), 0), arg4_1, out=buffer14)
""",
    )


def test_a_number_of_tokens_that_is_a_symbol():
    dynamic = {0: (0,), 2: (0,)}
    code = output_code(*statistics(CROSS_ENTROPY, BF16), capability=80, dynamic=dynamic)
    (launch,) = (line for line in calls(code).splitlines() if "_tem_" in line)
    assert_expected_inline(
        launch,
        """triton_tem_fused_1.run(input_1, weight_1, buffer2, buffer0, buffer1, buffer3, tokens, 256*((127 + tokens) // 128), 1, 1, stream=stream0)""",
    )


def test_a_number_of_tokens_that_is_a_symbol_in_the_backward():
    function, inputs = gradient(CROSS_ENTROPY, BF16, 256 * 2**20)
    code = output_code(function, inputs, dynamic=dict.fromkeys((0, 1, 2, 3, 4, 6), (0,)))
    assert len(templates_in(code)) == 1


def test_tokens_change_no_kernel():
    """So none is compiled again, for a number of them that is a symbol."""
    dynamic = {0: (0,), 2: (0,)}
    sources = []
    for rows in (100, 5000):
        function, inputs = statistics(CROSS_ENTROPY, BF16)
        inputs = [
            ((rows, *shape[1:]) if at in dynamic else shape, d)
            for at, (shape, d) in enumerate(inputs)
        ]
        (source,) = templates_in(output_code(function, inputs, dynamic=dynamic)).values()
        sources.append(re.sub(r"'num_gb'.*", "", source))
    assert sources[0] == sources[1]


def test_captured_function_is_inlined():
    code = output_code(*statistics(PROGRAMS["softcapped"], BF16))
    (source,) = templates_in(code).values()
    assert "libdevice.tanh" in source


def test_max_autotune_tries_every_configuration(monkeypatch):
    tried = []
    original = lowering.autotune_select_algorithm

    def spy(name, choices, *rest, **options):
        tried.append(len(choices))
        return original(name, choices[:1], *rest, **options)

    monkeypatch.setattr(lowering, "autotune_select_algorithm", spy)
    output_code(*statistics(CROSS_ENTROPY, BF16), max_autotune=True, deterministic=False)
    assert tried == [2 * len(every_config("statistics", BF16, 90))]


@pytest.mark.parametrize(
    ("patched", "why"),
    [
        ({"tiling.has_triton": lambda: False}, "Triton is not there"),
        ({"tiling.torch.version.hip": "6.0"}, "the templates are for NVIDIA devices"),
    ],
)
def test_devices_without_templates(patched, why, monkeypatch):
    monkeypatch.setattr(tiling, "has_triton", lambda: True)
    for name, value in patched.items():
        monkeypatch.setattr(f"cce_inductor.{name}", value)
    assert tiling._reason_against(torch.device("cuda", 0)) == why


def test_old_devices_have_no_templates(monkeypatch):
    monkeypatch.setattr(tiling, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    why = tiling._reason_against(torch.device("cuda", 0))
    assert why == "the templates are for devices of compute capability 8.0 and later"
