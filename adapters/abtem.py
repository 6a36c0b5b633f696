r"""abTEM as a simulator: multislice images of atoms, for reference and for thick specimens.

    psi_{j+1} = P_dz [exp(i sigma v_j) psi_j],    I = |F^-1[exp(i chi) F psi]|^2

abTEM (Madsen & Susi 2021, Open Research Europe 1, 24; GPL-3) is optional, `pip install "simulation-bridge[abtem]"`, and
is loaded by the first call; importing this module needs numpy alone.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bridge.arrays import Array
from bridge.errors import InputError, SetupError
from bridge.simulator.space import Parameter, ParameterSpace


def _p(name: str, unit: str, lower: float, upper: float, scale: float, value: float, text: str) -> tuple[Any, float]:
    return Parameter(name, unit, lower, upper, scale, "continuous", text), value


# Each with the value that it has where nothing is said.
_TABLE = (
    _p("voltage_kv", "kV", 20.0, 1000.0, 20.0, 300.0, "accelerating voltage"),
    _p("defocus_um", "um", -10.0, 10.0, 0.1, 1.0, "defocus of the specimen's origin, positive is underfocus"),
    _p("cs_mm", "mm", 0.0, 10.0, 0.3, 2.7, "spherical aberration"),
    _p("astigmatism_um", "um", -1.0, 1.0, 0.05, 0.0, "half the difference of the principal defoci"),
    _p("astigmatism_angle_deg", "deg", -360.0, 360.0, 5.0, 0.0, "direction of the larger defocus, from +x to +y"),
    _p("focal_spread_angstrom", "angstrom", 0.0, 1000.0, 10.0, 0.0, "standard deviation of the defocus"),
    _p("convergence_mrad", "mrad", 0.0, 1.0, 0.02, 0.0, "angular spread of the illumination"),
    _p("aperture_mrad", "mrad", 0.1, 1000.0, 1.0, 1000.0, "semi-angle of the objective aperture; 1000 for none"),
    _p("x_tilt_deg", "deg", -360.0, 360.0, 2.0, 0.0, "rotation about x, first"),
    _p("y_tilt_deg", "deg", -360.0, 360.0, 2.0, 0.0, "rotation about y, second"),
    _p("rotation_deg", "deg", -360.0, 360.0, 2.0, 0.0, "rotation in the plane from +x to +y, third"),
    _p("x_angstrom", "angstrom", -1e4, 1e4, 5.0, 0.0, "shift to the right (larger column), last"),
    _p("y_angstrom", "angstrom", -1e4, 1e4, 5.0, 0.0, "shift downwards (larger row), last"),
    _p("dose_e_per_angstrom2", "e/angstrom^2", 1e-6, 1e6, 2.0, 40.0, "exposure"),
)
_KNOWN = {p.name: p for p, _ in _TABLE}
_DEFAULTS = {p.name: value for p, value in _TABLE}
PARAMETER_NAMES = tuple(_KNOWN)
_ANGLES = ("x_tilt_deg", "y_tilt_deg", "rotation_deg")
_NO_APERTURE = 1000.0

# How many potentials and exit waves are kept.
_KEPT = 4


def import_abtem() -> Any:
    """abTEM, or a `SetupError` that says how to get it."""
    try:
        import abtem
    except ImportError as error:
        raise SetupError(
            f"Expected the package abtem, which cannot be imported: {error}. Install it: "
            'pip install "simulation-bridge[abtem]".'
        ) from error
    return abtem


@final
@dataclass(frozen=True, eq=False)
class AbTEM:
    """Micrographs of atoms in vacuum by multislice with abTEM; a `bridge.Simulator`.

    The atoms are turned, R_z(rotation) R_y(y-tilt) R_x(x-tilt), and shifted; their origin is at pixel (H // 2, W // 2).
    +x is the direction of columns, +y of rows, the beam runs along +z, and height adds to the underfocus, which is that
    of the origin. Values are expected electrons of each pixel, or counts; there is no detector. Atoms outside the image
    and its margin come in again from the other side, as abTEM's cells are periodic.

    The potential is built for each orientation and the wave travels through it for each voltage; both are kept for the
    last four, and a shift is a phase of the wave, so that lens, shift and dose cost next to nothing. abTEM places atoms
    in its projections by linear interpolation, hence the finer grid. There is neither solvent nor B factor.

    Beside `simulators.cryoet.CryoET`, with the same scattering factors ("peng"), no solvent, 300 atoms in a layer of
    6 angstrom: images differ by 2 to 3 % of the contrast at 5 to 10 angstrom and 6 % at 2.5, astigmatism, Cs and shift
    included; what is finer than that `CryoET` with pixels of 1 angstrom leaves out.

    Row i depends on inputs[i] and seeds[i] alone; computed in single precision and one thread.

    Args:
        atoms: an `ase.Atoms`, a path that ASE reads (PDB, XYZ, ...), or a table with `positions` (n, 3) [angstrom] and
            `numbers` (n,). Taken as they stand; `centre` moves them.
        shape: (rows, columns) of the image.
        pixel_size_angstrom: [angstrom].
        parameters: names of the d inputs, in order. All: `PARAMETER_NAMES`.
        settings: values of those that are no inputs, by name; those left out: 300 kV, 1 um, Cs 2.7 mm, 40 e/angstrom^2,
            no aperture, else 0.
        bounds: (lower, upper) of some of the parameters, instead of the defaults.
        noise: "none" or "poisson".
        oversampling: of abTEM's grid with respect to the pixels; the intensity is resampled in Fourier space.
        slice_thickness_angstrom: of the multislice [angstrom].
        parametrization: of the atoms' potentials: "lobato", "kirkland" or "peng".
        margin_pixels: computed on each side and cut off.
        centre: move the middle of the atoms' bounding box to the origin.

    Raises:
        InputError: a setting that is unknown, out of range or of the wrong shape.
    """

    atoms: Any
    shape: Sequence[int] = (128, 128)
    pixel_size_angstrom: float = 1.0
    parameters: Sequence[str] = ("defocus_um", "x_angstrom", "y_angstrom")
    settings: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    noise: Literal["none", "poisson"] = "none"
    oversampling: int = 4
    slice_thickness_angstrom: float = 2.0
    parametrization: Literal["lobato", "kirkland", "peng"] = "lobato"
    margin_pixels: int = 16
    centre: bool = True

    row_by_row: ClassVar[bool] = True
    _space: ParameterSpace = field(init=False, repr=False)
    _values: dict[str, float] = field(init=False, repr=False)
    _positions: Array = field(init=False, repr=False)
    _numbers: NDArray[np.int64] = field(init=False, repr=False)
    _potentials: OrderedDict[tuple[float, ...], Any] = field(init=False, repr=False)
    _waves: OrderedDict[tuple[float, ...], Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if len(self.shape) != 2 or not all(isinstance(n, int) and 8 <= n <= 8192 for n in self.shape):
            raise InputError(f"Expected shape (rows, columns), two integers in [8, 8192], got {self.shape!r}.")
        put(self, "shape", tuple(self.shape))
        for name, lower, upper in (
            ("pixel_size_angstrom", 0.01, 100.0),
            ("oversampling", 1, 64),
            ("slice_thickness_angstrom", 0.1, 1e4),
            ("margin_pixels", 0, 4096),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not lower <= value <= upper:
                raise InputError(f"Expected {name} in [{lower:g}, {upper:g}], got {value!r}.")
        for name, known in (("noise", ("none", "poisson")), ("parametrization", ("lobato", "kirkland", "peng"))):
            if getattr(self, name) not in known:
                raise InputError(f"Unknown {name}={getattr(self, name)!r}. Known: {', '.join(known)}.")
        if isinstance(self.parameters, str):
            raise InputError(f"Expected a list of parameter names, got the text {self.parameters!r}. Use a list.")
        for name in (*self.parameters, *self.settings):
            if name not in _KNOWN:
                raise InputError(f"Unknown parameter {name!r}. Known parameters: {', '.join(PARAMETER_NAMES)}.")
        for name in self.bounds:
            if name not in self.parameters:
                raise InputError(f"Unknown parameter {name!r} in bounds. Parameters: {', '.join(self.parameters)}.")
        for name, setting in self.settings.items():
            if not _KNOWN[name].lower <= setting <= _KNOWN[name].upper:
                raise InputError(
                    f"Expected {name} in [{_KNOWN[name].lower:g}, {_KNOWN[name].upper:g}] {_KNOWN[name].unit}, got "
                    f"{setting!r}."
                )
        space = []
        for p in (_KNOWN[name] for name in self.parameters):
            lower, upper = self.bounds.get(p.name, (p.lower, p.upper))
            if lower < p.lower or upper > p.upper:
                raise InputError(
                    f"Expected bounds of {p.name} within [{p.lower:g}, {p.upper:g}], got {lower}, {upper}."
                )
            space.append(Parameter(p.name, p.unit, lower, upper, p.natural_scale, p.kind, p.description))
        put(self, "_space", ParameterSpace(tuple(space)))
        put(self, "_values", {**_DEFAULTS, **self.settings})
        positions, numbers = _atoms(self.atoms)
        if self.centre:
            positions = positions - 0.5 * (positions.min(axis=0) + positions.max(axis=0))
        put(self, "_positions", positions)
        put(self, "_numbers", numbers)
        put(self, "_potentials", OrderedDict())
        put(self, "_waves", OrderedDict())

    def __getstate__(self) -> dict[str, Any]:
        # What is kept can be made again, and need not travel.
        return {**self.__dict__, "_potentials": OrderedDict(), "_waves": OrderedDict()}

    @property
    def identity_parts(self) -> dict[str, Any]:
        """What images depend on; and the versions of what computes them."""
        names = ("shape", "pixel_size_angstrom", "noise", "oversampling", "slice_thickness_angstrom", "margin_pixels")
        parts = {name: getattr(self, name) for name in (*names, "parametrization", "_values", "_positions", "_numbers")}
        for package in ("abtem", "ase"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                parts[package] = metadata.version(package)
        return parts | {"columns": self.space.names}

    @property
    def space(self) -> ParameterSpace:
        """Names, units, bounds and natural scales of the inputs."""
        return self._space

    @property
    def output_shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.shape[0], self.shape[1]

    @property
    def reference(self) -> Array:
        """The inputs that reproduce the settings (d,) float64."""
        return np.array([self._values[name] for name in self.space.names])

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        """Images of k parameter vectors.

        Args:
            inputs: (k, d) float64.
            seeds: (k,) of the noise.

        Returns:
            (k, rows, columns) float32, electrons a pixel.

        Raises:
            InputError: wrong shape, not finite, or outside the bounds.
            SetupError: abTEM is not installed.
        """
        inputs, seeds = self.space.checked(inputs, seeds)
        images = np.empty((len(inputs), *self.output_shape), dtype=np.float32)
        for row, seed, image in zip(inputs, seeds, images, strict=True):
            values = {**self._values, **dict(zip(self.space.names, row.tolist(), strict=True))}
            expected = self._image(values)
            if self.noise == "poisson":
                random = np.random.Generator(np.random.Philox(key=int(seed)))
                expected = random.poisson(np.maximum(expected, 0.0)).astype(np.float64)
            image[...] = expected
        return images

    def exit_wave(self, values: Mapping[str, float]) -> Any:
        """abTEM's `Waves` at the exit of the cell, unshifted; `values` are all parameters by name."""
        abtem = import_abtem()
        angles = tuple(values[name] for name in _ANGLES)
        key = (*angles, values["voltage_kv"])
        if key not in self._waves:
            _trim(self._waves)
            potential = self._potential(abtem, angles)
            plane = abtem.PlaneWave(energy=1e3 * values["voltage_kv"])
            with abtem.config.set(_CONFIG):
                self._waves[key] = plane.multislice(potential, lazy=False)
        return self._waves[key]

    def _potential(self, abtem: Any, angles: tuple[float, ...]) -> Any:
        if angles not in self._potentials:
            import ase

            _trim(self._potentials)
            rows, columns = (n + 2 * self.margin_pixels for n in self.output_shape)
            turned = self._positions @ _rotation(angles).T
            depth = self._depth
            cell = (columns * self.pixel_size_angstrom, rows * self.pixel_size_angstrom, depth)
            # abTEM's sample 0 is at 0; the origin comes to sample n // 2.
            middle = np.array((columns // 2, rows // 2, 0.0)) * self.pixel_size_angstrom + (0.0, 0.0, 0.5 * depth)
            atoms = ase.Atoms(numbers=self._numbers, positions=turned + middle, cell=cell, pbc=True)
            atoms.wrap()
            with abtem.config.set(_CONFIG):
                self._potentials[angles] = abtem.Potential(
                    atoms,
                    gpts=(columns * self.oversampling, rows * self.oversampling),
                    slice_thickness=self.slice_thickness_angstrom,
                    parametrization=self.parametrization,
                    projection="infinite",
                ).build(lazy=False)
        return self._potentials[angles]

    @property
    def _depth(self) -> float:
        """The cell's height: the atoms in any orientation, with 2 angstrom on both sides, in whole slices."""
        size = 2 * float(np.linalg.norm(self._positions, axis=1).max()) + 4.0
        return float(np.ceil(size / self.slice_thickness_angstrom) * self.slice_thickness_angstrom)

    def _image(self, values: Mapping[str, float]) -> Array:
        abtem = import_abtem()
        wave = self.exit_wave(values)
        aperture = values["aperture_mrad"]
        lens = abtem.CTF(
            semiangle_cutoff=np.inf if aperture >= _NO_APERTURE else aperture,
            focal_spread=values["focal_spread_angstrom"],
            angular_spread=values["convergence_mrad"],
            aberration_coefficients={
                # The origin is half a cell above the exit; abTEM's C10 is minus the underfocus.
                "C10": -(1e4 * values["defocus_um"] + 0.5 * self._depth),
                "C12": -1e4 * values["astigmatism_um"],
                "phi12": np.deg2rad(values["astigmatism_angle_deg"]),
                "C30": 1e7 * values["cs_mm"],
            },
            energy=1e3 * values["voltage_kv"],
        )
        with abtem.config.set(_CONFIG):
            image = np.asarray(wave.apply_ctf(lens).intensity().array, dtype=np.float64)  # [x, y]
        rows, columns = (n + 2 * self.margin_pixels for n in self.output_shape)
        spectrum = np.fft.fft2(image.T)
        shift = (values["y_angstrom"], values["x_angstrom"])
        phases = [
            np.exp(-2j * np.pi * np.fft.fftfreq(n, self.pixel_size_angstrom) * s)
            for n, s in zip((rows, columns), shift, strict=True)
        ]
        kept = spectrum[np.ix_(_low(rows, image.shape[1]), _low(columns, image.shape[0]))]
        sampled = np.fft.ifft2(kept * phases[0][:, None] * phases[1]).real * (rows * columns / image.size)
        margin = self.margin_pixels
        part = sampled[margin : rows - margin, margin : columns - margin]
        return np.asarray(part * values["dose_e_per_angstrom2"] * self.pixel_size_angstrom**2)


# The same bits each time: no measured FFT plans, one thread; and no progress bar.
_CONFIG = {
    "diagnostics.progress_bar": False,
    "dask.lazy": False,
    "fft": "numpy",
    "num_workers": 1,
    "precision": "float32",
}


def _trim(cache: OrderedDict[tuple[float, ...], Any]) -> None:
    while len(cache) >= _KEPT:
        cache.popitem(last=False)


def _low(keep: int, size: int) -> NDArray[np.int64]:
    """Indices of the `keep` lowest of `size` frequencies, in the order of fft."""
    return np.concatenate((np.arange((keep + 1) // 2), np.arange(size - keep // 2, size)))


def _rotation(angles: tuple[float, ...]) -> Array:
    a, b, c = np.deg2rad(angles)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)


def _atoms(given: Any) -> tuple[Array, NDArray[np.int64]]:
    """Positions (n, 3) [angstrom] and atomic numbers (n,)."""
    if isinstance(given, str | Path):
        if not Path(given).is_file():
            raise InputError(f"Expected a file of atoms, found none at {str(given)!r}. Check the path.")
        import_abtem()  # which brings ASE
        import ase.io

        try:
            given = ase.io.read(given)
        except Exception as error:  # ASE's readers raise whatever occurs in them
            raise InputError(f"Expected a file that ASE reads, got {str(given)!r}: {error}.") from error
    table: tuple[ArrayLike, ArrayLike]
    if isinstance(given, Mapping):
        if set(given) != {"positions", "numbers"}:
            raise InputError(f"Expected positions and numbers of atoms, got a table of {', '.join(map(str, given))}.")
        table = given["positions"], given["numbers"]
    else:
        try:
            table = given.positions, given.numbers
        except AttributeError as error:
            raise InputError(
                f"Expected atoms as an ase.Atoms, a path or a table of positions and numbers, got "
                f"{type(given).__name__}."
            ) from error
    positions, numbers = np.array(table[0], dtype=np.float64), np.array(table[1], dtype=np.int64)
    n = len(positions)
    if n == 0 or positions.shape != (n, 3) or numbers.shape != (n,) or not np.isfinite(positions).all():
        raise InputError(
            f"Expected finite positions (n, 3) and numbers (n,) with n >= 1, got {positions.shape} and {numbers.shape}."
        )
    if not ((numbers >= 1) & (numbers <= 98)).all():
        raise InputError("Expected atomic numbers from 1 to 98, got others. Remove those atoms.")
    return positions, numbers
