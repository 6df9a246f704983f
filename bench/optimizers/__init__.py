"""Whole steps of GWTAdamW and of the optimizers that a user would pick instead."""
