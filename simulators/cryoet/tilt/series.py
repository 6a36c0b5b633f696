"""`TiltSeries`: parameters -> the images of a tilt series of several particles in ice.

Frames: the specimen's (x, y, z) has its origin in the middle of the slab, z along its normal. Image t shows

    r = R_t p + shift_t,    R_t = R_z(axis) R_y(tilt_t + pre-tilt) R_x(x-tilt),

with the origin at pixel (H // 2, W // 2), +x to the right (larger column), +y to larger rows, and the beam along z;
height adds to the underfocus. A particle's angles are RELION's: its orientation is the inverse of R_z(rot) R_y(tilt)
R_z(psi).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bridge.errors import InputError
from bridge.simulator.protocol import BlockStructure
from bridge.simulator.space import ParameterSpace
from simulators.cryoet.device import checked_device, checked_theta
from simulators.cryoet.formats.micrographs import read_stack, write_stack
from simulators.cryoet.microscope import detector as detection
from simulators.cryoet.microscope.detector import Detector
from simulators.cryoet.microscope.optics import Microscope, Value, check_range, frequencies, transfer_function, unfolded
from simulators.cryoet.microscope.physics import interaction_constant, wavelength_angstrom
from simulators.cryoet.simulator import Mode, Noise, checked_shape, fade, made, padded_shape
from simulators.cryoet.specimen.deformation import Deformation
from simulators.cryoet.specimen.volume import Volume, projected, slice_frequencies
from simulators.cryoet.tilt.parameters import (
    IMAGE,
    LENS,
    PARTICLE,
    SERIES,
    Particle,
    about_x,
    about_y,
    about_z,
    make_series_space,
    split_name,
)
from simulators.cryoet.tilt.particle_volumes import ParticleVolumes
from simulators.cryoet.tilt.scheme import TiltScheme, damage, transmission


class _Row(NamedTuple):
    """One parameter vector: settings by name, 0-d tensors; each particle's volume; whether derivatives are wanted."""

    values: dict[str, torch.Tensor]
    volumes: list[Volume]
    differentiable: bool


