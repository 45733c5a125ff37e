"""Fits the rational of least weighted squared error, by damped Gauss-Newton steps in tangent coordinates.

This is for fits to the density of real pre-activations, where most of the mass is near 0 and the largest error says
little.
"""

import numpy as np

from rsae_triton.common.errors import ConfigError, ConvergenceError, NumericsError
from rsae_triton.remez.minimax import poles_at, solve
from rsae_triton.remez.problem import Problem
from rsae_triton.remez.rational import Rational
from rsae_triton.remez.tangent import tangent

STEPS = 500
CLOSE = 1e-6  # stop when ten steps together gain less than this share of the squared error
SHRINK = 0.2  # a step may shrink Q at no point below this share of its old value
BINS = 4000
BACKGROUND = 1e-3  # share of the mass spread evenly, so that the gate stays reasonable where there is no sample


def checked_samples(samples: np.ndarray) -> np.ndarray:
    """Returns samples as float64 [n], clipped to [-1, 1] like the gate's input. Raises ConfigError, NumericsError."""
    try:
        if np.iscomplexobj(samples):
            raise TypeError("complex numbers")
        t = np.asarray(samples, dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"samples is a {type(samples).__name__}; give an array of numbers ({error})") from error
    if t.size == 0:
        raise ConfigError("samples is empty; pass pre-activations t = (h - theta) / C_in, or None")
    if not np.all(np.isfinite(t)):
        raise NumericsError(f"samples holds {np.count_nonzero(~np.isfinite(t))} values that are not finite")
    return np.clip(t, -1.0, 1.0)


def density(problem: Problem, samples: np.ndarray | None, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (t [n], mass [n]) to sum the squared error over: the even grid, or samples (binned if they are many).

    A bin is represented by the mean of its samples, so that a spike of samples keeps its place. The gap is left out.
    """
    even = problem.inside(np.linspace(-1.0, 1.0, points))
    t, mass = even, np.full_like(even, 1.0 / len(even))
    if samples is not None:
        kept = samples[~np.isin(samples, problem.outside(samples))]
        if kept.size == 0:
            raise ConfigError("every sample lies in the gap around theta; use a smaller margin")
        if kept.size <= BINS:
            t, mass = kept, np.ones_like(kept)
        else:
            # Theta is a bin edge: a bin across the jump would treat samples of both sides as one.
            edges = np.union1d(np.linspace(-1.0, 1.0, BINS + 1), [problem.theta])
            mass, _ = np.histogram(kept, edges)
            total, _ = np.histogram(kept, edges, weights=kept)
            t, mass = total[mass > 0] / mass[mass > 0], mass[mass > 0].astype(np.float64)
        t = np.concatenate([t, even])
        mass = np.concatenate([(1 - BACKGROUND) / mass.sum() * mass, np.full_like(even, BACKGROUND / len(even))])
    return t, mass * problem.weight(t)


def _start(problem: Problem, p: int, q: int) -> tuple[Rational, int]:
    """Starts from the minimax fit if there is one, else from poles clustered at the jump."""
    if problem.solvable:
        try:
            solution = solve(problem, p, q)
        except ConvergenceError:
            pass
        else:
            return solution.r, solution.n_lps
    pairs = min(q, p + 1) // 2
    return poles_at(np.geomspace(0.02, 0.5, pairs), problem, p, q), 0


def solve_squares(problem: Problem, p: int, q: int, t: np.ndarray, mass: np.ndarray) -> tuple[Rational, int]:
    """Returns (r, number of LPs solved), a local minimum of sum mass * (value - r)^2 over t [n] with Q > 0 on [-1,
    1]."""
    hull = np.union1d(problem.grid, problem.gap)
    value, root = problem.value(t), np.sqrt(mass)
    r, n_lps = _start(problem, p, q)
    error = root * (value - r(t))
    loss, damping = float(error @ error), 1e-3
    trail = [loss]
    for _ in range(STEPS):
        if loss <= 1e-30:
            break
        coordinates = tangent(r, t, root, hull, np.sqrt(loss))
        d, _ = coordinates.directions(t)
        d *= root[:, None]
        gradient, normal = d.T @ error, d.T @ d
        while damping < 1e12:
            # The coordinates have one scale, so plain damping (Levenberg) is the same as Marquardt's.
            u = np.linalg.solve(normal + damping * np.trace(normal) / len(normal) * np.eye(len(normal)), gradient)
            moved = coordinates.moved(u)
            new_error = root * (value - moved(t))
            new_loss = float(new_error @ new_error)
            if new_loss < loss and _safe(moved, r, hull):
                damping = max(damping / 5, 1e-12)
                break
            damping *= 4
        else:
            break
        centre = moved.lowest(hull)
        r = moved.recentred(centre) if -1 < centre < 1 else moved
        error, loss = new_error, new_loss
        trail.append(loss)
        if len(trail) > 10 and trail[-11] - loss <= CLOSE * loss:
            break
    return r, n_lps


def _safe(moved: Rational, r: Rational, hull: np.ndarray) -> bool:
    real = np.sort(moved.poles().real)
    under = np.concatenate([real, 0.5 * (real[1:] + real[:-1])])
    points = np.concatenate([hull, under[np.abs(under) <= 1]])
    return bool(np.all(moved.denominator(points) > SHRINK * r.denominator(points)))
