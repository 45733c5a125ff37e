"""Adds rounds to any SAE without training: the weights stay bit-equal, and l0 stays what it was.

Two things are chosen on a sample of activations: the numbers a, b and eta that all features start from, by the error;
and the thresholds of the gates, by l0. The thresholds are the teacher's, shifted by one constant per gate.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.checks import check_integer, check_number, check_seed
from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.ops.encode import product_dtype
from rsae_triton.ops.reference import GateTensors
from rsae_triton.ops.rounds import Walk, candidates
from rsae_triton.ops.tiles import wide
from rsae_triton.remez import fit_gate
from rsae_triton.sae.added import AddedRounds, CodeScores, scores
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.batch_topk import BatchTopKSAE
from rsae_triton.sae.gate import RationalGate
from rsae_triton.sae.like_teacher import ramp_width, sample, teacher_thresholds
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.rounds import EPSILON, STARTS, check_rounds
from rsae_triton.sae.topk_rational import TopKRationalSAE
from rsae_triton.sae.units import check_place, in_store_units, reading

SEARCHED = 2048
"""Number of tokens for the search of a, b and eta; three numbers need no more."""
STEPS = (0.2, 0.1)
"""The changes that are tried on each of them, as long as they help."""
LIMITS = (-0.5, 1.5)
LEAST_WEIGHT = 1e-6
"""The smallest weight of a dimension, as a share of the mean one; a sum in float32 keeps nothing of a smaller one."""
TRIES = 8
"""Attempts to compensate for codes that the last search makes negative."""
Starts = tuple[float, float, float]


@in_store_units
@torch.no_grad()
def with_rounds(
    sae: SparseAutoencoder,
    rounds: int,
    activations: Tensor | Any,
    *,
    target_l0: float | None = None,
    weights: Tensor | None = None,
    n_tokens: int = 8192,
    seed: int = 0,
) -> FusedRationalSAE:
    """Returns the same SAE with an encoder of `rounds` rounds. Nothing is trained, and every weight stays bit-equal.

    Existing rounds are kept; if more are needed, the last one is repeated. `sae` itself is not changed.

    Args:
        sae: a teacher of any family, or a gated Rational SAE.
        rounds: the total number; 1 removes all further rounds.
        activations: an `ActivationStore`, or [n, d_in] in the SAE's units; best of text that the SAE was not trained
            on, so that l0 on other text is the same.
        target_l0: mean number of active features; that of `sae` on these activations when None.
        weights: [d_in], how much an error counts in each dimension of the activations, for the search and the
            correction of further rounds; only their ratios matter. `rsae_triton.dimension_weights(host, activations)`
            measures what a language model listens to. None: all count the same.
        n_tokens: size of the sample of activations. seed: of the sample.

    Raises:
        ConfigError: this SAE cannot have these rounds, or has rounds already that weigh dimensions otherwise.
        ShapeError, NumericsError: activations or weights that do not fit or cannot be used.
    """
    check_seed(seed)
    check_integer("n_tokens", n_tokens, 1)
    if target_l0 is not None:
        check_number("target_l0", target_l0, above=0, most=sae.d_sae)
    weights = check_weights(weights, sae.d_in)
    x = sample(activations, sae, n_tokens, seed)
    before = scores(sae, x)
    made = gated(sae, x)
    check_rounds(rounds, made.gate.spec())
    facts = add_rounds(made, rounds, x, before.l0 if target_l0 is None else target_l0, before, weights)
    if facts.caution:
        warnings.warn(facts.caution, stacklevel=4)
    made.metadata["rounds"] = {**asdict(facts), "summary": facts.summary}
    return made


def check_weights(weights: Any, d_in: int) -> Tensor | None:
    """Returns weights of dimensions with mean 1, on the CPU. Raises ShapeError or NumericsError."""
    if weights is None:
        return None
    weights = torch.as_tensor(weights).detach().float().cpu()
    if weights.shape != (d_in,):
        raise ShapeError(f"weights have shape {tuple(weights.shape)}; give one number per dimension, [d_in={d_in}]")
    if not bool((weights.isfinite() & (weights > 0)).all()):
        raise NumericsError("weights of dimensions must be positive and finite")
    relative = (weights.double() / weights.double().mean()).float()
    if float(relative.min()) < LEAST_WEIGHT:
        raise NumericsError(
            f"the smallest weight of a dimension is {float(relative.min()):.1g} of the mean one; it may not be below "
            f"{LEAST_WEIGHT:g}: use weights.clamp_min(1e-3 * weights.mean())"
        )
    return relative


def add_rounds(
    sae: FusedRationalSAE, rounds: int, x: Tensor, target_l0: float, before: CodeScores, weights: Tensor | None = None
) -> AddedRounds:
    """Adds rounds to `sae` in place. before: on the same x, of the code to compare with. weights: as in `with_rounds`,
    with mean 1."""
    had = sae.refinement
    same = had is None or weights is None or (had.weights is not None and torch.allclose(had.weights.cpu(), weights))
    if not same:
        raise ConfigError(
            "this SAE has rounds already, which weigh dimensions otherwise; begin with with_rounds(1, ...)"
        )
    starts: Starts | None = None
    if rounds == 1:
        sae.refinement = None
    elif had is not None:
        sae.refinement = had.with_rounds(rounds)
    else:
        sae.refinement = sae._refinement(rounds, weights)
        units = sae.normalization(x).apply(x).float() - sae.b_dec.float()
        units = units if weights is None else units * weights.to(units)
        sae.refinement.epsilon.fill_(
            EPSILON * max(float(units.square().sum(1).mean()), torch.finfo(torch.float32).tiny)
        )
        starts = search_starts(sae, x[:SEARCHED], target_l0)
        for name, value in zip(("a", "b", "eta"), starts, strict=True):
            getattr(sae.refinement, name).fill_(value)
    kept = 1 if had is None else had.rounds
    # Every new round is set to the target; of the old ones only the last, if none is added after it.
    _hold_rounds(sae, min(kept + 1, rounds), x, target_l0)
    after = scores(sae, x)
    a, b, eta = starts or (None, None, None)
    return AddedRounds(
        sae.rounds, a, b, eta, target_l0, after.l0, after.mse, before.l0, before.mse, len(x), after.unexplained,
        before.unexplained, sae.refinement is not None and sae.refinement.weights is not None,
    )  # fmt: skip


@torch.no_grad()
def hold_l0(sae: FusedRationalSAE, activations: Tensor | Any, target_l0: float, *, n_tokens: int = 8192) -> float:
    """Shifts the thresholds of the last gate by one constant, in place, until l0 is `target_l0`; returns the l0.

    Thresholds stay at 0 or above, so an l0 that would need negative codes is not reached (with a warning).

    Args:
        sae: a gated Rational SAE, of one round or more. activations: see `with_rounds`.
    """
    if not isinstance(sae, FusedRationalSAE) or isinstance(sae, TopKRationalSAE) or sae.gate.form != "gated":
        raise ConfigError("l0 is held by thresholds per feature; give a gated FusedRationalSAE")
    check_number("target_l0", target_l0, above=0, most=sae.d_sae)
    check_place(sae, activations)
    with reading(sae, activations):
        x = sae.sides(sample(activations, sae, n_tokens, 0))[0]
        _hold_rounds(sae, sae.rounds, x, target_l0)
        l0 = scores(sae, x).l0
    if abs(l0 / target_l0 - 1) > 0.02:
        warnings.warn(f"l0 is {l0:.2f}, not {target_l0:.2f}: thresholds cannot go below 0", stacklevel=2)
    return l0


def gated(sae: SparseAutoencoder, x: Tensor) -> FusedRationalSAE:
    """Returns a Rational SAE with per-feature thresholds, with the weights and (except for TopK) the code of `sae`.

    x [n, d_in]: activations.

    Raises:
        ConfigError: a direct form, whose code does not come from thresholds, or a kind of SAE without a gate.
    """
    if isinstance(sae, FusedRationalSAE) and not isinstance(sae, TopKRationalSAE):
        return copy.deepcopy(sae)
    if not isinstance(sae, ReluSAE | JumpReluSAE | TopKSAE | BatchTopKSAE | TopKRationalSAE):
        raise ConfigError(f"a {type(sae).__name__} has no gate to repeat; give a ReLU, JumpReLU or TopK SAE")
    h = sae.hidden_pre(x)
    theta = teacher_thresholds(sae, h, sae.encode(x))
    if isinstance(sae, TopKRationalSAE):
        gate = copy.deepcopy(sae.gate)
        gate.backward = "rational"
        gate.threshold.copy_(theta)
    else:
        width = ramp_width(sae, x[:SEARCHED], (h - theta)[:SEARCHED], None)
        options: dict[str, Any] = {"form": "gated", "backward": "rational", "input_scale": width}
        gate = RationalGate.from_fit(fit_gate("ramp", (3, 2)), sae.d_sae, thresholds=theta, **options).to(h.device)
    made = FusedRationalSAE(
        sae.d_in,
        sae.d_sae,
        gate=gate,
        backend=getattr(sae, "backend", "auto"),
        apply_b_dec_to_input=sae.apply_b_dec_to_input,
        normalize_activations=sae.normalize_activations,
        dtype=sae.W_enc.dtype,
        device=sae.W_enc.device,
        metadata=copy.deepcopy(sae.metadata),
        initialise=False,
    )
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(made, name).copy_(getattr(sae, name))
    return made


def search_starts(sae: FusedRationalSAE, x: Tensor, target_l0: float) -> Starts:
    """Returns the a, b and eta, shared by all features, with the least error after two rounds at l0 `target_l0`."""
    walk = _first_round(sae, x)
    h, y, e, c = walk.h, walk.y, walk.e, walk.correction()
    weights = None if sae.refinement is None else sae.refinement.weights

    def error(starts: Starts) -> float:
        walk.h, walk.y, walk.e = h, y, e
        walk.mix(*starts, c)
        walk.open(_shifted(walk, walk.theta, target_l0 * len(x))[0])
        walk.search(walk.unit.new_ones(()))
        residual = walk.code().residual.double()
        return float((residual if weights is None else residual * weights).square().sum())

    best = STARTS
    least = error(best)
    for step in STEPS:
        for place, sign in itertools.product((2, 1, 0), (1, -1)):
            values = [*best]
            values[place] = round(best[place] + sign * step, 3)
            tried = (values[0], values[1], values[2])
            if LIMITS[0] <= tried[place] <= LIMITS[1] and (found := error(tried)) < least:
                best, least = tried, found
    return best


def _hold_rounds(sae: FusedRationalSAE, first: int, x: Tensor, target_l0: float) -> None:
    """Shifts the thresholds of the gates from round `first` to the last, so that each code has this l0."""
    refinement = sae.refinement
    if refinement is None:
        _hold_one_round(sae, x, target_l0)
        return
    walk = _first_round(sae, x)
    weight, wanted = _weight(refinement.unit), target_l0 * len(x)
    for j in range(sae.rounds - 1):
        rows = [refinement.a[j], refinement.b[j], refinement.eta[j], refinement.p[j + 1], refinement.threshold[j]]
        a, b, eta, p, theta = walk.at(torch.stack(rows, 1).to(walk.h.dtype)).unbind(1)
        walk.mix(a, b, eta, walk.correction())
        if j + 2 < first:
            walk.open(theta)
            walk.search(p)
            continue
        last, h = j == sae.rounds - 2, walk.h
        more = 0.0
        for _ in range(TRIES if last else 1):
            walk.h = h
            shifted, shift = _shifted(walk, theta, wanted + more)
            walk.open(shifted)
            walk.search(p)
            # Codes that the search makes negative end as inactive, so as many more features may open.
            short = wanted - int((walk.opened & (walk.y > 0)).sum())
            if abs(short) <= 0.001 * wanted:
                break
            more += short
        refinement.threshold[j].add_(shift * weight).clamp_(min=0)


def _first_round(sae: FusedRationalSAE, x: Tensor) -> Walk:
    refinement, gate = sae.refinement, sae.gate.tensors()
    assert refinement is not None
    x = sae.normalization(x).apply(x)
    exact = wide(product_dtype(x))
    own = GateTensors(*(one.to(exact) for one in gate))
    weights = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    more = refinement.tensors().to(exact)
    numbers = (more.unit, more.epsilon, more.weights)
    walk = Walk(x, *weights, own, sae.gate.spec(), *numbers, subtract=sae.apply_b_dec_to_input)
    walk.open(walk.theta)
    walk.search(walk.at(refinement.p[0].to(exact)))
    return walk


def _weight(unit: Tensor) -> Tensor:
    """The unit in which each feature's threshold is shifted: one over the norm of its decoder row."""
    return torch.where(unit > 0, unit, unit.max()).sqrt()


