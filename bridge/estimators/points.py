"""Points of the open unit cube (0, 1)^d, from which perturbations are made by the inverse CDF.

The cube is open because 0 goes to minus infinity through an inverse CDF. Each set says into which independent blocks
its rows fall, because the covariates depend on it (theory: leave-one-out on dependent rows is biased).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import numpy as np
from scipy import special
from scipy.stats import qmc

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.estimators.distributions import Distribution, Gaussian, fisher_information
from bridge.registry import Registry

# What "auto" takes on itself, about a second: floating-point operations of orthogonal directions, and the dimensions
# whose scrambles Sobol' points need.
_DIRECTIONS_AT_ONCE, _SOBOL_AT_ONCE = 2e10, 4096


@dataclass(frozen=True)
class Nodes:
    """What the estimators see of a point set.

    Attributes:
        eps: (n, d) perturbations at unit scale.
        score: (n, d), s(eps).
        weight: (n,) weights of the mean, summing to 1.
        block: rows [0, block), [block, 2 block), ... are independent of each other and identically distributed as
            blocks; 1: independent rows; n: all rows depend on each other.
        paired: rows 2i and 2i + 1 are eps and -eps.
    """

    eps: Array
    score: Array
    weight: Array
    block: int
    paired: bool = False


class PointSet(ABC):
    """A rule that gives n points of the open unit cube from a random generator, and nothing else.

    A new one needs `uniform`, and `block` where its rows are independent. `bridge.register("name")` makes it known by a
    name; `bridge.testing.PointSetContract` tests it.
    """

    name: ClassVar[str] = "custom"

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abstractmethod
    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        """(n, d) points, each in the open interval (0, 1). Raises InputError where n is not feasible."""

    def block(self, n: int) -> int:
        """Size of the independent blocks, see `Nodes`. Most sets are one dependent whole."""
        return n

    def check(self, distribution: Distribution, n: int) -> None:  # noqa: B027  (by default all are)
        """Raises InputError where n rows of this density are not feasible, whatever the dimension."""

    def nodes(self, distribution: Distribution, n: int, d: int, rng: np.random.Generator) -> Nodes:
        u = self.uniform(n, d, rng)
        return Nodes(
            distribution.icdf(u),
            distribution.score_from_uniform(u),
            np.full(n, 1.0 / n),
            min(n, self.block(n)),
        )


POINT_SETS: Registry[PointSet] = Registry(
    "point set", "bridge.point_sets", PointSet, called="points", or_else=", or antithetic-NAME for pairs"
)


def _open(u: Array) -> Array:
    # Generator.random gives multiples of 2^-53 in [0, 1): half a step up makes the interval open, the mean exact.
    return u + 2.0**-54


@final
class MonteCarlo(PointSet):
    """Independent uniform rows."""

    name = "mc"

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        return _open(rng.random((n, d)))

    def block(self, n: int) -> int:
        return 1


@final
@dataclass(frozen=True)
class Latin(PointSet):
    """Latin hypercube: u_ij = (pi_j(i) + v_ij) / n with independent permutations pi_j.

    Args:
        jitter: v uniform in the cell ("rqmc-latin"), else its centre, 1/2 ("qmc-latin").
    """

    jitter: bool = True
    name: ClassVar[str] = "latin"

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        cells = rng.permuted(np.tile(np.arange(n, dtype=np.float64), (d, 1)), axis=1).T
        return (cells + (_open(rng.random((n, d))) if self.jitter else 0.5)) / n


@final
@dataclass(frozen=True)
class Cartesian(PointSet):
    """One point in each of n = k^d equal cells: uniform in it ("rqmc-cartesian") or its centre ("qmc-cartesian").

    The points of different cells are independent of each other (not a product of jittered axes). The centres are
    strongly biased for small k: projection on the true gradient 0.67-1.18 at k = 4.
    """

    jitter: bool = True
    name: ClassVar[str] = "cartesian"

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        k = round(n ** (1 / d))
        if k**d != n:
            below, above = max(1, int(n ** (1 / d))), int(n ** (1 / d)) + 1
            raise InputError(
                f"Expected k^{d} rows for {d} parameters with cartesian points, got {n}. The nearest feasible numbers "
                f"are {below**d} and {above**d}; or use latin or sobol points."
            )
        cells = np.stack(np.unravel_index(np.arange(n), (k,) * d), axis=1).astype(np.float64)
        return (cells + (_open(rng.random((n, d))) if self.jitter else 0.5)) / k


@final
class Sobol(PointSet):
    """Scrambled Sobol' points (linear matrix scramble and digital shift); best for n a power of two.

    Reference: Owen, ACM TOMACS 8 (1998) 71; Arnold et al., AISTATS 2022, for score-function gradients.
    """

    name = "sobol"
    _BITS = 52

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        if d > qmc.Sobol.MAXDIM:
            raise InputError(
                f"Expected at most {qmc.Sobol.MAXDIM} parameters for sobol points, got {d}. Use points='mc'."
            )
        engine = qmc.Sobol(d, scramble=True, bits=self._BITS, rng=rng)
        with warnings.catch_warnings():
            # n that is not a power of two is the user's choice; it costs balance, not correctness.
            warnings.filterwarnings("ignore", message="The balance properties of Sobol'", category=UserWarning)
            return engine.random(n) + 2.0 ** -(self._BITS + 1)


@final
@dataclass(frozen=True)
class Net(PointSet):
    """Scrambled digital net of n = 2^k points: the first coordinate is i/n, the others are Sobol's of one dimension
    less, which makes the net finer in all of them (its t-value falls) than the same number of Sobol' points.

    Args:
        jitter: uniform in each of the n cells of a coordinate, with independent linear scrambles and digital shifts
            ("rqmc-net", unbiased), else the cell's centre ("qmc-net": bounds scores that grow without limit in the
            outermost cells).

    Reference: Niederreiter, Random Number Generation and Quasi-Monte Carlo Methods, SIAM 1992, lemma 4.22.
    """

    jitter: bool = True
    name: ClassVar[str] = "net"

    def check(self, distribution: Distribution, n: int) -> None:
        self._cells(n)

    def _cells(self, n: int) -> int:
        """k of n = 2^k."""
        if n & (n - 1):
            below = 1 << (n.bit_length() - 1)
            raise InputError(
                f"Expected a power of two for the number of rows of a net, got {n}. Use {below} or {2 * below}, or "
                "sobol points."
            )
        return n.bit_length() - 1

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        bits = self._cells(n)
        # i/n in binary digits, the first one first, times a random lower triangular matrix, plus a random shift.
        digits = np.arange(n)[:, None] >> np.arange(bits)[::-1] & 1
        mixing = np.tril(rng.integers(0, 2, (bits, bits)), -1) + np.eye(bits, dtype=np.int64)
        cell = (digits @ mixing.T + rng.integers(0, 2, bits)) % 2 @ (1 << np.arange(bits)[::-1])
        u = np.empty((n, d))
        u[:, 0] = (cell + _open(rng.random(n))) / n
        if d > 1:
            u[:, 1:] = Sobol().uniform(n, d - 1, rng)
        return u if self.jitter else (np.floor(u * n) + 0.5) / n


@final
class Halton(PointSet):
    """Scrambled Halton points: for any n, where Sobol' points want a power of two.

    Reference: Owen, arXiv 1706.02808 (the random permutations of digits).
    """

    name = "halton"

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        return np.clip(qmc.Halton(d, scramble=True, rng=rng).random(n), 2.0**-53, 1 - 2.0**-53)


def _rotations(normal: Array) -> Array:
    """The columns of Q of matrices (..., d, r) of independent normal numbers, as rows: (..., r, d)."""
    q, r = np.linalg.qr(normal)
    # With the signs of R's diagonal, Q is uniform over the rotations (and reflections).
    q = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    return np.asarray(np.swapaxes(q, -1, -2))


@final
class Orthogonal(PointSet):
    """Blocks of d orthogonal directions, each row Gaussian by itself: a Haar rotation times independent chi(d) norms.

    For n a small multiple of d; Gaussian noise only, which alone is unchanged by rotations. Blocks are independent.

    Reference: Choromanski et al., ICML 2018 (structured evolution strategies).
    """

    name = "orthogonal"

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        return np.asarray(special.ndtr(self._directions(n, d, rng)))

    def _directions(self, n: int, d: int, rng: np.random.Generator) -> Array:
        # Of the last rotation only the columns that are needed: the first r columns of Q are those of r of A's, and
        # cost d r^2 in place of d^3.
        blocks, rest = divmod(n, d)
        parts = [_rotations(rng.standard_normal((blocks, d, d))).reshape(blocks * d, d)] if blocks else []
        parts += [_rotations(rng.standard_normal((d, rest)))] if rest else []
        directions = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return np.asarray(directions * np.sqrt(rng.chisquare(d, size=n))[:, None])

    def check(self, distribution: Distribution, n: int) -> None:
        if not isinstance(distribution, Gaussian):
            raise InputError(
                f"Expected Gaussian noise for orthogonal points, got {distribution.name!r}: only the Gaussian is "
                "unchanged by rotations. Use points='sobol'."
            )

    def nodes(self, distribution: Distribution, n: int, d: int, rng: np.random.Generator) -> Nodes:
        self.check(distribution, n)
        eps = self._directions(n, d, rng)
        return Nodes(eps, eps.copy(), np.full(n, 1.0 / n), d if n % d == 0 else n)


@final
class Auto(PointSet):
    """Chooses by (n, d, distribution); `choose` says what and why."""

    name = "auto"

    def choose(self, distribution: Distribution, n: int, d: int) -> tuple[PointSet, str]:
        power_of_two = n & (n - 1) == 0
        if np.isinf(fisher_information(distribution)):
            midpoints = Net(jitter=False) if power_of_two and d <= _SOBOL_AT_ONCE else Latin(jitter=False)
            return midpoints, "the score has infinite variance: midpoints bound it"
        if d > qmc.Sobol.MAXDIM:
            return MonteCarlo(), f"more parameters than Sobol' points have dimensions ({qmc.Sobol.MAXDIM})"
        gaussian = isinstance(distribution, Gaussian) and 4 * d * n * min(n, d) <= _DIRECTIONS_AT_ONCE
        if gaussian and n % 2 == 0 and 2 * d <= n < 4 * (d + 1):
            return Antithetic(Orthogonal()), f"few rows ({n}) for {d} parameters: orthogonal pairs"
        if gaussian and 1 < n < 2 * d:
            return Orthogonal(), f"fewer rows ({n}) than pairs for {d} parameters: orthogonal directions"
        if n <= d:
            return Latin(jitter=True), f"no more rows ({n}) than parameters ({d}): only single coordinates can be even"
        if power_of_two:
            return Net(jitter=True), "a scrambled digital net is the best all-round set for a power of two"
        return Sobol(), "scrambled Sobol' points are the best all-round set"

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        return Sobol().uniform(n, d, rng)

    def nodes(self, distribution: Distribution, n: int, d: int, rng: np.random.Generator) -> Nodes:
        return self.choose(distribution, n, d)[0].nodes(distribution, n, d, rng)


@final
@dataclass(frozen=True, init=False)
class Antithetic(PointSet):
    """Pairs (u, 1 - u), neighbours in row order, over n/2 points of another set.

    Symmetric densities and even n only. By name: "antithetic", "antithetic-mc", and so for every set with a name.

    Args:
        points: of which pairs are made, or their name; "auto" takes Sobol' points.
    """

    base: PointSet
    name: ClassVar[str] = "antithetic"

    def __init__(self, points: str | PointSet = "auto") -> None:
        base = get_points(points)
        if isinstance(base, Antithetic):
            raise InputError(f"Expected points that are no pairs themselves, got {base!r}. Give {base.base!r}.")
        object.__setattr__(self, "base", Sobol() if isinstance(base, Auto) else base)

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        self._check_even(n)
        half = self.base.uniform(n // 2, d, rng)
        return np.stack([half, 1 - half], axis=1).reshape(n, d)

    def block(self, n: int) -> int:
        return 2 * self.base.block(n // 2)

    def check(self, distribution: Distribution, n: int) -> None:
        self._check_even(n)
        if not distribution.symmetric:
            raise InputError(
                f"Expected a symmetric density for antithetic pairs, got {distribution.name!r}: -eps is not "
                "distributed as eps. Use other points, or gaussian, logistic, cauchy, laplace or triangular."
            )
        self.base.check(distribution, n // 2)

    def _check_even(self, n: int) -> None:
        if n % 2:
            raise InputError(
                f"Expected an even number of samples for antithetic pairs, got {n}. Use {n - 1} or {n + 1}."
            )

    def nodes(self, distribution: Distribution, n: int, d: int, rng: np.random.Generator) -> Nodes:
        self.check(distribution, n)
        # Mirrored exactly (not through 1 - u, which rounds), so that the scores of a pair cancel to the last bit.
        half = self.base.nodes(distribution, n // 2, d, rng)

        def mirror(x: Array) -> Array:
            return np.stack([x, -x], axis=1).reshape(n, d)

        block = min(n, 2 * half.block)
        return Nodes(mirror(half.eps), mirror(half.score), np.repeat(half.weight, 2) / 2, block, paired=True)


_NAMED: dict[str, Callable[[], PointSet]] = {
    "mc": MonteCarlo,
    "qmc-latin": partial(Latin, jitter=False),
    "rqmc-latin": Latin,
    "qmc-cartesian": partial(Cartesian, jitter=False),
    "rqmc-cartesian": Cartesian,
    "sobol": Sobol,
    "qmc-net": partial(Net, jitter=False),
    "rqmc-net": Net,
    "halton": Halton,
    "orthogonal": Orthogonal,
    "auto": Auto,
    "antithetic": Antithetic,
}
for _name, _factory in _NAMED.items():
    POINT_SETS.register(_name)(_factory)

_PAIRS = "antithetic-"


def get_points(points: str | PointSet) -> PointSet:
    """The point set of that name, or the one given.

    Raises:
        InputError: an unknown name, or pairs of pairs.
    """
    if isinstance(points, str) and points.startswith(_PAIRS):
        return Antithetic(points.removeprefix(_PAIRS))
    return POINT_SETS.make(points)
