"""What every launch asks of Triton's compiler."""

from __future__ import annotations

UNFUSED = {"enable_fp_fusion": False}
"""No multiplication is contracted with an addition.

Lanes that hold one block would each round the product of another lane, and not their own, and so hold, and store,
other sums of it.
"""
