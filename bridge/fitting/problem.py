"""What is to be fitted: which parameters, from which starts, to which target. All is checked here, at the door."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bridge.arrays import Array
from bridge.checks import Settings, as_whole, is_whole
from bridge.errors import InputError
from bridge.fitting.comparison import Comparison, CustomLoss, LeastSquares
from bridge.fitting.misfit import Misfit
from bridge.fitting.normal import in_units, lifted
from bridge.fitting.prior import Prior, PriorOf, make_prior, marginal_deviations
from bridge.fitting.robust import make_robust
from bridge.fitting.target import Cholesky, checked_noise, checked_target
from bridge.reporting.result import FitStep
from bridge.simulator.function import as_simulator
from bridge.simulator.protocol import Simulator
from bridge.simulator.reduced import ReducedSimulator, reduced
from bridge.simulator.space import Parameter, ParameterSpace

# Bounds of one sign with a ratio of at least this are taken for a logarithmic range.
_DECADES = 100.0
_NO_SOURCE = "the first runs alone, since the start is 0"
GivenStart = Mapping[str, float] | Sequence[Mapping[str, float]] | ArrayLike


@final
@dataclass(frozen=True)
class Starts(metaclass=Settings):
    """Several starts: those given, and others uniform in the bounds (about the first one where there are none).

    Attributes:
        number: of all. given: one or several: name -> value, (d,), a list of mappings, or (k, d).
    """

    number: int
    given: GivenStart

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", as_whole(self.number))
        if not is_whole(self.number, 1):
            raise InputError(f"Expected a positive number of starts, got {self.number!r}.")


Start = GivenStart | Starts


@final
@dataclass(frozen=True)
class FitProblem:
    """The free parameters z in natural units, and how they belong to all parameters.

    Attributes:
        space: of all parameters. simulator: of the free ones.
        starts: (k, d) of all parameters. misfit: of the free ones.
        known_noise: whether the target's variance is given.
        assumed: name -> what its natural scale was taken from, where nothing was said of it.
        said: (free,) natural scales as they were said, 1 where they were not.
    """

    space: ParameterSpace
    simulator: Simulator
    free: ParameterSpace
    starts: Array
    misfit: Misfit
    known_noise: bool
    assumed: Mapping[str, str]
    said: Array

    @property
    def guessed(self) -> NDArray[np.bool_]:
        """(free,) of which parameters the natural scale is our own guess."""
        return np.array([name in self.assumed for name in self.free.names])

    @property
    def unknown(self) -> NDArray[np.bool_]:
        """(free,) of which parameters nothing is known that a natural scale could be guessed from."""
        return np.array([self.assumed.get(name) == _NO_SOURCE for name in self.free.names])

    @property
    def scales_in_words(self) -> str:
        """What natural scales were taken from, or nothing."""
        sources = dict.fromkeys(self.assumed.values())
        parts = [f"{source}: {', '.join(n for n, s in self.assumed.items() if s == source)}" for source in sources]
        return f"natural scales taken from {'; from '.join(parts)}" if parts else ""

    @property
    def natural(self) -> Array:
        return self.free.natural_scale

    @property
    def lower(self) -> Array:
        return self.free.lower / self.natural

    @property
    def upper(self) -> Array:
        return self.free.upper / self.natural

    @property
    def free_starts(self) -> Array:
        """(k, free) natural units."""
        return np.asarray(self.starts[:, [self.space.index(name) for name in self.free.names]] / self.natural)

    def whole(self, z: Array) -> Array:
        """All parameters, (d,), in their units."""
        sim, x = self.simulator, z * self.natural
        return sim.forwarded(x[None])[0] if isinstance(sim, ReducedSimulator) else x

    def covariance(self, of_free: Array) -> Array:
        """(d, d) of all parameters in their units, of that of the free ones in natural units."""
        covariance = in_units(of_free, self.natural)
        return lifted(covariance, self.simulator.lift) if isinstance(self.simulator, ReducedSimulator) else covariance

    def record(self, step: FitStep) -> FitStep:
        """A step of the free parameters as one of all of them."""
        sim = self.simulator
        if not isinstance(sim, ReducedSimulator):
            return step
        error = step.standard_error
        whole = tuple(sim.forwarded(np.array([step.parameters]))[0].tolist())
        if error is not None:
            error = tuple(np.sqrt(np.diag(lifted(np.diag(np.square(error)), sim.lift))).tolist())
        return replace(step, parameters=whole, standard_error=error)


def make_problem(
    simulator: Any,
    target: ArrayLike | torch.Tensor,
    start: Start,
    comparison: Comparison,
    *,
    seed: int | None,
    spread: float = 1.0,
    prior: PriorOf | None = None,
    fixed: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
    guess: bool = True,
    missing: str = "raise",
) -> FitProblem:
    """Checks what is given.

    Args:
        spread: of starts that are drawn about a given one, natural units.
        guess: whether natural scales that nobody has said are guessed; they are 1 else.
        missing: "ignore" where outputs may lack numbers.

    Raises:
        InputError: something is unknown, of the wrong shape, or contradicts something else.
    """
    if not isinstance(fixed, Iterable):
        raise InputError(f'Expected names of parameters as fixed=, such as fixed=["a"], got {fixed!r}.')
    number = start.number if isinstance(start, Starts) else None
    if isinstance(start, Starts):
        start = start.given
    whole = as_simulator(simulator)
    starts, given = _given_starts(whole.space, start)
    space, assumed = with_scales(given, starts, marginal_deviations(prior, given), tied or {}, guess)
    for theta in starts:
        if not np.isfinite(theta).all():
            raise InputError(f"Expected a finite start, got {space.mapping(theta)}.")
        if outside := space.describe_outside(theta):
            raise InputError(f"Expected a start inside the bounds, got {outside}. Move the start, or widen the bounds.")
    sim = reduced(whole, space, starts[0], fixed, tied or {}) if fixed or tied else whole
    for name in fixed:
        if np.ptp(starts[:, space.index(name)]) > 0:
            raise InputError(f"Expected one value of {name!r}, which is fixed, in all starts, got several.")
    free = sim.space if isinstance(sim, ReducedSimulator) else space
    return FitProblem(
        space=space,
        simulator=sim,
        free=free,
        starts=_more_starts(starts, number, space, seed, spread),
        misfit=_misfit(target, comparison, sim, make_prior(prior, free), missing == "ignore"),
        known_noise=isinstance(comparison, LeastSquares) and comparison.variance is not None,
        assumed={name: source for name, source in assumed.items() if name in free.names},
        said=np.array([given.natural_scale[given.index(name)] for name in free.names]),
    )


def _misfit(
    target: ArrayLike | torch.Tensor, comparison: Comparison, sim: Simulator, prior: Prior, partial: bool
) -> Misfit:
    """The distance from the target; `partial` where outputs may lack numbers."""
    variance, robust = None, None
    if isinstance(comparison, LeastSquares):
        variance, robust = comparison.variance, comparison.robust
    goal, masked = checked_target(target, comparison.mask, sim)
    if robust is not None and variance is None:
        raise InputError(
            "Expected variance= with LeastSquares(robust=), whose width is in standard deviations of the target's "
            "noise."
        )
    noise, whitening, counts = checked_noise(variance, comparison.whiten, goal, masked)
    if partial and isinstance(whitening, Cholesky):
        raise InputError(
            "Expected a variance that is a number or of the target's shape with missing='ignore', got a covariance: an "
            "output that lacks numbers cannot be whitened by it. Leave the numbers out with "
            "misfit=bridge.LeastSquares(mask=...), or give variances."
        )
    return Misfit(
        target=goal,
        variance=noise,
        loss=comparison.function if isinstance(comparison, CustomLoss) else None,
        prior=prior,
        whiten=whitening,
        robust=make_robust(robust),
        masked=masked,
        counts=counts,
        partial=partial,
    )


def with_scales(
    space: ParameterSpace,
    starts: Array,
    prior: Mapping[str, float],
    tied: Mapping[str, str],
    guess: bool = True,
) -> tuple[ParameterSpace, dict[str, str]]:
    """The space with a natural scale for every parameter, and where those come from that nobody has said.

    A tenth of the width of bounds, but no more than the start is away from 0 where all values have one sign; where
    bounds span decades a part of the start that grows with these. Without bounds a tenth of the start; where that is 0
    the prior's deviation, or 1. Without `guess` all that nobody has said are 1.
    """
    if not guess:
        one = tuple(replace(p, natural_scale=p.natural_scale or 1.0) for p in space.parameters)
        return replace(space, parameters=one), {}
    found: dict[str, float] = {}
    assumed: dict[str, str] = {}
    for p, column in zip(space.parameters, starts.T, strict=True):
        if p.natural_scale is None:
            found[p.name], assumed[p.name] = _guessed_scale(p, float(np.abs(column).max()), prior.get(p.name))
    for name, other in tied.items():  # one value, one scale; unknown names are told elsewhere
        for a, b in ((name, other), (other, name)):
            if a in found and b in space.names and b not in found:
                found[a] = float(space.parameters[space.index(b)].natural_scale or 1.0)
        if name in found and other in found:
            found[name] = found[other]
    parameters = tuple(replace(p, natural_scale=found.get(p.name, p.natural_scale)) for p in space.parameters)
    return replace(space, parameters=parameters), assumed


def _guessed_scale(p: Parameter, size: float, prior: float | None) -> tuple[float, str]:
    size = size if np.isfinite(size) else 0.0
    width = p.upper - p.lower
    if np.isfinite(width):
        scale = 0.1 * width
        if p.lower >= 0 or p.upper <= 0:
            near, far = sorted((abs(p.lower), abs(p.upper)))
            if near > 0 and far >= _DECADES * near:
                scale = min(scale, max(size, near) * min(1.0, 0.1 * float(np.log(far / near))))
            elif near == 0:
                scale = min(scale, max(size, 1e-4 * width))
        return scale, "the bounds"
    if size > 0:
        return max(0.1 * size, 1e-300), "the start"
    if prior is not None:
        return prior, "the prior"
    return 1.0, _NO_SOURCE


def _given_starts(space: ParameterSpace | None, start: GivenStart) -> tuple[Array, ParameterSpace]:
    """(k, d), and the space."""
    named = isinstance(start, Mapping)
    several = isinstance(start, Sequence) and len(start) > 0 and isinstance(start[0], Mapping)
    if space is None and (named or several):
        first: Any = start if named else start[0]  # type: ignore[index]
        raise InputError(
            "Expected start values as a vector: the simulator does not name its parameters. Name them: "
            f"bridge.as_simulator(f, names={list(first)})."
        )
    if space is not None and (named or several):
        return np.stack([space.vector(one) for one in (start if several else [start])]), space  # type: ignore
    try:
        rows = np.asarray(start, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"Expected a start of numbers, (d,), or (k, d) for several, got {start!r}.") from error
    if start is None or rows.ndim > 2 or rows.size == 0:
        raise InputError(f"Expected a start of shape (d,), or (k, d) for several, got {rows.shape}.")
    space = space or ParameterSpace.unnamed(np.atleast_1d(rows).shape[-1])
    return np.stack([space.vector(row) for row in (rows if rows.ndim == 2 else [np.atleast_1d(rows)])]), space


def _more_starts(given: Array, count: int | None, space: ParameterSpace, seed: int | None, spread: float) -> Array:
    """`count` starts: those given, and others uniform in the bounds; where there are none, within about two spreads of
    the first start."""
    if count is None:
        return given
    if not is_whole(count, len(given)):
        raise InputError(
            f"Expected a number of at least the {len(given)} starts that are given, got Starts({count!r}, ...)."
        )
    rng = np.random.Generator(np.random.Philox(key=[int(seed or 0), 1 << 40]))
    shape = (count - len(given), space.dimension)
    u, normal = rng.uniform(size=shape), rng.normal(size=shape)
    bounded = np.isfinite(space.lower) & np.isfinite(space.upper)
    lower, upper = np.where(bounded, space.lower, 0), np.where(bounded, space.upper, 0)
    about = np.clip(given[0] + 2 * spread * space.natural_scale * normal, space.lower, space.upper)
    return np.vstack([given, np.where(bounded, lower + u * (upper - lower), about)])
