"""The scale of the activations that an SAE reads, and conversion to the activations at hand.

A model's residual stream has norms of 1 or of 1,000. Stores scale it to a mean norm of sqrt(d_in), so that learning
rates and penalties mean the same everywhere. Saved SAEs take raw activations, in the model's units. An SAE carries its
`units`: the factor on raw activations that it expects (1.0 for raw ones, None for an SAE that only ever saw plain
tensors). Every function that takes an SAE and a store compares the two and converts, so that no caller has to.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from rsae_triton.activations.places import canonical, same_place
from rsae_triton.common.errors import ConfigError
from rsae_triton.common.names import hub_model, model_metadata
from rsae_triton.sae.making import making_of, reading_of, warn_of_reading

UNITS = "units"
"""Name in the metadata. Saved SAEs take raw activations and do not have it."""

_FACTORS = tuple(10 ** (k / 4) for k in range(-12, 13))
_ROWS = 64


def scale_of(activations: Any) -> float | None:
    """The factor by which a store multiplies the model's activations; None for a tensor, where it is unknown."""
    scale = None if isinstance(activations, Tensor) else getattr(activations, "scale", None)
    return float(scale) if isinstance(scale, int | float) else None


def scales_of(activations: Any) -> tuple[float, ...] | None:
    """`scale_of` as a tuple; a store of pairs has two."""
    scales = getattr(activations, "scales", None)
    scale = scale_of(activations)
    return tuple(scales) if isinstance(scales, tuple) else None if scale is None else (scale,)


@contextmanager
def reading(sae: Any, activations: Any, *, trains: bool = False) -> Iterator[None]:
    """Within the context, `sae` reads rows of `activations` (a store, or its scale); afterwards its own units again.

    Parameters are restored bit for bit. With `trains` this holds for frozen ones only, and the others keep what they
    learned. An SAE whose units are unknown is assumed to read these.
    """
    scales = (activations,) if isinstance(activations, float) else scales_of(activations)
    before = getattr(sae, "all_units", None)
    if scales is None or before is None or scales == before:
        yield
        return
    kept = {one: one.data for one in sae.parameters() if not (trains and one.requires_grad)}
    kept |= {} if trains else {one: one.data for one in sae.buffers()}
    for tensor, data in kept.items():
        tensor.data = data.clone()
    sae.to_units_(*scales)
    for tensor, data in list(kept.items()):
        if torch.equal(tensor.data, data):  # not in units of x, so that changes within the context are kept
            tensor.data = kept.pop(tensor)
    try:
        yield
    finally:
        sae.to_units_(*before)
        for tensor, data in kept.items():
            tensor.data = data


def take_note(sae: Any, activations: Any) -> None:
    """Records in the metadata what a store knows and the SAE did not: units, model, place, the scale of its scores."""
    scales, manifest = scales_of(activations), getattr(activations, "manifest", None)
    if scales is None or not isinstance(manifest, Mapping):
        return
    if sae.units is None:
        sae.units = scales[0]
        if len(scales) > 1:
            sae.units_out = scales[1]
    sae.metadata["activation_scale"] = scales[0]
    if len(scales) > 1:
        sae.metadata["activation_scale_out"] = scales[1]
    said = model_metadata(manifest["model"]) if isinstance(manifest.get("model"), str) else {}
    said |= {key: manifest[key] for key in ("hook_name", "hook_name_out") if isinstance(manifest.get(key), str)}
    said |= reading_of(manifest)
    if said.get("model_name") != hub_model(str(sae.metadata.get("model_name", said.get("model_name")))):
        said = {name: one for name, one in said.items() if not name.startswith("host")}  # the SAE names another model
    sae.metadata.update({name: one for name, one in said.items() if name not in sae.metadata})


Making = TypeVar("Making", bound=Callable[..., Any])


def in_store_units(make: Making) -> Making:
    """Decorates a function of an SAE (first argument) and `activations` that returns another SAE.

    Within the function the SAE reads the store's rows. Afterwards both SAEs read what the first one did, and copied
    weights are equal bit for bit.
    """
    signature = inspect.signature(make)

    @functools.wraps(make)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            given = signature.bind(*args, **options).arguments
        except TypeError:
            return make(*args, **options)  # the function reports missing arguments under its own name
        teacher, activations = next(iter(given.values())), given["activations"]
        if not isinstance(getattr(teacher, "metadata", None), dict):
            return make(*args, **options)
        check_place(teacher, activations, stacklevel=4)
        with reading(teacher, activations), torch.no_grad():
            rsae = make(*args, **options)
            mine, theirs = dict(rsae.named_parameters()), dict(teacher.named_parameters())
            copied = [one for one in mine.keys() & theirs.keys() if torch.equal(mine[one], theirs[one])]
        if teacher.all_units is not None:
            rsae.to_units_(*teacher.all_units)
        with torch.no_grad():
            for one in copied:
                mine[one].copy_(theirs[one])
        take_note(rsae, activations)
        return rsae

    return wrapped  # type: ignore[return-value]


