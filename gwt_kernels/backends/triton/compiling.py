"""Options of Triton's compiler for every launch."""

from __future__ import annotations

UNFUSED = {"enable_fp_fusion": False}
"""No multiplication is contracted with an addition.

Otherwise each lane of a block would round other lanes' products but not its own, and lanes would hold, and store,
different sums.
"""