@dataclass(frozen=True, eq=False)
class TiltSeries:
    r"""A tilt series: several particles in a slab of ice, image by image, in detector counts.

    The electrons meet the particles from the highest to the lowest, each a phase object psi <- psi exp(i sigma v - mu)
    with v its projection in this direction, and the wave travels on between them, and to the middle of the slab; then
    lens, whose envelopes are those of the middle's defocus, aperture, and

        lambda_t = |psi|^2 dose_t pixel^2 exp(-thickness / (Lambda cos theta_t)),

    cos theta_t = (R_t)_zz. With `radiation_damage`, v~(q) is weighted by exp(-N_t / (2 N_e(q))) with N_t the exposure
    in the middle of image t (Grant & Grigorieff 2015).

    Args:
        particles: `Particle`s or tables of their fields.
        scheme: a `TiltScheme` or a table, {"dose_symmetric": [60, 3]}.
        shape: (rows, columns) of an image.
        pixel_size_angstrom: [angstrom].
        microscope: a `Microscope` or a table of its settings.
        detector: a `Detector` or a table; its dose is that of one image.
        parameters: names of the inputs: of settings ("defocus_um", "tilt_axis_deg", ...), of one image's
            ("shift_x_angstrom[0]", "defocus_um[0]", ...: `defocus_um` is then that of the others) and of one particle's
            ("x_angstrom[0]", "particle_rot_deg[0]", ...), and of `deformation` ("mode_angstrom[0]", "domain_deg[0]").
            All but the last: `SERIES_PARAMETER_NAMES`.
        bounds: (lower, upper) of some of the parameters.
        natural_scale: of some of the parameters, see `CryoET`.
        mode: "hard" or "smooth", see `CryoET`.
        noise: "none", "poisson" or "full"; an image's noise depends on the seed and its own parameters only. Without
            noise the hard mode rounds expected counts, of which a few tens a pixel hold a contrast below one: give the
            detector a `gain` (1000, bits=None) where derivatives are wanted of it.
        tilt_axis_deg, x_tilt_deg, pre_tilt_deg, thickness_angstrom, mean_free_path_angstrom: the geometry where it is
            not varied.
        shifts_angstrom: (images, 2) shifts x, y; None for none.
        radiation_damage: weight the signal by the exposure.
        margin_pixels: see `CryoET`.
        deformation: a `Deformation` or a table of its settings: how the structure may deform, the same in all images.
        deformed: numbers of the particles that deform, all alike; None for all. They are of one specimen.
        device: see `CryoET`.

    Raises:
        InputError: a setting that is unknown, out of range or of the wrong shape.

    Reference:
        Vulovic et al. (2013), J. Struct. Biol. 183, 19; Zivanov et al. (2022), eLife 11, e83724, for the angles.
    """

    particles: Sequence[Particle | Mapping[str, Any]] = field(default_factory=lambda: (Particle(),))
    scheme: TiltScheme | Mapping[str, Any] = field(default_factory=lambda: TiltScheme.dose_symmetric(60.0, 3.0))
    shape: Sequence[int] = (128, 128)
    pixel_size_angstrom: float = 8.0
    microscope: Microscope | Mapping[str, Any] = field(default_factory=lambda: Microscope(defocus_um=3.0))
    detector: Detector | Mapping[str, Any] = field(default_factory=lambda: Detector(dose_e_per_angstrom2=3.0))
    parameters: Sequence[str] = ("defocus_um", "tilt_axis_deg")
    bounds: Mapping[str, Sequence[float]] | None = None
    natural_scale: Mapping[str, float] | None = None
    mode: Mode = "hard"
    noise: Noise = "none"
    tilt_axis_deg: float = 0.0
    x_tilt_deg: float = 0.0
    pre_tilt_deg: float = 0.0
    thickness_angstrom: float = 1000.0
    mean_free_path_angstrom: float = 3150.0
    shifts_angstrom: Sequence[Sequence[float]] | None = None
    radiation_damage: bool = True
    margin_pixels: int | None = None
    deformation: Deformation | Mapping[str, Any] = field(default_factory=Deformation)
    deformed: Sequence[int] | None = None
    device: str | torch.device = "cpu"

    output_suffix: ClassVar[str] = ".mrc"

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "shape", checked_shape(self.shape))
        put(self, "device", checked_device("TiltSeries", self.device))
        check_range("TiltSeries", "pixel_size_angstrom", self.pixel_size_angstrom, 0.1, 100.0)
        if not self.particles or isinstance(self.particles, Mapping):
            raise InputError(f"Expected particles as a list with at least one, got {self.particles!r}.")
        put(self, "particles", tuple(made(Particle, p, "particles") for p in self.particles))
        put(self, "scheme", TiltScheme.from_options(self.scheme))
        put(self, "microscope", made(Microscope, self.microscope, "microscope"))
        put(self, "detector", made(Detector, self.detector, "detector"))
        put(self, "deformation", made(Deformation, self.deformation, "deformation"))
        numbers = tuple(range(len(self.particles)))
        chosen = numbers if self.deformed is None else tuple(self.deformed)
        if not chosen or not set(chosen) <= set(numbers):
            raise InputError(f"Expected deformed as numbers of particles, 0 to {numbers[-1]}, got {self.deformed!r}.")
        put(self, "deformed", chosen)
        for name, known in (("mode", ("hard", "smooth")), ("noise", ("none", "poisson", "full"))):
            if getattr(self, name) not in known:
                raise InputError(f"Unknown {name}={getattr(self, name)!r}. Known: {', '.join(known)}.")
        for name, p in SERIES.items():
            check_range("TiltSeries", name, getattr(self, name), p.lower, p.upper)
        if isinstance(self.parameters, str):
            raise InputError(f"Expected a list of parameter names, got the text {self.parameters!r}. Use a list.")
        put(self, "parameters", tuple(self.parameters))
        if self.margin_pixels is not None:
            check_range("TiltSeries", "margin_pixels", self.margin_pixels, 0, 4096)
        put(self, "_values", self._settings())
        sizes = dict(shape=self.shape, pixel=self.pixel_size_angstrom, natural_scale=self.natural_scale)
        space = make_series_space(self.parameters, self.bounds, self._values, **sizes)  # type: ignore[attr-defined]
        put(self, "_space", space)
        put(self, "_padded", self._padded_shape())
        put(self, "_volumes", self._make_volumes())
        self._check_tilt()

    @property
    def identity_parts(self) -> dict[str, Any]:
        """What images depend on; of the bounds the margin, and the room for structures that move."""
        names = ("particles", "scheme", "shape", "pixel_size_angstrom", "microscope", "detector", "parameters", "mode")
        names = (*names, "noise", "radiation_damage", "deformation", "deformed", "_values", "_padded")
        return {name: getattr(self, name) for name in names} | {"room": self._volumes.largest}  # type: ignore[attr-defined]

    @property
    def space(self) -> ParameterSpace:
        """Names, units, bounds and natural scales of the inputs."""
        return self._space  # type: ignore[attr-defined]

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(images, rows, columns)."""
        return (len(cast(TiltScheme, self.scheme)), *cast(tuple[int, int], self.shape))

    @property
    def reference(self) -> NDArray[np.float64]:
        """The inputs that reproduce the settings given to the constructor (d,) float64."""
        return np.array([self._values[n] for n in self.space.names])  # type: ignore[attr-defined]

    @property
    def structure(self) -> BlockStructure | None:
        """Which images each parameter touches; None where every parameter touches all."""
        blocks = []
        for name in self.space.names:
            stem, index = split_name(name)
            # An image's dose damages what is taken after it.
            single = stem in IMAGE and not (stem == "dose_e_per_angstrom2" and self.radiation_damage)
            blocks.append(index if single and index is not None else -1)
        if all(b == -1 for b in blocks):
            return None
        return BlockStructure(blocks, np.arange(self.output_shape[0]))

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        """Detector counts of k parameter vectors, with noise as `noise` says.

        Args:
            inputs: (k, d) float64.
            seeds: (k,) of the noise.

        Returns:
            (k, images, rows, columns) float32. Row i depends on inputs[i] and seeds[i] alone, to the last bit.

        Raises:
            InputError: wrong shape, not finite, or outside the bounds.
        """
        inputs, seeds = self.space.checked(inputs, seeds)
        outputs = np.empty((len(inputs), *self.output_shape), dtype=np.float32)
        for row, seed, output in zip(inputs, seeds, outputs, strict=True):
            with torch.no_grad():
                settings = self._row(torch.from_numpy(row.astype(np.float32)).to(self.device), differentiable=False)
                for t in range(len(output)):
                    noise_seed = None if self.noise == "none" else _image_seed(int(seed), t)
                    output[t] = self._counts(settings, t, noise_seed).cpu().numpy()
        return outputs

    def image(self, theta: torch.Tensor) -> torch.Tensor:
        """Expected counts, without noise; in smooth mode differentiable in `theta` (autograd and `torch.func`).

        Args:
            theta: (..., d) float32 or float64, in the order of `space`; bounds are not checked.

        Returns:
            (..., images, rows, columns) in the dtype of `theta`.
        """
        return self._each(theta, lambda row, t: self._counts(row, t, None))

    def electrons(self, theta: torch.Tensor) -> torch.Tensor:
        """Expected electrons of each pixel before the MTF, as `image`: the rate of the Poisson process."""
        return self._each(theta, lambda row, t: self._crop(self._rate(row.values, t, self._wave(row, t))))

    def read_output(self, path: str) -> NDArray[Any]:
        """A stack from an MRC file; its pixel size must be the simulator's within 1 %."""
        stack = read_stack(path)
        if abs(stack.pixel_size_angstrom / self.pixel_size_angstrom - 1) > 0.01:
            raise InputError(
                f"Expected a pixel of {self.pixel_size_angstrom:g} angstrom in {path}, got "
                f"{stack.pixel_size_angstrom:g}. Set pixel_size_angstrom to that of the series."
            )
        return stack.images

    def write_output(self, path: str, output: NDArray[Any]) -> None:
        """A stack as MRC."""
        write_stack(path, output, self.pixel_size_angstrom)

    def volume(self, particle: int) -> Volume:
        """The potential of a particle in the settings' structure; built once, and shared by particles alike."""
        volumes = self._volumes.of(self._values, differentiable=False)  # type: ignore[attr-defined]
        return cast(Volume, volumes[particle])

    def rotation(self, values: Mapping[str, torch.Tensor], image: int) -> torch.Tensor:
        """R_t (3, 3), from the specimen's frame to the image's; `values` by name, tensors of one dtype."""
        tilt = values[f"tilt_deg[{image}]"] + values["pre_tilt_deg"]
        return about_z(values["tilt_axis_deg"]) @ about_y(tilt) @ about_x(values["x_tilt_deg"])

    @property
    def nominal_deg(self) -> tuple[float, ...]:
        """The scheme's tilt of each image [degree]."""
        return cast(TiltScheme, self.scheme).angles_deg

    def settings(self, parameters: ArrayLike) -> dict[str, float]:
        """Every setting by parameter name at a parameter vector (d,); what one image may have of its own for each."""
        vector = torch.from_numpy(self.space.vector(parameters))
        return {name: float(value) for name, value in self._tensors(vector).items()}

    # --- settings -------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, float]:
        """Every setting by parameter name; what one image may have of its own is there for each."""
        microscope, camera = cast(Microscope, self.microscope), cast(Detector, self.detector)
        scheme = cast(TiltScheme, self.scheme)
        values = {**microscope.values(), **{name: getattr(self, name) for name in SERIES}}
        values["dose_e_per_angstrom2"] = camera.dose_e_per_angstrom2
        values |= cast(Deformation, self.deformation).values
        shifts = np.zeros((len(scheme), 2)) if self.shifts_angstrom is None else np.asarray(self.shifts_angstrom, float)
        if shifts.shape != (len(scheme), 2) or not np.isfinite(shifts).all():
            raise InputError(f"Expected shifts_angstrom of shape ({len(scheme)}, 2), finite, got {shifts.shape}.")
        for t, angle in enumerate(scheme.angles_deg):
            values |= {f"tilt_deg[{t}]": angle, f"defocus_um[{t}]": microscope.defocus_um}
            values |= {f"shift_x_angstrom[{t}]": shifts[t, 0], f"shift_y_angstrom[{t}]": shifts[t, 1]}
            values[f"dose_e_per_angstrom2[{t}]"] = camera.dose_e_per_angstrom2
        for i, particle in enumerate(cast(Sequence[Particle], self.particles)):
            for name in PARTICLE:
                values[f"{name}[{i}]"] = getattr(particle, name.removeprefix("particle_"))
        return {name: float(value) for name, value in values.items()}

    def _extremes(self, name: str) -> list[float]:
        """The smallest and largest value of a setting, each image's or particle's included."""
        space, values = self.space, self._values  # type: ignore[attr-defined]
        found = [value for other, value in values.items() if split_name(other)[0] == name]
        for p in space.parameters:
            if split_name(p.name)[0] == name:
                found += [p.lower, p.upper]
        return [min(found), max(found)]

    def _make_volumes(self) -> ParticleVolumes:
        bending = cast(Deformation, self.deformation)
        ends = {p.name: (p.lower, p.upper) for p in self.space.parameters}
        return ParticleVolumes(
            cast(Sequence[Particle], self.particles),
            float(self.pixel_size_angstrom),
            self.mode == "hard",
            bending,
            cast(tuple[int, ...], self.deformed),
            {name: max(map(abs, ends.get(name, (value,)))) for name, value in bending.values.items()},
            cast(torch.device, self.device),
        )

    def _padded_shape(self) -> tuple[int, int]:
        defocus, astigmatism = (max(map(abs, self._extremes(n))) for n in ("defocus_um", "astigmatism_um"))
        places = [(p.x_angstrom, p.y_angstrom, p.z_angstrom) for p in cast(Sequence[Particle], self.particles)]
        # Turned, a particle may come to be as high as it is far away.
        farthest = (defocus + astigmatism) * 1e4 + max(math.hypot(*place) for place in places)
        shape = cast(tuple[int, int], self.shape)
        return padded_shape(
            shape, self.pixel_size_angstrom, self.margin_pixels, self._extremes("voltage_kv")[0], farthest
        )

    def _check_tilt(self) -> None:
        """A slab that is seen edge-on, or from behind, has no image."""
        tilt = max(abs(a + b) for a in self._extremes("tilt_deg") for b in self._extremes("pre_tilt_deg"))
        own = self._values  # type: ignore[attr-defined]
        angles = [own[f"tilt_deg[{t}]"] + own["pre_tilt_deg"] for t in range(self.output_shape[0])]
        if max(map(abs, angles)) > 85.0:
            raise InputError(f"Expected tilts, with the pre-tilt, within 85 degrees, got {max(map(abs, angles)):g}.")
        if tilt > 85.0 and any(split_name(n)[0] in ("tilt_deg", "pre_tilt_deg") for n in self.space.names):
            raise InputError(
                f"Expected bounds of tilt_deg and pre_tilt_deg that keep their sum within 85 degrees, got {tilt:g}. "
                "Narrow bounds."
            )

    def _tensors(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """All settings as 0-d tensors, with the inputs in their places (differentiable in them)."""
        varied = dict(zip(self.space.names, row.unbind(0), strict=True))
        settings = self._values  # type: ignore[attr-defined]
        fixed = torch.from_numpy(np.array(list(settings.values()))).to(row.device, row.dtype).unbind(0)
        values = dict(zip(settings, fixed, strict=True)) | varied
        for name in ("defocus_um", "dose_e_per_angstrom2"):
            if name in varied:
                # The common value is that of every image that has none of its own.
                for t in range(self.output_shape[0]):
                    if f"{name}[{t}]" not in varied:
                        values[f"{name}[{t}]"] = varied[name]
        return values

    def _row(self, row: torch.Tensor, *, differentiable: bool) -> _Row:
        values = self._tensors(row)
        # The hard mode's thresholds have no derivative, nor has a structure that is not varied.
        varied = self.mode == "smooth" and any(
            n in cast(Deformation, self.deformation).values for n in self.space.names
        )
        volumes = self._volumes.of(values, differentiable=differentiable and varied)  # type: ignore[attr-defined]
        return _Row(values, volumes, differentiable)

    def _each(self, theta: torch.Tensor, compute: Callable[[_Row, int], torch.Tensor]) -> torch.Tensor:
        theta = checked_theta(self.space, theta, cast(torch.device, self.device))
        series = []
        for vector in theta.reshape(-1, self.space.dimension).unbind(0):
            row = self._row(vector, differentiable=True)
            series.append(torch.stack([compute(row, t) for t in range(self.output_shape[0])]))
        if not series:
            return theta.new_zeros((*theta.shape[:-1], *self.output_shape))
        return torch.stack(series).reshape(*theta.shape[:-1], *self.output_shape)

    # --- one image ------------------------------------------------------------------------------------------------

    def _exposure(self, values: Mapping[str, torch.Tensor], image: int) -> torch.Tensor:
        """What the specimen has seen in the middle of an image [e/angstrom^2]."""
        doses = [values[f"dose_e_per_angstrom2[{t}]"] for t in cast(TiltScheme, self.scheme).earlier(image)]
        return 0.5 * values[f"dose_e_per_angstrom2[{image}]"] + sum(doses)

    def _projected(
        self, row: _Row, image: int, particle: int, turn: torch.Tensor, at: torch.Tensor
    ) -> tuple[torch.Tensor, int, int]:
        """A particle's projection in its box [V angstrom], and the box's first row and column in the padded grid.

        `at` is the particle's place in the image [angstrom].
        """
        values, volume = row.values, row.volumes[particle]
        angles = [values[f"particle_{name}_deg[{particle}]"] for name in ("rot", "tilt", "psi")]
        own = (about_z(angles[0]) @ about_y(angles[1]) @ about_z(angles[2])).T
        grid = slice_frequencies(volume.box, turn.dtype, turn.device)
        padded = self._padded  # type: ignore[attr-defined]
        pixels = at[:2] / self.pixel_size_angstrom
        whole = pixels.detach().round()
        part = pixels - whole
        # A shift by less than a pixel, in Fourier space; by whole pixels when the box is put into the image.
        phase = (-2 * math.pi) * (grid.fx * part[0] + grid.fy * part[1])
        weight = torch.complex(torch.cos(phase), torch.sin(phase))
        if self.radiation_damage:
            q2 = (grid.fx**2 + grid.fy**2) / self.pixel_size_angstrom**2
            voltage = float(self._values["voltage_kv"])  # type: ignore[attr-defined]
            weight = weight * damage(q2, self._exposure(values, image), voltage)
        # Images that are moved, or seen through another lens, show the same projections.
        most = 2 * self.output_shape[0] * len(self.particles)
        spectrum = volume.slice(turn @ own) if row.differentiable else volume.kept_slice(turn @ own, most)
        box = projected(spectrum * weight, volume.box)
        # What rings at the box's edges fades out at fixed distances from the particle, wherever pixels begin.
        across, down = (_window(volume.box, offset) for offset in part.unbind(0))
        first_column, first_row = (
            int(place) + size // 2 - volume.box // 2
            for place, size in zip(whole.cpu().tolist(), padded[::-1], strict=True)
        )
        return box * down[:, None] * across, first_row, first_column

    def _wave(self, row: _Row, image: int) -> torch.Tensor:
        """The wave in the image plane, on the padded grid.

        Kept is the scattered part s of psi = 1 + s: a phase object 1 + t makes s + t (1 + s) of it, which differs from
        s in the particle's box alone, and the unscattered beam passes ice and lens as it is.
        """
        values = row.values
        turn = self.rotation(values, image)
        dtype, device = turn.dtype, turn.device
        padded = self._padded  # type: ignore[attr-defined]
        grid = frequencies(padded, float(self.pixel_size_angstrom), dtype, device)
        down, across = (fade(p, n, dtype, device) for p, n in zip(padded, self.shape, strict=True))
        sigma = interaction_constant(values["voltage_kv"])
        height = turn.new_zeros(())
        shift = torch.stack((values[f"shift_x_angstrom[{image}]"], values[f"shift_y_angstrom[{image}]"], height))
        places = []
        for i in range(len(self.particles)):
            own = torch.stack([values[f"{name}[{i}]"] for name in ("x_angstrom", "y_angstrom", "z_angstrom")])
            places.append(turn @ own + shift)
        w = values["amplitude_contrast"]
        loss = w / (1 - w * w) ** 0.5
        # The phase of a free electron's wave on its way by dz: pi lambda dz q^2, as for the defocus.
        drift = (math.pi * wavelength_angstrom(values["voltage_kv"])) * grid.quadrant.q2
        spectrum: torch.Tensor | None = None
        for i in sorted(range(len(places)), key=lambda i: -float(places[i][2].detach())):
            box, top, left = self._projected(row, image, i, turn, places[i])
            rows = slice(max(top, 0), min(top + len(box), padded[0]))
            columns = slice(max(left, 0), min(left + len(box), padded[1]))
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue  # outside the image and its margin
            seen = box[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            phase = seen * sigma * down[rows, None] * across[columns]
            amplitude = torch.exp(-loss * phase)
            thin = torch.complex(amplitude * torch.cos(phase) - 1, amplitude * torch.sin(phase))
            if spectrum is None:
                spectrum = _box_spectrum(thin, rows, columns, padded)
            else:
                spectrum = spectrum * _propagator(drift * (height - places[i][2]), padded)
                # Only what meets the particle is transformed back.
                met = torch.fft.ifft(torch.fft.ifft(spectrum, dim=0)[rows], dim=1)[:, columns]
                spectrum = spectrum + _box_spectrum(thin * (1 + met), rows, columns, padded)
            height = places[i][2]
        lens: dict[str, Value] = {name: values[name] for name in LENS}
        for name in ("astigmatism_um", "phase_shift_deg", "convergence_mrad", "aperture_um"):
            # A plain zero lets the lens skip what it would multiply by one.
            if name not in self.space.names and self._values[name] == 0.0:  # type: ignore[attr-defined]
                lens[name] = 0.0
        lens["defocus_um"] = values[f"defocus_um[{image}]"]
        transfer = transfer_function(lens, grid, smooth=self.mode == "smooth")
        if spectrum is None:
            return transfer[0, 0].expand(padded)
        # The lens sees the plane in the middle of the slab, whatever is there.
        spectrum = spectrum * _propagator(drift * height, padded)
        return transfer[0, 0] + torch.fft.ifft2(spectrum * transfer)

    def _rate(self, values: Mapping[str, torch.Tensor], image: int, wave: torch.Tensor) -> torch.Tensor:
        """Expected electrons of each pixel."""
        left = transmission(
            values["thickness_angstrom"], values["mean_free_path_angstrom"], self.rotation(values, image)[2, 2]
        )
        dose = values[f"dose_e_per_angstrom2[{image}]"] * self.pixel_size_angstrom**2
        return (wave.real.square() + wave.imag.square()) * (dose * left)

    def _crop(self, image: torch.Tensor) -> torch.Tensor:
        top, left = (p // 2 - n // 2 for p, n in zip(self._padded, self.shape, strict=True))  # type: ignore[attr-defined]
        return image[top : top + self.shape[0], left : left + self.shape[1]]

    def _counts(self, row: _Row, image: int, seed: int | None) -> torch.Tensor:
        camera = cast(Detector, self.detector)
        padded = self._rate(row.values, image, self._wave(row, image))
        kind = padded.dtype, padded.device
        transfer = detection.mtf_filter(camera, self._padded, *kind)  # type: ignore[attr-defined]
        counts = self._crop(detection.filtered(padded, transfer))
        if seed is not None:
            noise = detection.noise(self._crop(padded), camera, seed, self.noise)
            own = detection.mtf_filter(camera, self.output_shape[1:], *kind)
            counts = counts + detection.filtered(noise, own)
        counts = counts * camera.gain
        return detection.read_out(counts, camera) if self.mode == "hard" else counts


def _box_spectrum(box: torch.Tensor, rows: slice, columns: slice, padded: tuple[int, int]) -> torch.Tensor:
    """The Fourier transform of what is nought outside a box; lines without any of it are not transformed."""
    lines = torch.fft.fft(torch.nn.functional.pad(box, (columns.start, padded[1] - columns.stop)), dim=1)
    return torch.fft.fft(torch.nn.functional.pad(lines, (0, 0, rows.start, padded[0] - rows.stop)), dim=0)


def _propagator(way: torch.Tensor, padded: tuple[int, int]) -> torch.Tensor:
    """exp(i way) of a phase given for a quadrant of frequencies, for all of them."""
    return unfolded(torch.complex(torch.cos(way), torch.sin(way)), padded)


def _window(size: int, offset: torch.Tensor) -> torch.Tensor:
    """1 around the middle of a box, and 0 from one pixel before its edges on; six pixels wide, half a cosine."""
    distance = (torch.arange(size, dtype=offset.dtype, device=offset.device) - size // 2 - offset).abs()
    ramp = ((0.5 * size - 1 - distance) / 6).clamp(0, 1)
    return torch.sin(0.5 * math.pi * ramp).square()


def _image_seed(seed: int, image: int) -> int:
    """A seed of the image's own: its noise does not change with the other images."""
    return int(np.random.SeedSequence((seed, image)).generate_state(1, np.uint64)[0])
