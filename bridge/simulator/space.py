"""The space that parameters live in: names, units, bounds, natural scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bridge.checks import did_you_mean, is_number
from bridge.errors import InputError

Kind = Literal["continuous", "staircase", "integer"]
Outside = Literal["clip", "raise", "ignore"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a simulator.

    Args:
        name: identifier; by convention it ends with its unit (`defocus_um`).
        unit: unit as text, "" where there is none.
        lower, upper: the closed domain in which the simulator may be queried.
        natural_scale: a change of this size matters to the simulator [the parameter's unit]. A plain number given
            as the smoothing scale is in these units, so that 300 kV may stand beside 1 A. None where nothing is said:
            a smoothing then takes 1, and `bridge.fit` goes by the bounds, the start and what the first runs show.
        kind: "continuous", "staircase" (constant between steps) or "integer".
        description: one line for `bridge info`.
    """

    name: str
    unit: str = ""
    lower: float = -np.inf
    upper: float = np.inf
    natural_scale: float | None = None
    kind: Kind = "continuous"
    description: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"Expected a parameter name, got {self.name!r}. Names are text: {str(self.name)!r}.")
        if not self.name:
            raise InputError("Expected a parameter name, got an empty string. Give every parameter a name.")
        if not self.lower < self.upper:
            raise InputError(
                f"Expected lower < upper for parameter {self.name!r}, got [{self.lower}, {self.upper}]. "
                "Exchange or widen the bounds."
            )
        if self.natural_scale is not None and not (np.isfinite(self.natural_scale) and self.natural_scale > 0):
            raise InputError(
                f"Expected a positive, finite natural_scale for parameter {self.name!r}, got {self.natural_scale}."
            )
        if self.kind not in ("continuous", "staircase", "integer"):
            raise InputError(
                f"Unknown kind {self.kind!r} of parameter {self.name!r}. Known: continuous, staircase, integer."
            )


