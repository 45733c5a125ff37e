"""Certified rational fits of SAE gates: `fit_gate(target, degree) -> GateFit`, and the table of fits that ships."""

from rsae_triton.remez.fit import fit_gate
from rsae_triton.remez.gatefit import GateFit
from rsae_triton.remez.table import shipped_gate

__all__ = ["GateFit", "fit_gate", "shipped_gate"]
