"""What rules, formats and backends share: options of an update, buckets of tensors, decisions about a step."""
