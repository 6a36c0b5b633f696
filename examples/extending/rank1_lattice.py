"""A point set of one's own: a randomly shifted rank-1 lattice, with a name.

    python examples/extending/rank1_lattice.py

Point i is the fractional part of i z / n + shift, for any n. The whole number vector z is found component by component:
each is the one that makes the error of periodic functions least, given those before it. One method makes a point set,
`uniform`. tests/examples/extending/test_rank1_lattice.py inherits all that is asked of a point set.

Reference: J. Dick, F. Y. Kuo, I. H. Sloan, Acta Numerica 22 (2013) 133, sections 5.2 and 5.4.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import ClassVar, final

import numpy as np
import torch

import bridge

_CANDIDATES = 200  # of each component, at most


@bridge.register("rank1-lattice")
@final
@dataclass(frozen=True)
class Rank1Lattice(bridge.PointSet):
    """n points of a lattice, shifted as a whole: each is uniform by itself, so that means are unbiased.

    Args:
        decay: how much less the next coordinate counts than the one before, for the choice of z.
    """

    decay: float = 0.8
    name: ClassVar[str] = "rank1-lattice"

    def uniform(self, n, d, rng):
        u = np.arange(n)[:, None] * generating_vector(n, d, self.decay) / n + rng.random(d)
        return np.clip(u % 1, 2.0**-53, 1 - 2.0**-53)  # open: 0 would become minus infinity


@lru_cache(maxsize=64)
def generating_vector(n, d, decay):
    """z, component by component: the least sum over points of prod_j (1 + decay^j 2 pi^2 B_2({i z_j / n})).

    B_2(x) = x^2 - x + 1/6. That sum, less n, is n times the squared worst-case error of periodic functions whose mixed
    first derivatives are square integrable.
    """
    units = [z for z in range(1, max(2, n // 2 + 1)) if gcd(z, n) == 1]
    units = np.array(units[:: -(-len(units) // _CANDIDATES)])
    x = np.arange(n) * units[:, None] % n / n  # (candidates, n)
    kernel = 2 * np.pi**2 * (x * x - x + 1 / 6)
    product, z = np.ones(n), []
    for j in range(d):
        best = int(np.argmin(kernel @ product)) if j else 0
        product = product * (1 + decay**j * kernel[best])
        z.append(units[best])
    return np.array(z)


def main():
    def simulate(theta):
        a, b, c = theta
        return np.array([np.tanh(a + b), np.exp(-c * c) * a])

    x = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    reference = bridge.smooth(simulate, seed=0, num_samples=1 << 14, scale=0.5).estimate(x).jacobian()
    for points in ("mc", "rank1-lattice"):
        smoothed = bridge.smooth(simulate, seed=1, num_samples=101, scale=0.5, points=points, covariate="block")
        error = smoothed.estimate(x.expand(64, 3)).jacobian() - reference  # 64 problems, each with noise of its own
        print(f"{points:>13}: 101 runs give the Jacobian to {float(error.square().mean().sqrt()):.3f}")


if __name__ == "__main__":
    main()
