"""The names by which a micrograph is varied, and the specimen's pose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from bridge.errors import InputError
from bridge.simulator.space import Kind, Parameter, ParameterSpace
from simulators.cryoet.microscope.optics import check_range
from simulators.cryoet.specimen.deformation import STRUCTURE


@dataclass(frozen=True)
class Pose:
    """Where the specimen is.

    Args:
        x_angstrom, y_angstrom: shift to the right (larger column) and downwards (larger row) [angstrom].
        z_angstrom: height; positive adds to the underfocus, and does nothing else [angstrom].
        rotation_deg: in-plane rotation about the specimen's origin, from +x to +y, before the shift [degree].
        x_tilt_deg, y_tilt_deg: rotations about x, then y, before the rotation in the plane [degree].
    """

    x_angstrom: float = 0.0
    y_angstrom: float = 0.0
    z_angstrom: float = 0.0
    rotation_deg: float = 0.0
    x_tilt_deg: float = 0.0
    y_tilt_deg: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            check_range("Pose", item.name, getattr(self, item.name), -1e6, 1e6)


def line(
    name: str, unit: str, lower: float, upper: float, scale: float, description: str, kind: Kind = "continuous"
) -> Parameter:
    """A line of a simulator's table of parameters."""
    return Parameter(name, unit, lower, upper, scale, kind, description)


# Bounds are those within which the model makes sense; those of x and y follow from the field.
KNOWN = {
    p.name: p
    for p in (
        line("voltage_kv", "kV", 60.0, 1000.0, 20.0, "accelerating voltage"),
        line("defocus_um", "um", 0.2, 4.0, 0.1, "defocus, positive is underfocus"),
        line("astigmatism_um", "um", -0.5, 0.5, 0.05, "half the difference of the principal defoci"),
        line("astigmatism_angle_deg", "deg", -360.0, 360.0, 5.0, "direction of the larger defocus, from +x to +y"),
        line("cs_mm", "mm", 0.0, 10.0, 0.3, "spherical aberration"),
        line("amplitude_contrast", "", 0.0, 0.5, 0.02, "part of the contrast that is amplitude contrast"),
        line("phase_shift_deg", "deg", -360.0, 360.0, 5.0, "extra phase of the scattered wave (phase plate)"),
        line("energy_spread_ev", "eV", 0.0, 10.0, 0.3, "standard deviation of the beam's energy"),
        line("cc_mm", "mm", 0.0, 10.0, 0.3, "chromatic aberration"),
        line("convergence_mrad", "mrad", 0.0, 1.0, 0.02, "illumination semi-angle at 1/e"),
        line("aperture_um", "um", 5.0, 500.0, 5.0, "diameter of the objective aperture"),
        line("focal_length_mm", "mm", 0.5, 20.0, 0.3, "focal length; with the aperture it sets the cut-off"),
        line("b_factor", "angstrom^2", 0.0, 1000.0, 20.0, "B of the envelope exp(-B q^2 / 4)"),
        line("x_angstrom", "angstrom", -1e4, 1e4, 5.0, "shift to the right (larger column)"),
        line("y_angstrom", "angstrom", -1e4, 1e4, 5.0, "shift downwards (larger row)"),
        line("z_angstrom", "angstrom", -1e4, 1e4, 500.0, "height; adds to the underfocus"),
        line("rotation_deg", "deg", -360.0, 360.0, 2.0, "in-plane rotation from +x to +y, before the shift"),
        line("x_tilt_deg", "deg", -360.0, 360.0, 2.0, "rotation about x, before those about y and in the plane"),
        line("y_tilt_deg", "deg", -360.0, 360.0, 2.0, "rotation about y, before that in the plane"),
        line("dose_e_per_angstrom2", "e/angstrom^2", 0.1, 1000.0, 2.0, "exposure"),
    )
}
PARAMETER_NAMES = tuple(KNOWN)

# Rotations out of the plane, which need projections of their own.
TILTS = ("x_tilt_deg", "y_tilt_deg")


def make_space(
    names: tuple[str, ...],
    bounds: Mapping[str, Sequence[float]] | None,
    shape: tuple[int, int],
    pixel: float,
    structure: tuple[str, ...],
    natural_scale: Mapping[str, float] | None = None,
) -> ParameterSpace:
    """The space of these parameters.

    Args:
        names: of the parameters, in order.
        bounds: (lower, upper) of some.
        shape: (rows, columns) of the image; with `pixel` [angstrom] it limits shifts.
        structure: names of a deformation's parameters.
        natural_scale: of some.
    """
    known = {**KNOWN, **{name: STRUCTURE[name.partition("[")[0]] for name in structure}}
    for name in names:
        if name not in known:
            hint = (
                " mode_angstrom[k] and domain_deg[j] need deformation." if name.partition("[")[0] in STRUCTURE else ""
            )
            raise InputError(f"Unknown parameter {name!r}. Known parameters: {', '.join(known)}.{hint}")
    limits = {"x_angstrom": 0.5 * shape[1] * pixel, "y_angstrom": 0.5 * shape[0] * pixel}
    check_names(names, {"bounds": bounds, "natural_scale": natural_scale})
    for name, pair in (bounds or {}).items():
        if isinstance(pair, str) or len(pair) != 2:
            raise InputError(f"Expected bounds of {name} as (lower, upper), got {pair!r}.")
    parameters = []
    for name in names:
        p = known[name]
        lower, upper = (-limits[name], limits[name]) if name in limits else (p.lower, p.upper)
        lower, upper = (bounds or {}).get(name, (lower, upper))
        scale = float((natural_scale or {}).get(name, p.natural_scale))
        parameters.append(Parameter(name, p.unit, float(lower), float(upper), scale, p.kind, p.description))
    return ParameterSpace(tuple(parameters))


def check_names(names: Sequence[str], tables: Mapping[str, Mapping[str, object] | None]) -> None:
    """Raises `InputError` where a table of some parameters' settings, by the argument's name, has others."""
    for table, entries in tables.items():
        for name in entries or {}:
            if name not in names:
                raise InputError(f"Unknown parameter {name!r} in {table}. The parameters are: {', '.join(names)}.")
