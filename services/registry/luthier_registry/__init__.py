"""Sessions, training runs, checkpoints and sampler records."""
