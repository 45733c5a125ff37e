"""Stage 1: a pretrained SAE becomes a Rational SAE that computes the same code, ready to be trained on."""

from __future__ import annotations

import functools
import warnings
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsae_triton.common.checks import check_data, check_finite, check_integer, check_number, check_seed, shown
from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.ops.encode import resolve_backend
from rsae_triton.remez import GateFit, fit_gate
from rsae_triton.remez.problem import parse_degree as remez_degree
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.gate import RationalGate
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.topk_rational import TopKRationalSAE
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.training.recipes import training_l0
from rsae_triton.upgrading.calibrate import Calibration, Histogram, calibrate, histogram

LADDER = ((3, 2), (5, 4), (7, 6), (9, 8))
HISTOGRAM_TOKENS = 2048
# A direct JumpReLU is fitted with its jump at THETA of the clip, so that codes up to 1 / THETA thresholds are covered.
THETA, MARGIN = 0.1, 0.02
# C_in of the gated form, in units of the activations' mean norm, and how much of it active pre-activations must rise
# above their thresholds in the median; chosen in docs/experiments.md.
GATE_WIDTH = 0.02
LEAST_RISE = 0.7


@dataclass(frozen=True)
class StageOne:
    """What stage 1 did; kept in the SAE's metadata under "stage1".

    form, degree: of the gate. error, lower_bound: the minimax fit and its certificate (on [-1, 1]).
    relative_error: ||z - z_teacher|| / ||z_teacher|| over the sample's codes. initial_relative_error: before the
    calibration. activity_threshold: of the direct form. teacher_l0, l0: on the sample of n_tokens. train_l0: what
    stage 2 holds (`recipes.training_l0`).
    """

    form: str
    degree: tuple[int, int]
    error: float | None
    lower_bound: float | None
    relative_error: float
    initial_relative_error: float | None
    activity_threshold: float
    teacher_l0: float
    l0: float
    train_l0: float
    n_tokens: int

    @property
    def summary(self) -> str:
        fitted = "" if self.error is None else f", minimax error {self.error:.3g} (proved >= {self.lower_bound:.3g})"
        return (
            f"{self.form} {self.degree}{fitted}; code within {100 * self.relative_error:.2f} % of the teacher's, "
            f"l0 {self.l0:.2f} against {self.teacher_l0:.2f}"
        )


class Sample(NamedTuple):
    """What stage 1 looks at: activations x [n, d_in], the teacher's h and z [n, d_sae], its thresholds [d_sae]."""

    x: Tensor
    h: Tensor
    z: Tensor
    thresholds: Tensor


class Grouping(NamedTuple):
    """How many coefficient sets, and which of them each feature uses (None: one for all, or one for each)."""

    groups: int
    group_of: Tensor | None


