"""Loads saved SAEs and the held-out activations they are scored on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rsae_triton.activations import (
    ActivationStore,
    HostModel,
    PairedStore,
    check_corpus,
    extract,
    extract_pairs,
    load_corpus,
    load_host,
    split_three_ways,
)
from rsae_triton.activations.places import canonical
from rsae_triton.common.checks import check_seed
from rsae_triton.common.errors import ConfigError, FormatError, ShapeError, SourceError
from rsae_triton.common.files import read_json
from rsae_triton.common.hub import local_path
from rsae_triton.common.names import EMBEDDED, hub_model
from rsae_triton.evaluation.downstream import Splice, splice_of
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.making import making_of, warn_of_making
from rsae_triton.sae.pretrained import CONFIG_FILE
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.topk_rational import RATIONAL
from rsae_triton.sae.transcoder import RationalTranscoder, Transcoder
from rsae_triton.teachers import load_teacher


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """The language model, and the place in it."""

    model: str | None = None
    """Host model: smollm2, a .gguf file, a model folder, or a hub id; what the SAE says it is for when not given."""
    hook: str | None = None
    """Where the SAE reads, in TransformerLens' names; what the SAE says when not given."""
    device: str | None = None
    """cpu or cuda; CUDA where there is one when not given."""
    dtype: str | None = None
    """Dtype of the host model, such as float32. Default: bfloat16 where the hardware multiplies it, else float32."""


@dataclass(frozen=True, kw_only=True)
class TextOptions(HostOptions):
    """The text, and how much of it to use."""

    text: tuple[str, ...] = ("demo",)
    """Text to read activations from: demo, files, folders, or a hub dataset."""
    tokens: int = 10_000
    """Held-out tokens."""
    seed: int | None = None
    """Seed of the split of the text. Default: the one the SAE says it was trained with, else 0."""
    whole_text: bool = False
    """Use all of the text, not only its test part: for an SAE that was trained on something else."""


def check_text(options: TextOptions) -> None:
    """Checks the options about the text before anything is loaded (ConfigError, SourceError)."""
    if options.tokens < 1:
        raise ConfigError(f"--tokens is {options.tokens}; give a positive number")
    if options.seed is not None:
        check_seed(options.seed)
    check_corpus(options.text)


def load_sae(source: str | Path) -> SparseAutoencoder:
    """Loads any saved SAE: the folder of a Rational SAE, or whatever `load_teacher` reads.

    Raises:
        FormatError: it is no SAE, or a damaged one.
        SourceError: a hub id cannot be fetched.
    """
    folder = Path(source)
    if not folder.exists():
        try:
            folder = local_path(source)  # also from the hub, where people push their Rational SAEs
        except (FormatError, SourceError):
            return load_teacher(str(source))  # it accepts more kinds of names, and its errors say what is wrong
    config = folder / CONFIG_FILE
    architecture = read_json(config).get("architecture") if config.is_file() else None
    kinds: tuple[type[FusedRationalSAE], ...] = (*RATIONAL, RationalTranscoder)
    for kind in kinds:
        if architecture in kind.architectures():
            return kind.from_pretrained(folder)
    return load_teacher(str(source))


def load_saes(paths: Sequence[Path]) -> dict[str, SparseAutoencoder]:
    """Loads SAEs and names each by the shortest end of its path that tells it from the others.

    Raises:
        ConfigError: no path, or the same path twice.
        FormatError: see `load_sae`.
    """
    if not paths:
        raise ConfigError("no SAE to evaluate; give the folder of at least one")
    real = [Path(os.path.realpath(path)) for path in paths]  # Path.resolve raises for a link that points to itself
    if len(set(real)) < len(paths):
        raise ConfigError(f"{', '.join(map(str, paths))} names an SAE twice; give each once")
    depth = 1
    parts = [path.parts for path in real]
    while len({part[-depth:] for part in parts}) < len(paths):
        depth += 1
    return {str(Path(*part[-depth:])): load_sae(path) for part, path in zip(parts, paths, strict=True)}


def agreed(saes: Mapping[str, SparseAutoencoder], key: str, given: str | None) -> str | None:
    """Returns `given`, else the value of `key` that the SAEs' metadata agree on; None if none has one.

    Raises:
        ConfigError: the SAEs disagree.
    """
    if given is not None:
        return given
    said = {name: str(sae.metadata[key]) for name, sae in saes.items() if sae.metadata.get(key)}
    one_name = {"model_name": hub_model, "hook_name": canonical, "hook_name_out": canonical}.get(key, str)
    if len(set(map(one_name, said.values()))) > 1:
        option = {"model_name": "--model", "hook_name": "--hook"}.get(key, key)
        what = ", ".join(f"{name}: {value}" for name, value in said.items())
        raise ConfigError(f"the SAEs are for different places ({what}); evaluate them apart, or say which by {option}")
    return next(iter(said.values()), None)


