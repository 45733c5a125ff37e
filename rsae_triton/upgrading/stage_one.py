"""Stage 1: a pretrained SAE becomes a Rational SAE that computes the same code, ready to be trained on."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rsae_triton.activations import ActivationStore
from rsae_triton.common.checks import check_data, check_finite, check_integer, check_number, check_seed, shown
from rsae_triton.common.errors import ConfigError, NumericsError
from rsae_triton.ops.encode import resolve_backend
from rsae_triton.remez.problem import parse_degree as remez_degree
from rsae_triton.sae.added import AddedRounds, scores
from rsae_triton.sae.adding import add_rounds
from rsae_triton.sae.architectures import JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.batch_topk import BatchTopKSAE
from rsae_triton.sae.like_teacher import LEAST_TOKENS, few_tokens, sample, teacher_thresholds
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.rounds import MOST_ROUNDS
from rsae_triton.sae.sides import side_by_side
from rsae_triton.sae.topk_rational import TopKRationalSAE
from rsae_triton.sae.transcoder import NO_ROUNDS, RationalTranscoder, Transcoder
from rsae_triton.sae.units import check_place, in_store_units, scale_of, warn_of_units
from rsae_triton.teachers import objects
from rsae_triton.training.recipes import training_l0
from rsae_triton.upgrading.asking import ask
from rsae_triton.upgrading.direct import direct
from rsae_triton.upgrading.gated import gated
from rsae_triton.upgrading.sampling import Sample, worth_of
from rsae_triton.upgrading.thresholds import Grouping, strength_groups

Making = TypeVar("Making", bound=Callable[..., Any])


@dataclass(frozen=True)
class StageOne:
    """What stage 1 did; kept in the SAE's metadata under "stage1".

    form, degree: of the gate. error, lower_bound: of the minimax fit on [-1, 1], and its certificate.
    relative_error: ||z - z_teacher|| / ||z_teacher|| over the sample's codes. initial_relative_error: the same before
    calibration. activity_threshold: of the direct form. teacher_l0, l0: on the sample of n_tokens. train_l0: the l0 at
    which stage 2 holds the code (`recipes.training_l0`). worth: of a feature (`worth_of`), near which the sparsity
    weight of stage 2 starts; None if it cannot be said. validation_l0: the teacher's l0 on validation text, if any was
    given. All of these describe an encoder of one round. rounds: what further rounds did, also in metadata["rounds"];
    None with one round.
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
    worth: float | None = None
    validation_l0: float | None = None
    rounds: AddedRounds | None = None

    @property
    def summary(self) -> str:
        if self.teacher_l0 == 0:
            return f"{self.form} {self.degree}; no feature of the teacher was active, so that nothing was compared"
        fitted = "" if self.error is None else f", minimax error {self.error:.3g} (proved >= {self.lower_bound:.3g})"
        one = (
            f"{self.form} {self.degree}{fitted}; code within {100 * self.relative_error:.2f} % of the teacher's, "
            f"l0 {self.l0:.2f} against {self.teacher_l0:.2f}"
        )
        if self.rounds is None:
            return one if self.n_tokens >= LEAST_TOKENS else f"{one}; only {few_tokens(self.n_tokens)}"
        if self.rounds.n_tokens < LEAST_TOKENS:
            return f"nothing trained. {self.rounds.summary}. The first round alone: {one}"
        return (
            f"nothing trained: mse {self.rounds.change} at the teacher's l0 ({self.rounds.rounds} rounds, l0 "
            f"{self.rounds.l0:.2f} against {self.rounds.l0_before:.2f}{self.rounds.asked}). The first round alone: "
            f"{one}"
        )


def in_float32(make: Making) -> Making:
    """Decorates `upgrade`: a bfloat16 or float16 teacher is calibrated in float32, and the result has its dtype."""

    @functools.wraps(make)
    def wrapped(*args: Any, **options: Any) -> Any:
        teacher = args[0] if args else options.get("teacher")
        if objects.is_saelens(teacher):
            teacher = objects.read(teacher)
            args, options = ((teacher, *args[1:]), options) if args else (args, {**options, "teacher": teacher})
        if not isinstance(teacher, SparseAutoencoder) or teacher.W_enc.dtype.itemsize >= 4 or teacher.W_enc.is_meta:
            return make(*args, **options)
        resolve_backend(options.get("backend", "auto"), teacher.W_enc.device, teacher.W_enc.dtype)
        wide = copy.deepcopy(teacher).float()
        given = (wide, *args[1:]) if args else ()
        return make(*given, **(options if args else {**options, "teacher": wide})).to(teacher.W_enc.dtype)

    return wrapped  # type: ignore[return-value]


