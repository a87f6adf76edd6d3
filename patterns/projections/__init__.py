"""Operations that make logits: a matrix product with a [vocabulary, hidden] weight."""
