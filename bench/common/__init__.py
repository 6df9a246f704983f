"""Models, measurements and records of raw results, shared by all benchmarks."""
