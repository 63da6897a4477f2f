"""The parts of bench_log.py: a stack with a toy trainer, traffic for it, a file per question."""
