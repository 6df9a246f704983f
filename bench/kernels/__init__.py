"""Benchmarks of each kernel alone: cases, their oracle, and target ratios."""
