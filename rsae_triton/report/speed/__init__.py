"""Benchmark results: JSON files, tables, plots, and a guard on ratios. `benchmarks/` does the measuring."""

from rsae_triton.report.speed.results import exponents, guard, load_results, read_result, write_result

__all__ = ["exponents", "guard", "load_results", "read_result", "write_result"]
