"""Optimizers of this package in training loops of other libraries; only users import these modules."""

__all__: list[str] = []
