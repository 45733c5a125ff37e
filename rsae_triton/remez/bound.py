"""Proves a lower bound by an infeasible linear program, for fits whose error does not alternate often enough.

No rational of the type is closer than `level` at the points if |f Q - P| <= level * Q has no solution with Q >= 0 other
than Q = 0. The solutions form a convex cone in the coefficients (Loeb 1960), so one linear program decides.
"""

import numpy as np

from rsae_triton.remez.problem import Problem
from rsae_triton.remez.rational import Rational
from rsae_triton.remez.tangent import tangent

SHARES = (0.9999, 0.9995, 0.999, 0.99, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1)

TOLERANCE = 1e-9


def program_bound(problem: Problem, r: Rational, points: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns (bound, support): the largest share of r's own error that is proved unattainable; (0, []) if none is.

    points: [n] of the domain. support: the points that make the program infeasible (nonzero multipliers).
    """
    from scipy.optimize import linprog  # imported here because it takes half a second

    hull = np.union1d(problem.grid, problem.gap)
    weight = problem.weight(points)
    error = weight * (problem.value(points) - r(points))
    size = float(np.max(np.abs(error)))
    coordinates = tangent(r, points, weight, hull, size)
    d, q = coordinates.directions(points)
    d, e = d * weight[:, None] / size, (error / size)[:, None]
    mean = np.mean(q, axis=0)  # Q's scale: its mean ratio to r's own Q at the points is 1
    q_gap = coordinates.directions(problem.gap)[1] - mean
    q = q - mean
    for share in SHARES:
        rows = np.concatenate([e * q - d - share * q, d - e * q - share * q])
        excess = np.concatenate([share - e[:, 0], share + e[:, 0]])
        answer = linprog(
            np.append(np.zeros(rows.shape[1]), 1.0),
            A_ub=np.column_stack(
                [np.concatenate([rows, -q_gap]), np.append(np.full(len(rows), -1.0), np.zeros(len(q_gap)))]
            ),
            b_ub=np.append(excess, np.ones(len(q_gap))),
            bounds=[(None, None)] * (rows.shape[1] + 1),
            method="highs-ds",
            options={"primal_feasibility_tolerance": TOLERANCE, "dual_feasibility_tolerance": TOLERANCE},
        )
        # Ten times HiGHS' feasibility tolerance: the least violation any P / Q must have.
        if answer.x is not None and answer.fun > 10 * TOLERANCE:
            used = np.abs(answer.ineqlin.marginals[: len(rows)]).reshape(2, -1).max(axis=0) > 1e-9
            return share * size, points[used]
    return 0.0, np.empty(0)
