"""Logits that a compiled function returns without having computed them."""
