"""What the benchmarks measured: results as JSON, tables, plots, and a guard on ratios. `benchmarks/` measures."""

from rsae_triton.report.speed.results import exponents, guard, load_results, read_result, write_result

__all__ = ["exponents", "guard", "load_results", "read_result", "write_result"]
