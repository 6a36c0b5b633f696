"""`TEMSim`: TEM-simulator v1.3's model of a micrograph of one particle, without the program.

atoms -> maps of voxels -> projection -> pixels -> phase and loss -> lens, inelastic blur -> ice -> counts, MTF, gain

The program's conventions: the sample's centre is the detector's; +x is a larger column, +y a larger row; z adds to
the underfocus, in steps of a slice; counts are electrons times gain; protein is dark at underfocus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.simulator.space import Parameter, ParameterSpace
from simulators.cryoet.device import CPU, checked_device
from simulators.cryoet.formats.micrographs import read_micrograph, write_micrograph
from simulators.cryoet.microscope.detector import drawn, poisson_quantile
from simulators.cryoet.microscope.optics import check_range
from simulators.cryoet.microscope.physics import interaction_constant
from simulators.cryoet.parameters import line
from simulators.cryoet.simulator import checked_shape, made
from simulators.cryoet.specimen.specimen import Specimen
from simulators.cryoet.temsim.optics import Grid, Optics, Sample, Scattering, Thickness, lens, slice_of
from simulators.cryoet.temsim.potential import Maps, Projected, on_pixels, read_structure, rotation


@dataclass(frozen=True)
class Placement:
    """Where the particle is: the centre of its box of voxels.

    Args:
        x_nm, y_nm, z_nm: place [nm].
        phi_deg, theta_deg, psi_deg: orientation R_z(psi) R_x(theta) R_z(phi) [degree].
    """

    x_nm: float = 0.0
    y_nm: float = 0.0
    z_nm: float = 0.0
    phi_deg: float = 0.0
    theta_deg: float = 0.0
    psi_deg: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            check_range("Placement", item.name, getattr(self, item.name), -1e6, 1e6)


@dataclass(frozen=True)
class Camera:
    """A detector with a scintillator.

    MTF(xi) = (a P_p(1 + alpha xi^2) + b P_q(1 + beta xi^2) + c) / (a + b + c), P_n(s) = 2^n / (2 s^n + 2^n - 2), xi in
    cycles a pixel; it acts on signal and noise.

    Args:
        dose_e_per_nm2: exposure.
        gain: counts an electron.
        dqe: the variance of a pixel's electrons is their mean over it, before the MTF.
        mtf_a, mtf_b, mtf_c, mtf_alpha, mtf_beta, mtf_p, mtf_q: of the MTF.
        padding: pixels on each side within which images are computed; they are periodic.
    """

    dose_e_per_nm2: float = 6000.0
    gain: float = 10.0
    dqe: float = 0.4
    mtf_a: float = 0.7
    mtf_b: float = 0.2
    mtf_c: float = 0.1
    mtf_alpha: float = 10.0
    mtf_beta: float = 40.0
    mtf_p: float = 1.0
    mtf_q: float = 1.0
    padding: int = 20

    def __post_init__(self) -> None:
        limits = {"dqe": (0.01, 1.0), "mtf_a": (0.0, 1.0), "mtf_b": (0.0, 1.0), "mtf_c": (0.0, 1.0)}
        limits |= {"mtf_p": (0.01, 10.0), "mtf_q": (0.01, 10.0), "padding": (0, 1000)}
        for item in fields(self):
            check_range("Camera", item.name, getattr(self, item.name), *limits.get(item.name, (0.0, 1e6)))
        if not self.mtf_a + self.mtf_b + self.mtf_c > 0:
            raise InputError("Expected mtf_a + mtf_b + mtf_c > 0, got 0. Set mtf_c=1 for a perfect detector.")

    def mtf(self, shape: tuple[int, int], device: torch.device = CPU) -> torch.Tensor:
        """Of images of that shape, in the order of `torch.fft.rfft2`: (rows, columns // 2 + 1) float32."""
        return _mtf(self, shape, device)


@lru_cache(maxsize=16)
def _mtf(camera: Camera, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """In the order of `torch.fft.rfft2`."""
    xi2 = np.fft.fftfreq(shape[0])[:, None] ** 2 + np.fft.rfftfreq(shape[1]) ** 2

    def part(slope: float, n: float) -> Array:
        return 2**n / (2 * (1 + slope * xi2) ** n + 2**n - 2)

    total = camera.mtf_a * part(camera.mtf_alpha, camera.mtf_p) + camera.mtf_b * part(camera.mtf_beta, camera.mtf_q)
    values = (total + camera.mtf_c) / (camera.mtf_a + camera.mtf_b + camera.mtf_c)
    return torch.from_numpy(values).to(device, torch.float32)


_KNOWN = {
    p.name: p
    for p in (
        line("voltage_kv", "kV", 1.0, 1000.0, 20.0, "accelerating voltage"),
        line("focal_length_mm", "mm", 0.1, 100.0, 0.3, "focal length; acts in steps", "staircase"),
        line("x_nm", "nm", -1e4, 1e4, 0.5, "particle's place to the right (larger column)"),
        line("y_nm", "nm", -1e4, 1e4, 0.5, "particle's place downwards (larger row)"),
        line("z_nm", "nm", -1e4, 1e4, 50.0, "particle's height; adds to the defocus, in steps", "staircase"),
        line("defocus_um", "um", -20.0, 20.0, 0.1, "defocus, positive is underfocus"),
        line("aperture_um", "um", 1.0, 1000.0, 5.0, "diameter of the objective aperture; acts in steps", "staircase"),
        line("cs_mm", "mm", -10.0, 10.0, 0.3, "spherical aberration"),
        line("cc_mm", "mm", -10.0, 10.0, 0.3, "chromatic aberration"),
        line("energy_spread_ev", "eV", 0.0, 100.0, 0.3, "spread of the beam's energy"),
        line("cond_ap_angle_mrad", "mrad", 0.0, 10.0, 0.02, "aperture angle of the condenser"),
        line("dose_e_per_nm2", "e/nm^2", 0.0, 1e6, 200.0, "exposure"),
        line("thickness_center_nm", "nm", 0.0, 1e3, 10.0, "thickness of the ice in the middle"),
        line("thickness_edge_nm", "nm", 0.0, 1e3, 10.0, "thickness of the ice at the edge of the hole"),
    )
}
TEMSIM_PARAMETER_NAMES = tuple(_KNOWN)


@dataclass(frozen=True, eq=False)
class TEMSim:
    r"""A micrograph of one particle in ice by TEM-simulator v1.3's model; a `bridge.Simulator`.

    The wave exp(i phase - loss) of the particle's projection goes through the lens; what it loses,
    1 - exp(-2 loss), is added to the intensity with the angular distribution of carbon's cross-sections. Ice takes
    electrons away by their angle. The images are the program's, in any orientation, to 0.002 % of the contrast (rms),
    which is the rounding of its files; the noise has the same distribution, but not the same numbers.

    Not in it: tilts, several particles, `use_defocus_corr`, `famp`, errors of alignment, several detectors.

    Args:
        particle: a PDB or mmCIF file, see `read_structure`; or a `Specimen`, whose hydrogens are its own.
        transforms: file of copies, see `read_structure`.
        add_hydrogen: of a file's residues.
        voxel_size_nm: of the maps.
        shape: (rows, columns).
        pixel_size_nm: in the specimen.
        optics, sample, camera, placement: settings, or tables of them.
        parameters: names of the d inputs, in order; the other settings keep the values given here.
        bounds: (lower, upper) of some parameters.
        natural_scale: of some parameters.
        noise: "none", "poisson" (electrons are counted) or "full" (and the DQE adds to their variance).
        device: where waves, images and counts are computed, see `CryoET`; projections and the tables of lens and
            scattering are made by the processor for each parameter vector, and copied.
        model, unknown_atoms: of a file, see `Specimen.from_file`.

    Raises:
        InputError: a setting that is unknown or out of range, or a structure that cannot be read.

    Reference:
        Rullgard, Ofverstedt, Masich, Daneholt & Oktem (2011), J. Microsc. 243, 234.
    """

    particle: Specimen | str | Path
    transforms: str | Path | None = None
    add_hydrogen: bool = True
    voxel_size_nm: float = 0.1
    shape: Sequence[int] = (400, 400)
    pixel_size_nm: float = 0.5
    optics: Optics | Mapping[str, Any] = field(default_factory=Optics)
    sample: Sample | Mapping[str, Any] = field(default_factory=Sample)
    camera: Camera | Mapping[str, Any] = field(default_factory=Camera)
    placement: Placement | Mapping[str, Any] = field(default_factory=Placement)
    parameters: Sequence[str] = ("voltage_kv", "focal_length_mm", "x_nm", "y_nm")
    bounds: Mapping[str, Sequence[float]] | None = None
    natural_scale: Mapping[str, float] | None = None
    noise: Literal["none", "poisson", "full"] = "none"
    device: str | torch.device = "cpu"
    model: int | str | None = None
    unknown_atoms: str = "error"

    output_suffix: ClassVar[str] = ".mrc"

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "shape", checked_shape(self.shape))
        put(self, "device", checked_device("TEMSim", self.device))
        check_range("TEMSim", "voxel_size_nm", self.voxel_size_nm, 0.01, 10.0)
        check_range("TEMSim", "pixel_size_nm", self.pixel_size_nm, 0.01, 10.0)
        for name, kind in (("optics", Optics), ("sample", Sample), ("camera", Camera), ("placement", Placement)):
            put(self, name, made(kind, getattr(self, name), name))
        if self.noise not in ("none", "poisson", "full"):
            raise InputError(f"Unknown noise={self.noise!r}. Known: none, poisson, full.")
        if isinstance(self.parameters, str):
            raise InputError(f"Expected a list of parameter names, got the text {self.parameters!r}. Use a list.")
        put(self, "parameters", tuple(self.parameters))
        put(self, "_space", self._make_space())
        settings = {**asdict(cast(Any, self.optics)), **asdict(cast(Any, self.sample))}
        settings |= asdict(cast(Any, self.placement))
        settings["dose_e_per_nm2"] = cast(Camera, self.camera).dose_e_per_nm2
        put(self, "_values", settings)
        if not isinstance(self.particle, Specimen | str | Path):
            raise InputError(
                f"Expected a PDB file or a Specimen as particle, got {type(self.particle).__name__}. The program has "
                "atoms only; CryoET takes maps."
            )
        if not isinstance(self.particle, Specimen):
            particle = read_structure(
                self.particle,
                self.transforms,
                add_hydrogen=self.add_hydrogen,
                model=self.model,
                unknown_atoms=self.unknown_atoms,
            )
            put(self, "particle", particle)
        put(self, "_projections", {})

    @property
    def identity_parts(self) -> dict[str, Any]:
        """What images depend on."""
        names = ("particle", "voxel_size_nm", "shape", "pixel_size_nm", "optics", "sample", "camera", "placement")
        return {name: getattr(self, name) for name in (*names, "parameters", "noise")}

    @property
    def space(self) -> ParameterSpace:
        """Names, units, bounds and natural scales of the inputs."""
        return self._space  # type: ignore[attr-defined]

    @property
    def output_shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.shape  # type: ignore[return-value]

    @property
    def reference(self) -> Array:
        """The inputs that reproduce the settings given to the constructor (d,) float64."""
        return np.array([self._values[n] for n in self.space.names])  # type: ignore[attr-defined]

    def replace(self, **changes: Any) -> TEMSim:
        """A simulator with some arguments of the constructor changed; projections are shared where still valid."""
        known = [item.name for item in fields(self)]
        for name in changes:
            if name not in known:
                raise InputError(f"Unknown argument {name!r} of TEMSim. Known: {', '.join(known)}.")
        other = TEMSim(**{name: changes.get(name, getattr(self, name)) for name in known})
        object.__setattr__(other, "_projections", self._projections)  # type: ignore[attr-defined]
        return other

    def projection(self) -> Projected:
        """The particle's projected maps in its orientation; built once, shared by `replace`."""
        place, specimen = cast(Placement, self.placement), cast(Specimen, self.particle)
        angles = (place.phi_deg, place.theta_deg, place.psi_deg)
        key = (specimen.digest, self.voxel_size_nm, angles)
        cache = self._projections  # type: ignore[attr-defined]
        if key not in cache:
            cache[key] = Projected.build(Maps.build(specimen, self.voxel_size_nm), rotation(*angles))
        return cache[key]

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
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
        images = np.empty((len(inputs), *self.output_shape), dtype=np.float32)
        for row, seed, image in zip(inputs, seeds, images, strict=True):
            image[...] = self._counts(dict(zip(self.space.names, row.tolist(), strict=True)), int(seed))
        return images

    def electrons(self, theta: Array) -> Array:
        """Expected electrons of each pixel before the MTF, without noise and padding (rows, columns) float64."""
        values = {**self._values, **self.space.mapping(self.space.vector(theta))}  # type: ignore[attr-defined]
        return self._crop(self._electrons(values)).cpu().numpy()

    def read_output(self, path: str) -> NDArray[Any]:
        """A micrograph from an MRC file, for `bridge fit`; its pixel size must be the simulator's within 1 %."""
        micrograph = read_micrograph(path)
        if abs(micrograph.pixel_size_angstrom / (10 * self.pixel_size_nm) - 1) > 0.01:
            raise InputError(
                f"Expected a pixel of {10 * self.pixel_size_nm:g} angstrom in {path}, got "
                f"{micrograph.pixel_size_angstrom:g}. Set pixel_size_nm to that of the micrograph."
            )
        return micrograph.image

    def write_output(self, path: str, output: NDArray[Any]) -> None:
        """A micrograph as MRC, for `bridge fit`."""
        write_micrograph(path, output, 10 * self.pixel_size_nm)

    def _make_space(self) -> ParameterSpace:
        names = cast(tuple[str, ...], self.parameters)
        half = {"x_nm": 0.5 * self.shape[1] * self.pixel_size_nm, "y_nm": 0.5 * self.shape[0] * self.pixel_size_nm}
        for table in (self.bounds or {}, self.natural_scale or {}):
            for name in table:
                if name not in names:
                    raise InputError(f"Unknown parameter {name!r}. The parameters are: {', '.join(names)}.")
        parameters = []
        for name in names:
            if name not in _KNOWN:
                raise InputError(f"Unknown parameter {name!r}. Known parameters: {', '.join(_KNOWN)}.")
            p = _KNOWN[name]
            pair = (self.bounds or {}).get(name, (-half[name], half[name]) if name in half else (p.lower, p.upper))
            if isinstance(pair, str) or len(pair) != 2:
                raise InputError(f"Expected bounds of {name} as (lower, upper), got {pair!r}.")
            if name == "voltage_kv" and not 1.0 <= pair[0] <= pair[1] <= 1e4:
                raise InputError(f"Expected bounds of voltage_kv within [1, 10000], got {pair!r}.")
            if name == "focal_length_mm" and not pair[0] >= 0.01:
                raise InputError(f"Expected bounds of focal_length_mm from 0.01 on, got {pair!r}.")
            scale = float((self.natural_scale or {}).get(name, p.natural_scale))
            parameters.append(Parameter(name, p.unit, float(pair[0]), float(pair[1]), scale, p.kind, p.description))
        return ParameterSpace(tuple(parameters))

    @property
    def _padded(self) -> tuple[int, int]:
        pad = cast(Camera, self.camera).padding
        return self.shape[0] + 2 * pad, self.shape[1] + 2 * pad

    def _crop(self, image: torch.Tensor) -> torch.Tensor:
        pad = cast(Camera, self.camera).padding
        return image[pad : pad + self.shape[0], pad : pad + self.shape[1]]

    def _electrons(self, values: Mapping[str, float]) -> torch.Tensor:
        """Expected electrons of each pixel of the padded image."""
        kv, pixel, device = values["voltage_kv"], float(self.pixel_size_nm), cast(torch.device, self.device)
        grid = Grid.of(self._padded, pixel)
        projected = self.projection()
        # Per V nm rather than V angstrom.
        layers = projected.at(kv, 10 * interaction_constant(kv))
        (phase, loss), (rows, columns) = on_pixels(
            layers, projected.basis, (values["x_nm"], values["y_nm"]), grid.shape, pixel
        )
        # All is computed as a deviation from the beam, which single precision carries.
        wave, lost = np.zeros(grid.shape, dtype=np.complex64), np.zeros(grid.shape, dtype=np.float32)
        wave[rows, columns] = np.expm1(1j * phase - loss)
        lost[rows, columns] = -np.expm1(-2 * loss)
        height = slice_of(values["z_nm"], kv, pixel)
        at_detector = torch.fft.ifft2(
            torch.fft.fft2(torch.from_numpy(wave).to(device)).mul_(lens(values, height, grid, device))
        )
        deviation = 2 * at_detector.real + at_detector.real.square() + at_detector.imag.square()
        scattering, defocus = Scattering.of(values, pixel), 1e3 * values["defocus_um"]
        particle, taken = scattering.at(defocus, grid)
        if height:
            particle, _ = scattering.at(defocus + height, grid)
        share = grid.half(torch.from_numpy(np.float32(particle)).to(device))
        spectrum = torch.fft.rfft2(torch.from_numpy(lost).to(device)).mul_(share)
        spectrum += torch.fft.rfft2(deviation)
        sample = Sample(**{item.name: values[item.name] for item in fields(Sample)})
        beam, rest = Thickness.of(sample, kv, grid).blurred(spectrum, taken, grid)
        return (beam + rest).mul_(values["dose_e_per_nm2"] * pixel**2)

    def _counts(self, varied: Mapping[str, float], seed: int) -> NDArray[Any]:
        camera = cast(Camera, self.camera)
        electrons = self._electrons({**self._values, **varied})  # type: ignore[attr-defined]
        if self.noise != "none":
            dqe = camera.dqe if self.noise == "full" else 1.0
            electrons = counted(electrons, dqe, seed)
        # The MTF keeps the mean.
        mean = float(electrons.mean())
        spectrum = torch.fft.rfft2((electrons - mean).to(torch.float32)).mul_(
            camera.mtf(self._padded, electrons.device)
        )
        deviation = self._crop(torch.fft.irfft2(spectrum, s=self._padded)).to(torch.float64)
        return deviation.add(mean).mul(camera.gain).cpu().numpy()


def counted(mean: torch.Tensor, dqe: float, seed: int) -> torch.Tensor:
    r"""Electrons as a detector of quantum efficiency DQE counts them: mean and variance mean / DQE.

    n ~ Poisson(mean); where n > 0, an inverse Gaussian number of mean n and variance n (1 / DQE - 1).

    Args:
        mean: expected electrons, float64; negative ones count as none.
        dqe: in (0, 1].
        seed: the result is a function of it and of each pixel's mean alone, on any device: the stream is that of
            numpy's Philox generator with the key `seed`.

    Returns:
        float64, of the shape of `mean` and on its device.

    Reference:
        Michael, Schucany & Haas (1976), Am. Stat. 30, 88.
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    n = poisson_quantile(drawn(random, mean), mean.clamp_min(0.0))
    if dqe >= 1.0:
        return n
    # Mean n and shape n^3 / variance = n^2 / (1 / DQE - 1).
    y = (1 / dqe - 1) * drawn(random, mean).square()
    safe = n.clamp_min(1.0)
    # The smaller root of a quadratic, without cancellation.
    small = safe * 2 * safe / (2 * safe + y + (y * (4 * safe + y)).sqrt())
    uniform = torch.from_numpy(random.random(tuple(mean.shape))).to(mean.device)
    other = uniform * (safe + small) > safe
    return torch.where(n > 0, torch.where(other, safe * safe / small, small), 0.0)
