"""The operators `torch.ops.cce_inductor.*`, and how Inductor compiles them."""
