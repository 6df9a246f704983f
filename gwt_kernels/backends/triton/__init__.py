"""Fused Triton kernels and their launches; imported only when Triton is to update a tensor."""
