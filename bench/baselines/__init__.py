"""What the benchmarks compare against: plain loops, and the networks by their published formulas."""
