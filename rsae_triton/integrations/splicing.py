"""Runs a language model with its activations at one place replaced by an SAE's reconstruction.

Works with TransformerLens 3 and 4 (`TransformerBridge`, and `HookedTransformer` where it exists) and with plain Hugging
Face models; none of them is imported here.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from rsae_triton.activations.host import HostModel
from rsae_triton.activations.layers import decoder_layers, tap, tapped
from rsae_triton.activations.places import canonical, other_names, suggestion
from rsae_triton.common.checks import check_number
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.sae.base import SparseAutoencoder, check_sae
from rsae_triton.sae.making import making_of
from rsae_triton.sae.transcoder import Transcoder

_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


@contextmanager
def splice(
    model: Any,
    sae: SparseAutoencoder,
    hook_name: str | None = None,
    *,
    use_error_term: bool = False,
    norm_limit: float | None = None,
) -> Iterator[None]:
    """Within the context, activations at one place of `model` are replaced by `sae`'s reconstruction of them.

        with splice(model, rsae):
            logits = model(tokens)

    Contexts can be nested, for several SAEs. Afterwards the model is as before, even if the body raises.

    Args:
        model: a TransformerLens model, a Hugging Face model, or the host that `load_host` returns.
        sae: any SAE of the package; if it does not take raw activations (`sae.units` is not 1), activations are
            converted.
        hook_name: the place, by any of its names (`rsae_triton.activations.places`); the one in the SAE's metadata when
            None. In a Hugging Face model, names of residual streams and MLPs work, or the path of a module whose output
            is replaced. A transcoder reads there, and writes at its metadata's hook_name_out. Attention heads [batch,
            token, head, d_head] are flattened for the SAE.
        use_error_term: add the reconstruction error, without its gradient: the model's output does not change, and
            gradients go through the code.
        norm_limit: activations with a larger norm are not replaced (attention sinks such as BOS have a hundred times
            the usual norm, and no SAE has been trained on them).

    Raises:
        ConfigError: no such place, or the model ran without computing that place.
        ShapeError: activations there have another width.
    """
    check_sae("sae", sae)
    if norm_limit is not None:
        check_number("norm_limit", norm_limit, least=0)
    if isinstance(sae, Transcoder):
        with _transcoded(model, sae, hook_name, use_error_term=use_error_term, norm_limit=norm_limit):
            yield
        return
    count = [0]
    replace = replacement(sae, use_error_term=use_error_term, norm_limit=norm_limit, count=count)
    with replaced(model, sae, hook_name, replace, count):
        yield


@contextmanager
def replaced(
    model: Any, sae: SparseAutoencoder, hook_name: str | None, replace: Callable[[Tensor], Tensor], count: list[int]
) -> Iterator[None]:
    """Within the context, the activations that `sae` reads go through `replace`; see `splice`.

    Args:
        model: see `splice`; also a `HostModel`. count: [number of calls of `replace`], which `replace` increments.
    """
    if isinstance(model, HostModel):
        with ExitStack() as stack:
            try:
                stack.enter_context(replaced(model.model, sae, hook_name, replace, count))
            except ConfigError:  # a place that only the other library knows
                if model.bridge is None:
                    raise

            def also(bridge: Any) -> None:  # whichever of them is run, and the bridge may be made later
                stack.enter_context(replaced(bridge, sae, hook_name, replace, count))

            with model.lens.when_made(also):
                yield
        return
    if not hasattr(model, "register_forward_pre_hook"):
        raise ConfigError(f"model is a {type(model).__name__}; give a TransformerLens or Hugging Face model")
    place = hook_name or sae.metadata.get("hook_name")
    if not place:
        raise ConfigError("the SAE's metadata names no hook_name; pass it: where in the model is the SAE to go?")
    _check_centred(model, sae)
    ran: list[bool] = []
    watch = model.register_forward_pre_hook(lambda *_: ran.append(True))
    try:
        with (_lens if hasattr(model, "hook_dict") else _huggingface)(model, str(place), replace):
            yield
    finally:
        watch.remove()
    if ran and not count[0]:
        raise ConfigError(f"the model ran, but never computed {place}; the SAE was not spliced in")


def _check_centred(model: Any, sae: SparseAutoencoder) -> None:
    """Warns if the SAE says that its activations were centred, and the model's embedding is not centred."""
    if not making_of(sae.metadata).centred:
        return
    embedding = getattr(model, "W_E", None)
    if embedding is None and hasattr(model, "get_input_embeddings"):
        embedding = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(embedding, Tensor) or not embedding.numel():
        return
    rows = embedding.detach()[:256].float()
    if float(rows.mean(-1).abs().max()) > 1e-3 * float(rows.std()):
        warnings.warn(
            "the SAE says center_writing_weights=True and the model's embedding is not centred: its activations are "
            "not those the SAE was trained on (TransformerLens: center_writing_weights=True; here: load_host(..., "
            "center_writing_weights=True).model)",
            stacklevel=4,
        )


