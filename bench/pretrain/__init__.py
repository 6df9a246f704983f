"""Pre-training runs: models on real text, with one optimizer or with several on the same batches."""
