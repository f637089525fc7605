"""Benchmarks: one program a file, run by `aat bench NAME`."""
