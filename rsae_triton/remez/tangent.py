"""First-order changes of a rational function, in coordinates scaled to size O(1) for linear solvers.

With P -> P + dP and Q -> Q + dQ the linearised error f Q - P becomes, divided by the old Q and exactly,
    e (1 + q) - d,    q = dQ / Q,    d = (dP - r dQ) / Q,    e = f - r.
d spans the tangent space of the rationals at r. Powers of s are scaled to unit influence, then rotated by the
SVD of d's matrix, so each coordinate moves the error by about its largest present value. Differential
correction, the equioscillation Newton and least squares all step in these coordinates.
"""

from dataclasses import dataclass

import numpy as np

from rsae_triton.remez.rational import Rational, powers, unit_influence


@dataclass(frozen=True)
class Tangent:
    """Coordinates u [p+q+1] of steps away from `base`. basis: [p+1+q, p+q+1], maps u to (da, db)."""

    base: Rational
    basis: np.ndarray

    def directions(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (d, q), each [n, p+q+1]: the change at the points t per unit of each coordinate."""
        r, s = self.base, t - self.base.centre
        n_a, n_d = len(r.a), len(r.d)
        terms = powers(s, max(n_a, n_d)) / r.denominator(t)[:, None]
        q = terms[:, 1:n_d] @ self.basis[n_a:]
        return terms[:, :n_a] @ self.basis[:n_a] - r(t)[:, None] * q, q

    def moved(self, u: np.ndarray) -> Rational:
        """Returns the rational after the step u, with the same centre."""
        step, n_a = self.basis @ u, len(self.base.a)
        d = self.base.d.copy()
        d[1:] += step[n_a:]
        return Rational(self.base.a + step[:n_a], d, self.base.centre)


def tangent(
    r: Rational, t: np.ndarray, weight: np.ndarray, hull: np.ndarray, size: float, floor: float = 1e-2
) -> Tangent:
    """Makes coordinates at r for errors of order `size` at the points t [n], with weights [n].

    hull: points of [-1, 1] over which powers are scaled. floor: a direction that moves the error by less than
    floor * size per unit of coefficient is not stretched further (it may be a common factor of P and Q that
    appears: it moves nothing to first order but must not run away).
    """
    n_a, n_d = len(r.a), len(r.d)
    scales = np.concatenate([unit_influence(r, hull, n_a), unit_influence(r, hull, n_d)[1:]])
    s = t - r.centre
    over = weight / r.denominator(t)
    terms = powers(s, max(n_a, n_d)) * over[:, None]
    columns = np.concatenate([terms[:, :n_a], -r(t)[:, None] * terms[:, 1:n_d]], axis=1) * scales
    _, singular, rotation = np.linalg.svd(columns / (size * np.sqrt(len(t))), full_matrices=False)
    return Tangent(r, scales[:, None] * rotation.T / np.maximum(singular, floor))
