"""What the benchmarks share: models, timing, checks, counts of operations, records."""
