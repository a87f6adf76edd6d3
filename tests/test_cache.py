"""Inductor's caches stay enabled, serve a second process, and never return stale code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cce_inductor

SCRIPT = """
import json, sys
import torch, torch.nn.functional as F
import cce_inductor

how, options = sys.argv[1], json.loads(sys.argv[2])
generator = torch.Generator().manual_seed(0)
input = torch.randn(6, 8, generator=generator, requires_grad=True)
weight = torch.randn(50, 8, generator=generator, requires_grad=True)
target = torch.randint(50, (6,), generator=generator)

def loss(input, weight, target):
    return F.cross_entropy(F.linear(input, weight), target)

if how == "function":
    def loss(input, weight, target):
        return cce_inductor.linear_cross_entropy(input, weight, target)

if how == "install":
    cce_inductor.install(**options)
    compiled = torch.compile(loss)
elif how == "backend":
    compiled = torch.compile(loss, backend="cce_inductor", options=options)
else:
    compiled = torch.compile(loss)
value = compiled(input, weight, target)
value.backward()
counters = torch._dynamo.utils.counters
print(json.dumps({
    "numbers": [value.item(), *input.grad.flatten().tolist(), *weight.grad.flatten().tolist()],
    "rewritten": [report.rewritten for report in cce_inductor.reports()],
    "hits": counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"],
    "misses": counters["inductor"]["fxgraph_cache_miss"],
}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the script in a new process with the shared cache directory."""
    cache = tmp_path_factory.mktemp("cache")

    def run(how, sources=None, **options):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        if sources is not None:
            environment["PYTHONPATH"] = str(sources)
        command = [sys.executable, "-c", SCRIPT, how, json.dumps(options)]
        done = subprocess.run(
            command, env=environment, cwd=cache, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def other_sources(tmp_path):
    """Return a copy of the package with an added comment in a kernel."""
    shutil.copytree(Path(cce_inductor.__file__).parent, tmp_path / "cce_inductor")
    kernel = tmp_path / "cce_inductor" / "kernels" / "blockwise" / "engine.py"
    kernel.write_text(kernel.read_text() + "\n# another version\n")
    return tmp_path


@pytest.mark.parametrize("how", ["install", "backend"])
def test_caches(run, how, other_sources):
    cold = run(how, min_logits_bytes=0)
    assert cold["hits"] == 0
    assert cold["misses"] > 0

    warm = run(how, min_logits_bytes=0)
    assert warm["hits"] > 0
    assert warm["misses"] == 0
    assert warm["numbers"] == cold["numbers"]
    assert warm["rewritten"] == cold["rewritten"] == [True]

    assert run(how, min_logits_bytes=0, workspace_bytes=1000)["hits"] == 0
    assert run(how, sources=other_sources, min_logits_bytes=0)["hits"] == 0
    plain = run("plain")
    assert plain["rewritten"] == []


def test_compiled_function_without_install(run, other_sources):
    cold = run("function")
    assert cold["hits"] == 0
    assert run("function")["misses"] == 0
    assert run("function", sources=other_sources)["hits"] == 0
