"""TEM-simulator: electron micrographs by the user's own binary, as a function of the settings one chooses.

    simulator = TEMSimulator("input.txt", parameters=["voltage_kv", "defocus_um", "x_nm", "y_nm"])

The program (Rullgard et al., 2011) is licensed under the GPL and is not part of this package: build it or install it,
and name it in the environment variable TEM_SIMULATOR. It is started once a row, in a directory of its own.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
from numpy.typing import NDArray

from adapters.external import ExternalSimulator, Profile
from adapters.tem import mrc
from adapters.tem.deck import Component, Deck, table_text
from adapters.tem.keys import DIALECTS, KEYS, Dialect, Value
from adapters.tem.maps import IMAGINARY, REAL, Maps, absorption, cache_key, cached, default_cache
from adapters.tem.parameters import PARAMETER_NAMES, Angles, Plan, make_plan
from adapters.template import STDOUT, Row, Template
from bridge.arrays import unmasked_array
from bridge.errors import EvaluationError, InputError
from bridge.simulator.protocol import BlockStructure
from bridge.simulator.space import Outside, Parameter, ParameterSpace

__all__ = ["PARAMETER_NAMES", "Deck", "TEMSimulator"]

Noise = Literal["deck", "none", "noisy", "both"]

_DECK, _LOG, _IMAGE = "input.txt", "tem.log", "image{}.mrc"
_COMPLETE = re.compile(r"^# Simulation complete\.", re.MULTILINE)
_RAND_SEEDS = 2**31 - 1


@final
@dataclass(frozen=True)
class _Micrographs(Template):
    """The files of one run.

    Args:
        plan: from parameters to the deck.
        maps: cached maps of each particle of the deck; None where its own source is used.
        voltage_kv: at which the imaginary maps were built.
        dialect: of the binary.
        shape: (images, rows, columns) of each detector.
    """

    plan: Plan
    maps: tuple[Maps | None, ...]
    voltage_kv: float
    dialect: Dialect
    shape: tuple[int, int, int]

    def write_input(self, directory: Path, row: Row) -> None:
        deck, tables = self.plan.filled(row.vector)
        components = list(deck.components)
        (first,) = deck.indices("simulation")
        # glibc takes the seed 0 for 1.
        components[first] = components[first].changed({"rand_seed": 1 + row.seed % (_RAND_SEEDS - 1)})
        factor = absorption(deck.one("electronbeam").number("acc_voltage")) / absorption(self.voltage_kv)
        for number, (i, maps) in enumerate(zip(deck.indices("particle"), self.maps, strict=True)):
            components[i] = _with_inputs(components[i], f"particle{number}", maps, deck.folder, directory, factor)
        deck = deck.with_components(components)
        deck.check(self.dialect)
        for name, table in tables.items():
            (directory / name).write_text(table_text(table), encoding="utf-8")
        (directory / _DECK).write_text(deck.text(), encoding="utf-8")

    def read_output(self, directory: Path) -> NDArray[Any]:
        check_run(directory, _COMPLETE)
        images = []
        for i in range(len(self.plan.deck.all("detector"))):
            image, _ = mrc.read(directory / _IMAGE.format(i))
            if image.shape != self.shape:
                raise EvaluationError(
                    f"Expected {self.shape[0]} images of {self.shape[1]} x {self.shape[2]} pixels in "
                    f"{_IMAGE.format(i)}, got shape {image.shape}. The program stopped early; see its log."
                )
            images.append(image[0] if self.shape[0] == 1 else image)
        return images[0] if len(images) == 1 else np.stack(images)

    def log_files(self) -> tuple[str, ...]:
        return (_LOG,)


@final
@dataclass(frozen=True)
class _ParticleMaps(Template):
    """The run that builds the maps of one particle, and moves them to `target`."""

    deck: Deck
    target: Path

    def write_input(self, directory: Path, row: Row) -> None:
        (i,) = self.deck.indices("particle")
        components = list(self.deck.components)
        one = _with_inputs(components[i], "particle", None, self.deck.folder, directory, 1.0)
        components[i] = one.changed({"map_file_re_out": REAL, "map_file_im_out": IMAGINARY})
        (directory / _DECK).write_text(self.deck.with_components(components).text(), encoding="utf-8")

    def read_output(self, directory: Path) -> NDArray[Any]:
        check_run(directory, re.compile(r"^# Particle map written to file", re.MULTILINE))
        (i,) = self.deck.indices("particle")
        names = [REAL, IMAGINARY] if self.deck.components[i].get("use_imag_pot") else [REAL]
        shapes = [mrc.read_header(directory / name).shape for name in names]
        for name in names:
            shutil.move(directory / name, self.target / name)
        return np.array(shapes)

    def log_files(self) -> tuple[str, ...]:
        return (_LOG,)


def check_run(directory: Path, finished: re.Pattern[str]) -> None:
    """Raises `EvaluationError` where the program failed, which its exit status does not tell.

    It says nothing on its standard output unless something is wrong, and then may go on with half of what was asked.
    """
    said = (directory / STDOUT).read_text(encoding="utf-8", errors="replace").strip()
    if said:
        raise EvaluationError(
            f"Expected a run of TEM-simulator without complaints, got: {said.splitlines()[0][:200]} Correct the deck."
        )
    try:
        log = (directory / _LOG).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise EvaluationError(
            f"Expected the log {_LOG} of TEM-simulator, got none. Is the binary TEM-simulator?"
        ) from None
    if not finished.search(log):
        raise EvaluationError(
            f"Expected {finished.pattern.lstrip('^# ')!r} in {_LOG}, got a log without it: the run did not end."
        )


def _with_inputs(
    particle: Component, stem: str, maps: Maps | None, folder: Path, directory: Path, factor: float
) -> Component:
    """A particle whose files lie in the run's directory under short names: a deck's lines are limited."""
    if maps is None:
        links: dict[str, Value] = {}
        for key in ("pdb_file_in", "pdb_transf_file_in", "map_file_re_in", "map_file_im_in"):
            name = particle.values.get(key)
            if name is not None:
                links[key] = f"{stem}_{key}"
                (directory / f"{stem}_{key}").symlink_to((folder / str(name)).absolute())
        return particle.changed(links)
    values: dict[str, Value] = {"source": "map", "map_file_format": "mrc", "map_file_re_in": f"{stem}_{REAL}"}
    values |= {"map_axis_order": "xyz", "map_file_byte_order": "native"}
    (directory / f"{stem}_{REAL}").symlink_to(maps.real)
    if maps.imaginary is not None:
        values["map_file_im_in"] = f"{stem}_{IMAGINARY}"
        if factor == 1.0:
            (directory / f"{stem}_{IMAGINARY}").symlink_to(maps.imaginary)
        else:
            mrc.write_scaled(maps.imaginary, directory / f"{stem}_{IMAGINARY}", factor)
    return particle.changed(values, ("pdb_file_in", "pdb_transf_file_in", "add_hydrogen", "nx", "ny", "nz"))


@final
@dataclass(frozen=True, eq=False)
class TEMSimulator:
    """Micrographs by TEM-simulator v1.3; a `bridge.Simulator`.

    A particle given as a PDB file is turned into potential maps once, by the program itself, and the maps are kept in a
    cache that any number of processes may share: a run then takes a tenth of a second instead of half a minute. Where
    the voltage is varied, the cached imaginary map is multiplied by the ratio of water's absorption at the two
    voltages (`adapters.tem.maps.absorption`), which errs by some 0.03 % of the contrast.

    Conventions of the program: the sample's centre is the detector's; +x is a larger column, +y a larger row, +z adds
    to the underfocus; a positive defocus is underfocus; the values are counts times gain. z acts in steps of a slice,
    focal length and aperture in steps and by hard limits. With use_defocus_corr = yes v1.3 may give images that are not
    finite, which count as failed runs; its fork gives finite ones.

    Args:
        deck: a deck as a path (what it names is relative to its folder), as {"file": path}, or as tables, {"optics":
            {"cs": 2.0, ...}, "particle TMV": {...}, ...} (what they name is relative to the current directory). The
            component `simulation`, the image files and what else the program may write are set here.
        parameters: what is varied: names of keys ("voltage_kv"), of a particle's place and angles ("x_nm" where there
            is one, else "x_nm[0]", ...; phi, theta, psi are the columns four to six), and of what belongs to one image
            ("tilt_deg[0]", "shift_x_nm[0]", "defocus_um[0]", ...). All: `PARAMETER_NAMES`.
        bounds: (lower, upper) of some of the parameters, within what the program accepts.
        natural_scale: of some of the parameters.
        noise: "deck" (the deck's detectors as they are), "none", "noisy", or "both": two detectors for each of the
            deck's, noisy first, in one run.
        binary: the program; by default $TEM_SIMULATOR, else `TEM-simulator` on the PATH.
        cache: folder of the maps; by default $XDG_CACHE_HOME/simulation-bridge/tem-simulator (~/.cache).
        exact_imag: where the voltage is varied, have the program build the imaginary map in each run.
        dialect: "v1.3", or "phase-plate": a fork that knows phase_shift (`TEM-simulator -help optics` lists it) and
            takes particle angles as zyz instead of zxz.
        angles: what the deck's and the parameters' particle angles are, where they are not the dialect's.
        timeout_s: limit of a run [s]; the cost grows as 1 / focal_length^2.
        build_timeout_s: limit of building the maps of one particle [s].
        scratch: where runs have their directories, see `adapters.external.Profile`.
        keep: whose run directories stay: of "failed" runs, "all" or "none".
        outside: what becomes of a query out of bounds, see `bridge.simulator.space.ParameterSpace`.
        identity: a text under which evaluations are filed, see `adapters.external.ExternalSimulator`.

    Raises:
        InputError: the program would refuse the deck, or do something else than it says.

    Reference:
        Rullgard, Ofverstedt, Masich, Daneholt & Oktem (2011), J. Microsc. 243, 234.
    """

    deck: str | Path | Mapping[str, Any] | Deck
    parameters: Sequence[str] = ("voltage_kv", "focal_length_mm", "x_nm", "y_nm")
    bounds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    natural_scale: Mapping[str, float] = field(default_factory=dict)
    noise: Noise = "deck"
    binary: str | Path | None = None
    cache: str | Path | None = None
    exact_imag: bool = False
    dialect: Dialect = "v1.3"
    angles: Angles | None = None
    timeout_s: float = 120.0
    build_timeout_s: float = 3600.0
    scratch: str | Path | None = None
    keep: Literal["failed", "all", "none"] = "failed"
    outside: Outside = "clip"
    identity: str | None = None

    output_suffix: ClassVar[str] = ".mrc"
    row_by_row: ClassVar[bool] = True
    _plan: Plan = field(init=False, repr=False)
    _space: ParameterSpace = field(init=False, repr=False)
    _shape: tuple[int, int, int] = field(init=False, repr=False)
    _profile: Profile = field(init=False, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.noise not in ("deck", "none", "noisy", "both"):
            raise InputError(f"Unknown noise={self.noise!r}. Known: deck, none, noisy, both.")
        if self.dialect not in DIALECTS:
            raise InputError(f"Unknown dialect={self.dialect!r}. Known: {', '.join(DIALECTS)}.")
        plan = make_plan(_prepared(_loaded(self.deck), self.noise), self.parameters, self.dialect, self.angles)
        put(self, "_plan", plan)
        put(self, "_space", plan.space(self.bounds, self.natural_scale, self.outside))
        sizes = {(int(d.number("det_pix_y")), int(d.number("det_pix_x"))) for d in plan.deck.all("detector")}
        if len(sizes) != 1:
            raise InputError(f"Expected detectors of one size, got {sorted(sizes)} (rows, columns). Remove the others.")
        put(self, "_shape", (plan.num_images, *sizes.pop()))
        binary = os.fspath(self.binary or os.environ.get("TEM_SIMULATOR") or "TEM-simulator")
        scratch = None if self.scratch is None else Path(self.scratch)
        put(self, "_profile", Profile((binary, _DECK), timeout_s=self.timeout_s, scratch=scratch, keep=self.keep))
        plan.filled(plan.reference())[0].check(self.dialect)  # what is wrong with the deck is said now, not on a rank

    @property
    def identity_parts(self) -> dict[str, Any]:
        """What images depend on: the deck, what the files that it names hold, and the program."""
        plan, components = self._plan, []
        for one in plan.deck.components:
            values: dict[str, Any] = {}
            for key in sorted(one.values):
                values[key] = value = one.values[key]
                if KEYS[one.kind][key].file == "in":
                    # What tables hold has been read.
                    values[key] = plan.deck.folder / str(value) if one.kind == "particle" else "table"
            components.append((one.kind, one.name, values))
        tables = {f"table {name}": table for name, table in plan.tables.items()}
        settings = {"names": plan.names, "turn": plan.turn, "dialect": self.dialect, "exact_imag": self.exact_imag}
        files = {"program": self._profile, "components": components, "coordinates": plan.coordinates}
        return settings | files | tables

    @property
    def space(self) -> ParameterSpace:
        """Names, units, bounds and natural scales of the inputs."""
        return self._space

    @property
    def output_shape(self) -> tuple[int, ...]:
        """([detectors,] [images,] rows, columns); the first two only where there are several."""
        images, rows, columns = self._shape
        detectors = len(self._plan.deck.all("detector"))
        return (detectors,) * (detectors > 1) + (images,) * (images > 1) + (rows, columns)

    @property
    def structure(self) -> BlockStructure | None:
        """Which images each parameter touches; None with noise, whose random numbers are one stream for all images."""
        blocks = [self._plan.image_of(name) for name in self.parameters]
        quantized = any(d.get("use_quantization") for d in self._plan.deck.all("detector"))
        if quantized or all(b is None for b in blocks):
            return None
        shape = self.output_shape
        axis = len(shape) - 3
        images = np.arange(shape[axis], dtype=np.int16)
        if axis:
            images = np.broadcast_to(images[None, :, None, None], shape)
        return BlockStructure([-1 if b is None else b for b in blocks], images)

    @property
    def reference(self) -> NDArray[np.float64]:
        """The parameters' values in the deck (d,) float64."""
        return self._plan.reference()

    @property
    def pixel_angstrom(self) -> float:
        """Pixel size in the specimen of the (first) detector, as the deck has it [angstrom]."""
        deck = self._plan.deck
        return 1e4 * deck.all("detector")[0].number("pixel_size") / deck.one("optics").number("magnification")

    def prepare(self) -> None:
        """Builds what the cache lacks, so that the first run need not; may be called by many processes at once.

        Raises:
            SetupError: no program, or no cache that can be written.
            EvaluationError: the program failed to build the maps.
        """
        self._maps()

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Runs the program k times, one after another.

        Args:
            inputs: (k, d); outside the bounds `outside` says what happens.
            seeds: (k,) of the program's random numbers.

        Returns:
            (k, *output_shape) float64. Row i depends on inputs[i] and seeds[i] alone.

        Raises:
            InputError: a row that the deck's rules forbid.
            SetupError: no program, no cache, no scratch directory.
            EvaluationError: a run failed (TEM-simulator ends with exit status 0 then, too), left no images or others
                than asked for, or took too long.
        """
        inputs = np.asarray(inputs, dtype=np.float64)
        if inputs.ndim != 2 or inputs.shape[1] != self.space.dimension or not np.isfinite(inputs).all():
            raise InputError(
                f"Expected finite inputs of shape (k, {self.space.dimension}) ({', '.join(self.space.names)}), got "
                f"shape {inputs.shape}, or NaN."
            )
        plan = self._plan
        voltage_kv = plan.deck.one("electronbeam").number("acc_voltage")
        template = _Micrographs(plan, self._maps(), voltage_kv, self.dialect, self._shape)
        simulator = ExternalSimulator(template, self._profile, self.space, self.output_shape)
        return simulator(self.space.admit(inputs)[0], seeds)

    def read_output(self, path: str) -> NDArray[Any]:
        """Images from an MRC file, in the shape of an output.

        Raises:
            InputError: they cannot be read, or are others.
        """
        try:
            images, _ = mrc.read(Path(path))
        except (OSError, ValueError) as error:
            raise InputError(f"Expected an MRC file at {path!r}, got: {error}.") from error
        shape = self.output_shape
        if images.shape[1:] != shape[-2:] or images.size != np.prod(shape):
            raise InputError(f"Expected images of shape {shape} in {path!r}, got {images.shape}.")
        return images.reshape(shape).astype(np.float32)

    def write_output(self, path: str, output: NDArray[Any]) -> None:
        """Images as an MRC stack; with several detectors one after another."""
        images = unmasked_array(output, "as images").reshape(-1, *self.output_shape[-2:])
        mrc.write_stack(Path(path), images, self.pixel_angstrom)

    def _maps(self) -> tuple[Maps | None, ...]:
        """The cached maps of each particle of the deck; None where it has none."""
        plan = self._plan
        voltage_kv = plan.deck.one("electronbeam").number("acc_voltage")
        exact = self.exact_imag and "voltage_kv" in self.parameters
        maps: list[Maps | None] = []
        for particle in plan.deck.all("particle"):
            imaginary = bool(particle.get("use_imag_pot"))
            if particle.get("source") != "pdb" or (exact and imaginary):
                maps.append(None)
                continue
            binary = Path(self._profile.executable())
            key = cache_key(particle, plan.deck.folder, binary, voltage_kv)
            root = default_cache() if self.cache is None else Path(self.cache)

            def build(folder: Path, particle: Component = particle) -> None:
                self._build(folder, particle)

            maps.append(cached(root.absolute(), key, imaginary, build))
        return tuple(maps)

    def _build(self, folder: Path, particle: Component) -> None:
        """Has the program build a particle's maps in `folder`, by a run of its own."""
        plan = self._plan
        simulation = Component.of("simulation", "", {"generate_particle_maps": True, "log_file": _LOG, "rand_seed": 1})
        particle = particle.changed(
            {"map_file_format": "mrc", "map_axis_order": "xyz", "map_file_byte_order": "native"}
        )
        deck = Deck((simulation, plan.deck.one("electronbeam"), particle), plan.deck.folder)
        profile = replace(self._profile, timeout_s=self.build_timeout_s)
        run = ExternalSimulator(_ParticleMaps(deck, folder), profile, ParameterSpace((Parameter("unused"),)), None)
        run(np.zeros((1, 1)), np.zeros(1, dtype=np.uint64))


def _loaded(deck: str | Path | Mapping[str, Any] | Deck) -> Deck:
    """The deck; where its files are does not change with the current directory any more."""
    if isinstance(deck, Mapping):
        deck = str(deck["file"]) if set(deck) == {"file"} else Deck.from_tables(deck)
    if isinstance(deck, str | Path):
        deck = Deck.read(deck)
    if not isinstance(deck, Deck):
        raise InputError(f"Expected a deck as a path, a table or a Deck, got {type(deck).__name__}.")
    return Deck(deck.components, deck.folder.absolute())


def _prepared(deck: Deck, noise: Noise) -> Deck:
    """The deck with what is ours to say: what is run, the detectors, and no files but the images and the log."""
    components = [
        Component.of("simulation", "", {"generate_micrographs": True, "log_file": _LOG, "rand_seed": 1}),
    ]
    number = 0
    for one in deck.components:
        if one.kind in ("simulation", "volume"):
            continue
        if one.kind != "detector":
            components.append(one.changed({}, [k for k in one.values if KEYS[one.kind][k].file == "out"]))
            continue
        kinds = {"none": [False], "noisy": [True], "both": [True, False]}
        for quantized in kinds.get(noise, [bool(one.get("use_quantization"))]):
            values: dict[str, Value] = {"use_quantization": quantized, "image_file_out": _IMAGE.format(number)}
            if one.get("image_file_format") == "raw":
                values["image_file_format"] = "mrc"
            values |= {"image_axis_order": "xy", "image_file_byte_order": "native"}
            components.append(Component.of("detector", f"d{number}", {**one.values, **values}))
            number += 1
    return Deck(tuple(components), deck.folder)