@contextmanager
def _transcoded(
    model: Any, sae: Transcoder, hook_name: str | None, *, use_error_term: bool, norm_limit: float | None
) -> Iterator[None]:
    """Reads at one place and writes at the other, both in units of the model's activations."""
    place, outside = hook_name or sae.metadata.get("hook_name"), sae.metadata.get("hook_name_out")
    if not place:
        raise ConfigError("the transcoder's metadata names no hook_name; pass it: where in the model does it read?")
    if not outside:
        raise ConfigError("the transcoder's metadata names no hook_name_out: where in the model does it write?")
    units, units_out = sae.all_units or (1.0, 1.0)
    read: list[Tensor] = []
    count = [0]

    def take(x: Tensor) -> Tensor:
        if x.shape[-1] != sae.d_in:
            raise ShapeError(f"activations at {place} have shape {tuple(x.shape)}, but d_in={sae.d_in}")
        read[:] = [x]
        return x

    def put(y: Tensor) -> Tensor:
        count[0] += 1
        if not read:
            raise ConfigError(f"{outside} is computed before {place}; the transcoder has nothing to read yet")
        x = read[0].to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
        new = (sae(x * units) / units_out).to(device=y.device, dtype=y.dtype)
        if new.shape != y.shape:
            raise ShapeError(
                f"activations at {outside} have shape {tuple(y.shape)}, the transcoder gives {tuple(new.shape)}"
            )
        if use_error_term:
            new = new + (y - new).detach()
        if norm_limit is not None:
            new = torch.where(read[0].float().norm(dim=-1, keepdim=True) > norm_limit, y, new)
        return new

    def reader(x: Tensor) -> Tensor:
        count[0] += 1
        return take(x)

    with replaced(model, sae, str(outside), put, count), replaced(model, sae, str(place), reader, count):
        yield


def replacement(
    sae: SparseAutoencoder, *, use_error_term: bool, norm_limit: float | None, count: list[int]
) -> Callable[[Tensor], Tensor]:
    """Returns the function that replaces activations [..., d_in]; count[0] is the number of its calls."""

    def replace(x: Tensor) -> Tensor:
        count[0] += 1
        heads = x.shape
        if x.shape[-1] != sae.d_in and x.dim() > 3 and math.prod(x.shape[2:]) == sae.d_in:
            x = x.flatten(2)
        if x.shape[-1] != sae.d_in:
            raise ShapeError(f"activations there have shape {tuple(heads)}, but the SAE has d_in={sae.d_in}")
        own = x.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
        units = sae.units
        new = sae(own) if units in (None, 1.0) else sae(own * units) / units
        if use_error_term:
            with torch.no_grad():
                error = own - new
            new = new + error
        new = new.to(device=x.device, dtype=x.dtype)
        if norm_limit is not None:
            new = torch.where(x.float().norm(dim=-1, keepdim=True) > norm_limit, x, new)
        return new.reshape(heads)

    return replace


def hook_points(model: Any) -> dict[str, Any]:
    """The places of a TransformerLens model by all their names, since SAELens' bridge omits the aliases from
    hook_dict."""
    found: dict[str, Any] = {}
    for cls in reversed(type(model).__mro__):
        if isinstance(inherited := vars(cls).get("hook_dict"), property):
            found.update(inherited.__get__(model))
    return found or model.hook_dict


@contextmanager
def _lens(model: Any, place: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    points = hook_points(model)
    if place not in points:
        place = next((one for one in other_names(place) if one in points), place)
    if place not in points:
        raise ConfigError(
            f"the model has no hook {place!r}; {suggestion(place, list(points), 'a name of model.hook_dict')} "
            f"(model.hook_dict has {len(points)})"
        )
    point = points[place]
    before = list(point.fwd_hooks)
    # Permanent for TransformerLens, so that a run_with_hooks in the body does not remove it; it is removed here.
    point.add_hook(lambda value, hook: replace(value), dir="fwd", is_permanent=True)
    added = [handle for handle in point.fwd_hooks if handle not in before]
    try:
        yield
    finally:
        for handle in added:
            handle.hook.remove()
            if handle in point.fwd_hooks:
                point.fwd_hooks.remove(handle)


@contextmanager
def _huggingface(model: Any, place: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    place = canonical(place)
    residual = _RESIDUAL.fullmatch(place)
    if residual and residual[2] == "pre" and int(residual[1]) == len(decoder_layers(model)):
        place = f"blocks.{int(residual[1]) - 1}.hook_resid_post"
        residual = _RESIDUAL.fullmatch(place)
    if residual:
        layers = len(decoder_layers(model))
        if int(residual[1]) >= layers:
            raise ConfigError(f"the model has {layers} layers, 0 to {layers - 1}; there is no {place}")
        with tapped(model, int(residual[1]) + (residual[2] == "post"), replace):
            yield
        return
    if (reach := tap(model, place)) is not None:
        with reach(replace):
            yield
        return
    try:
        module = model.get_submodule(place)
    except AttributeError as error:
        names = [name for name, _ in model.named_modules()]
        raise ConfigError(
            f"the model has neither a module {place!r} nor is that a place of a residual stream or an MLP, such as "
            f"blocks.0.hook_resid_post; {suggestion(place, names, 'a name of model.named_modules()')}"
        ) from error

    def after(_module: Any, _inputs: Any, output: Any) -> Any:
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
