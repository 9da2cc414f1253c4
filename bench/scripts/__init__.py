"""Commands around the benchmarks: `python -m bench.scripts.NAME`."""