def open_host(options: HostOptions, saes: Mapping[str, SparseAutoencoder]) -> HostModel:
    """Loads the host model that the SAEs read, at their hook, and checks their width.

    Raises:
        ConfigError, SourceError: see `load_host`; also if the SAEs are for different places.
        ShapeError: an SAE has another width.
    """
    model = agreed(saes, "model_name", options.model) or EMBEDDED
    if options.model is None:
        model = agreed(saes, "host", None) or model
    hook = agreed(saes, "hook_name", options.hook)
    said = {name: making_of(sae.metadata) for name, sae in saes.items()}
    dtypes = {one.dtype for one in said.values()} - {None}
    dtype = options.dtype or (dtypes.pop() if len(dtypes) == 1 else None)
    centred = {one.centred for one in said.values()}
    if len(centred) > 1:
        which = ", ".join(name for name, one in said.items() if one.centred)
        raise ConfigError(f"{which} says center_writing_weights=True and the others do not; evaluate them apart")
    host = load_host(
        model,
        device=options.device,
        dtype=dtype,
        hook_name=hook,
        center_writing_weights="where possible" if True in centred else False,
    )
    for name, sae in saes.items():
        warn_of_making(sae.metadata, name)
    if hook is None:
        warnings.warn(
            f"no SAE says at which hook it reads; taking {host.default_hook}, which is a guess: say it with --hook",
            stacklevel=2,
        )
    width = host.hook_width()
    for name, sae in saes.items():
        if sae.d_in != width:
            raise ShapeError(
                f"{name} has d_in={sae.d_in}, but {host.name} has {width} at {host.default_hook}; "
                "give the --model and --hook it was trained on"
            )
    return host


def _context(saes: Mapping[str, SparseAutoencoder]) -> int:
    """The number of tokens in a context: the one that the SAEs were trained with, if their metadata agree."""
    said = {one.context or 128 for one in (making_of(sae.metadata) for sae in saes.values())}
    return said.pop() if len(said) == 1 else 128


def _reading(saes: Mapping[str, SparseAutoencoder]) -> dict[str, Any]:
    """The positions that the SAEs were trained on, as arguments of `extract`.

    Raises:
        ConfigError: the SAEs disagree.
    """
    said = {name: making_of(sae.metadata).reading for name, sae in saes.items()}
    first = next(iter(said.values()))
    if any(one != first for one in said.values()):
        what = "; ".join(
            f"{name}: {', '.join(f'{key}={value}' for key, value in one.items()) or 'all positions, BOS first'}"
            for name, one in said.items()
        )
        raise ConfigError(f"the SAEs were trained on different positions ({what}); evaluate them apart")
    return first


class HeldOut(NamedTuple):
    """Held-out activations in the SAEs' training units: x [n_tokens, d_in], the context of each row, and how host
    activations are converted to these units (`splice`)."""

    x: torch.Tensor
    store: ActivationStore | PairedStore
    splice: Splice
    mean: torch.Tensor


def open_held_out(options: TextOptions, saes: Mapping[str, SparseAutoencoder], host: HostModel) -> HeldOut:
    """Reads the test part of the text, and converts the SAEs (saved in the host's units) in place to the units of x.

    The units are those the first SAE was trained in, if its metadata says so (activation_scale); otherwise they are
    such that the mean norm of x is sqrt(d_in).

    Raises:
        ConfigError: the text is too small to split.
    """
    documents = load_corpus(list(options.text))
    try:
        seed = options.seed if options.seed is not None else int(agreed(saes, "split_seed", None) or 0)
        check_seed(seed)
    except ValueError as error:  # metadata can come from anywhere
        raise FormatError(f"the split_seed in the SAE's cfg.json is no seed ({error}); give --seed") from error
    if not options.whole_text:
        documents = split_three_ways(documents, seed=seed)[2]
    context = min(_context(saes), host.max_context)
    reads = _reading(saes)
    outside = agreed(saes, "hook_name_out", None)
    if len({isinstance(sae, Transcoder) for sae in saes.values()}) > 1:
        raise ConfigError("SAEs and transcoders are scored on other things; evaluate them apart")
    if isinstance(next(iter(saes.values())), Transcoder):
        if outside is None:
            raise ConfigError("the transcoder does not say where it writes: set hook_name_out in its metadata")
        pairs = extract_pairs(
            host,
            documents,
            host.default_hook,
            outside,
            options.tokens,
            split="eval",
            seed=seed,
            context=context,
            **reads,
        )
        for sae in saes.values():
            assert isinstance(sae, Transcoder)
            sae.to(host.device).to_units_(*pairs.scales)
        return HeldOut(pairs.tensor().to(host.device), pairs, splice_of(pairs), pairs.mean)
    store = extract(host, documents, n_tokens=options.tokens, split="eval", seed=seed, context=context, **reads)
    first = next(iter(saes.values())).metadata
    try:
        scale = float(first.get("activation_scale") or store.scale)
    except (TypeError, ValueError) as error:  # metadata can come from anywhere
        raise FormatError(f"the activation_scale in the SAE's cfg.json is no number ({error}); mend it") from error
    for sae in saes.values():
        sae.to(host.device).to_units_(scale)
    ratio = scale / store.scale
    splice = replace(splice_of(store), scale=scale)
    return HeldOut((store.tensor() * ratio).to(host.device), store, splice, store.mean * ratio)
