"""Each kernel alone: cases, the oracle that checks them, and the ratios to reach."""
