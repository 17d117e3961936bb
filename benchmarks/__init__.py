"""One harness for `python -m benchmarks` and benchmarks/gpu.sh: cases, providers, clock, runner, records, report."""
