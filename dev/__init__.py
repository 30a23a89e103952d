"""Benchmarks, faults, the demo, end-to-end runs and the scripts that write docs."""
