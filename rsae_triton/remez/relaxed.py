"""The published initialiser, "relaxed Remez", for comparison only: Adam on a penalty at fixed nodes.

Chen, Chen, Lai, Zhang & Lu, "Rational neural networks for approximating jump discontinuities of graph convolution
operator", ICDM 2018: the "relaxed Remez" that initialises the RSAE paper's gates. Loss, optimiser, rates and steps are
those of the authors' program (github.com/aquastar/RationalGraphNet), the nodes are its Chebyshev option. Differences: Q
is the safe 1 + |B| instead of 1 + B, because a gate must not have poles; p and q may differ; the seed is fixed. The
method has no exchange step as Remez' does: the nodes never move, so errors between them go unnoticed and nothing is
proved.
"""

import numpy as np

from rsae_triton.remez.problem import Problem
from rsae_triton.remez.rational import Rational, powers

STEPS = 30_000  # three rounds of 10 000; the later rounds use the first round's nodes
RATE, BETAS, DECAY = 1e-2, (0.5, 0.99), 5e-4


def nodes(problem: Problem, count: int) -> np.ndarray:
    """[count] Chebyshev nodes of the domain with its gap closed up, ascending."""
    length = 2.0 - 2.0 * problem.margin
    x = 0.5 * length * (1.0 - np.cos(np.pi * (np.arange(count) + 0.5) / count)) - 1.0
    return x + 2.0 * problem.margin * (x > problem.pieces[0][1])


def solve_relaxed(problem: Problem, p: int, q: int, seed: int = 0) -> Rational:
    """Returns r = P(t) / (1 + |B(t)|), in powers of t about 0, after the published number of steps.

    The loss at the p + q + 2 nodes, with e = r - value (times the weight) and sigma alternating from +1, is
        mean (e - sigma E)^2 + sum max(0, -sigma e) + max |e|
    over the coefficients and the level E. As published, the last parameters are kept, not the best ones.
    """
    rng = np.random.default_rng(seed)
    t = nodes(problem, p + q + 2)
    weight, value = problem.weight(t), problem.value(t)
    n, sigma = len(t), np.where(np.arange(len(t)) % 2 == 0, 1.0, -1.0)
    up, down = powers(t, p + 1), powers(t, q + 1)[:, 1:]
    # Xavier's normal initialisation for a matrix with one row, as in the authors' program; E starts at 1e-8.
    scales = np.concatenate([np.full(p + 1, np.sqrt(2 / (p + 2))), np.full(q, np.sqrt(2 / (q + 1)))])
    u = np.append(rng.normal(size=p + 1 + q) * scales, 1e-8)
    mean, square = np.zeros_like(u), np.zeros_like(u)
    slope = np.empty_like(u)
    for step in range(1, STEPS + 1):
        b = down @ u[p + 1 : -1]
        over = weight / (1.0 + np.abs(b))
        r = up @ u[: p + 1] * over
        e = r - weight * value
        off = e - sigma * u[-1]
        pull = 2.0 / n * off - sigma * (sigma * e < 0)  # d loss / d e
        worst = int(np.argmax(np.abs(e)))
        pull[worst] += np.sign(e[worst])
        slope[: p + 1] = (pull * over) @ up
        slope[p + 1 : -1] = -(pull * r * np.sign(b) / (1.0 + np.abs(b))) @ down
        slope[-1] = -2.0 / n * (sigma @ off)
        slope += DECAY * u
        mean += (1 - BETAS[0]) * (slope - mean)
        square += (1 - BETAS[1]) * (slope * slope - square)
        root = np.sqrt(square / (1 - BETAS[1] ** step)) + 1e-8
        u = u - RATE / (1 - BETAS[0] ** step) * mean / root
    return Rational(u[: p + 1], np.concatenate([[1.0], u[p + 1 : -1]]), 0.0)


def kinks(r: Rational, problem: Problem) -> np.ndarray:
    """Points of the domain at and close to the zeros of B, where the safe form has corners."""
    if not np.any(r.d[1:]):
        return np.empty(0)
    roots = np.polynomial.polynomial.polyroots(np.trim_zeros(np.append([0.0], r.d[1:]), "b"))
    real = roots.real[np.abs(roots.imag) < 1e-6] + r.centre
    return problem.inside(
        (real[:, None] + np.concatenate([-np.geomspace(1e-6, 1e-2, 9), [0.0], np.geomspace(1e-6, 1e-2, 9)])).ravel()
    )
