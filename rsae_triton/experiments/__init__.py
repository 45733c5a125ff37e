"""Whole studies made of the parts below: the demo, teachers to train, sweeps, the paper's tables."""
