"""The residual stream of a Hugging Face model: read it, replace it, or resume the forward pass from it.

`depth` counts the layers whose output has been added: hook_resid_pre of layer L is depth L, hook_resid_post
of layer L is depth L + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from rsae_triton.common.errors import SourceError


class _Reached(Exception):  # noqa: N818  (a signal that ends the forward pass, not an error)
    pass


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The list of `model`'s transformer blocks. Raises SourceError for an architecture without one."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise SourceError(
        f"{type(model).__name__} keeps its layers in no list of {count} modules; use a decoder-only model"
    )


def read(model: Any, tokens: torch.Tensor, depth: int) -> torch.Tensor:
    """The residual [B, T, d] at `depth`; nothing behind it is computed."""
    found: list[torch.Tensor] = []

    def take(hidden: torch.Tensor) -> None:
        found.append(hidden)
        raise _Reached

    with tapped(model, depth, take):
        try:
            model(input_ids=tokens, use_cache=False)
        except _Reached:
            return found[0]
    raise RuntimeError("the forward pass ended without running the hooked layer")


def read_many(model: Any, tokens: torch.Tensor, depths: list[int]) -> list[torch.Tensor]:
    """The residuals [B, T, d] at several depths, in one pass that ends at the last of them."""
    found: dict[int, torch.Tensor] = {}

    def keep(depth: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def take(hidden: torch.Tensor) -> torch.Tensor:
            # A copy: some layers write into their input.
            found[depth] = hidden.clone()
            if depth == max(depths):
                raise _Reached
            return hidden

        return take

    with ExitStack() as stack:
        for depth in set(depths):
            stack.enter_context(tapped(model, depth, keep(depth)))
        try:
            model(input_ids=tokens, use_cache=False)
        except _Reached:
            return [found[depth] for depth in depths]
    raise RuntimeError("the forward pass ended without running the hooked layer")


def replaced(
    model: Any, tokens: torch.Tensor, depth: int, replace: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Logits [B, T, vocab] of a whole forward pass with the residual at `depth` put through `replace`."""
    with tapped(model, depth, replace):
        return model(input_ids=tokens, use_cache=False).logits


def resumed(model: Any, tokens: torch.Tensor, depth: int, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, vocab] of the layers behind `depth`, started from `hidden` [B, T, d].

    The earlier layers hand their input through, so this takes the remaining layers' time only. Right for
    models whose later layers see the earlier ones through the residual stream alone.
    """
    layers = decoder_layers(model)
    as_tuple = _returns_tuple(model, tokens)

    def skip(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if as_tuple else hidden_states

    skipped = list(layers[:depth])
    for layer in skipped:
        layer.forward = skip
    try:
        return replaced(model, tokens, depth, lambda _: hidden)
    finally:
        for layer in skipped:
            del layer.forward


def _returns_tuple(model: Any, tokens: torch.Tensor) -> bool:
    """Whether blocks return (hidden, ...) or hidden: it differs by architecture and version of transformers."""
    known = getattr(model, "_rsae_layer_returns_tuple", None)
    if known is None:
        seen: list[bool] = []
        handle = decoder_layers(model)[0].register_forward_hook(
            lambda _module, _inputs, output: seen.append(isinstance(output, tuple))
        )
        try:
            model(input_ids=tokens[:1, :1], use_cache=False)
        finally:
            handle.remove()
        known = model._rsae_layer_returns_tuple = seen[0]
    return known


@contextmanager
def tapped(model: Any, depth: int, function: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Put the residual at `depth` through `function` while the context is open."""
    layers = decoder_layers(model)
    if depth < len(layers):

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (function(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}

        handle = layers[depth].register_forward_pre_hook(before, with_kwargs=True)
    else:

        def after(_module: Any, _inputs: Any, output: Any) -> Any:
            return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

        handle = layers[depth - 1].register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
