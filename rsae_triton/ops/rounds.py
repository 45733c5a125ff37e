"""Rounds: an encoder that encodes again what its code has not explained. Definition, and computation on entries.

    r  = x - b_dec                                     h_1 = r W_enc + b_enc
    z_k = gate(h_k; theta_k) at the candidates         (y_k, e_k) = search(z_k; p_k)
    c_k = unit * (e_k W_dec^T)                         h_{k+1} = a_k h_k + b_k y_k + eta_k c_k
    search(z; p): e = r - z W_dec,  g = p * unit * (e W_dec^T) where the gate is open,  m = g W_dec,
                  alpha = <m, e> / (epsilon + ||m||^2),  y = z + alpha g,  e - alpha m

In every round the candidates are the places with h_1 > theta_1 - C_in; everywhere else the code is zero. unit is 1 /
||W_dec row||^2 at the time when the rounds were added, so that c is in the units of z whatever the decoder's norms are.
alpha is an exact line search, and a safe rational function of the token. The code is y of the last round, set to zero
where the search made it negative. For the gradient, the choices of entries (candidates, open, set to zero) are
constants; everything else is differentiated, including alpha.

With `weights`, one per dimension of x, r and W_dec are both multiplied by them in this: the search and the correction
then see weights * e instead of e. h_1 and x_hat do not change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsae_triton.common.errors import ConfigError
from rsae_triton.ops import entry_loops as loops
from rsae_triton.ops.across import Across, sum_of
from rsae_triton.ops.encode import centred
from rsae_triton.ops.entries import (
    Entries,
    at_features,
    collected,
    decode_at,
    encode_at,
    sum_at,
)
from rsae_triton.ops.entry_gate import gate_at
from rsae_triton.ops.finding import find_by_kernels, find_entries
from rsae_triton.ops.reference import Encoded, GateSpec, GateTensors, rational_gate
from rsae_triton.ops.search import by_token, search
from rsae_triton.ops.tiles import wide


class RoundTensors(NamedTuple):
    """The parameters of the rounds after the first, per feature; float32 (float64 in the oracle).

    a, b, eta, threshold: [rounds - 1, d_sae]. p: [rounds, d_sae]. unit: [d_sae]. epsilon: scalar. weights: [d_in],
    how much an error counts in each dimension of x; None if it counts the same in all.
    """

    a: Tensor
    b: Tensor
    eta: Tensor
    threshold: Tensor
    p: Tensor
    unit: Tensor
    epsilon: Tensor
    weights: Tensor | None = None

    def to(self, dtype: torch.dtype) -> RoundTensors:
        return self._replace(**{name: one.to(dtype) for name, one in self._asdict().items() if one is not None})


class RoundCode(NamedTuple):
    """A code, given at its candidates.

    Attributes:
        there: the candidates. values: [n_entries] the code, zero where it is not active; at least float32.
        counts, l1: [d_sae], as in `Encoded`. residual: [n_tokens, d_in], x - x_hat in the encoder's units.
        hidden: [n_entries], the last round's pre-activations.
    """

    there: Entries
    values: Tensor
    counts: Tensor
    l1: Tensor
    residual: Tensor


def check_spec(spec: GateSpec) -> None:
    """Raises ConfigError for a gate whose code is not zero outside its candidates."""
    if spec.form != "gated" or spec.domain != "clamp":
        raise ConfigError(
            f"rounds need a gate of form='gated' and domain='clamp'; this one is {spec.form}, {spec.domain}"
        )
    if not spec.hard:
        raise ConfigError("an encoder with rounds has no dense rational code; use hard=True, or rounds=1")


def reference(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    gate: GateTensors,
    spec: GateSpec,
    more: RoundTensors,
    *,
    subtract: bool = True,
    dtype: torch.dtype | None = None,
    hidden: Tensor | None = None,
) -> Encoded:
    """Encodes x [n_tokens, d_in] densely in plain PyTorch and returns `Encoded`: the definition, and `backend="eager"`.

    Args:
        gate, spec, more: in at least float32. subtract: whether b_dec is subtracted from x before W_enc (the residual
            is always that of x - b_dec). dtype: of the product with W_enc; x's when None.
        hidden: [n_tokens, d_sae], h_1 if it has been computed already.
    """
    check_spec(spec)
    dtype = x.dtype if dtype is None else dtype
    exact = wide(dtype)
    if hidden is None:
        hidden = centred(x, b_dec if subtract else None, dtype) @ W_enc.to(dtype) + b_enc.to(dtype)
    h = hidden.to(exact)
    r, W = x.to(exact) - b_dec.to(exact), W_dec.to(exact)
    if more.weights is not None:
        r, W = r * more.weights, W * more.weights
    there = ~(h <= gate.threshold - gate.input_scale)  # NaN counts as a candidate

    def gated(h: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, active = rational_gate(h, gate._replace(threshold=theta), spec)
        return torch.where(there, z, 0), torch.where(there, active, 0), ~(h <= theta) & there

    def search(z: Tensor, opened: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        e = r - z @ W
        g = torch.where(opened, p * more.unit * (e @ W.t()), 0)
        m = g @ W
        alpha = line(m, e, more.epsilon)
        return z + alpha.unsqueeze(1) * g, e - alpha.unsqueeze(1) * m

    z, active, opened = gated(h, gate.threshold)
    y, e = search(z, opened, more.p[0])
    for k in range(len(more.a)):
        h = more.a[k] * h + more.b[k] * y + more.eta[k] * more.unit * (e @ W.t())
        z, active, opened = gated(h, more.threshold[k])
        y, e = search(z, opened, more.p[k + 1])
    off = opened & (y <= 0)
    y = torch.where(off, 0, y)
    return Encoded(y.to(dtype), (active - off.to(active.dtype)).sum(0), y.abs().sum(0))


def line(m: Tensor, e: Tensor, epsilon: Tensor) -> Tensor:
    """Returns alpha [n_tokens], the step along m that minimises ||e - alpha m||; m, e [n_tokens, d_in]."""
    return (m * e).sum(1) / (epsilon + m.square().sum(1))


def candidates(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, low: Tensor, dtype: torch.dtype,
    screened: bool = True, by: GateTensors | None = None,
) -> tuple[Entries, Tensor]:  # fmt: skip
    """Finds where the pre-activations of x [n_tokens, d_in] exceed low [d_sae] (or are NaN); returns the entries and
    their differentiable values. screened: see `find_entries`. by: the gate that `low` is of, where the Triton kernels
    are to find them."""
    x_c = x if b_dec is None else x - b_dec
    given = (x_c.detach(), W_enc.detach(), b_enc.detach())
    if by is None:
        entries = find_entries(*given, low, dtype=dtype, screened=screened)
    else:
        entries = find_by_kernels(*given, by.threshold, by.input_scale, dtype)
    assert entries is not None
    return entries, encode_at(x, W_enc, b_enc, entries, b_dec)


def candidates_of(h: Tensor, low: Tensor) -> tuple[Entries, Tensor]:
    """Like `candidates`, from given pre-activations [n_tokens, d_sae]."""
    features, tokens = (~(h.detach() <= low)).t().nonzero(as_tuple=True)
    values = h[tokens, features]
    return Entries(tokens, features, values.detach(), loops.offsets_of(features, h.shape[1]), len(h)), values


class Walk:
    """An encoder with rounds in progress, on its candidates alone: one dense product; differentiable once.

        walk = Walk(...);  walk.open(theta_1);  walk.search(p)          then for every further round
        walk.mix(a, b, eta, walk.correction());  walk.open(theta);  walk.search(p)

    theta, p, a, b, eta are [n_entries] (`at`), or numbers.

    Attributes:
        there: the candidates. h: [n_entries], pre-activations of this round. z, active, opened: of its gate (`open`).
        y, e: code [n_entries] and residual [n_tokens, d_in] after its search.
    """

    def __init__(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        gate: GateTensors,
        spec: GateSpec,
        unit: Tensor,
        epsilon: Tensor,
        weights: Tensor | None = None,
        *,
        subtract: bool = True,
        dtype: torch.dtype | None = None,
        across: Across | None = None,
        hidden: Tensor | None = None,
        screened: bool = True,
        triton: bool = False,
    ) -> None:
        check_spec(spec)
        dtype = x.dtype if dtype is None else dtype
        exact = wide(dtype)
        low = (gate.threshold - gate.input_scale).detach()
        triton = triton and exact == torch.float32
        by, W_enc = (gate, collected(W_enc, triton)) if triton else (None, W_enc)
        if hidden is None:
            found, self.h = candidates(x, W_enc, b_enc, b_dec if subtract else None, low, dtype, screened, by)
        else:
            found, self.h = candidates_of(hidden.to(exact), low)
        self.there: Entries = found
        self._place = by_token(found, triton)
        own_b_dec = b_dec if across is None or across.first else b_dec.detach()
        self.r, W = x.to(exact) - own_b_dec.to(exact), W_dec if triton else W_dec.to(exact)
        if weights is not None:
            self.r, W = self.r * weights, W.to(exact) * weights
        self._W, self._weights = collected(W, triton), weights
        self._spec, self._epsilon, self._across = spec, epsilon, across
        own = [one if len(one) == 1 < len(gate.threshold) else self.at(one) for one in gate[:6]]
        self._gate = GateTensors._make([*own, gate.activity_threshold])  # which a gated gate does not look at
        self.unit = self.at(unit)
        self.theta = self._gate.threshold

    def at(self, rows: Tensor) -> Tensor:
        """Returns numbers per feature, [d_sae, ...], at every entry."""
        return at_features(rows, self.there)

    def open(self, theta: Tensor) -> None:
        """Applies the gate of this round, with its own thresholds."""
        self.z, self.active, self.opened = gate_at(self.h, self._gate._replace(threshold=theta), self._spec)

    def search(self, p: Tensor, *, last: bool = False) -> None:
        """Moves the open amplitudes along their gradient by the best step; `last`: no correction follows."""
        self.y, self.e, self._raw = search(
            self.z, p * self.unit, self.opened, self.r, self._W, self._epsilon, self._place,
            correct=not last, across=self._across,
        )  # fmt: skip

    def correction(self) -> Tensor:
        """Returns c [n_entries], the correction that the residual suggests for every candidate."""
        return self.unit * self._raw

    def mix(self, a: Tensor | float, b: Tensor | float, eta: Tensor | float, c: Tensor) -> None:
        """Computes the next round's pre-activations."""
        self.h = a * self.h + b * self.y + eta * c

    def code(self) -> RoundCode:
        """Returns the code after the last round; what the search made negative is zero, and the residual corrected."""
        off, y, e = self.opened & (self.y.detach() <= 0), self.y, self.e
        if self._across is not None or bool(off.any()):
            e = e + sum_of(decode_at(y[off], self.there.select(off), self._W), self._across)
            y = torch.where(off, 0, y)
        e = e if self._weights is None else e / self._weights
        counts = sum_at(self.active - off.to(self.active.dtype), self.there)
        return RoundCode(self.there, y, counts, sum_at(y.abs(), self.there), e)


def on_entries(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    gate: GateTensors,
    spec: GateSpec,
    more: RoundTensors,
    **options: Any,
) -> RoundCode:
    """Computes what `reference` does, on entries.

    Args:
        options: subtract, dtype: see `reference`. hidden: [n_tokens, d_sae], h_1 if it has been computed already.
            screened: see `find_entries`. triton: whether the Triton kernels do what they can. across: the other
            processes that hold features of this SAE. They exchange [n_tokens, d_in] sums: two per round, and two more
            in the backward pass. Gradients of b_dec are this process's share.
    """
    walk = Walk(x, W_enc, b_enc, W_dec, b_dec, gate, spec, more.unit, more.epsilon, more.weights, **options)
    walk.open(walk.theta)
    walk.search(walk.at(more.p[0]), last=len(more.a) == 0)
    for k in range(len(more.a)):
        rows = torch.stack([more.a[k], more.b[k], more.eta[k], more.threshold[k], more.p[k + 1]], 1)
        a, b, eta, theta, p = walk.at(rows).unbind(1)
        walk.mix(a, b, eta, walk.correction())
        walk.open(theta)
        walk.search(p, last=k == len(more.a) - 1)
    return walk.code()
