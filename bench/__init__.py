"""Benchmarks and chaos, for users to run."""
