"""Arithmetic of Cut Cross-Entropy: tensors in, tensors out, nothing of FX or of the compiler.

`reference` is the specification, `blockwise` computes the same without storing the logits,
`modification` is the pointwise function of a logit, `product` the matrix product both rest on.
"""
