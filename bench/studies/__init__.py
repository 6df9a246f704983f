"""Measurements behind single decisions: the code of int8 moments, roundings on a CPU, gradient release."""