def upgrade(
    teacher: SparseAutoencoder,
    activations: Tensor | Any,
    *,
    form: str = "auto",
    degree: str | tuple[int, int] = "auto",
    coefficients: str | int = "shared",
    thresholds: str = "feature",
    width: str | float = "auto",
    tolerance: float = 0.0085,
    n_tokens: int = 8192,
    backend: str = "auto",
    seed: int = 0,
) -> FusedRationalSAE:
    """Turns a teacher into a Rational SAE: weights copied bit for bit, the gate fitted and calibrated.

    Args:
        teacher: a ReLU, JumpReLU, TopK or BatchTopK SAE.
        activations: [n, d_in] in the teacher's units, or an `ActivationStore` (with a warning where it is of another
            hook than the teacher's metadata name).
        form: "gated" (z = h * r, zeros by thresholds; "auto") or "direct" (the paper's z = r).
        degree: (p, q), "p,q", or "auto": the smallest of the ladder whose code is within `tolerance`.
        coefficients: "shared", "per_feature", or a number of groups: features whose active pre-activations are
            equally strong (root mean square on the sample) share a coefficient set.
        thresholds: of a TopK teacher, whose gate looks at a whole token. "feature": each feature gets the fixed one at
            which it fires as often as in the teacher; no sort, but not the same code. "token": between each token's
            k-th and (k+1)-th pre-activation; the teacher's code (`TopKRationalSAE`).
        width: of the gated form's ramp, in units of 2 % of the activations' mean norm. "auto": 1, or where half of
            the active pre-activations rise less than 0.7 of that above their thresholds (small codes of many
            features), as wide as they rise (docs/experiments.md). It changes how the SAE trains, not its code.
        tolerance: largest relative error of the code that degree="auto" accepts (gated: and of the mse, against a code
            with thresholds but no ramp).
        n_tokens: how many activations to calibrate on. backend: of the result. seed: of the sample.

    Returns:
        The Rational SAE. metadata["stage1"] says how well it reproduces its teacher (`StageOne`), and at what l0
        `train` holds it: the teacher's, and 4 % for a margin (a code can be thresholded down to an l0, never up to
        it; not so for TopK).

    Raises:
        ShapeError, NumericsError: activations that do not fit or are not finite. ConfigError: a bad setting, or a
            teacher of a kind that has no gate to fit.
    """
    if not isinstance(teacher, ReluSAE | JumpReluSAE | TopKSAE | BatchTopKSAE):
        raise ConfigError(
            f"a {type(teacher).__name__} cannot be upgraded; teachers are ReLU, JumpReLU, TopK and BatchTopK SAEs"
        )
    check_data("the teacher's W_enc", teacher.W_enc)
    if teacher.metadata.get("transcoder"):
        raise ConfigError("the teacher is a transcoder; stage 1 calibrates against the activations that go in")
    if form not in ("auto", "gated", "direct"):
        raise ConfigError(f"form is {form!r}; choose auto, gated or direct")
    if thresholds not in ("feature", "token"):
        raise ConfigError(f"thresholds is {thresholds!r}; choose feature or token")
    if thresholds == "token" and (not isinstance(teacher, TopKSAE) or form == "direct"):
        raise ConfigError("thresholds='token' is for the gated form of a TopK teacher; use thresholds='feature'")
    check_integer("n_tokens", n_tokens, 1)
    check_seed(seed)
    check_number("tolerance", tolerance, least=0)
    factor = parse_width(width)
    if factor is not None and form == "direct":
        raise ConfigError(f"width is {width}; the direct form has no ramp: leave it at 'auto', or use form='gated'")
    pair = parse_degree(degree)
    read, named = getattr(activations, "manifest", {}).get("hook_name"), teacher.metadata.get("hook_name")
    if read and named and read != named:
        warnings.warn(
            f"the activations were read at {read}, the teacher says that it reads {named}; unless these are two names "
            "of one place, extract them there",
            stacklevel=2,
        )
    resolve_backend(backend, teacher.W_enc.device, teacher.W_enc.dtype)
    for name, tensor in teacher.state_dict().items():
        check_finite(f"the teacher's {name}", tensor, "fetch or train it again")
    x = sample(activations, teacher, n_tokens, seed)
    with torch.no_grad():
        h, z = teacher.hidden_pre(x), teacher.encode(x)
    if not bool(torch.isfinite(h).all()):
        raise NumericsError(
            "the teacher's pre-activations are not finite; its weights or the activations are too large"
        )
    if not bool(x.any()) or not bool(h.any()):
        raise NumericsError("the activations, or the teacher's pre-activations of them, are all zero; give other ones")
    given = parse_coefficients(coefficients)
    groups = given if isinstance(given, int) else {"shared": 1, "per_feature": teacher.d_sae}[given]
    if not 1 <= groups <= teacher.d_sae:
        raise ConfigError(f"coefficients is {groups} groups; there are {teacher.d_sae} features to put into them")
    kind = _direct if form == "direct" else functools.partial(_gated, width=factor)
    seen = Sample(x, h, z, teacher_thresholds(teacher, h, z))
    grouping = Grouping(groups, None if groups in (1, teacher.d_sae) else strength_groups(h, z, groups))
    gate, facts = kind(teacher, seen, pair, grouping, tolerance)
    options: dict[str, Any] = {}
    if thresholds == "token" and isinstance(teacher, TopKSAE):
        # Whatever is below tau is replaced, not added: a slope there would pull at features that cannot all open.
        gate.backward, options = "soft", {"k": teacher.k}
    rsae = (TopKRationalSAE if options else FusedRationalSAE)(
        teacher.d_in,
        teacher.d_sae,
        gate=gate,
        backend=backend,
        apply_b_dec_to_input=teacher.apply_b_dec_to_input,
        normalize_activations=teacher.normalize_activations,
        dtype=teacher.W_enc.dtype,
        device=teacher.W_enc.device,
        metadata=teacher.metadata,
        **options,
    )
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(rsae, name).copy_(getattr(teacher, name))
        code = rsae.encode(x)
        teacher_l0 = float((z != 0).sum(1).float().mean())
        report = StageOne(
            form=gate.form,
            degree=gate.degree,
            relative_error=float((code - z).norm() / z.norm().clamp_min(1e-12)),
            activity_threshold=float(gate.activity_threshold.max()),
            teacher_l0=teacher_l0,
            l0=float((code != 0).sum(1).float().mean()),
            train_l0=training_l0(teacher, teacher_l0),
            n_tokens=len(x),
            **facts,
        )
    rsae.metadata["stage1"] = {**asdict(report), "summary": report.summary}
    return rsae


def parse_degree(degree: str | tuple[int, int]) -> tuple[int, int] | None:
    """(p, q) from a pair or "p,q"; None for "auto"."""
    return None if degree == "auto" else remez_degree(degree)


