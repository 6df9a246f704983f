"""What a model costs under ``GWTAdamW``, on one process or many, before a byte is allocated."""
