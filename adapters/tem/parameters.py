"""Which numbers of a deck, and of the tables that it names, are varied under which names.

Three kinds of names: keys of the deck (`voltage_kv`, ...: see `KEYS`), a particle's place and angles (`x_nm`, or
`x_nm[3]` for the fourth one), and what one image of a series has of its own (`defocus_um[3]`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

from adapters.tem.deck import Component, Deck, read_table
from adapters.tem.keys import KEYS, Dialect, Key, Value, check_value
from bridge.errors import InputError
from bridge.simulator.space import Kind, Outside, Parameter, ParameterSpace

Angles = Literal["zxz", "zyz"]

COORDINATES, GEOMETRY, ERRORS, DOSES, DEFOCI = (
    "coordinates_{}.txt",
    "geometry.txt",
    "errors.txt",
    "dose.txt",
    "defocus.txt",
)


@final
@dataclass(frozen=True)
class _Column:
    """A column of a table that can be varied row by row."""

    table: str
    column: int
    unit: str
    scale: float
    bounds: tuple[float, float] | None
    kind: Kind = "continuous"


_PARTICLE = {
    "x_nm": _Column(COORDINATES, 0, "nm", 0.5, None),
    "y_nm": _Column(COORDINATES, 1, "nm", 0.5, None),
    "z_nm": _Column(COORDINATES, 2, "nm", 50.0, None, "staircase"),
    "phi_deg": _Column(COORDINATES, 3, "deg", 5.0, (-360, 360)),
    "theta_deg": _Column(COORDINATES, 4, "deg", 5.0, (-360, 360)),
    "psi_deg": _Column(COORDINATES, 5, "deg", 5.0, (-360, 360)),
}
_IMAGE = {
    "tilt_deg": _Column(GEOMETRY, 1, "deg", 0.5, (-90, 90)),
    "image_rotation_deg": _Column(ERRORS, 0, "deg", 0.5, (-360, 360)),
    "shift_x_nm": _Column(ERRORS, 3, "nm", 0.5, None),
    "shift_y_nm": _Column(ERRORS, 4, "nm", 0.5, None),
    "dose_e_per_nm2": _Column(DOSES, 0, "e/nm^2", 50.0, (0, math.inf)),
    "defocus_um": _Column(DEFOCI, 0, "um", 0.1, (-math.inf, math.inf)),
}
_SCALARS = {key.parameter: (kind, name) for kind, keys in KEYS.items() for name, key in keys.items() if key.parameter}
PARAMETER_NAMES = tuple(dict.fromkeys((*_SCALARS, *_PARTICLE, *(f"{name}[i]" for name in (*_PARTICLE, *_IMAGE)))))

# A key that the program reads only where another has a certain value: to vary it elsewhere would do nothing.
_ONLY_IF: Mapping[tuple[str, str], tuple[str, Value]] = {
    ("particle", "famp"): ("use_imag_pot", False),
    **{("particle", k): ("source", "random") for k in ("contrast_re", "contrast_im", "smoothness")},
    **{("particleset", k): ("particle_coords", "grid") for k in ("particle_dist", "offset_x", "offset_y", "offset_z")},
    **{("geometry", k): ("gen_tilt_data", True) for k in ("theta_start", "theta_incr", "tilt_axis")},
    **{("geometry", k): ("geom_errors", "random") for k in ("tilt_err", "align_err_rot", "align_err_tr")},
    **{("electronbeam", k): ("gen_dose", True) for k in ("total_dose", "dose_per_im", "dose_sd")},
    **{
        ("optics", k): ("gen_defocus", True) for k in ("defocus_nominal", "defocus_syst_error", "defocus_nonsyst_error")
    },
}


@final
@dataclass(frozen=True)
class _Target:
    """Where a parameter goes: a key of some components, or an entry of a table."""

    components: tuple[int, ...] = ()
    key: str = ""
    table: str = ""
    row: int = 0
    column: int = 0


@final
@dataclass(frozen=True)
class Plan:
    """From a parameter vector to a deck and its tables.

    Args:
        deck: complete and checked; what it names are the run's own files.
        coordinates: (particles, 6) of each particleset that is read from a file, None for others.
        tables: the other tables, by file name, as they are where nothing of them is varied.
        names: of the parameters.
        turn: whether angles zxz are written as zyz (1), zyz as zxz (-1), or as they are (0).
    """

    deck: Deck
    coordinates: tuple[NDArray[np.float64] | None, ...]
    tables: Mapping[str, NDArray[np.float64]]
    names: tuple[str, ...]
    turn: int

    @property
    def num_images(self) -> int:
        return int(self.deck.one("geometry").number("ntilts"))

    def image_of(self, name: str) -> int | None:
        """The image that a parameter belongs to alone; None for all."""
        target = self._target(name)
        return target.row if target.table in (GEOMETRY, ERRORS, DOSES, DEFOCI) else None

    def filled(self, vector: NDArray[np.float64]) -> tuple[Deck, dict[str, NDArray[np.float64]]]:
        """The deck and all its tables at a parameter vector (d,)."""
        components = list(self.deck.components)
        targets = [self._target(name) for name in self.names]
        for target, value in zip(targets, vector, strict=True):
            for i in target.components:
                components[i] = components[i].changed({target.key: float(value)})
        deck = self.deck.with_components(components)
        tables = {name: table.copy() for name, table in self.tables.items()}
        for i, coordinates in enumerate(self.coordinates):
            if coordinates is not None:
                tables[COORDINATES.format(i)] = coordinates.copy()
        for target, value in zip(targets, vector, strict=True):
            if target.table:
                if target.table not in tables:
                    tables[target.table] = _generated(deck, target.table)
                tables[target.table][target.row, target.column] = value
        for name, table in tables.items():
            if name.startswith("coordinates"):
                # The image sees R_z(psi) R_x(theta) R_z(phi), and R_x(theta) is R_z(-90) R_y(theta) R_z(90).
                table[:, 3] += 90 * self.turn
                table[:, 5] -= 90 * self.turn
        return _with_files(deck, tables), tables

    def reference(self) -> NDArray[np.float64]:
        """The parameters' values in the deck itself (d,)."""
        return np.array([self._value(self._target(name)) for name in self.names], dtype=np.float64)

    def _value(self, target: _Target) -> float:
        if target.components:
            return self.deck.components[target.components[0]].number(target.key)
        if target.table in self.tables:
            table: NDArray[np.float64] | None = self.tables[target.table]
        elif target.table in (GEOMETRY, ERRORS, DOSES, DEFOCI):
            table = _generated(self.deck, target.table)
        else:
            table = next(c for i, c in enumerate(self.coordinates) if COORDINATES.format(i) == target.table)
        assert table is not None
        return float(table[target.row, target.column])

    def _target(self, name: str) -> _Target:
        match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name)
        stem, index = (match[1], match[2]) if match else (name, None)
        if stem in _PARTICLE:
            return self._particle_target(name, _PARTICLE[stem], None if index is None else int(index))
        if index is not None and stem in _IMAGE:
            if int(index) >= self.num_images:
                raise InputError(f"Expected an image below {self.num_images} in {name!r}: the series has no more.")
            return _Target(table=_IMAGE[stem].table, row=int(index), column=_IMAGE[stem].column)
        if index is None and stem in _SCALARS:
            return self._scalar_target(name, *_SCALARS[stem])
        raise InputError(f"Unknown parameter {name!r}. Known parameters: {', '.join(PARAMETER_NAMES)}.")

    def _particle_target(self, name: str, column: _Column, index: int | None) -> _Target:
        counts = [0 if c is None else len(c) for c in self.coordinates]
        if index is None and sum(counts) != 1:
            raise InputError(
                f"Expected {name}[i] with the number i of a particle, got {name!r}: the deck reads {sum(counts)} "
                "particles from coordinate files."
            )
        row = index or 0
        for i, count in enumerate(counts):
            if row < count:
                return _Target(table=column.table.format(i), row=row, column=column.column)
            row -= count
        raise InputError(f"Expected a particle below {sum(counts)} in {name!r}: the coordinate files have no more.")

    def _scalar_target(self, name: str, kind: str, key: str) -> _Target:
        indices = self.deck.indices(kind)
        condition = _ONLY_IF.get((kind, key))
        if condition is not None:
            indices = tuple(i for i in indices if self.deck.components[i].get(condition[0]) == condition[1])
        if not indices:
            why = "" if condition is None else f" with {condition[0]} = {condition[1]}"
            raise InputError(f"Expected a component {kind!r}{why} in the deck for the parameter {name!r}, got none.")
        for i in indices:
            self.deck.components[i].number(key)
        return _Target(components=indices, key=key)

    def space(
        self, bounds: Mapping[str, Sequence[float]], natural_scale: Mapping[str, float], outside: Outside
    ) -> ParameterSpace:
        """The parameters' units, bounds and scales.

        Raises:
            InputError: an unknown parameter, or bounds beyond what the program accepts.
        """
        if not self.names:
            raise InputError(f"Expected parameters to vary, got none. Known parameters: {', '.join(PARAMETER_NAMES)}.")
        for what, given in (("bounds", bounds), ("natural_scale", natural_scale)):
            if unknown := sorted(set(given) - set(self.names)):
                raise InputError(
                    f"Unknown parameters {unknown} in {what}. The parameters are: {', '.join(self.names)}."
                )
        return ParameterSpace(
            tuple(self._parameter(name, bounds.get(name), natural_scale.get(name)) for name in self.names), outside
        )

    def _parameter(self, name: str, bounds: Sequence[float] | None, scale: float | None) -> Parameter:
        target = self._target(name)
        if target.components:
            key = KEYS[self.deck.components[target.components[0]].kind][target.key]
            default = key.bounds or (key.lower, key.upper)
        else:
            stem = name.partition("[")[0]
            column = (_PARTICLE if target.table.startswith("coordinates") else _IMAGE)[stem]
            default = column.bounds or self._reach(stem)
            key = Key("float", column.unit, scale=column.scale, kind=column.kind)
            if stem == "dose_e_per_nm2":
                key = KEYS["electronbeam"]["dose_per_im"]
        if bounds is not None and (isinstance(bounds, str) or len(bounds) != 2):
            raise InputError(f"Expected bounds of {name} as (lower, upper), got {bounds!r}.")
        lower, upper = (float(v) for v in bounds or default)
        for value in (lower, upper):
            check_value(f"the bounds of {name}", key, value)
        return Parameter(name, key.unit, lower, upper, key.scale if scale is None else float(scale), key.kind)

    def _reach(self, stem: str) -> tuple[float, float]:
        """Within the field of the first detector, or the specimen's thickness."""
        detector, magnification = self.deck.all("detector")[0], self.deck.one("optics").number("magnification")
        if stem == "z_nm":
            sample = self.deck.one("sample")
            half = 0.5 * max(sample.number("thickness_center"), sample.number("thickness_edge"), 1.0)
        else:
            pixels = detector.number("det_pix_x" if "x_nm" in stem else "det_pix_y")
            half = 500.0 * pixels * detector.number("pixel_size") / magnification
        return -half, half


