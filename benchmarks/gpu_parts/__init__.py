"""The parts of `benchmarks/gpu.py`, each a program: ``python -P -m gpu_parts.heads head``.

A part prints one line of JSON for each number (see `results`). To run a part alone, put the folder
`benchmarks` and the root of the clone on PYTHONPATH. A part needs torch, triton and this package,
and no other installed package.

- `versions`, `products`, `blocks`, `kernels`, `heads`, `device_tests`, `sanitizer`: the parts.
- `problem`, `methods`: the loss that is measured, and the implementations that are compared.
- `templates`: the package's two kernels, compiled and timed alone.
- `results`, `timing`, `profiling`: output, clocks and the profiler.
- `dealt`, `one_loss`: run by `device_tests` and `sanitizer` in other processes.
"""
