"""The benchmark suite: `python -m benchmarks` runs it and prints fused against eager."""