def _generated(deck: Deck, table: str) -> NDArray[np.float64]:
    """The table that says image by image what the deck says by keys."""
    geometry, beam, optics = deck.one("geometry"), deck.one("electronbeam"), deck.one("optics")
    n = int(geometry.number("ntilts"))
    if table == GEOMETRY:
        theta = geometry.number("theta_start") + geometry.number("theta_incr") * np.arange(n)
        axis = np.full(n, geometry.number("tilt_axis"))
        return np.stack([-axis, theta, axis], axis=1)
    if table == ERRORS:
        _only("geom_errors = none", geometry.get("geom_errors") == "none")
        return np.zeros((n, 5))
    if table == DOSES:
        _only("dose_sd = 0", beam.number("dose_sd") == 0)
        total = beam.get("total_dose")
        return np.full((n, 1), beam.number("dose_per_im") if total is None else float(total) / n)
    _only(
        "no random defocus errors", optics.number("defocus_syst_error") == optics.number("defocus_nonsyst_error") == 0
    )
    return np.full((n, 1), optics.number("defocus_nominal"))


def _only(what: str, holds: bool) -> None:
    if not holds:
        raise InputError(f"Expected {what} in the deck where a parameter of one image is varied. Change the deck.")


def _with_files(deck: Deck, tables: Mapping[str, NDArray[np.float64]]) -> Deck:
    """The deck that reads the tables that there are."""
    by_file: Mapping[str, tuple[str, dict[str, Value], tuple[str, ...]]] = {
        GEOMETRY: (
            "geometry",
            {"gen_tilt_data": False, "geom_file_in": GEOMETRY},
            ("theta_start", "theta_incr", "tilt_axis"),
        ),
        ERRORS: ("geometry", {"geom_errors": "file", "error_file_in": ERRORS}, ()),
        DOSES: ("electronbeam", {"gen_dose": False, "dose_file_in": DOSES}, ("total_dose", "dose_per_im", "dose_sd")),
        DEFOCI: (
            "optics",
            {"gen_defocus": False, "defocus_file_in": DEFOCI},
            ("defocus_nominal", "defocus_syst_error", "defocus_nonsyst_error"),
        ),
    }
    components = list(deck.components)
    for name in tables:
        if name in by_file:
            kind, values, without = by_file[name]
            (i,) = deck.indices(kind)
            components[i] = components[i].changed(values, without)
    return deck.with_components(components)


