"""Statistics and gradients of blocks of logits, by ordinary tensor operations on any device."""
