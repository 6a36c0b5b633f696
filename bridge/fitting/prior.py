"""What is known of parameters beforehand: a Gaussian of them, or of some of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.simulator.space import ParameterSpace

PriorOf = Mapping[Any, tuple[Any, Any]] | tuple[Any, Any]


@final
@dataclass(frozen=True)
class Prior:
    """A Gaussian: 1/2 (z - mu)^T P (z - mu) of parameters in natural units.

    Attributes:
        information: P, (d, d), 0 where nothing is known. mean: mu, (d,).
    """

    information: Array
    mean: Array

    def __call__(self, z: Array) -> tuple[float, Array]:
        slope = self.information @ (z - self.mean)
        return 0.5 * float(slope @ (z - self.mean)), np.asarray(slope)

    @property
    def known(self) -> int:
        """How many numbers it says something of."""
        return int(np.linalg.matrix_rank(self.information))


def make_prior(prior: PriorOf | None, space: ParameterSpace) -> Prior:
    """A prior from what is known of parameters, or of several together.

    Args:
        prior: name -> (mean, standard deviation); several names, in a tuple or with commas between them -> (means,
            covariance) of these together; (means, covariance) of all.

    Raises:
        InputError: an unknown name, one that is named twice, a standard deviation that is not positive, or a covariance
            that is not symmetric and positive definite.
    """
    d, natural = space.dimension, space.natural_scale
    information, mean = np.zeros((d, d)), np.zeros(d)
    seen: set[int] = set()
    for names, (centre, spread) in _by_names(prior, space).items():
        at = [space.index(name) for name in names]
        if len(set(at)) < len(at) or seen & set(at):
            raise InputError(f"Expected each parameter once in prior=, got one of {', '.join(names)} again.")
        seen |= set(at)
        centres, covariance = np.atleast_1d(centre), spread
        what = f"prior[{', '.join(map(repr, names))}]"
        if len(at) == 1 and covariance.ndim == 0:
            if centres.shape != (1,) or not (np.isfinite(centres[0]) and covariance > 0):
                raise InputError(f"Expected {what} = (mean, standard deviation > 0), got ({centre}, {spread}).")
            information[at[0], at[0]] = (natural[at[0]] / float(covariance)) ** 2
        else:
            information[np.ix_(at, at)] = _inverse_covariance(what, centres, covariance, natural[at])
        mean[at] = centres / natural[at]
    return Prior(information, mean)


def marginal_deviations(prior: PriorOf | None, space: ParameterSpace) -> dict[str, float]:
    """The standard deviation of each parameter of which a prior says something; what is no prior is passed over."""
    found: dict[str, float] = {}
    for names, (_, spread) in _by_names(prior, space).items():
        variances = np.diag(spread) if spread.ndim == 2 else np.square(spread).reshape(-1)
        sizes = np.sqrt(np.maximum(variances, 0))
        found |= {name: float(s) for name, s in zip(names, sizes, strict=False) if np.isfinite(s) and s > 0}
    return found


def _inverse_covariance(what: str, means: Array, covariance: Array, unit: Array) -> Array:
    """Of several parameters, in natural units."""
    k = len(unit)
    if means.shape == (k,) and covariance.shape == (k, k):
        sizes = np.sqrt(np.maximum(np.diag(covariance), 0))
        if np.isfinite(means).all() and np.isfinite(covariance).all() and (sizes > 0).all():
            correlation = covariance / np.outer(sizes, sizes)  # parameters may have very different units
            if (
                np.allclose(correlation, correlation.T, rtol=0, atol=1e-8)
                and np.linalg.eigvalsh(correlation)[0] > 1e-12
            ):
                inverse = np.linalg.inv(correlation) / np.outer(sizes / unit, sizes / unit)
                return np.asarray((inverse + inverse.T) / 2)
    raise InputError(
        f"Expected {what} = (means of shape ({k},), covariance ({k}, {k}), symmetric and positive definite), got "
        f"shapes {means.shape} and {covariance.shape}, or numbers that are no covariance."
    )


def _by_names(prior: PriorOf | None, space: ParameterSpace) -> dict[tuple[str, ...], tuple[Array, Array]]:
    if prior is None:
        return {}
    given = prior if isinstance(prior, Mapping) else {space.names: prior}
    named = {}
    for key, value in given.items():
        if isinstance(key, str):
            names = (key,) if key in space.names else tuple(name.strip() for name in key.split(","))
        elif isinstance(key, tuple):
            names = key
        else:
            raise InputError(f"Expected names of parameters in prior=, or tuples of several, got {key!r}.")
        try:
            if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
                raise TypeError
            centre, spread = (np.asarray(x, dtype=np.float64) for x in value)
        except (TypeError, ValueError):
            raise InputError(
                f"Expected prior[{', '.join(names)}] = (mean, standard deviation), or (means, covariance) of several "
                f"parameters, got {value!r}."
            ) from None
        named[names] = (centre, spread)
    return named
