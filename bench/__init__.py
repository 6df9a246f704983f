"""Benchmarks, pre-training runs and machine-code reports; not part of the installed package."""
