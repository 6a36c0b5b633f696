"""The names by which a tilt series is varied, its particles, and rotations about the axes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bridge.errors import InputError
from bridge.simulator.space import Parameter, ParameterSpace
from simulators.cryoet.microscope.optics import check_range
from simulators.cryoet.parameters import KNOWN, Pose, check_names, line
from simulators.cryoet.specimen.deformation import STRUCTURE
from simulators.cryoet.specimen.specimen import Specimen


@dataclass(frozen=True)
class Particle:
    """A particle and where it is.

    Args:
        specimen: what it is, see `Specimen.from_options`.
        x_angstrom, y_angstrom, z_angstrom: its origin in the slab [angstrom].
        rot_deg, tilt_deg, psi_deg: its Euler angles as RELION has them [degree].
    """

    specimen: Specimen | str | Path | Mapping[str, Any] = "helix"
    x_angstrom: float = 0.0
    y_angstrom: float = 0.0
    z_angstrom: float = 0.0
    rot_deg: float = 0.0
    tilt_deg: float = 0.0
    psi_deg: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "specimen", Specimen.from_options(self.specimen))
        for item in fields(self):
            if item.name != "specimen":
                check_range("Particle", item.name, getattr(self, item.name), -1e6, 1e6)


_POSE = tuple(item.name for item in fields(Pose))
LENS = {name: p for name, p in KNOWN.items() if name not in (*_POSE, "dose_e_per_angstrom2")}
SERIES = {
    p.name: p
    for p in (
        line("tilt_axis_deg", "deg", -360.0, 360.0, 1.0, "direction of the tilt axis, counted from +y through -x"),
        line("x_tilt_deg", "deg", -30.0, 30.0, 0.5, "tilt of the specimen about x"),
        line("pre_tilt_deg", "deg", -45.0, 45.0, 0.5, "tilt of the slab on the stage, added to every image's"),
        line("thickness_angstrom", "angstrom", 0.0, 1e4, 100.0, "thickness of the ice"),
        line("mean_free_path_angstrom", "angstrom", 100.0, 1e5, 300.0, "inelastic mean free path"),
    )
}
# Of each image, as `name[t]`; what is varied for all images at once has no number.
IMAGE = {
    p.name: p
    for p in (
        line("tilt_deg", "deg", -90.0, 90.0, 0.5, "tilt of image t"),
        line("shift_x_angstrom", "angstrom", -1e4, 1e4, 5.0, "shift of image t to the right"),
        line("shift_y_angstrom", "angstrom", -1e4, 1e4, 5.0, "shift of image t downwards"),
        KNOWN["defocus_um"],
        KNOWN["dose_e_per_angstrom2"],
    )
}
PARTICLE = {
    p.name: p
    for p in (
        line("x_angstrom", "angstrom", -1e5, 1e5, 5.0, "place of particle i"),
        line("y_angstrom", "angstrom", -1e5, 1e5, 5.0, "place of particle i"),
        line("z_angstrom", "angstrom", -1e5, 1e5, 20.0, "height of particle i"),
        line("particle_rot_deg", "deg", -360.0, 360.0, 2.0, "first Euler angle of particle i"),
        line("particle_tilt_deg", "deg", -360.0, 360.0, 2.0, "second Euler angle of particle i"),
        line("particle_psi_deg", "deg", -360.0, 360.0, 2.0, "third Euler angle of particle i"),
    )
}
COMMON = {**LENS, **SERIES, "dose_e_per_angstrom2": KNOWN["dose_e_per_angstrom2"]}
SERIES_PARAMETER_NAMES = (*COMMON, *(f"{name}[t]" for name in IMAGE), *(f"{name}[i]" for name in PARTICLE))


def split_name(name: str) -> tuple[str, int | None]:
    """A name without its number, and the number: ("defocus_um", 3) of "defocus_um[3]"."""
    match = re.fullmatch(r"(\w+)\[(\d+)\]", name)
    return (name, None) if match is None else (match[1], int(match[2]))


def make_series_space(
    names: Sequence[str],
    bounds: Mapping[str, Sequence[float]] | None,
    values: Mapping[str, float],
    shape: Sequence[int],
    pixel: float,
    natural_scale: Mapping[str, float] | None = None,
) -> ParameterSpace:
    """The space of these parameters.

    Args:
        names: of the parameters, in order.
        bounds: (lower, upper) of some.
        values: all that may be varied, by name.
        shape: (rows, columns) of an image; with `pixel` [angstrom] it limits shifts.
        natural_scale: of some.
    """
    check_names(names, {"bounds": bounds, "natural_scale": natural_scale})
    parameters = []
    for name in names:
        stem, _ = split_name(name)
        if name not in values:
            count = {kind: sum(split_name(other)[0] == kind for other in values) for kind in ("tilt_deg", "z_angstrom")}
            hint = " mode_angstrom[k] and domain_deg[j] need deformation." if stem in STRUCTURE else ""
            raise InputError(
                f"Unknown parameter {name!r}. Known parameters: {', '.join(SERIES_PARAMETER_NAMES)}, with t below "
                f"{count['tilt_deg']} and i below {count['z_angstrom']}.{hint}"
            )
        p = {**COMMON, **IMAGE, **PARTICLE, **STRUCTURE}[stem]
        lower, upper = p.lower, p.upper
        if stem.startswith("shift_"):
            upper = 0.5 * pixel * shape[1 if stem == "shift_x_angstrom" else 0]
            lower = -upper
        pair = (bounds or {}).get(name, (lower, upper))
        if isinstance(pair, str) or len(pair) != 2:
            raise InputError(f"Expected bounds of {name} as (lower, upper), got {pair!r}.")
        lower, upper = (float(v) for v in pair)
        scale = float((natural_scale or {}).get(name, p.natural_scale))
        parameters.append(Parameter(name, p.unit, lower, upper, scale, p.kind, p.description))
    return ParameterSpace(tuple(parameters))


def _axes(angle_deg: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    angle = torch.deg2rad(angle_deg)
    return torch.cos(angle), torch.sin(angle), torch.zeros_like(angle), torch.ones_like(angle)


def about_x(angle_deg: torch.Tensor) -> torch.Tensor:
    c, s, zero, one = _axes(angle_deg)
    return torch.stack((one, zero, zero, zero, c, -s, zero, s, c)).reshape(3, 3)


def about_y(angle_deg: torch.Tensor) -> torch.Tensor:
    c, s, zero, one = _axes(angle_deg)
    return torch.stack((c, zero, s, zero, one, zero, -s, zero, c)).reshape(3, 3)


def about_z(angle_deg: torch.Tensor) -> torch.Tensor:
    c, s, zero, one = _axes(angle_deg)
    return torch.stack((c, -s, zero, s, c, zero, zero, zero, one)).reshape(3, 3)
