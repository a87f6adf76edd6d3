"""Statistics and gradients by Triton kernels: templates that Inductor compiles."""
