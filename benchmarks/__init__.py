"""Benchmarks: one module per suite, each with `run(options) -> list[dict]` of flat rows."""
