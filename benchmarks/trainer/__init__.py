"""Parts of bench_trainer.py."""