@dataclass(frozen=True)
class ParameterSpace:
    """The parameters of a simulator, in the order of its input columns.

    Args:
        parameters: one `Parameter` a column.
        outside: what becomes of a query outside the bounds: "clip" it to the nearest point of the domain (scores
            still use the unclipped perturbation; the fraction is reported), "raise" an `InputError`, or "ignore"
            (the simulator copes by itself).
    """

    parameters: tuple[Parameter, ...]
    outside: Outside = "clip"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        if not self.parameters:
            raise InputError("Expected at least one parameter, got none. Declare what the simulator varies.")
        names = [p.name for p in self.parameters]
        twice = sorted(n for n, count in Counter(names).items() if count > 1)
        if twice:
            raise InputError(f"Expected distinct parameter names, got {twice} more than once. Rename them.")
        if self.outside not in ("clip", "raise", "ignore"):
            raise InputError(f"Unknown outside={self.outside!r}. Known: clip, raise, ignore.")

    @classmethod
    def unnamed(cls, dimension: int) -> ParameterSpace:
        """A space of `dimension` unbounded parameters p0, p1, ... for a plain function."""
        return cls(tuple(Parameter(f"p{i}") for i in range(dimension)))

    @property
    def dimension(self) -> int:
        return len(self.parameters)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    @property
    def lower(self) -> NDArray[np.float64]:
        return np.array([p.lower for p in self.parameters], dtype=np.float64)

    @property
    def upper(self) -> NDArray[np.float64]:
        return np.array([p.upper for p in self.parameters], dtype=np.float64)

    @property
    def natural_scale(self) -> NDArray[np.float64]:
        """(d,), 1 where nothing is said."""
        return np.array([p.natural_scale or 1.0 for p in self.parameters], dtype=np.float64)

    @property
    def bounded(self) -> bool:
        return bool(np.isfinite(self.lower).any() or np.isfinite(self.upper).any())

    def index(self, name: str) -> int:
        """Column of the parameter called `name`; an unknown name lists the known ones."""
        if name not in self.names:
            meant = did_you_mean(str(name), self.names)
            raise InputError(f"Unknown parameter {name!r}. Known parameters: {', '.join(self.names)}.{meant}")
        return self.names.index(name)

    def vector(self, values: Mapping[str, float] | ArrayLike) -> NDArray[np.float64]:
        """A (d,) float64 vector from a name -> value mapping (all names, no others) or from an array-like."""
        if isinstance(values, Mapping):
            for name in values:
                self.index(name)
            missing = [n for n in self.names if n not in values]
            if missing:
                raise InputError(f"Expected a value for each parameter, got none for {', '.join(missing)}.")
            for n in self.names:
                if not is_number(values[n]):
                    raise InputError(f"Expected a number for parameter {n!r}, got {values[n]!r}.")
            return np.array([float(values[n]) for n in self.names], dtype=np.float64)
        try:
            vector = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"Expected {self.dimension} numbers ({', '.join(self.names)}), got {values!r}.") from error
        if vector.shape != (self.dimension,):
            raise InputError(
                f"Expected {self.dimension} values ({', '.join(self.names)}), got an array of shape {vector.shape}."
            )
        return vector

    def mapping(self, vector: ArrayLike) -> dict[str, float]:
        """The inverse of `vector`."""
        return {n: float(v) for n, v in zip(self.names, self.vector(vector), strict=True)}

    def describe_outside(self, vector: ArrayLike) -> str:
        """Which entries of a (d,) vector lie outside their bounds, in words; "" when none does."""
        parts = []
        for p, value in zip(self.parameters, self.vector(vector), strict=True):
            if not p.lower <= value <= p.upper:
                unit = f" {p.unit}" if p.unit else ""
                parts.append(f"{p.name} = {value:g}{unit} outside [{p.lower:g}, {p.upper:g}]")
        return "; ".join(parts)

    def checked(self, inputs: ArrayLike, seeds: ArrayLike) -> tuple[NDArray[np.float64], NDArray[Any]]:
        """What a simulator was called with, at its door.

        Args:
            inputs: (k, d).
            seeds: (k,).

        Returns:
            inputs as float64, and seeds, as arrays.

        Raises:
            InputError: wrong shape, not a number, or outside the bounds.
        """
        inputs, seeds = np.asarray(inputs, dtype=np.float64), np.asarray(seeds)
        d = self.dimension
        if inputs.ndim != 2 or inputs.shape[1] != d or seeds.shape != (len(inputs),):
            raise InputError(
                f"Expected inputs of shape (k, {d}) ({', '.join(self.names)}) and seeds of shape (k,), got "
                f"{inputs.shape} and {seeds.shape}."
            )
        inside = ((inputs >= self.lower) & (inputs <= self.upper)).all(axis=1)  # not where there is NaN
        if not inside.all():
            what = self.describe_outside(inputs[int(np.argmin(inside))]) or "not a number"
            raise InputError(f"Expected parameters inside the bounds, got {what}. Clip them, or widen bounds.")
        return inputs, seeds

    def admit(self, inputs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Brings queries into the domain as `outside` says.

        Args:
            inputs: (k, d) queries.

        Returns:
            the queries to evaluate, (k, d), and which rows were changed, (k,) bool.

        Raises:
            InputError: a query lies outside and `outside="raise"`.
        """
        if self.outside == "ignore" or not self.bounded:
            return inputs, np.zeros(len(inputs), dtype=bool)
        clipped = np.clip(inputs, self.lower, self.upper)
        changed = (clipped != inputs).any(axis=1)
        if self.outside == "raise" and changed.any():
            row = int(np.flatnonzero(changed)[0])
            raise InputError(
                f"Expected queries inside the bounds, got {self.describe_outside(inputs[row])}. Use a smaller scale, "
                'a density of compact support (distribution="triangular"), or outside="clip".'
            )
        return clipped, changed
