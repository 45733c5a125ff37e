"""Triton device code of rsae_triton, one file per kernel. Imports nothing of `rsae_triton`.

Installed as the package `rsae_triton.kernels` (setup.py maps the folder).
"""
