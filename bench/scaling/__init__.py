"""Benchmarks of steps on several processes, compared with the planner's predictions."""
