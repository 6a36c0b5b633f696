"""Every key of TEM-simulator's input file: its type, unit and legal range, and which can be varied under which name.

Reference: Rullgard et al. (2011), J. Microsc. 243, 234, and the manual of TEM-simulator 1.3; the keys of the dialect
"phase-plate" are those of a fork that has a phase plate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from bridge.errors import InputError
from bridge.simulator.space import Kind

Dialect = Literal["v1.3", "phase-plate"]
DIALECTS: tuple[Dialect, ...] = ("v1.3", "phase-plate")
Value = bool | int | float | str

_INF = math.inf


@final
@dataclass(frozen=True)
class Key:
    """One key of a component.

    Args:
        type: what its value is.
        unit: [unit of the value].
        lower, upper: the closed range that the program accepts.
        default: what the program takes where the key is missing; None for nothing.
        required: whether the program stops where it is missing.
        choices: the permitted texts; () for any.
        file: "in" where it names a file that is read, "out" one that is written.
        parameter: its name as a parameter that can be varied; "" where it cannot.
        scale: natural scale of that parameter [unit].
        bounds: default bounds of that parameter, within the legal range, where they are narrower.
        kind: how the image depends on it.
        dialect: the dialect that alone has it; None for both.
    """

    type: Literal["bool", "int", "float", "text"]
    unit: str = ""
    lower: float = -_INF
    upper: float = _INF
    default: Value | None = None
    required: bool = False
    choices: tuple[str, ...] = ()
    file: Literal["", "in", "out"] = ""
    parameter: str = ""
    scale: float = 1.0
    bounds: tuple[float, float] | None = None
    kind: Kind = "continuous"
    dialect: Dialect | None = None


def _real(unit: str, lower: float, upper: float, parameter: str = "", scale: float = 1.0, **more: Any) -> Key:
    return Key("float", unit, lower, upper, parameter=parameter, scale=scale, **more)


def _count(lower: int, upper: int, default: int | None = None, required: bool = False) -> Key:
    return Key("int", "", lower, upper, default, required)


_YES, _NO = Key("bool", default=True), Key("bool", default=False)
_FILE_IN, _FILE_OUT, _ANY = Key("text", file="in"), Key("text", file="out"), (-_INF, _INF)
_FORMAT = Key("text", default="mrc", choices=("mrc", "mrc-int", "raw"))
_BYTES = Key("text", default="native", choices=("be", "le", "native"))
_AXES = Key("text", default="xyz", choices=("xyz", "xzy", "yxz", "yzx", "zxy", "zyx"))
_VOXEL = _real("nm", 0.01, 10)
_SHIFT = _real("nm", *_ANY, default=0.0)

# component -> key -> what it is; the order of components is that in which a deck is written.
KEYS: Mapping[str, Mapping[str, Key]] = {
    "simulation": {
        "generate_micrographs": _NO,
        "generate_volumes": _NO,
        "generate_particle_maps": _NO,
        "log_file": _FILE_OUT,
        "rand_seed": _count(-(2**31), 2**31 - 1),
    },
    "sample": {
        "diameter": _real("nm", 0, _INF, "diameter_nm", 50.0, required=True),
        "thickness_center": _real("nm", 0, _INF, "thickness_center_nm", 10.0, required=True),
        "thickness_edge": _real("nm", 0, _INF, "thickness_edge_nm", 10.0, required=True),
        "offset_x": replace(_SHIFT, parameter="sample_offset_x_nm", scale=20.0),
        "offset_y": replace(_SHIFT, parameter="sample_offset_y_nm", scale=20.0),
    },
    "particle": {
        "source": Key("text", required=True, choices=("pdb", "map", "random")),
        "use_imag_pot": _YES,
        "famp": _real("", 0, 1, "famp", 0.02),
        "use_defocus_corr": _NO,
        "voxel_size": _VOXEL,
        "nx": _count(1, 1000),
        "ny": _count(1, 1000),
        "nz": _count(1, 1000),
        "map_file_re_in": _FILE_IN,
        "map_file_im_in": _FILE_IN,
        "map_file_re_out": _FILE_OUT,
        "map_file_im_out": _FILE_OUT,
        "map_file_format": _FORMAT,
        "map_file_byte_order": _BYTES,
        "map_axis_order": _AXES,
        "pdb_file_in": _FILE_IN,
        "pdb_transf_file_in": _FILE_IN,
        "add_hydrogen": _YES,
        "contrast_re": _real("V", *_ANY, "contrast_re_v", 0.5),
        "contrast_im": _real("V", *_ANY, "contrast_im_v", 0.1),
        "smoothness": _real("", 0, 10, "smoothness", 0.5),
        "make_positive": Key("bool"),
        "randomize_particle": replace(_NO, dialect="phase-plate"),
        "rand_seed_particle": replace(_count(-(2**31), 2**31 - 1), dialect="phase-plate"),
    },
    "particleset": {
        "particle_type": Key("text", required=True),
        "particle_coords": Key("text", required=True, choices=("file", "random", "grid")),
        "num_particles": _count(0, 10**6),
        "where": Key("text", choices=("volume", "surface", "top", "bottom")),
        "particle_conc": _real("1/um^3", 0, 1e6),
        "occupancy": _real("", 0, 100),
        "nx": _count(1, 1000, 1),
        "ny": _count(1, 1000, 1),
        "nz": _count(1, 1000, 1),
        "particle_dist": _real("nm", 0, 1e4, "particle_dist_nm", 1.0),
        "offset_x": replace(_SHIFT, parameter="grid_offset_x_nm", scale=0.5),
        "offset_y": replace(_SHIFT, parameter="grid_offset_y_nm", scale=0.5),
        "offset_z": replace(_SHIFT, parameter="grid_offset_z_nm", scale=50.0, kind="staircase"),
        "coord_file_in": _FILE_IN,
        "coord_file_out": _FILE_OUT,
    },
    "geometry": {
        "gen_tilt_data": Key("bool", required=True),
        "ntilts": _count(1, 10**6),
        "theta_start": _real("deg", *_ANY, "theta_start_deg", 1.0, bounds=(-90, 90)),
        "theta_incr": _real("deg", *_ANY, "theta_incr_deg", 0.1, bounds=(-90, 90)),
        "tilt_axis": _real("deg", *_ANY, "tilt_axis_deg", 1.0, default=0.0, bounds=(-360, 360)),
        "tilt_mode": Key("text", default="tiltseries", choices=("tiltseries", "single_particle")),
        "geom_file_in": _FILE_IN,
        "geom_file_out": _FILE_OUT,
        "geom_errors": Key("text", required=True, choices=("none", "random", "file")),
        "tilt_err": _real("deg", 0, _INF, "tilt_err_deg", 0.1, default=0.0),
        "align_err_rot": _real("deg", 0, _INF, "align_err_rot_deg", 0.1, default=0.0),
        "align_err_tr": _real("nm", 0, _INF, "align_err_tr_nm", 0.5, default=0.0),
        "error_file_in": _FILE_IN,
        "error_file_out": _FILE_OUT,
    },
    "electronbeam": {
        "acc_voltage": _real("kV", 1, 1e4, "voltage_kv", 20.0, required=True),
        "energy_spread": _real("eV", 0, _INF, "energy_spread_ev", 0.3, required=True),
        "gen_dose": Key("bool", required=True),
        "total_dose": _real("e/nm^2", 0, _INF, "total_dose_e_per_nm2", 200.0),
        "dose_per_im": _real("e/nm^2", 0, _INF, "dose_e_per_nm2", 200.0),
        "dose_sd": _real("", 0, 1, "dose_sd", 0.02, default=0.0),
        "dose_file_in": _FILE_IN,
        "dose_file_out": _FILE_OUT,
    },
    "optics": {
        "magnification": _real("", 1, _INF, "magnification", 500.0, required=True),
        "gen_defocus": Key("bool", required=True),
        "defocus_nominal": _real("um", *_ANY, "defocus_um", 0.1),
        "defocus_syst_error": _real("um", 0, _INF, "defocus_syst_error_um", 0.05, default=0.0),
        "defocus_nonsyst_error": _real("um", 0, _INF, "defocus_nonsyst_error_um", 0.05, default=0.0),
        "defocus_file_in": _FILE_IN,
        "defocus_file_out": _FILE_OUT,
        "cs": _real("mm", *_ANY, "cs_mm", 0.3, required=True),
        "cc": _real("mm", *_ANY, "cc_mm", 0.3, required=True),
        "aperture": _real("um", 0, _INF, "aperture_um", 5.0, required=True, kind="staircase"),
        # A run's time grows as 1 / f^2: seconds at 0.1 mm, minutes at the legal 0.01 mm.
        "focal_length": _real(
            "mm", 0.01, _INF, "focal_length_mm", 0.3, required=True, bounds=(0.1, 100.0), kind="staircase"
        ),
        "cond_ap_angle": _real("mrad", 0, _INF, "cond_ap_angle_mrad", 0.02, required=True),
        "phase_shift": _real("deg", 0, 180, "phase_shift_deg", 5.0, default=0.0, dialect="phase-plate"),
        "phase_plate_spot": _real("1/nm", 0, 1, "phase_plate_spot_per_nm", 0.02, default=0.0, dialect="phase-plate"),
    },
    "detector": {
        "det_pix_x": _count(1, 10**4, required=True),
        "det_pix_y": _count(1, 10**4, required=True),
        "padding": _count(0, 1000, 20),
        "pixel_size": _real("um", 0.01, 1000, "pixel_size_um", 0.2, required=True),
        "gain": _real("", 0, _INF, "gain", 0.5, required=True),
        "use_quantization": Key("bool", required=True),
        "dqe": _real("", 0.01, 1, "dqe", 0.05, required=True),
        "mtf_a": _real("", 0, 1, "mtf_a", 0.05, required=True),
        "mtf_b": _real("", 0, 1, "mtf_b", 0.05, required=True),
        "mtf_c": _real("", 0, 1, "mtf_c", 0.05, required=True),
        "mtf_alpha": _real("", 0, _INF, "mtf_alpha", 1.0, required=True),
        "mtf_beta": _real("", 0, _INF, "mtf_beta", 2.0, required=True),
        "mtf_p": _real("", 0, 10, "mtf_p", 0.1, default=1.0),
        "mtf_q": _real("", 0, 10, "mtf_q", 0.1, default=1.0),
        "image_file_out": Key("text", file="out", required=True),
        "image_file_format": _FORMAT,
        "image_file_byte_order": _BYTES,
        "image_axis_order": Key("text", default="xy", choices=("xy", "yx")),
    },
    "volume": {
        "voxel_size": replace(_VOXEL, required=True),
        "nx": _count(1, 1000, required=True),
        "ny": _count(1, 1000, required=True),
        "nz": _count(1, 1000, required=True),
        "offset_x": _SHIFT,
        "offset_y": _SHIFT,
        "offset_z": _SHIFT,
        "map_file_re_out": Key("text", file="out", required=True),
        "map_file_im_out": _FILE_OUT,
        "map_file_format": _FORMAT,
        "map_file_byte_order": _BYTES,
        "map_axis_order": _AXES,
    },
}


def check_kind(kind: str) -> None:
    """Raises `InputError` where there is no such component."""
    if kind not in KEYS:
        raise InputError(f"Unknown component {kind!r} in the deck. Known components: {', '.join(KEYS)}.")


def known_key(kind: str, key: str) -> Key:
    """What a key of a component is; an unknown one lists the known ones."""
    if key not in KEYS[kind]:
        raise InputError(f"Unknown key {key!r} of the component {kind!r}. Known keys: {', '.join(KEYS[kind])}.")
    return KEYS[kind][key]


def converted(where: str, key: Key, value: object) -> Value:
    """A value of the key's type, from Python's, TOML's or the deck's own way to write it; its range is not checked."""
    expected = {"bool": "yes or no", "int": "an integer", "float": "a finite number", "text": "text"}[key.type]
    wrong = InputError(f"Expected {where} to be {expected}, got {value!r}. Correct the deck.")
    if key.type == "bool":
        known: dict[object, bool] = {True: True, False: False, "yes": True, "no": False}
        if not isinstance(value, bool | str) or value not in known:
            raise wrong
        return known[value]
    if key.type == "text":
        if not isinstance(value, str) or not value or not value.isprintable() or '"' in value:
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = float(value)
    except ValueError:
        raise wrong from None
    if not math.isfinite(number) or (key.type == "int" and number != int(number)):
        raise wrong
    return int(number) if key.type == "int" else number


def check_value(where: str, key: Key, value: Value) -> None:
    """Raises `InputError` where the program would refuse a value of the right type."""
    if key.choices and value not in key.choices:
        raise InputError(f"Expected {where} to be one of {', '.join(key.choices)}, got {value!r}. Correct the deck.")
    if key.type in ("int", "float") and not key.lower <= float(value) <= key.upper:
        unit = f" {key.unit}" if key.unit else ""
        raise InputError(
            f"Expected {where} within [{key.lower:g}, {key.upper:g}]{unit}, got {value!r}: TEM-simulator refuses it. "
            "Correct the deck, or the parameter's bounds."
        )
