"""What every benchmark shares: models, measurements, and records of raw results."""
