"""Tests the machine code of kernels that take rows, and what they execute, without a GPU."""

from tests.backends.triton.test_jit import run

# The most registers, and instructions an element, of row_code.VARIANTS in their order.
LIMITS = [(48, 26), (48, 12), (56, 35), (64, 34), (80, 56), (80, 53), (56, 33), (96, 78)]


def test_rows_take_few_registers_and_instructions_and_wide_accesses(tmp_path):
    for own, (registers, instructions) in zip(run("row_code.py", tmp_path), LIMITS, strict=True):
        assert own["registers"] <= registers, own
        assert own["stack"] == 0, f"registers are spilled: {own}"
        assert own["wide"] == (own["width"] % 8 == 0), own
        assert own["instructions"] <= instructions, own
        assert own["distinct"] < 1.1, own
        assert own["programs"] == 1, own
