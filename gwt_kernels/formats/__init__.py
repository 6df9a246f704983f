"""Storage formats of moments and of 16-bit weights, in PyTorch and in Triton side by side."""
