"""In which order and at which angles a tilt series is taken, and what the exposure does to the specimen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from bridge.arrays import is_number
from bridge.errors import InputError
from simulators.cryoet.microscope.optics import check_range

Number = TypeVar("Number", float, torch.Tensor)


@dataclass(frozen=True)
class TiltScheme:
    """The images of a series, sorted by angle as in a stack, and when each was taken.

    Args:
        angles_deg: nominal tilt of each image of the stack, from small to large [degree].
        order: (images,) when each was taken: 0 for the first; a permutation.
    """

    angles_deg: tuple[float, ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "angles_deg", tuple(float(a) for a in self.angles_deg))
        object.__setattr__(self, "order", tuple(int(i) for i in self.order))
        for angle in self.angles_deg:
            check_range("TiltScheme", "angles_deg", angle, -90.0, 90.0)
        if not self.angles_deg or list(self.angles_deg) != sorted(self.angles_deg):
            raise InputError(f"Expected TiltScheme.angles_deg from small to large, got {self.angles_deg}. Sort them.")
        if sorted(self.order) != list(range(len(self.angles_deg))):
            raise InputError(f"Expected TiltScheme.order as a permutation of {len(self.angles_deg)}, got {self.order}.")

    @classmethod
    def uniform(cls, start_deg: float, stop_deg: float, step_deg: float) -> TiltScheme:
        """From one end to the other; a negative step begins at the larger angle.

        Args:
            start_deg, stop_deg: first and last angle, both included [degree].
            step_deg: [degree].
        """
        number = _steps(stop_deg - start_deg, step_deg) + 1
        return cls._from_acquisition([start_deg + step_deg * i for i in range(number)])

    @classmethod
    def dose_symmetric(cls, largest_deg: float, step_deg: float, group: int = 1, start_deg: float = 0.0) -> TiltScheme:
        """From the middle outwards, `group` images on one side and then as many on the other.

        Args:
            largest_deg: of the tilt from the start, on both sides [degree].
            step_deg: [degree].
            group: images on one side before the other's turn.
            start_deg: the first image's tilt, such as minus a lamella's pre-tilt [degree].

        Reference:
            Hagen, Wan & Briggs (2017), J. Struct. Biol. 197, 191.
        """
        if not isinstance(group, int) or group < 1:
            raise InputError(f"Expected group >= 1, an integer, got {group!r}.")
        number = _steps(largest_deg, step_deg)
        angles = [start_deg]
        for first in range(1, number + 1, group):
            turn = range(first, min(first + group, number + 1))
            angles += [start_deg + step_deg * i for i in turn] + [start_deg - step_deg * i for i in turn]
        return cls._from_acquisition(angles)

    @classmethod
    def _from_acquisition(cls, angles: Sequence[float]) -> TiltScheme:
        place = np.argsort(np.asarray(angles), kind="stable")
        return cls(tuple(float(angles[i]) for i in place), tuple(int(i) for i in place))

    @classmethod
    def from_options(cls, options: TiltScheme | Mapping[str, Any]) -> TiltScheme:
        """A scheme from plain data: {"uniform": [-60, 60, 3]}, {"dose_symmetric": [60, 3]}, or its two fields."""
        if isinstance(options, TiltScheme):
            return options
        if not isinstance(options, Mapping):
            raise InputError(f"Expected a scheme as a TiltScheme or a table, got {type(options).__name__}.")
        try:
            if set(options) == {"uniform"}:
                return cls.uniform(*options["uniform"])
            if set(options) == {"dose_symmetric"}:
                return cls.dose_symmetric(*options["dose_symmetric"])
        except TypeError as error:
            raise InputError(f"Expected the arguments of {next(iter(options))} as a list, got {options}.") from error
        if set(options) != {"angles_deg", "order"}:
            raise InputError(
                f"Expected one of uniform, dose_symmetric, or angles_deg and order in a scheme, got {list(options)}."
            )
        return cls(**options)

    def __len__(self) -> int:
        return len(self.angles_deg)

    def earlier(self, image: int) -> list[int]:
        """The images of the stack that were taken before this one."""
        return [i for i, when in enumerate(self.order) if when < self.order[image]]


def _steps(range_deg: float, step_deg: float) -> int:
    """How many whole steps a range has."""
    if not (is_number(range_deg) and is_number(step_deg)) or step_deg == 0 or range_deg / step_deg < 0:
        raise InputError(f"Expected a step that leads from start to stop, got {step_deg} over {range_deg} degrees.")
    return int(range_deg / step_deg + 1e-6)


def critical_exposure(q2: torch.Tensor, voltage_kv: float) -> torch.Tensor:
    r"""Exposure after which the signal's power at q has fallen to 1/e.

        N_e(q) = (0.245 q^{-1.665} + 2.81) r,    r = 1 at 300 kV, 0.8 at 200 kV, 0.64 at 100 kV, linear between.

    The amplitude after an exposure N is exp(-N / (2 N_e)).

    Args:
        q2: squared spatial frequency [1/angstrom^2].
        voltage_kv: [kV].

    Returns:
        N_e [e/angstrom^2], infinite at q = 0.

    Reference:
        Grant & Grigorieff (2015), eLife 4, e06980.
    """
    ratio = float(np.interp(voltage_kv, (100.0, 200.0, 300.0), (0.64, 0.8, 1.0)))
    return (0.245 * q2 ** (-0.5 * 1.665) + 2.81) * ratio


def damage(q2: torch.Tensor, exposure: torch.Tensor, voltage_kv: float) -> torch.Tensor:
    """exp(-N / (2 N_e(q))), 1 at q = 0; differentiable in the exposure N [e/angstrom^2]."""
    return torch.exp(-0.5 * exposure / critical_exposure(q2, voltage_kv))


def transmission(thickness: Number, mean_free_path: Number, cosine: Number) -> Number:
    r"""Electrons that a slab leaves in the zero-loss image: exp(-t / (Lambda cos theta)).

    Args:
        thickness: of the slab [angstrom].
        mean_free_path: inelastic, Lambda [angstrom].
        cosine: of the angle between the beam and the slab's normal.
    """
    path = -thickness / (mean_free_path * cosine)
    return torch.exp(path) if isinstance(path, torch.Tensor) else math.exp(path)
