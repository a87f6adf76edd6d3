"""The parts of `benchmarks/gpu.py`, each a program: ``python -P -m gpu_parts.heads head``.

A part prints one line of JSON for every number (`results`) and can be run alone, with the folders
of the benchmarks and of the clone on PYTHONPATH. It imports torch, triton and this package, and
nothing else that has to be installed.
"""
