"""Operations that make logits: matrix products with a [vocabulary, hidden] weight."""