def parse_coefficients(coefficients: str | int) -> str | int:
    """ "shared", "per_feature", or a number of groups, also as text."""
    if isinstance(coefficients, str) and coefficients.isdecimal() and len(coefficients) < 20:
        return int(coefficients)
    if isinstance(coefficients, bool) or not (
        isinstance(coefficients, int) or coefficients in ("shared", "per_feature")
    ):
        raise ConfigError(f"coefficients is {shown(coefficients)}; choose shared, per_feature or a number of groups")
    return coefficients


def parse_width(width: str | float) -> float | None:
    """A positive number, also as text; None for "auto"."""
    if width == "auto":
        return None
    try:
        number = float(width) if isinstance(width, str) else width
    except ValueError as error:
        raise ConfigError(f"width is {width!r}; give 'auto' or a positive number such as 0.5") from error
    check_number("width", number, above=0)
    return number


def sample(activations: Tensor | Any, teacher: SparseAutoencoder, n_tokens: int, seed: int) -> Tensor:
    """n_tokens rows to calibrate on, in the teacher's dtype and on its device."""
    if not isinstance(activations, Tensor) and not hasattr(activations, "tensor"):
        raise ShapeError(f"activations is a {type(activations).__name__}; give a torch.Tensor or an ActivationStore")
    x = activations if isinstance(activations, Tensor) else activations.tensor()
    check_data("activations", x)
    if x.dim() != 2 or x.shape[1] != teacher.d_in:
        raise ShapeError(f"activations have shape {tuple(x.shape)}; the teacher takes [n, d_in={teacher.d_in}]")
    if len(x) == 0:
        raise ShapeError("there are no activations to calibrate on; give at least a few hundred tokens")
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n_tokens]
    x = x[chosen.to(x.device)].to(device=teacher.W_enc.device, dtype=teacher.W_enc.dtype)
    check_finite("the sample of the activations", x, "drop those rows first")
    return x


def teacher_thresholds(teacher: SparseAutoencoder, h: Tensor, z: Tensor) -> Tensor:
    """theta_f >= 0 [d_sae]: above it the teacher's feature is active (TopK: as often as it is active)."""
    if isinstance(teacher, JumpReluSAE):
        return teacher.threshold.detach().float().clone()
    if isinstance(teacher, BatchTopKSAE):
        return teacher.topk_threshold.detach().float().expand(teacher.d_sae).clone()
    if isinstance(teacher, ReluSAE):
        return torch.zeros(teacher.d_sae, device=h.device)
    # The m-th largest pre-activation of a feature that fires on m tokens would itself not fire at h > theta, so
    # the threshold lies halfway to the next; a feature that never fires keeps its largest.
    fires = (z != 0).sum(0)
    ranked = torch.cat([h.sort(0, descending=True).values, h.amin(0, keepdim=True)]).float()
    last = ranked.gather(0, (fires - 1).clamp_min(0).unsqueeze(0)).squeeze(0)
    following = ranked.gather(0, fires.unsqueeze(0)).squeeze(0)
    return torch.where(fires > 0, (last + following) / 2, last).clamp_min(0)


def strength_groups(h: Tensor, z: Tensor, groups: int) -> Tensor:
    """[d_sae] int64: features in `groups` equal parts by the root mean square of their active pre-activations.

    Features of one strength cover the same stretch of the gate, which is what they have to share. One that is never
    active on the sample counts as weakest.
    """
    active = z != 0
    strength = (h.float().square() * active).sum(0) / active.sum(0).clamp_min(1)
    rank = strength.argsort(stable=True).argsort()
    return rank * groups // len(rank)


def _gated(
    teacher: SparseAutoencoder,
    seen: Sample,
    degree: tuple[int, int] | None,
    grouping: Grouping,
    tolerance: float,
    width: float | None,
) -> tuple[RationalGate, dict[str, Any]]:
    """z = h * r where h > theta_f, r the minimax fit of a ramp that is complete at theta.

    Above the threshold r is 1 to the fit's error, so that the code is the teacher's; its slope lies below, where
    it tells pre-activations that are not active yet what they would be worth (docs/experiments.md: why this side).
    """
    x, h = seen.x[:HISTOGRAM_TOKENS], seen.h[:HISTOGRAM_TOKENS]
    input_scale = ramp_width(teacher, x, h - seen.thresholds, width)
    # Against the code with thresholds and no ramp: a TopK teacher's own code differs already in which fire.
    exact = h * (h > seen.thresholds)
    with torch.no_grad():
        mse = (x - teacher.decode(exact, x)).square().sum()
    error = np.inf
    for candidate in LADDER if degree is None else (degree,):
        fit = fit_gate("ramp", candidate)
        gate = RationalGate.from_fit(
            fit,
            teacher.d_sae,
            thresholds=seen.thresholds,
            form="gated",
            **grouping._asdict(),
            backward="rational",
            input_scale=input_scale,
        ).to(h.device)
        with torch.no_grad():
            code = gate(h)
            change = (x - teacher.decode(code, x)).square().sum() / mse - 1
            error = max(float((code - exact).norm() / exact.norm().clamp_min(1e-12)), abs(float(change)))
        if error <= tolerance:
            return gate, {"error": fit.error, "lower_bound": fit.lower_bound, "initial_relative_error": None}
    raise NumericsError(
        f"a gate of degree {gate.degree} reproduces the teacher's code to {error:.3g}, not to {tolerance:g}; "
        "raise tolerance or the degree"
    )


