"""The multi-level Haar transform and its inverse."""

from gwt_kernels.haar.transform import haar_dwt, haar_idwt

__all__ = ["haar_dwt", "haar_idwt"]
