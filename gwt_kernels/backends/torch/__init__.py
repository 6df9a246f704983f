"""Plain PyTorch implementations: the path without Triton or C, and the readable statement of the mathematics."""
