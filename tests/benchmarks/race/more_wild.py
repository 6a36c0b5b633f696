"""Residuals of a published test set of optimisation without derivatives, in four variants.

Twelve of the 22 functions of Moré and Wild, each once, with the sizes of their table: small ones, and those whose
parameters are of comparable size. Kowalik and Osborne's is not among them, nor any other on which a setting was chosen.

smooth         F(x)
deterministic  F(x) sqrt(1 + 1e-3 phi(x)): then f(x) = (1 + 1e-3 phi(x)) sum F_i(x)^2 / 2, their noise
stochastic     F_i(x) (1 + 1e-2 z_i), z standard normal and new in each run (Cartis et al.)
nonsmooth      sign(F_i) sqrt(2 |F_i|): then half the sum of squares is sum |F_i|, their piecewise smooth problem

References: Moré, Wild, SIAM J. Optim. 20 (2009) 172; Moré, Garbow, Hillstrom, ACM TOMS 7 (1981) 17; Cartis, Fiala,
Marteau, Roberts, ACM TOMS 45 (2019) 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

VARIANTS = ("smooth", "deterministic", "stochastic", "nonsmooth")
DETERMINISTIC, STOCHASTIC = 1e-3, 1e-2
LARGEST = 1e12  # residuals beyond are cut: exponentials of a bad guess


def rosenbrock(x: Array) -> Array:
    return np.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def helical_valley(x: Array) -> Array:
    turn = np.arctan2(x[1], x[0]) / (2 * np.pi)
    turn = turn + 1 if turn < -0.25 else turn  # the branch between -1/4 and 3/4
    return np.array([10 * (x[2] - 10 * turn), 10 * (np.hypot(x[0], x[1]) - 1), x[2]])


def powell_singular(x: Array) -> Array:
    return np.array([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def freudenstein_roth(x: Array) -> Array:
    return np.array([-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((1 + x[1]) * x[1] - 14) * x[1]])


BARD = np.array([0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.1, 4.39])


def bard(x: Array) -> Array:
    u = np.arange(1.0, 16.0)
    v = 16 - u
    return BARD - (x[0] + u / (v * x[1] + np.minimum(u, v) * x[2]))


def watson(x: Array) -> Array:
    t, j = np.arange(1, 30)[:, None] / 29, np.arange(len(x))
    slope = (j[1:] * x[1:] * t ** (j[1:] - 1)).sum(axis=1)
    return np.concatenate([slope - (x * t**j).sum(axis=1) ** 2 - 1, [x[0], x[1] - x[0] ** 2 - 1]])


def box(x: Array) -> Array:
    t = np.arange(1, 11) / 10
    return np.exp(-t * x[0]) - np.exp(-t * x[1]) - x[2] * (np.exp(-t) - np.exp(-10 * t))


def brown_dennis(x: Array) -> Array:
    t = np.arange(1, 21) / 5
    return (x[0] + t * x[1] - np.exp(t)) ** 2 + (x[2] + x[3] * np.sin(t) - np.cos(t)) ** 2


def chebyquad(x: Array) -> Array:
    i = np.arange(1, len(x) + 1)
    before, now = np.ones_like(x), 2 * x - 1
    mean = np.empty(len(x))
    for k in range(len(x)):
        mean[k] = now.mean()
        before, now = now, 2 * (2 * x - 1) * now - before
    return mean + np.where(i % 2 == 0, 1 / (i**2 - 1.0 + (i == 1)), 0.0)


OSBORNE = np.array(
    [
        1.366,
        1.191,
        1.112,
        1.013,
        0.991,
        0.885,
        0.831,
        0.847,
        0.786,
        0.725,
        0.746,
        0.679,
        0.608,
        0.655,
        0.616,
        0.606,
        0.602,
        0.626,
        0.651,
        0.724,
        0.649,
        0.649,
        0.694,
        0.644,
        0.624,
        0.661,
        0.612,
        0.558,
        0.533,
        0.495,
        0.500,
        0.423,
        0.395,
        0.375,
        0.372,
        0.391,
        0.396,
        0.405,
        0.428,
        0.429,
        0.523,
        0.562,
        0.607,
        0.653,
        0.672,
        0.708,
        0.633,
        0.668,
        0.645,
        0.632,
        0.591,
        0.559,
        0.597,
        0.625,
        0.739,
        0.710,
        0.729,
        0.720,
        0.636,
        0.581,
        0.428,
        0.292,
        0.162,
        0.098,
        0.054,
    ]
)


def osborne_2(x: Array) -> Array:
    t = np.arange(65) / 10
    peaks = sum(x[k] * np.exp(-x[4 + k] * (t - x[7 + k]) ** 2) for k in (1, 2, 3))
    return OSBORNE - x[0] * np.exp(-t * x[4]) - peaks


def bdqrtic(x: Array) -> Array:
    k = len(x) - 4
    quartic = x[:k] ** 2 + 2 * x[1 : k + 1] ** 2 + 3 * x[2 : k + 2] ** 2 + 4 * x[3 : k + 3] ** 2 + 5 * x[-1] ** 2
    return np.concatenate([3 - 4 * x[:k], quartic])


def cube(x: Array) -> Array:
    return np.concatenate([[x[0] - 1], 10 * (x[1:] - x[:-1] ** 3)])


@dataclass(frozen=True)
class Function:
    """A sum of squares.

    Attributes:
        residuals: (d,) -> (m,).
        start: the published one.
        minimum: of half the sum of squares, near the start.
        elsewhere: a lower one, far from it.
    """

    residuals: Callable[[Array], Array]
    start: tuple[float, ...]
    minimum: float
    elsewhere: float | None = None


# The minima are the published ones, halved.
FUNCTIONS = {
    "rosenbrock": Function(rosenbrock, (-1.2, 1.0), 0.0),
    "helical-valley": Function(helical_valley, (-1.0, 0.0, 0.0), 0.0),
    "powell-singular": Function(powell_singular, (3.0, -1.0, 0.0, 1.0), 0.0),
    "freudenstein-roth": Function(freudenstein_roth, (0.5, -2.0), 48.98425 / 2, 0.0),
    "bard": Function(bard, (1.0, 1.0, 1.0), 8.21487e-3 / 2),
    "watson": Function(watson, (0.5,) * 6, 2.28767e-3 / 2),
    "box": Function(box, (0.0, 10.0, 20.0), 0.0),
    "brown-dennis": Function(brown_dennis, (25.0, 5.0, -5.0, -1.0), 85822.2 / 2),
    "chebyquad": Function(chebyquad, tuple(i / 7 for i in range(1, 7)), 0.0),
    "osborne-2": Function(osborne_2, (1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5), 4.01377e-2 / 2),
    "bdqrtic": Function(bdqrtic, (1.0,) * 8, 10.2389734 / 2),
    "cube": Function(cube, (0.5,) * 5, 0.0),
}


def oscillation(x: Array) -> float:
    """phi of Moré and Wild, in [-1, 1]: the Chebyshev polynomial T_3 of a fast oscillation."""
    one, most, two = np.abs(x).sum(), np.abs(x).max(), np.linalg.norm(x)
    a = 0.9 * np.sin(100 * one) * np.cos(100 * most) + 0.1 * np.cos(two)
    return float(a * (4 * a * a - 3))


def true_residuals(function: Function, variant: str, x: Array) -> Array:
    """(m,) without noise: half the sum of squares is what a point is judged by."""
    with np.errstate(all="ignore"):
        f = function.residuals(x)
    f = np.clip(np.nan_to_num(f, nan=LARGEST), -LARGEST, LARGEST)
    return np.sign(f) * np.sqrt(2 * np.abs(f)) if variant == "nonsmooth" else f


def residuals(function: Function, variant: str, x: Array, seed: int) -> Array:
    """(m,) as a solver sees them."""
    f = true_residuals(function, variant, x)
    if variant == "deterministic":
        return f * np.sqrt(1 + DETERMINISTIC * oscillation(x))
    if variant == "stochastic":
        return f * (1 + STOCHASTIC * np.random.Generator(np.random.Philox(key=seed)).standard_normal(len(f)))
    return f