def check_same_units(saes: Mapping[str, Any]) -> None:
    """Raises ConfigError if SAEs that are to read one plain tensor are known to read different units."""
    known = {name: units for name, sae in saes.items() if (units := getattr(sae, "all_units", None)) is not None}
    if len(set(known.values())) > 1:
        what = ", ".join(f"{name}: {value[0]:g} times the model's activations" for name, value in known.items())
        raise ConfigError(f"the SAEs read different units ({what}); give an ActivationStore, or use sae.to_units_(...)")


# --- places


def check_place(sae: Any, activations: Any, name: str = "the SAE", stacklevel: int = 3) -> None:
    """Raises ConfigError if a store was read from another model, or at another place, than the SAE's metadata say.

    If a name cannot be compared (a path, a module of another library), a warning is given instead.
    """
    manifest = getattr(activations, "manifest", None)
    if not isinstance(manifest, Mapping):
        return
    read = manifest.get("documents_file") is not None  # read by this package, which records how
    if read and making_of(sae.metadata).centred and not manifest.get("center_writing_weights"):
        warnings.warn(
            f"{name} says center_writing_weights=True, but these activations come from a model without it; read them "
            "again with load_host(..., center_writing_weights=True)",
            stacklevel=stacklevel,
        )
    if read:
        warn_of_reading(sae.metadata, manifest, name, stacklevel)
    for key, entry, same in (
        ("hook_name", "hook_name", same_hook),
        ("hook_name_out", "hook_name_out", same_hook),
        ("model_name", "model", same_model),
    ):
        ours, theirs = sae.metadata.get(key), manifest.get(entry)
        if not isinstance(ours, str) or not isinstance(theirs, str):
            continue
        answer = same(ours, theirs)
        if answer is None:
            warnings.warn(
                f"the activations were read at {theirs}, {name} says that it reads {ours}; unless these are two names "
                "of one place, extract them there",
                stacklevel=stacklevel,
            )
        elif not answer:
            raise ConfigError(
                f"the activations were read at {theirs}, {name} says that it reads {ours}; extract them there, or, if "
                f"these are two names of one thing, say so: sae.metadata[{key!r}] = {theirs!r}"
            )


_KNOWN = re.compile(r"blocks\.\d+\..+")
_MLP = re.compile(r"(blocks\.\d+)\.(?:hook_mlp_out|mlp\.hook_out)")


def same_hook(a: str, b: str) -> bool | None:
    """Whether two names mean the same place in a model; None if that cannot be told."""
    one, other = canonical(a), canonical(b)
    if same_place(one, other):
        return True
    if not _KNOWN.fullmatch(one) or not _KNOWN.fullmatch(other):
        return None
    # the same place, unless the model normalises the output of its MLPs
    mlps = _MLP.fullmatch(one), _MLP.fullmatch(other)
    return None if mlps[0] and mlps[1] and mlps[0][1] == mlps[1][1] else False


def same_model(a: str, b: str) -> bool | None:
    """Whether two names mean the same model, or one and its fine-tuned version; None if one is a path."""
    ids = [hub_model(one) for one in (a, b)]
    names = [re.sub(r"[^a-z0-9]", "", one.lower().rstrip("/").split("/")[-1].removesuffix(".gguf")) for one in ids]
    if names[0] in names[1] or names[1] in names[0]:
        return True
    paths = any(one.startswith((".", "/", "~")) or one.count("/") > 1 or one.endswith(".gguf") for one in ids)
    return None if paths else False


# --- plain tensors


@torch.no_grad()
def warn_of_units(sae: Any, x: Tensor, name: str = "the SAE", stacklevel: int = 3) -> None:
    """Warns, with the likely cause, if `sae` reconstructs x [n, d_in] worse than the mean of x would."""
    rows = x[:: max(1, len(x) // _ROWS)][:_ROWS].to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
    now = _fvu(sae, rows)
    if not now > 1:
        return
    found = {factor: _fvu(sae, rows * factor) for factor in _FACTORS}
    best = min(found, key=lambda factor: found[factor] if found[factor] == found[factor] else float("inf"))
    text = f"{name} reconstructs these activations worse than their mean does (fvu {now:.2f})"
    if found[best] < 0.7:
        text += (
            f". Multiplied by about {best:.2g} its fvu is {found[best]:.2f}: they are in other units than it reads. A "
            "store's rows are scaled, a saved SAE takes raw activations: give the store itself instead of "
            "store.tensor(), or use sae.to_units_(store.scale)"
        )
    else:
        text += "; they may come from another model, layer or hook, or the SAE is not trained"
    warnings.warn(text, stacklevel=stacklevel)


def _fvu(sae: Any, x: Tensor) -> float:
    x, y = sae.sides(x)
    error = (y - sae.decode(sae.encode(x), x)).double().square().sum()
    variance = (y.double() - y.double().mean(0)).square().sum()
    return float(error / variance) if float(variance) > 0 else float("nan")
