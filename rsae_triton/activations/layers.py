"""The residual stream of a Hugging Face model: read it, replace it, or resume the forward pass from it.

`depth` counts the layers whose output has been added: hook_resid_pre of layer L is depth L, hook_resid_post
of layer L is depth L + 1.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from rsae_triton.common.errors import SourceError

Tap = Callable[[Callable[[torch.Tensor], Any]], AbstractContextManager[None]]
"""A context that puts the activations at one place through a function."""
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_AFTER_MLP = (
    # Gemma 2 and 3, OLMo 2: the MLP's contribution to the residual stream passes through it
    "post_feedforward_layernorm"
)


class _Reached(Exception):  # noqa: N818  (a signal that ends the forward pass, not an error)
    pass


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """Returns `model`'s list of transformer blocks. Raises SourceError for an architecture without one."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise SourceError(
        f"{type(model).__name__} keeps its layers in no list of {count} modules; use a decoder-only model"
    )


def read(model: Any, tokens: torch.Tensor, depth: int) -> torch.Tensor:
    """Returns the residual [B, T, d] at `depth`; the layers behind it are not run."""
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


def read_many(model: Any, tokens: torch.Tensor, taps: dict[str, Tap]) -> dict[str, torch.Tensor]:
    """Returns the activations [B, T, d] at several places, from one pass that ends at the last of them."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def take(hidden: torch.Tensor) -> torch.Tensor:
            # A copy, because some layers write into their input.
            found[name] = hidden.clone()
            if len(found) == len(taps):
                raise _Reached
            return hidden

        return take

    with ExitStack() as stack:
        for name, tap in taps.items():
            stack.enter_context(tap(keep(name)))
        try:
            model(input_ids=tokens, use_cache=False)
        except _Reached:
            return found
    raise RuntimeError(f"the forward pass ended without running {', '.join(sorted(taps.keys() - found.keys()))}")


def replaced(
    model: Any, tokens: torch.Tensor, depth: int, replace: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Returns logits [B, T, vocab] of a whole forward pass in which `replace` is applied to the residual at `depth`."""
    with tapped(model, depth, replace):
        return model(input_ids=tokens, use_cache=False).logits


def resumed(model: Any, tokens: torch.Tensor, depth: int, hidden: torch.Tensor) -> torch.Tensor:
    """Returns logits [B, T, vocab] of the layers behind `depth`, started from `hidden` [B, T, d].

    The earlier layers pass their input through, so only the remaining layers take time. This is right for models whose
    later layers depend on earlier ones through the residual stream only.
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


def tap(model: Any, name: str) -> Tap | None:
    """Returns how to reach a place, by TransformerLens' name, in a Hugging Face model; None if only a bridge can.

    The places are hook_resid_pre and hook_resid_post, mlp.hook_in, mlp.hook_out and hook_mlp_out (the MLP's
    contribution to the residual stream).
    """
    found = re.fullmatch(
        r"blocks\.(\d+)\.(hook_resid_pre|hook_resid_post|mlp\.hook_in|mlp\.hook_out|hook_mlp_out)", name
    )
    if not found or int(found[1]) >= len(layers := decoder_layers(model)):
        return None
    layer, place = layers[int(found[1])], found[2]
    if place.startswith("hook_resid"):
        return functools.partial(tapped, model, int(found[1]) + (place == "hook_resid_post"))
    module = next((one for one in (getattr(layer, part, None) for part in _MLP) if one is not None), None)
    if place == "hook_mlp_out":
        module = getattr(layer, _AFTER_MLP, module)
    return None if module is None else functools.partial(tapped_module, module, place == "mlp.hook_in")


@contextmanager
def tapped_module(module: torch.nn.Module, inside: bool, function: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Within the context, applies `function` to a module's first input, or to its output."""
    handle = (
        module.register_forward_pre_hook(functools.partial(_before, function), with_kwargs=True)
        if inside
        else module.register_forward_hook(functools.partial(_after, function))
    )
    try:
        yield
    finally:
        handle.remove()


def _before(
    function: Callable[[torch.Tensor], Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    if args:
        return (function(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}


def _after(function: Callable[[torch.Tensor], Any], _module: Any, _inputs: Any, output: Any) -> Any:
    return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)


def _returns_tuple(model: Any, tokens: torch.Tensor) -> bool:
    """Whether blocks return (hidden, ...) or hidden, which depends on the architecture and the version of
    transformers."""
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
    """Within the context, applies `function` to the residual at `depth`."""
    layers = decoder_layers(model)
    inside = depth < len(layers)
    with tapped_module(layers[depth if inside else depth - 1], inside, function):
        yield
