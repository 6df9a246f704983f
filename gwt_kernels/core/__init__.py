"""Shared by rules, formats and backends: options of an update, random bits, surveys of tensors, DTensors."""
