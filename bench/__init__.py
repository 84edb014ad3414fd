"""Benchmarks (`python -m bench`) and chaos (`python -m bench.chaos`), for users to run."""
