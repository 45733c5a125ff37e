"""Runs TransformerLens' bridge with functions at named places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rsae_triton.common.errors import ConfigError, ShapeError, first_line


class Enough(Exception):  # noqa: N818  (a signal that ends the forward pass, not an error)
    """Raised by a function of `run_bridge` to end the forward pass: what follows is not needed."""


def run_bridge(
    bridge: Any, tokens: torch.Tensor, functions: Mapping[str, Callable[[torch.Tensor], Any]], model: str, instead: str
) -> torch.Tensor:
    """Runs the bridge on `tokens` [B, T] and returns its logits [B, T, vocabulary].

    At each named place the activations, as [B, T, d], are replaced by what its function returns for them.

    Args:
        model: the model's name, for error messages.
        instead: a place that works, for error messages.

    Raises:
        ConfigError: a place cannot be hooked, is never computed, or holds no [B, T, ...] activations.
    """
    ran: set[str] = set()

    def hooked(name: str, function: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
        def hook(value: Any, hook: Any) -> Any:
            ran.add(name)
            if not isinstance(value, torch.Tensor) or value.dim() < 3 or value.shape[:2] != tokens.shape:
                raise ConfigError(
                    f"{name} holds no [batch, token, width] activations; choose a residual, mlp or z hook"
                )
            new = function(value.flatten(2))
            return new.view_as(value)

        return hook

    names = " or ".join(functions)
    try:
        hooks = [(name, hooked(name, function)) for name, function in functions.items()]
        logits: torch.Tensor = bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
    except (ConfigError, ShapeError, Enough):
        raise
    except (AssertionError, KeyError, ValueError) as error:
        if ran:
            raise
        raise ConfigError(f"{names} cannot be hooked ({first_line(error)}); try {instead}") from error
    if missing := functions.keys() - ran:
        raise ConfigError(f"{' or '.join(sorted(missing))} is never computed in {model!r}; try {instead}")
    return logits
