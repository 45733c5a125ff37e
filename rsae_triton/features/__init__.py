"""Features: inspect one, steer a model with some, or write a page of all."""

from rsae_triton.features.feature import Feature, feature
from rsae_triton.features.page import write_features
from rsae_triton.features.steering import steer

__all__ = ["Feature", "feature", "steer", "write_features"]
