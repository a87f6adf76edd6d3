"""The pass: it puts a fused operator in the place of the losses of a graph before autograd."""
