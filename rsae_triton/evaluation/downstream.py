"""The cost to the language model, in nats per token, of replacing its activations by their reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsae_triton.activations import ActivationStore, PairedStore
from rsae_triton.activations.packing import left_out
from rsae_triton.common.errors import NumericsError
from rsae_triton.evaluation.paired import mean_interval
from rsae_triton.evaluation.reconstruction import Codec, reconstruct


@dataclass(frozen=True)
class Splice:
    """How host activations become SAE inputs: x = scale * activation, at the positions that training kept.

    BOS tokens and positions whose norm exceeds `norm_limit` (host units; None: no limit) are left as they are, for SAEs
    and ablations alike, because training dropped them; and so are positions outside `seqpos_slice` (start, stop, step)
    and those of `exclude_tokens`, where a store leaves these out. A transcoder reads at `read_at` and writes at
    `hook_name`, there in units of `scale_out`.
    """

    hook_name: str
    scale: float = 1.0
    norm_limit: float | None = None
    read_at: str | None = None
    scale_out: float | None = None
    seqpos_slice: tuple[int | None, ...] | None = None
    exclude_tokens: tuple[int, ...] = ()

    def left(self, tokens: Tensor, bos: int | None) -> Tensor:
        """Marks where activations for tokens [B, T] are left unchanged, whatever their norms: bool [B, T]."""
        made = {"seqpos_slice": self.seqpos_slice, "exclude_tokens": self.exclude_tokens}
        left = left_out(tokens, made)
        if bos is None:
            left[:, 0] = True
            return left
        return left | (tokens == bos)

    def replacement(self, function: Callable[[Tensor], Tensor], left: Tensor | None = None) -> Callable[..., Tensor]:
        """Returns the function to give the host as `replace`, from one that maps [n, d_in] in SAE units to [n, d_out].

        left: bool [B, T], of `left`; the first of every row when None.
        """

        def replace(resid: Tensor, read: Tensor | None = None) -> Tensor:
            source = resid if read is None else read
            norms = source.float().norm(dim=-1)
            seen = torch.ones_like(norms, dtype=torch.bool)
            if left is None:
                seen[:, 0] = False
            else:
                seen &= ~left.to(seen.device)
            if self.norm_limit is not None:
                seen &= norms <= self.norm_limit
            out = resid.clone()
            scale_out = self.scale if self.scale_out is None else self.scale_out
            out[seen] = (function(source[seen].float() * self.scale) / scale_out).to(out.dtype)
            return out

        return replace


@dataclass(frozen=True)
class Downstream:
    """Mean scores in nats, over sequences, of the mean over predicted tokens. Intervals are 95 %, over sequences.

    ce: cross-entropy with the reconstruction in place. delta_ce: ce - ce_clean, paired by sequence. kl: KL(clean ||
    spliced) of the next-token distributions. loss_recovered: (ce_zero - ce) / (ce_zero - ce_clean), where ce_zero
    is the cross-entropy with the activation set to zero; loss_recovered_mean: the same with ce_mean, the
    activation set to its mean over training tokens.
    """

    ce: float
    delta_ce: float
    delta_ce_low: float
    delta_ce_high: float
    loss_recovered: float
    loss_recovered_mean: float
    n_sequences: int
    kl: float
    kl_low: float
    kl_high: float
    ce_clean: float
    ce_zero: float
    ce_mean: float


class Spliced(NamedTuple):
    """Means over the predicted tokens of each sequence, float64 [n_sequences]: the loss, and KL(clean || spliced)."""

    ce: Tensor
    kl: Tensor


@torch.no_grad()
def splice_sequences(
    host: Any,
    codecs: Mapping[str, Codec],
    tokens: Tensor,
    splice: Splice,
    mean: Tensor,
    *,
    counted: Tensor | None = None,
    batch: int = 8,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Spliced]:
    """Splices every codec into the host in one pass over the text, so that all are scored on the same sequences.

    Args:
        host: a `HostModel`. codecs: by name. tokens: [n_sequences, context], BOS first.
        splice: the place and the units. mean: [d_in] in SAE units, for mean ablation.
        counted: bool [n_sequences, context - 1], False where a prediction does not count; all when None.
        batch: sequences at once. progress: called with the number of sequences done.

    Returns:
        "clean", "zero" and "mean" for the host as it is and under the ablations, "sae:NAME" for every codec.

    Raises:
        NumericsError: fewer than two sequences (no interval), a sequence without a prediction that counts, or a
            loss that is not finite.
    """
    if len(tokens) < 2:
        raise NumericsError(f"{len(tokens)} held-out sequences give no interval; use at least 2, better 100")
    if counted is not None and not bool(counted.any(1).all()):
        raise NumericsError("a sequence has no prediction that counts; leave such sequences out")

    def through(codec: Codec) -> Callable[[Tensor], Tensor]:
        return lambda x: reconstruct(codec, x.to(codec.W_dec.dtype)).float()

    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "zero": lambda x: x.new_zeros(len(x), len(mean)),
        "mean": lambda x: mean.to(x).expand(len(x), len(mean)),
        **{f"sae:{name}": through(codec) for name, codec in codecs.items()},
    }
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in ("clean", *functions)}
    bos = getattr(host, "bos_token_id", None)
    places: dict[str, Any] = {} if splice.read_at is None else {"read_at": splice.read_at}
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        left = splice.left(part, bos)
        replacements: dict[str, Callable[[Tensor], Tensor] | None] = {
            "clean": None,
            **{name: splice.replacement(one, left) for name, one in functions.items()},
        }
        use = torch.ones(part.shape[0], part.shape[1] - 1) if counted is None else counted[start : start + batch]
        for name, result in host.splice(part, splice.hook_name, replacements, kl=True, **places).items():
            for values, per_token in zip(found[name], (result.nll, result.kl), strict=True):
                weights = use.to(per_token)
                values.append(((per_token * weights).sum(1) / weights.sum(1)).double().cpu())
        if progress is not None:
            progress(len(part))
    spliced = {name: Spliced(torch.cat(ce), torch.cat(kl)) for name, (ce, kl) in found.items()}
    for name, one in spliced.items():
        if not bool(torch.isfinite(torch.cat(one)).all()):
            raise NumericsError(f"the language model's loss under {name!r} is not finite on some sequence")
    return spliced


def splice_loss(
    host: Any, codecs: Mapping[str, Codec], tokens: Tensor, splice: Splice, mean: Tensor, **options: Any
) -> dict[str, Downstream]:
    """The cost of each codec to the host; arguments and errors are those of `splice_sequences`."""
    spliced = splice_sequences(host, codecs, tokens, splice, mean, **options)
    return {name: downstream(spliced, f"sae:{name}") for name in codecs}


def downstream(spliced: Mapping[str, Spliced], name: str) -> Downstream:
    """Computes the scores of one entry, `name`, of the result of `splice_sequences`."""
    ce, clean = spliced[name].ce, spliced["clean"].ce
    delta, kl = mean_interval(ce - clean), mean_interval(spliced[name].kl)
    level = {one: float(spliced[one].ce.mean()) for one in ("clean", "zero", "mean", name)}
    recovered, recovered_mean = (
        (level[one] - level[name]) / (level[one] - level["clean"]) if level[one] != level["clean"] else float("nan")
        for one in ("zero", "mean")
    )
    return Downstream(
        ce=level[name],
        delta_ce=delta.mean,
        delta_ce_low=delta.low,
        delta_ce_high=delta.high,
        loss_recovered=recovered,
        loss_recovered_mean=recovered_mean,
        n_sequences=len(ce),
        kl=kl.mean,
        kl_low=kl.low,
        kl_high=kl.high,
        ce_clean=level["clean"],
        ce_zero=level["zero"],
        ce_mean=level["mean"],
    )


def splice_of(activations: ActivationStore | PairedStore) -> Splice:
    """The hook, the scale, and what is left as it is, with which a store was made."""
    manifest = activations.manifest
    positions = manifest.get("seqpos_slice")
    made: dict[str, Any] = {
        "norm_limit": manifest.get("norm_limit"),
        "seqpos_slice": None if positions is None else tuple(positions),
        "exclude_tokens": tuple(manifest.get("exclude_tokens", ())),
    }
    if isinstance(activations, PairedStore):
        inside, outside = activations.scales
        return Splice(manifest["hook_name_out"], inside, read_at=manifest["hook_name"], scale_out=outside, **made)
    return Splice(manifest["hook_name"], activations.scale, **made)
