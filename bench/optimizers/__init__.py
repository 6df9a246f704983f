"""Benchmarks of whole steps: GWTAdamW and the optimizers that a user would choose instead."""
