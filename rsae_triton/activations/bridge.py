"""TransformerLens' bridge over a model's own weights, which is made on first use; and forward passes with functions."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch

from rsae_triton.common.errors import ConfigError, ShapeError, SourceError, first_line
from rsae_triton.common.install import advice
from rsae_triton.common.names import hub_model

Library = Literal["auto", "transformer_lens", "transformers"]


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


class Bridge:
    """A `TransformerBridge` that is made on the first `get()`, or one that the caller made.

    Importing TransformerLens and making the bridge takes seconds, and most callers never need it: residual streams and
    MLPs are read from the Hugging Face module.
    """

    def __init__(self, made: Any = None) -> None:
        self.made = made
        self._make: Callable[[], Any] | None = None
        self._waiting: list[Callable[[Any], None]] = []

    @classmethod
    def of(cls, model: Any, tokenizer: Any, name: str, library: Library) -> Bridge:
        """Prepares a bridge over a second module with `model`'s parameters, because the bridge changes the module it is
        given.

        The second module is made now, before anybody adds hooks to `model`. With library="transformer_lens" the bridge
        is made now as well, and SourceError says why if that fails.
        """
        bridge = cls()
        if library == "transformers":
            return bridge
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, shared)
        bridge._make = lambda: _boot(twin, tokenizer, name, library)
        if library == "transformer_lens":
            bridge.get()
        return bridge

    def get(self) -> Any:
        """The bridge; None if TransformerLens is missing, cannot run the model (with a warning) or is not wanted."""
        if self._make is not None:
            make, self._make = self._make, None
            with torch.random.fork_rng(devices=[]):  # so that random numbers do not depend on when the bridge is made
                self.made = make()
            if self.made is not None:
                for act in self._waiting:
                    act(self.made)
        return self.made

    @contextlib.contextmanager
    def when_made(self, act: Callable[[Any], None]) -> Iterator[None]:
        """Calls `act(bridge)` if there is a bridge; otherwise as soon as one is made within the context."""
        if self.made is not None:
            act(self.made)
        self._waiting.append(act)
        try:
            yield
        finally:
            self._waiting.remove(act)


def _boot(twin: Any, tokenizer: Any, name: str, library: Library) -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        if library == "auto":
            return None
        raise SourceError(
            f"library='transformer_lens' needs that package; install it with: {advice('host')}"
        ) from error
    try:
        return TransformerBridge.boot_transformers(
            hub_model(name),
            hf_model=twin,
            tokenizer=tokenizer,
            device=str(next(twin.parameters()).device),
            dtype=next(twin.parameters()).dtype,
        )
    except Exception as error:  # it has no adapter for the architecture, and can fail in many ways
        reason = first_line(error)
        if library == "transformer_lens":
            raise SourceError(f"TransformerLens cannot run {name!r} ({reason}); use library='transformers'") from error
        warnings.warn(f"TransformerLens cannot run {name!r} ({reason}); using transformers alone", stacklevel=4)
        return None
