"""Everything here runs in Triton's interpreter, which the environment must choose.

    TRITON_INTERPRET=1 pytest tests/templates/interpreted

Without that, nothing here is collected: the interpreter changes what Triton is in a process.
"""

import os
import sys
from pathlib import Path

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not IS_INTERPRETED:
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import interpreter
    import pytest
    import torch
    import triton
    from fake_cuda import Driver
    from torch._inductor.graph import GraphLowering

    interpreter.install()
    triton.runtime.driver._active = Driver(90)

    @pytest.fixture(autouse=True)
    def templates_on_cpu(monkeypatch, caplog, request):
        """Inductor uses the templates for tensors on the CPU, and none of them fails."""
        monkeypatch.setattr("cce_inductor.kernels.triton.tiled.DEVICES", {"cpu"})
        monkeypatch.setattr("cce_inductor.kernels.triton.lowering.DEVICES", {"cpu"})
        monkeypatch.setattr("cce_inductor.operators.inductor.has_triton", lambda: True)
        # A tensor of one number on the CPU would be handed over by value, unlike one on a GPU.
        monkeypatch.setattr(GraphLowering, "is_unspec_arg", lambda self, name: False)
        torch._dynamo.reset()
        options = {"cpu_backend": "triton", "deterministic": True, "force_disable_caches": True}
        with torch._inductor.config.patch(options):
            yield
        if "that_fails" not in request.node.name:
            assert "runs without a Triton kernel" not in caplog.text
            assert "Traceback" not in caplog.text
