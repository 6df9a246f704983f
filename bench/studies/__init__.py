"""Studies behind single decisions: quantization of int8 moments, roundings on a CPU, gradient release."""
