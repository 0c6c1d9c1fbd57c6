"""Benchmarks: one module a suite, each with `run(options) -> list[dict]` of flat rows."""
