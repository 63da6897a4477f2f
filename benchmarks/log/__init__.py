"""The parts of bench_log.py: a stack with a toy trainer, traffic for it, and one file per question."""
