"""The same by Triton kernels, which Inductor makes of templates."""
