"""Torch code that trainer and sampler share, so that both compute the same numbers."""
