"""Pre-training runs on real text, with one optimizer or with several on the same batches."""
