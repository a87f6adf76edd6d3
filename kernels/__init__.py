"""Arithmetic of Cut Cross-Entropy: tensors in, tensors out, nothing of FX or of the compiler.

`reference` is the specification, `blockwise` computes the same without storing the logits,
`program` writes down what is computed, `reductions` are its parts in one block, `product` is the
matrix product that all of it rests on.
"""
