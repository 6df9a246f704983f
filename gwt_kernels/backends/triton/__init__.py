"""Fused Triton kernels and their launch; imported only where a tensor is to be updated by Triton."""