@in_float32
@in_store_units
def upgrade(
    teacher: SparseAutoencoder,
    activations: Tensor | Any,
    *,
    targets: Tensor | None = None,
    form: str = "auto",
    degree: str | tuple[int, int] = "auto",
    coefficients: str | int = "shared",
    thresholds: str = "feature",
    width: str | float = "auto",
    tolerance: float = 0.0085,
    rounds: str | int = "auto",
    validation: Tensor | Any | None = None,
    host: Any = None,
    n_tokens: int = 8192,
    backend: str = "auto",
    seed: int = 0,
) -> FusedRationalSAE:
    """Turns a teacher into a Rational SAE: copies the weights bit for bit, then fits and calibrates the gate.

    Args:
        teacher: a ReLU, JumpReLU, TopK or BatchTopK SAE, or a transcoder; also an SAE object of SAELens.
        activations: an `ActivationStore`, or [n, d_in] in the teacher's units. A warning is given if the teacher
            reconstructs them worse than their mean does.
        targets: for a transcoder, the activations that it should write, [n, d_out], row by row beside the ones it
            reads. A `PairedStore` as `activations` holds both.
        form: "gated" (z = h * r, zeros by thresholds), "direct" (the paper's z = r), or "auto", which is gated.
        degree: (p, q), "p,q", or "auto": the smallest degree of the ladder whose code is within `tolerance`.
        coefficients: "shared", "per_feature", or a number of groups. Features whose active pre-activations are equally
            strong (root mean square on the sample) then share a coefficient set.
        thresholds: for a TopK teacher, whose gate depends on the whole token. "feature": each feature gets a fixed
            threshold that matches its firing rate in the teacher; this needs no sort but is not the same code.
            "token": the threshold lies between each token's k-th and (k+1)-th pre-activation, which is the teacher's
            code (`TopKRationalSAE`).
        width: width of the gated form's ramp, in units of 2 % of the activations' mean norm. "auto": 1; or, if half of
            the active pre-activations exceed their thresholds by less than 0.7 of that (small codes of many features),
            the amount by which they do (docs/experiments.md). It changes how the SAE trains, not its code.
        tolerance: largest relative error of the code that degree="auto" accepts. In the gated form also the largest
            relative change of the mse, against a code with thresholds but no ramp.
        rounds: how many rounds the encoder makes; each further round encodes what the code has not yet explained
            (docs/rounds.md). Nothing is trained for it, and every weight stays. "auto": 2 if that lowers the
            error at the teacher's l0, and does not raise it on average relative to each dimension's variance (else
            there is a warning). 1: the teacher's own encoder. More rounds go on helping, at their cost. Needs the gated
            form with thresholds per feature.
        validation: [n, d_in] or a store of text that the teacher was not trained on, best some 10,000 tokens. The
            thresholds of the last round are set there, and its l0 is the one that `train(validation=...)` restores.
            None: `activations` are used; if the teacher was trained on them, its l0 there is lower than on new text.
        host: the language model that the activations (a store) were read from. It then chooses the rounds, by its loss
            on 16 spliced sequences: weighed by how much it listens to each dimension (`dimension_weights`) where that
            is better than plain ones beyond the 95 % interval; with rounds="auto" none, if they do not lower the loss.
            For models with a few huge dimensions (docs/rounds.md).
        n_tokens: how many activations to calibrate on. backend: of the result. seed: of the sample.

    Returns:
        The Rational SAE (a `RationalTranscoder` for a transcoder), which reads the units that the teacher reads.
        metadata["stage1"] says how well it reproduces its teacher (`StageOne`), and the l0 at which `train` holds it:
        the teacher's plus a margin of 4 %, because a code can be thresholded down to an l0 but never up (no margin for
        TopK).

    Raises:
        ShapeError, NumericsError: the activations do not fit or are not finite.
        ConfigError: a bad setting, a teacher without a gate to fit, or a store of another model or place than the
            teacher reads.
    """
    if not isinstance(teacher, ReluSAE | JumpReluSAE | TopKSAE | BatchTopKSAE):
        raise ConfigError(
            f"a {type(teacher).__name__} cannot be upgraded; teachers are ReLU, JumpReLU, TopK and BatchTopK SAEs"
        )
    check_data("the teacher's W_enc", teacher.W_enc)
    if form not in ("auto", "gated", "direct"):
        raise ConfigError(f"form is {form!r}; choose auto, gated or direct")
    if thresholds not in ("feature", "token"):
        raise ConfigError(f"thresholds is {thresholds!r}; choose feature or token")
    if thresholds == "token" and (not isinstance(teacher, TopKSAE) or form == "direct"):
        raise ConfigError("thresholds='token' is for the gated form of a TopK teacher; use thresholds='feature'")
    if thresholds == "token" and isinstance(teacher, Transcoder):
        raise ConfigError("thresholds='token' is for SAEs; use thresholds='feature' for a transcoder")
    one_round = form == "direct" or thresholds == "token" or isinstance(teacher, Transcoder)
    if host is not None and (one_round or parse_rounds(rounds) == 1):
        raise ConfigError("host chooses rounds, and this SAE gets none; leave one of them out")
    check_integer("n_tokens", n_tokens, 1)
    check_seed(seed)
    check_number("tolerance", tolerance, least=0)
    factor = parse_width(width)
    if factor is not None and form == "direct":
        raise ConfigError(f"width is {width}; the direct form has no ramp: leave it at 'auto', or use form='gated'")
    pair = parse_degree(degree)
    wanted = parse_rounds(rounds)
    if wanted not in (None, 1) and isinstance(teacher, Transcoder):
        raise ConfigError(NO_ROUNDS)
    if wanted not in (None, 1) and (form == "direct" or thresholds == "token"):
        raise ConfigError("rounds need form='gated' and thresholds='feature'; use rounds=1")
    resolve_backend(backend, teacher.W_enc.device, teacher.W_enc.dtype)
    for name, tensor in teacher.state_dict().items():
        check_finite(f"the teacher's {name}", tensor, "fetch or train it again")
    rows = sample(side_by_side(teacher, activations, targets), teacher, n_tokens, seed)
    x, y = teacher.sides(rows)
    with torch.no_grad():
        h, z = teacher.hidden_pre(x), teacher.encode(x)
    if not bool(torch.isfinite(h).all()):
        raise NumericsError(
            "the teacher's pre-activations are not finite; its weights or the activations are too large"
        )
    if not bool(x.any()) or not bool(h.any()):
        raise NumericsError("the activations, or the teacher's pre-activations of them, are all zero; give other ones")
    warn_of_units(teacher, rows, "the teacher", stacklevel=5)
    given = parse_coefficients(coefficients)
    groups = given if isinstance(given, int) else {"shared": 1, "per_feature": teacher.d_sae}[given]
    if not 1 <= groups <= teacher.d_sae:
        raise ConfigError(f"coefficients is {groups} groups; there are {teacher.d_sae} features to put into them")
    kind = direct if form == "direct" else functools.partial(gated, width=factor)
    negative = int((z < 0).sum())
    if negative and thresholds == "feature":
        warnings.warn(
            f"{negative / max(1, int((z != 0).sum())):.0%} of the teacher's codes are negative; thresholds "
            "per feature drop those, thresholds='token' keeps them",
            stacklevel=2,
        )
    seen = Sample(x, h, z, teacher_thresholds(teacher, h, z), y)
    grouping = Grouping(groups, None if groups in (1, teacher.d_sae) else strength_groups(h, z, groups))
    gate, facts = kind(teacher, seen, pair, grouping, tolerance)
    options: dict[str, Any] = {}
    if thresholds == "token" and isinstance(teacher, TopKSAE):
        # A threshold by token replaces features that fall below it, it does not add any: a slope there would pull at
        # features that cannot all open.
        gate.backward, options = "soft", {"k": teacher.k, "relu": teacher.relu}
    kind_of_sae: type[FusedRationalSAE] = TopKRationalSAE if options else FusedRationalSAE
    copied = ["W_enc", "b_enc", "W_dec", "b_dec"]
    if isinstance(teacher, Transcoder):
        kind_of_sae, options = RationalTranscoder, {"d_out": teacher.d_out, "skip": teacher.W_skip is not None}
        copied += ["W_skip"] * (teacher.W_skip is not None)
    rsae = kind_of_sae(
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
        for name in copied:
            getattr(rsae, name).copy_(getattr(teacher, name))
        code = rsae.encode(x)
        teacher_l0 = float((z != 0).sum(1).float().mean())
        report = StageOne(
            form=gate.form,
            degree=gate.degree,
            relative_error=float((code - z).double().norm() / z.double().norm().clamp_min(1e-12)),
            activity_threshold=float(gate.activity_threshold.max()),
            teacher_l0=teacher_l0,
            l0=float((code != 0).sum(1).float().mean()),
            train_l0=training_l0(teacher, teacher_l0),
            n_tokens=len(x),
            worth=worth_of(teacher, seen),
            **facts,
        )
    if not math.isfinite(report.relative_error):
        raise NumericsError(
            f"the code of the {gate.form} gate overflows {code.dtype} on these activations; use form='gated', or other "
            "units (store_tensor scales activations)"
        )
    if teacher_l0 == 0:
        warnings.warn("no feature of the teacher was active on these activations; nothing was compared", stacklevel=4)
    added, held = None, x
    ours = teacher.units if scale_of(activations) is None else scale_of(activations)
    if validation is not None:
        held = teacher.sides(sample(validation, teacher, n_tokens, seed))[0]
        check_place(teacher, validation, "the teacher", stacklevel=5)
        theirs = scale_of(validation)
        if ours is not None and theirs is not None:
            held = held * (ours / theirs)
        with torch.no_grad():
            report = replace(report, validation_l0=float((teacher.encode(held) != 0).sum(1).float().mean()))
    if wanted != 1 and form != "direct" and not options:
        if host is None:
            added = refine(rsae, teacher, held, wanted)
        else:
            store = validation if isinstance(validation, ActivationStore) else activations
            added = refine_for(host, store, rsae, teacher, held, wanted, ours)
    report = replace(report, rounds=added)
    rsae.metadata["stage1"] = {**asdict(report), "summary": report.summary}
    if added is not None:
        rsae.metadata["rounds"] = {**asdict(added), "summary": added.summary}
    return rsae


@torch.no_grad()
def refine(rsae: FusedRationalSAE, teacher: SparseAutoencoder, x: Tensor, rounds: int | None) -> AddedRounds | None:
    """Adds rounds to `rsae` in place, at the l0 of its teacher on x. None adds two, but only if that lowers the error,
    and that of each dimension relative to its variance on average too.

    Returns what was added, or None if nothing was.
    """
    before = scores(teacher, x)
    if before.l0 == 0 and rounds is None:
        return None
    added = add_rounds(rsae, rounds or 2, x, before.l0, before)
    advice = added.caution
    if rounds is None and (advice or not (added.mse < before.mse and added.l0 <= 1.02 * before.l0)):
        rsae.refinement = None
        if advice:
            warnings.warn(f"no round was added: {advice}. rounds=2 adds one all the same", stacklevel=6)
        return None
    if advice:
        warnings.warn(advice, stacklevel=6)
    return added


@torch.no_grad()
def refine_for(
    host: Any,
    store: Any,
    rsae: FusedRationalSAE,
    teacher: SparseAutoencoder,
    x: Tensor,
    rounds: int | None,
    scale: float | None,
) -> AddedRounds | None:
    """Like `refine`, but the host says which rounds are best, on the first sequences of the store. scale: the factor on
    the model's activations that both SAEs read; the store's when None."""
    before = scores(teacher, x)
    if before.l0 == 0:  # there is nothing to choose by
        return refine(rsae, teacher, x, rounds)
    facts: dict[int, AddedRounds] = {}

    def made(weights: Tensor | None) -> FusedRationalSAE:
        one = copy.deepcopy(rsae)
        facts[id(one)] = add_rounds(one, rounds or 2, x, before.l0, before, weights)
        return one

    chosen = ask(host, store, teacher, made, scale)
    if rounds is None and chosen.gain >= 0:
        warnings.warn(
            f"no round was added: with one, the language model's loss is {chosen.gain:.4f} nats higher; rounds=2 adds "
            "one all the same",
            stacklevel=6,
        )
        return None
    rsae.refinement = chosen.sae.refinement
    return replace(facts[id(chosen.sae)], delta_ce=chosen.gain)


def parse_degree(degree: str | tuple[int, int]) -> tuple[int, int] | None:
    """Returns (p, q) from a pair or "p,q"; None for "auto"."""
    return None if degree == "auto" else remez_degree(degree)


def parse_rounds(rounds: str | int) -> int | None:
    """Returns a number of rounds, given as a number or as text; None for "auto"."""
    if rounds == "auto":
        return None
    if isinstance(rounds, str):
        if not (rounds.isdecimal() and len(rounds) < 20):
            raise ConfigError(f"rounds is {shown(rounds)}; give 'auto' or a number such as 2")
        rounds = int(rounds)
    check_integer("rounds", rounds, 1, MOST_ROUNDS)
    return rounds


def parse_coefficients(coefficients: str | int) -> str | int:
    """Returns "shared", "per_feature", or a number of groups (also given as text)."""
    if isinstance(coefficients, str) and coefficients.isdecimal() and len(coefficients) < 20:
        return int(coefficients)
    if isinstance(coefficients, bool) or not (
        isinstance(coefficients, int) or coefficients in ("shared", "per_feature")
    ):
        raise ConfigError(f"coefficients is {shown(coefficients)}; choose shared, per_feature or a number of groups")
    return coefficients


def parse_width(width: str | float) -> float | None:
    """Returns a positive number, given as a number or as text; None for "auto"."""
    if width == "auto":
        return None
    try:
        number = float(width) if isinstance(width, str) else width
    except ValueError as error:
        raise ConfigError(f"width is {width!r}; give 'auto' or a positive number such as 0.5") from error
    check_number("width", number, above=0)
    return number
