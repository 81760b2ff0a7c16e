"""Instruments that both the tests and the benchmarks read: floating-point operations, and bytes alive."""
