"""Losses as they are written in training code, and whether the pass rewrites each."""
