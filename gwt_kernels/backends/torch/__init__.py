"""Plain PyTorch implementations: the CPU path and the readable statement of the mathematics."""
