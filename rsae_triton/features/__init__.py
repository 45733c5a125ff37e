"""Looking at features: what one of them is active on and writes, steering a model with it, a page of all of them."""

from rsae_triton.features.feature import Feature, feature
from rsae_triton.features.page import write_features
from rsae_triton.features.steering import steer

__all__ = ["Feature", "feature", "steer", "write_features"]
