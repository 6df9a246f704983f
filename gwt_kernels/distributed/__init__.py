"""Shards of DTensors, and reductions over processes."""