def make_plan(deck: Deck, names: Sequence[str], dialect: Dialect, angles: Angles | None) -> Plan:
    """Reads the tables that a deck names, and finds its parameters.

    Raises:
        InputError: the deck would be refused, a table cannot be read, or a parameter is unknown or has no effect.
    """
    own: Angles = "zxz" if dialect == "v1.3" else "zyz"
    if angles not in (None, "zxz", "zyz"):
        raise InputError(f"Unknown angles={angles!r}. Known: zxz, zyz, or None for those of the dialect.")
    deck.check(dialect)
    components = list(deck.components)
    coordinates: list[NDArray[np.float64] | None] = []
    for number, i in enumerate(deck.indices("particleset")):
        one = components[i]
        if one.get("particle_coords") != "file":
            coordinates.append(None)
            continue
        table = read_table(deck.folder / str(one.get("coord_file_in")), (6,))
        coordinates.append(_first(table, one, "num_particles"))
        components[i] = one.changed({"coord_file_in": COORDINATES.format(number)}, ("num_particles",))
    tables: dict[str, NDArray[np.float64]] = {}
    (g,) = deck.indices("geometry")
    if not components[g].get("gen_tilt_data"):
        table = read_table(deck.folder / str(components[g].get("geom_file_in")), (3,))
        tables[GEOMETRY] = _first(table, components[g], "ntilts")
        components[g] = components[g].changed({"ntilts": len(tables[GEOMETRY])})
    reading = (
        (ERRORS, "geometry", "geom_errors", "file", "error_file_in", 5),
        (DOSES, "electronbeam", "gen_dose", False, "dose_file_in", 1),
        (DEFOCI, "optics", "gen_defocus", False, "defocus_file_in", 1),
    )
    for file, kind, key, value, source, columns in reading:
        (i,) = deck.indices(kind)
        if components[i].get(key) == value:
            table = read_table(Path(deck.folder / str(components[i].get(source))), (columns,))
            tables[file] = _first(table, components[g], "ntilts")
    if isinstance(names, str):
        raise InputError(f"Expected a list of parameter names, got the text {names!r}. Use a list.")
    turn = {("zxz", "zyz"): 1, ("zyz", "zxz"): -1}.get((angles or own, own), 0)
    return Plan(deck.with_components(components), tuple(coordinates), tables, tuple(names), turn)


def _first(table: NDArray[np.float64], component: Component, key: str) -> NDArray[np.float64]:
    """As many rows as the deck says, all where it does not."""
    number = component.get(key)
    if number is not None and int(number) > len(table):
        raise InputError(
            f"Expected at least {key} = {number} rows in a table of {component.heading!r}, got {len(table)}."
        )
    return table if number is None else table[: int(number)]
