"""Losses as training code writes them, and what the pass should do about each."""
