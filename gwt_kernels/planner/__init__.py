"""Planner: memory and traffic of a model's optimizer, on one process or many, before anything is allocated."""
