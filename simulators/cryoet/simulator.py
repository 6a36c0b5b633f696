"""`CryoET`: parameters -> micrograph.

atoms -> projected potential -> solvent -> pose -> phase object -> lens -> dose -> noise, MTF -> counts

A single image. Pose: the specimen is rotated about its origin, r -> R_z(rotation) R_y(y-tilt) R_x(x-tilt) r, then
shifted; its origin is at pixel (H // 2, W // 2) of the image. +x is the direction of columns, +y of rows, the beam runs
along +z, and a rotation in the plane is positive from +x to +y. The structure may deform before that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import scipy.fft
import torch
from numpy.typing import NDArray

from bridge.errors import InputError
from bridge.simulator.space import ParameterSpace
from simulators.cryoet.device import CPU, checked_device, checked_theta
from simulators.cryoet.formats.micrographs import read_micrograph, write_micrograph
from simulators.cryoet.microscope import detector as detection
from simulators.cryoet.microscope.detector import Detector
from simulators.cryoet.microscope.optics import Microscope, Value, check_range, cos_sin, frequencies, transfer_function
from simulators.cryoet.microscope.physics import interaction_constant, wavelength_angstrom
from simulators.cryoet.parameters import KNOWN as KNOWN
from simulators.cryoet.parameters import TILTS, make_space
from simulators.cryoet.parameters import Pose as Pose
from simulators.cryoet.specimen.deformation import Deformation, Motion, number
from simulators.cryoet.specimen.maps import DensityMap
from simulators.cryoet.specimen.potential import Projection, Projector
from simulators.cryoet.specimen.specimen import Specimen
from simulators.cryoet.specimen.volume import MapProjector

Mode = Literal["hard", "smooth"]
Noise = Literal["none", "poisson", "full"]


# How many projections of varied structures are kept.
_STRUCTURES = 4


@dataclass(frozen=True, eq=False)
class CryoET:
    r"""An embedded cryo-EM simulator: a micrograph of a specimen in vitreous ice, in detector counts.

    psi = exp(i sigma v - mu), I = |F^{-1}[T F psi]|^2, lambda = I dose pixel^2, with v the projected potential less
    that of the displaced solvent, band-limited at the image's Nyquist frequency, and mu = w / sqrt(1 - w^2) sigma v.

    The image is computed with a margin that is cut off afterwards, so that next to nothing comes in from the other
    side: less than 1 % of the contrast. The specimen fades out over the outermost pixels of the margin.

    The specimen is projected once and the projection kept, unless its structure or a tilt is varied
    (`mode_angstrom[k]`, `domain_deg[j]`, `x_tilt_deg`, `y_tilt_deg`): then it is projected for each parameter vector,
    on a grid that holds all that the bounds of these allow; narrow bounds make it faster.

    Args:
        specimen: a `Specimen`, a `DensityMap`, a path, "helix", or a table (see `Specimen.from_options`).
        shape: (rows, columns) of the image.
        pixel_size_angstrom: [angstrom].
        microscope: a `Microscope` or a table of its settings.
        detector: a `Detector` or a table of its settings.
        parameters: names of the d inputs, in order; the other settings keep the values given here. All:
            `PARAMETER_NAMES`, and those of `deformation`.
        bounds: (lower, upper) of some of the parameters, instead of the defaults.
        natural_scale: of some of the parameters: steps that change the image about as much as those of the others do.
            Methods that smooth move all parameters by so much at once. The defaults are for images of a few angstrom a
            pixel; where standard errors differ from parameter to parameter by far in these units, say so here.
        mode: "hard" (solvent by threshold, hard aperture, integer counts, saturation, dead pixels) or "smooth" (none of
            these; differentiable by autograd).
        noise: "none", "poisson" (counting) or "full" (counting and DQE).
        pose: a `Pose` or a table: values of the pose parameters that are not inputs.
        deformation: a `Deformation` or a table of its settings: how the structure may deform, and by how much where
            that is no input.
        device: where it computes, "cpu" or what torch has ("cuda", "cuda:1"). There `theta` of `image` and `electrons`
            has to be, and images are there; a call takes and returns numpy's arrays all the same. Potentials are built
            on the processor, except where smooth mode varies the structure, and copied. Noise is drawn from the same
            stream on every device.
        margin_pixels: margin on each side; by default 12 pixels more than the distance to which the lens spreads the
            Nyquist frequency at the largest defocus and wavelength within the parameters' bounds, or than half the
            image's longer side if that is less.

    Raises:
        InputError: a setting that is unknown, out of range or of the wrong shape.

    Reference:
        Vulovic et al. (2013), J. Struct. Biol. 183, 19, for the chain; the modules beside for each formula.
    """

    specimen: Specimen | DensityMap | str | Path | Mapping[str, Any] = "helix"
    shape: Sequence[int] = (256, 256)
    pixel_size_angstrom: float = 3.0
    microscope: Microscope | Mapping[str, Any] = field(default_factory=Microscope)
    detector: Detector | Mapping[str, Any] = field(default_factory=Detector)
    parameters: Sequence[str] = ("defocus_um", "x_angstrom", "y_angstrom", "rotation_deg")
    bounds: Mapping[str, Sequence[float]] | None = None
    natural_scale: Mapping[str, float] | None = None
    mode: Mode = "hard"
    noise: Noise = "none"
    pose: Pose | Mapping[str, Any] = field(default_factory=Pose)
    deformation: Deformation | Mapping[str, Any] = field(default_factory=Deformation)
    margin_pixels: int | None = None
    device: str | torch.device = "cpu"

    output_suffix: ClassVar[str] = ".mrc"

    def __post_init__(self) -> None:
        put = object.__setattr__
        shape = checked_shape(self.shape)
        put(self, "shape", shape)
        put(self, "device", checked_device("CryoET", self.device))
        check_range("CryoET", "pixel_size_angstrom", self.pixel_size_angstrom, 0.1, 100.0)
        put(self, "microscope", made(Microscope, self.microscope, "microscope"))
        put(self, "detector", made(Detector, self.detector, "detector"))
        put(self, "pose", made(Pose, self.pose, "pose"))
        put(self, "deformation", made(Deformation, self.deformation, "deformation"))
        for name, known in (("mode", ("hard", "smooth")), ("noise", ("none", "poisson", "full"))):
            if getattr(self, name) not in known:
                hint = " TEM-simulator's model is the class TEMSim." if getattr(self, name) == "temsim" else ""
                raise InputError(f"Unknown {name}={getattr(self, name)!r}. Known: {', '.join(known)}.{hint}")
        put(self, "specimen", Specimen.from_options(self.specimen))
        if isinstance(self.specimen, DensityMap) and cast(Deformation, self.deformation).values:
            raise InputError("Expected a specimen of atoms for a deformation, got a map, which is rigid.")
        if isinstance(self.parameters, str):
            raise InputError(f"Expected a list of parameter names, got the text {self.parameters!r}. Use a list.")
        names = tuple(self.parameters)
        put(self, "parameters", names)
        structure = cast(Deformation, self.deformation).values
        put(
            self,
            "_space",
            make_space(names, self.bounds, shape, self.pixel_size_angstrom, tuple(structure), self.natural_scale),
        )
        put(self, "_values", self._settings())
        put(self, "_shaping", (*structure, *TILTS))
        if self.margin_pixels is not None:
            check_range("CryoET", "margin_pixels", self.margin_pixels, 0, 4096)
        put(self, "_padded", self._padded_shape())
        put(self, "_source", self._make_source())  # what is wrong with the deformation is said now
        put(self, "_projectors", {})
        put(self, "_projections", {})

    @property
    def identity_parts(self) -> dict[str, Any]:
        """What images depend on; of the bounds the margin, and the room for structures that move."""
        names = ("specimen", "shape", "pixel_size_angstrom", "microscope", "detector", "parameters", "mode", "noise")
        return {name: getattr(self, name) for name in (*names, "pose", "deformation", "_padded", "_source")}

    @property
    def space(self) -> ParameterSpace:
        """Names, units, bounds and natural scales of the inputs."""
        return self._space  # type: ignore[attr-defined]

    @property
    def output_shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.shape  # type: ignore[return-value]

    @property
    def reference(self) -> NDArray[np.float64]:
        """The inputs that reproduce the settings given to the constructor (d,) float64."""
        return np.array([self._values[n] for n in self.space.names])  # type: ignore[attr-defined]

    def replace(self, **changes: Any) -> CryoET:
        """A simulator with some arguments of the constructor changed; projections are shared where still valid."""
        known = [item.name for item in fields(self)]
        for name in changes:
            if name not in known:
                raise InputError(f"Unknown argument {name!r} of CryoET. Known: {', '.join(known)}.")
        other = CryoET(**{name: changes.get(name, getattr(self, name)) for name in known})
        # Keys hold everything that a projection depends on, so sharing them all is safe.
        for name in ("_projections", "_projectors"):
            object.__setattr__(other, name, getattr(self, name))
        return other

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        """Detector counts of k parameter vectors, with noise as `noise` says.

        Args:
            inputs: (k, d) float64.
            seeds: (k,) of the noise.

        Returns:
            (k, rows, columns) float32. Row i depends on inputs[i] and seeds[i] alone, to the last bit.

        Raises:
            InputError: wrong shape, not finite, or outside the bounds.
        """
        inputs, seeds = self.space.checked(inputs, seeds)
        if not (np.issubdtype(seeds.dtype, np.integer) and (seeds >= 0).all()):
            raise InputError(f"Expected seeds that are integers >= 0, got dtype {seeds.dtype}. Use uint64.")
        images = np.empty((len(inputs), *self.output_shape), dtype=np.float32)
        for row, seed, image in zip(inputs, seeds, images, strict=True):
            values = {**self._values, **dict(zip(self.space.names, row.tolist(), strict=True))}  # type: ignore[attr-defined]
            # One row at a time: a batched kernel may round differently from a single one.
            with torch.no_grad():
                counts = self._counts(values, torch.float32, None if self.noise == "none" else int(seed))
            image[...] = counts.cpu().numpy()
        return images

    def read_output(self, path: str) -> NDArray[Any]:
        """A micrograph from an MRC file, for `bridge fit`; its pixel size must be the simulator's within 1 %."""
        micrograph = read_micrograph(path)
        if abs(micrograph.pixel_size_angstrom / self.pixel_size_angstrom - 1) > 0.01:
            raise InputError(
                f"Expected a pixel of {self.pixel_size_angstrom:g} angstrom in {path}, got "
                f"{micrograph.pixel_size_angstrom:g}. Set pixel_size_angstrom to that of the micrograph."
            )
        return micrograph.image

    def write_output(self, path: str, output: NDArray[Any]) -> None:
        """A micrograph as MRC, for `bridge fit`."""
        write_micrograph(path, output, self.pixel_size_angstrom)

    def image(self, theta: torch.Tensor) -> torch.Tensor:
        """Expected counts, without noise; in smooth mode differentiable in `theta` (autograd and `torch.func`).

        In hard mode the result is that of the noise-free chain, with its rounding.

        Args:
            theta: (..., d) float32 or float64, in the order of `space`; bounds are not checked.

        Returns:
            (..., rows, columns) in the dtype of `theta`.
        """
        return self._each(theta, lambda values: self._counts(values, theta.dtype, None))

    def electrons(self, theta: torch.Tensor) -> torch.Tensor:
        """Expected electrons of each pixel before the MTF: lambda, the rate of the Poisson process.

        Args:
            theta: (..., d).

        Returns:
            (..., rows, columns), without gain, rounding, saturation and dead pixels.
        """
        return self._each(theta, lambda values: self._rate(values, self._crop(self._wave(values, theta.dtype))))

    def projection(self, values: Mapping[str, float] | None = None) -> Projection:
        """The projected potential in the specimen's frame; built once, shared by `replace`.

        Args:
            values: of the structure's parameters and the tilts, by name; None for the settings.
        """
        key, cache = self._projection_key(values), self._projections  # type: ignore[attr-defined]
        if key in cache:
            return cache[key]
        source, shape = key
        with torch.no_grad():
            built = self._built(dict(zip(self._shaping, shape, strict=True)))  # type: ignore[attr-defined]
        # Where the structure is varied, one may be asked for again at once, but not for long.
        for old in [k for k in cache if k[0] == source][:-_STRUCTURES]:
            cache.pop(old, None)
        cache[key] = built
        return built

    def _projection_key(self, values: Mapping[str, float] | None = None) -> tuple[tuple[Any, ...], tuple[float, ...]]:
        """What a projection depends on: the specimen and its motions, and by how much it has moved."""
        chosen = self._values if values is None else values  # type: ignore[attr-defined]
        return self._source, tuple(float(chosen[name]) for name in self._shaping)  # type: ignore[attr-defined]

    def _built(self, values: Mapping[str, Value]) -> Projection:
        """A projection at values of the structure's parameters and of the tilts, without derivatives."""
        projector = self._projector()
        moved = any(float(value) != 0.0 for value in values.values())
        if isinstance(projector, Projector):
            return projector.build(self._positions(values, CPU).numpy() if moved else None)
        # One way for all values, where they vary.
        moved = moved or any(name in TILTS for name in self.space.names)
        return projector.turned(_tilt(values, CPU)) if moved else projector.build()

    def _projector(self) -> Projector | MapProjector:
        cache, source = self._projectors, self._source  # type: ignore[attr-defined]
        if source not in cache:
            specimen, pixel, hard = cast(Specimen | DensityMap, self.specimen), self.pixel_size_angstrom, source[2]
            cache[source] = (
                MapProjector(specimen, pixel)
                if isinstance(specimen, DensityMap)
                else Projector.of(specimen, pixel, hard_solvent=hard, reach_angstrom=self._reach())
            )
        return cache[source]

    def _make_source(self) -> tuple[Any, ...]:
        motion = self._motion().digest if cast(Deformation, self.deformation).values else ""
        digest = cast(Specimen | DensityMap, self.specimen).digest
        turning = any(name in TILTS for name in self.space.names)
        return digest, self.pixel_size_angstrom, self.mode == "hard", self._reach(), motion, turning

    def _motion(self) -> Motion:
        return cast(Deformation, self.deformation).of(cast(Specimen, self.specimen))

    def _reach(self) -> float:
        """Largest |x| or |y| of an atom within the bounds of the structure's parameters and of the tilts."""
        specimen = cast(Specimen | DensityMap, self.specimen)
        xyz = specimen.corners if isinstance(specimen, DensityMap) else specimen.positions
        largest = {name: max(map(abs, self._extremes(name))) for name in self._shaping}  # type: ignore[attr-defined]
        turned = any(largest[name] for name in TILTS)
        distance = np.linalg.norm(xyz, axis=1) if turned else np.abs(xyz[:, :2]).max(axis=1)
        if cast(Deformation, self.deformation).values:
            distance = distance + self._motion().farthest(largest)
        return float(distance.max())

    def _positions(self, values: Mapping[str, Value], device: torch.device) -> torch.Tensor:
        """The atoms' places (n, 3) float64 after deformation and tilts [angstrom]."""
        return self._motion().positions(values, device) @ _tilt(values, device).T

    def _each(self, theta: torch.Tensor, compute: Callable[[dict[str, Value]], torch.Tensor]) -> torch.Tensor:
        theta = checked_theta(self.space, theta, cast(torch.device, self.device))
        images = []
        for row in theta.reshape(-1, self.space.dimension).unbind(0):
            varied = dict(zip(self.space.names, row.unbind(0), strict=True))
            images.append(compute({**self._values, **varied}))  # type: ignore[attr-defined]
        if not images:
            return theta.new_zeros((*theta.shape[:-1], *self.output_shape))
        return torch.stack(images).reshape(*theta.shape[:-1], *self.output_shape)

    def _settings(self) -> dict[str, float]:
        """Every known parameter's value in the settings."""
        # The constructor has made them of the options.
        microscope, pose = cast(Microscope, self.microscope), cast(Pose, self.pose)
        dose = cast(Detector, self.detector).dose_e_per_angstrom2
        structure = cast(Deformation, self.deformation).values
        table = {**microscope.values(), **asdict(pose), **structure, "dose_e_per_angstrom2": dose}
        return {name: float(value) for name, value in table.items()}

    def _extremes(self, name: str) -> tuple[float, float]:
        """Smallest and largest value of a setting: its bounds if it is an input."""
        if name in self.space.names:
            i = self.space.index(name)
            return float(self.space.lower[i]), float(self.space.upper[i])
        return self._values[name], self._values[name]  # type: ignore[attr-defined]

    def _padded_shape(self) -> tuple[int, int]:
        names = ("defocus_um", "astigmatism_um", "z_angstrom")
        defocus, astigmatism, height = (max(map(abs, self._extremes(name))) for name in names)
        farthest = (defocus + astigmatism) * 1e4 + height
        shape = cast(tuple[int, int], self.shape)
        return padded_shape(
            shape, self.pixel_size_angstrom, self.margin_pixels, self._extremes("voltage_kv")[0], farthest
        )

    def _crop(self, image: torch.Tensor) -> torch.Tensor:
        # The origin is at n // 2 of the padded grid and of the image alike.
        top, left = (p // 2 - n // 2 for p, n in zip(self._padded, self.shape, strict=True))  # type: ignore[attr-defined]
        return image[top : top + self.shape[0], left : left + self.shape[1]]

    def _posed(self, values: Mapping[str, Value], dtype: torch.dtype) -> torch.Tensor:
        """Projected potential on the padded grid: pixel r shows the specimen's point R^{-1} (r - shift)."""
        projection = self._projected(values)
        cosine, sine = cos_sin(values["rotation_deg"])
        step, n = projection.step_angstrom, projection.coefficients.shape[0]
        rows, columns = (
            (torch.arange(size, dtype=dtype, device=self.device) - size // 2) * self.pixel_size_angstrom
            for size in self._padded  # type: ignore[attr-defined]
        )
        x, y = (columns - values["x_angstrom"]) / step, (rows - values["y_angstrom"]) / step
        across = (cosine * x)[None, :] + (sine * y + n // 2)[:, None]
        down = (cosine * y + n // 2)[:, None] - (sine * x)[None, :]
        return projection.sample(across, down)

    def _projected(self, values: Mapping[str, Value]) -> Projection:
        shaping = self._shaping  # type: ignore[attr-defined]
        if self.mode == "smooth" and any(isinstance(values[name], torch.Tensor) for name in shaping):
            projector = self._projector()
            device = cast(torch.device, self.device)
            if isinstance(projector, MapProjector):
                return projector.turned(_tilt(values, device))
            return projector.differentiable(self._positions(values, device))
        return self.projection({name: float(values[name]) for name in shaping})

    def _wave(self, values: Mapping[str, Value], dtype: torch.dtype) -> torch.Tensor:
        """The wave in the image plane, on the padded grid."""
        padded, device = self._padded, cast(torch.device, self.device)  # type: ignore[attr-defined]
        grid = frequencies(padded, float(self.pixel_size_angstrom), dtype, device)
        # The padded grid is periodic: an atom that leaves it must not end in an edge, which would diffract far.
        down, across = (fade(n, size, dtype, device) for n, size in zip(padded, self.shape, strict=True))
        phase = self._posed(values, dtype) * (interaction_constant(values["voltage_kv"]) * down)[:, None] * across
        w = values["amplitude_contrast"]
        # The part w of the contrast is amplitude contrast: arcsin w is the phase of 1 + i w / sqrt(1 - w^2).
        amplitude = torch.exp(phase * (-w / (1 - w * w) ** 0.5))
        wave = torch.complex(amplitude * torch.cos(phase), amplitude * torch.sin(phase))
        spectrum = torch.fft.fft2(wave) * transfer_function(values, grid, smooth=self.mode == "smooth")
        return torch.fft.ifft2(spectrum)

    def _rate(self, values: Mapping[str, Value], wave: torch.Tensor) -> torch.Tensor:
        """Expected electrons of each pixel."""
        intensity = wave.real.square() + wave.imag.square()
        return intensity * (values["dose_e_per_angstrom2"] * self.pixel_size_angstrom**2)

    def _counts(self, values: Mapping[str, Value], dtype: torch.dtype, seed: int | None) -> torch.Tensor:
        camera, device = cast(Detector, self.detector), cast(torch.device, self.device)
        transfer = detection.mtf_filter(camera, self._padded, dtype, device)  # type: ignore[attr-defined]
        wave = self._wave(values, dtype)
        if transfer is None:
            rate = counts = self._rate(values, self._crop(wave))
        else:
            padded = self._rate(values, wave)
            rate, counts = self._crop(padded), self._crop(detection.filtered(padded, transfer))
        if seed is not None:
            noise = detection.noise(rate, camera, seed, self.noise)
            # White noise may be filtered periodically: its correlations are right, and nothing of the signal wraps.
            counts = counts + detection.filtered(noise, detection.mtf_filter(camera, self.output_shape, dtype, device))
        counts = counts * camera.gain
        return detection.read_out(counts, camera) if self.mode == "hard" else counts


def _tilt(values: Mapping[str, Value], device: torch.device) -> torch.Tensor:
    """R_y(y-tilt) R_x(x-tilt), (3, 3) float64."""
    (c, s), (d, t) = (cos_sin(number(values[name], device)) for name in TILTS)
    one, zero = (torch.full((), value, dtype=torch.float64, device=device) for value in (1.0, 0.0))
    rows = ((d, t * s, t * c), (zero, c, -s), (-t, d * s, d * c))
    return torch.stack([torch.as_tensor(v) * one for row in rows for v in row]).reshape(3, 3)


def padded_shape(
    shape: tuple[int, int], pixel_size_angstrom: float, margin: int | None, voltage_kv: float, defocus_angstrom: float
) -> tuple[int, int]:
    """An image's shape with a margin for what the lens displaces.

    Args:
        shape: (rows, columns) of the image.
        pixel_size_angstrom: [angstrom].
        margin: on each side [pixels]; None for what the defocus needs.
        voltage_kv: lowest voltage [kV].
        defocus_angstrom: largest defocus [angstrom].
    """
    if margin is None:
        # A frequency q is displaced by lambda df q: the gradient of chi over 2 pi.
        displaced = wavelength_angstrom(voltage_kv) * defocus_angstrom * 0.5 / pixel_size_angstrom
        reach = min(math.ceil(displaced / pixel_size_angstrom), max(shape) // 2)
        # Beyond that come the ringing of the band limit, whose edge is a twentieth of a cycle a pixel wide, and
        # the diffraction fringe of the shadow's own edge. 12 pixels leave less than 1 % of the contrast.
        margin = reach + 12
    rows, columns = (scipy.fft.next_fast_len(n + 2 * margin, real=True) for n in shape)
    return rows, columns


@lru_cache(maxsize=32)
def fade(padded: int, size: int, dtype: torch.dtype, device: torch.device = CPU) -> torch.Tensor:
    """1, but a rise from 0 over the outermost pixels on both sides: eight, or all of the margin if that is less."""
    width = min(8, padded // 2 - size // 2, padded - size - (padded // 2 - size // 2))
    rise = torch.sin(0.5 * math.pi * (torch.arange(width, dtype=torch.float64) + 0.5) / max(width, 1)).square()
    return torch.cat((rise, torch.ones(padded - 2 * width, dtype=torch.float64), rise.flip(0))).to(device, dtype)


def checked_shape(shape: Sequence[int]) -> tuple[int, int]:
    good = isinstance(shape, Sequence) and not isinstance(shape, str) and len(shape) == 2
    if not good or not all(isinstance(n, int | np.integer) and 8 <= n <= 16384 for n in shape):
        raise InputError(f"Expected shape (rows, columns), two integers in [8, 16384], got {shape!r}. Correct it.")
    return int(shape[0]), int(shape[1])


def made(kind: Any, options: Any, name: str) -> Any:
    """An instance of a settings class from itself or from a mapping of its fields."""
    if isinstance(options, kind):
        return options
    if not isinstance(options, Mapping):
        raise InputError(f"Expected {name} as a {kind.__name__} or a table, got {type(options).__name__}.")
    known = [item.name for item in fields(kind)]
    for key in options:
        if key not in known:
            raise InputError(f"Unknown key {key!r} of {name}. Known keys: {', '.join(known)}.")
    return kind(**options)