def _shifted(walk: Walk, theta: Tensor, wanted: float) -> tuple[Tensor, float]:
    """Returns theta [n_entries], shifted so that `wanted` of this round's candidates open, and the shift."""
    shift = _shift(walk.h, theta, _weight(walk.unit), wanted)
    return (theta + shift * _weight(walk.unit)).clamp_min(0), shift


def _shift(h: Tensor, theta: Tensor, weight: Tensor, wanted: float) -> float:
    """Returns the shift for which h > max(theta + shift * weight, 0) at `wanted` places."""
    above = ((h - theta) / weight)[h > 0].sort(descending=True).values
    if not len(above):
        return 0.0
    k = min(max(round(wanted), 0), len(above))
    last = above[max(k - 1, 0)]
    following = above[k] if k < len(above) else last - last.abs() - 1
    return float(last + 1 if k == 0 else (last + following) / 2)


def _hold_one_round(sae: FusedRationalSAE, x: Tensor, target_l0: float) -> None:
    """Sets the l0 of an encoder of one round, where any pre-activation may open."""
    gate, x = sae.gate, sae.normalization(x).apply(x)
    b_dec = sae.b_dec if sae.apply_b_dec_to_input else None
    squares = sae.W_dec.float().square().sum(1)
    weight = _weight(torch.where(squares > 0, 1 / squares, 0))
    reach, wanted = gate.input_scale.detach(), target_l0 * len(x)
    while True:
        low = (gate.threshold - reach).clamp_min(0)
        there, h = candidates(x, sae.W_enc, sae.b_enc, b_dec, low, product_dtype(x))
        if len(h) > 1.5 * wanted or not bool((low > 0).any()):
            break
        reach = 2 * reach
    own = weight[there.features]
    shift = _shift(h, gate.threshold[there.features].to(h.dtype), own.to(h.dtype), wanted)
    gate.threshold.add_(shift * weight).clamp_(min=0)
