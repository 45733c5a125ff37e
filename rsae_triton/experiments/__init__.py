"""Whole studies: the demo, training teachers, sweeps, and the paper's tables."""
