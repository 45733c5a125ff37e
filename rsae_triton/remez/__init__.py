"""Certified rational fits of SAE gates: `fit_gate(target, degree) -> GateFit`."""

from rsae_triton.remez.fit import fit_gate
from rsae_triton.remez.gatefit import GateFit

__all__ = ["GateFit", "fit_gate"]
