"""How numbers are stored: moments, and weights in 16 bits; PyTorch's statement and Triton's side by side."""
