"""Maps the folder `kernels/` to the package `rsae_triton.kernels`; everything else is in pyproject.toml.

A top-level import named `kernels` would collide with Hugging Face's package of that name.
"""

from setuptools import find_packages, setup

packages = find_packages(include=["rsae_triton", "rsae_triton.*"])
kernel_packages = ["rsae_triton.kernels", *(f"rsae_triton.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=packages + kernel_packages,
    package_dir={"rsae_triton.kernels": "kernels"},
)
