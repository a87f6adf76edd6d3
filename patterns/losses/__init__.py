"""Operations that reduce logits to a loss."""