def ramp_width(teacher: SparseAutoencoder, x: Tensor, above: Tensor, width: float | None) -> float:
    """C_in of a ramp of `width` (see `upgrade`); above [n, d_sae]: pre-activations over their thresholds.

    A ramp bets on features below their thresholds as if they were worth what active ones are: it must not reach much
    deeper than those rise. Where they rise more it is not widened: it gains little, and where many features are near
    their thresholds l0 could not be held.
    """
    usual = GATE_WIDTH * float(teacher.normalization(x).apply(x).float().norm(dim=1).mean())
    if width is not None:
        return width * usual
    rises = above[above > 0].float()
    if not len(rises):
        return usual
    rise = float(rises.median())
    return rise if rise < LEAST_RISE * usual else usual


def _direct(
    teacher: SparseAutoencoder, seen: Sample, degree: tuple[int, int] | None, grouping: Grouping, tolerance: float
) -> tuple[RationalGate, dict[str, Any]]:
    """z = C_out * (r(h / C_in) + tail): the minimax fit of the teacher's gate, calibrated; thresholds by C_in."""
    jump, thresholds = not isinstance(teacher, ReluSAE), seen.thresholds
    if jump and bool((thresholds <= 0).any()):
        # A feature without a threshold of its own is a ReLU; the smallest positive one is the closest jump.
        positive = thresholds[thresholds > 0]
        thresholds = thresholds.clamp_min(max(float(positive.min()), 1e-3) if len(positive) else 1e-3)
    scale = thresholds / THETA if jump else torch.ones_like(thresholds)
    h, z = seen.h[:HISTOGRAM_TOKENS], seen.z[:HISTOGRAM_TOKENS]
    # In units of the feature's own scale; an error there counts scale^2 in the code.
    value, target = (h / scale).flatten().double().cpu().numpy(), (z / scale).flatten().double().cpu().numpy()
    weight = scale.square().expand_as(h).flatten().double().cpu().numpy()
    data = histogram(value, target, target != 0, weight)
    best: tuple[Calibration, GateFit, float] | None = None
    for candidate in LADDER if degree is None else (degree,):
        fit = fit_gate("jumprelu", candidate, theta=THETA, margin=MARGIN) if jump else fit_gate("relu", candidate)
        best = min(
            (_calibrated(fit, data, c) for c in _input_scales(data, jump)), key=lambda one: one[0].relative_error
        )
        if best[0].relative_error <= tolerance:
            break
    assert best is not None
    calibration, fit, c_in = best
    gate = RationalGate(
        teacher.d_sae,
        fit.degree,
        calibration.a,
        calibration.b,
        **grouping._asdict(),
        form="direct",
        centre=fit.centre,
        input_scale=scale * c_in if jump else c_in,
        output_scale=scale * c_in if jump else c_in,
        numerator_scale=fit.numerator_scale,
        denominator_scale=fit.denominator_scale,
    ).to(h.device)
    with torch.no_grad():
        # A threshold below all that are active, l0 as in the teacher: ranked in numpy, kthvalue is slow on millions.
        strengths = gate(h, hard=False).abs().flatten().cpu().numpy()
        rank = max(0, len(strengths) - int((z != 0).sum()) - 1)
        gate.activity_threshold.fill_(float(np.partition(strengths, rank)[rank]))
    return gate, {
        "error": fit.error,
        "lower_bound": fit.lower_bound,
        "initial_relative_error": calibration.initial_relative_error,
    }


def _input_scales(data: Histogram, jump: bool) -> list[float]:
    """C_in to try: a jump's is set by its threshold, a ReLU's by how far the pre-activations reach."""
    if jump:
        return [1.0]
    reach = np.abs(data.value).max()
    return [float(reach * share) for share in (1.0, 0.5, 0.25, 0.125)]


def _calibrated(fit: GateFit, data: Histogram, input_scale: float) -> tuple[Calibration, GateFit, float]:
    return calibrate(fit, data, input_scale, tail=True), fit, input_scale
