"""The machine code of every kernel variant, compiled without a GPU."""
