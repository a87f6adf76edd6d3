"""Every use of PyTorch that has no public name: features by version, patches, capture, tensors."""
