"""Aligns a tilt series: shifts, defocus and the tilt axis of 41 images, 124 parameters, by the bridge.

    python examples/align_tilt_series.py                        # one series, and its errors
    python examples/align_tilt_series.py --targets 0:8          # eight, and their errors against the Cramer-Rao bound
    mpirun -n 2 python examples/align_tilt_series.py            # bitwise the same
    python examples/align_tilt_series.py --pictures docs/tilt_series

The simulator is `TiltSeries` in its hard mode, a black box here: thresholds, a hard aperture, integers. An image
depends on its own shifts and defocus and on the axis alone, so four columns hold all that is not zero of the Jacobian:
one run moves every image's x at once (and y, defocus, axis), as Curtis, Powell & Reid (1974, J. Inst. Math. Appl. 13,
117) do for sparse Jacobians, and smoothing has 4 dimensions instead of 124. Eight runs, a pair for each of four
orthogonal directions, make a step of Gauss-Newton; twelve, where astigmatism adds two dimensions. Coarse to fine:
images are binned and the smoothing is wide at first.

The images come from another code: atoms turned one by one, projected in slices on a grid twice as fine, Fresnel
propagation between the slices, square pixels that collect what falls on them, and electrons counted
one by one. Gain, offset and a linear background of each image are unknown, and projected out of residuals and Jacobian.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.fft
import torch
from numpy.typing import NDArray

import bridge
from bridge import Detector, Microscope, Particle, Simulator, Specimen, TiltScheme, TiltSeries, cryoet

Array = NDArray[np.float64]

KINDS = ("shift_x_angstrom", "shift_y_angstrom", "defocus_um")  # one of each for each image
# Common to all images; astigmatism A in the direction phi as A cos 2 phi and A sin 2 phi, which is smooth at A = 0.
COMMON = ("tilt_axis_deg", "astigmatism_cos_um", "astigmatism_sin_um")
UNITS = np.array([5.0, 5.0, 0.3, 0.5, 0.1, 0.1])  # of the smoothing, by kind, those of COMMON last
START = np.array([30.0, 30.0, 0.3, 2.0, 0.1, 0.1])  # half-width of what coarse alignment leaves
# (binning, width of the smoothing in UNITS) of each step. Where images are binned, simulations have pixels twice as
# large: a quarter of the work.
SCHEDULE = ((8, 3.0), (8, 2.0), (4, 1.5), (4, 1.0), (2, 0.6), (2, 0.4), (1, 0.3), (1, 0.2))
AFTER_CORRELATION = SCHEDULE[4:]
# Before the last but two, each image is tried at so many by so many places over all that the start leaves open, since a
# helix looks like itself a turn away.
ACROSS = 7
TRIALS = 1 + ACROSS**2
# The last step is repeated, at most so many times, until shifts move by less than that part of their standard errors
# (root mean square): where a fit has converged the last step moves them by a third.
REPEATS, SETTLED = 4, 0.5


OPTICS = Microscope(voltage_kv=300.0, defocus_um=3.0, cs_mm=2.7, amplitude_contrast=0.07)
THICKNESS, FREE_PATH = 1000.0, 3150.0  # of the ice [angstrom]
DOSE, DQE = 3.0, 0.8
DRIFT_UM, DRIFT_DEG, JITTER_UM = 0.15, 40.0, 0.02  # what the prior says of the defocus' change over tilts


# --- the series and its images ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What is known: the specimen, where its copies are, and the geometry of the series.

    poses: x, y, z [angstrom] and rot, tilt, psi [degree] of each copy.
    thresholded: the images' solvent is that of the fit's hard mode; else the atoms' Gaussians displace it, which the
        fit does not know.
    gain: counts an electron of the fit's simulator. At 1 its expected counts would be rounded to whole electrons, which
        are as large as the contrast; the gain is unknown to the fit anyway.
    """

    specimen: Specimen
    poses: tuple[tuple[float, ...], ...] = (
        (-420.0, 150.0, 60.0, 25.0, 60.0, -40.0),
        (350.0, -280.0, -80.0, -70.0, 110.0, 15.0),
    )
    images: int = 41
    largest_deg: float = 60.0
    size: int = 400
    pixel: float = 5.0
    axis_deg: float = 85.3
    astigmatic: bool = False
    thresholded: bool = False
    gain: float = 1000.0

    @property
    def kinds(self) -> int:
        """Columns of the Jacobian: three kinds of each image's own parameters, and the common ones."""
        return 6 if self.astigmatic else 4

    @property
    def runs_a_step(self) -> int:
        """An antithetic pair for each column: with fewer, orthogonal directions leave columns out at random."""
        return 2 * self.kinds

    def spread(self, of: Array) -> Array:
        """A value for each kind to one for each of the d parameters."""
        return np.concatenate((np.repeat(of[:3], self.images), of[3 : self.kinds]))

    @property
    def scheme(self) -> TiltScheme:
        return TiltScheme.dose_symmetric(self.largest_deg, 2 * self.largest_deg / (self.images - 1))

    def series(self, mode: Literal["hard", "smooth"] = "hard", larger: int = 1) -> TiltSeries:
        """The fit's simulator, with pixels so many times larger; in smooth mode its counts are electrons."""
        gain = self.gain if mode == "hard" else 1.0
        names = [f"{kind}[{t}]" for kind in KINDS for t in range(self.images)] + ["tilt_axis_deg"]
        names += ["astigmatism_um", "astigmatism_angle_deg"] if self.astigmatic else []
        bounds = {f"defocus_um[{t}]": (1.5, 4.5) for t in range(self.images)}
        return TiltSeries(
            [Particle(self.specimen, *pose) for pose in self.poses],
            self.scheme,
            (self.size // larger,) * 2,
            self.pixel * larger,
            OPTICS,
            Detector(dose_e_per_angstrom2=DOSE, dqe=DQE, gain=gain, bits=None),
            names,
            bounds,
            mode=mode,
            margin_pixels=24 // larger,  # the copies are far from the edges
            tilt_axis_deg=self.axis_deg,
            thickness_angstrom=THICKNESS,
            mean_free_path_angstrom=FREE_PATH,
        )


def inputs(series: TiltSeries, theta: Array, offset: float = 0.0) -> Array:
    """The simulator's inputs of d parameters: within its bounds, and the astigmatism as it wants it.

    Args:
        offset: of the pixels' middles from where `theta` counts shifts from [angstrom].
    """
    values = theta.copy()
    values[: 2 * series.output_shape[0]] -= offset
    if len(theta) % 3 == 0:  # not 3 n + 1: there is astigmatism
        c, s = theta[-2:]
        values = np.append(values[:-2], (math.hypot(c, s), 0.5 * math.degrees(math.atan2(s, c))))
    return np.clip(values, series.space.lower, series.space.upper)


MIDDLE = ((60.0, -40.0, 60.0, 25.0, 60.0, -40.0),)  # the pose of a single copy


def truth(layout: Layout, seed: int) -> Array:
    """(d,) shifts of up to +-3 nm; a defocus that drifts as a cubic of the tilt, and jitters by 20 nm."""
    random, n = np.random.default_rng((seed, 1)), layout.images
    u = np.asarray(layout.scheme.angles_deg) / layout.largest_deg
    drift = np.polynomial.legendre.legval(u, [0.0, *(random.uniform(-1, 1, 3) * [0.15, 0.1, 0.05])])
    defocus = 3.0 + drift + JITTER_UM * random.standard_normal(n)
    common = [layout.axis_deg, 0.03, 0.05] if layout.astigmatic else [layout.axis_deg]
    return np.concatenate((random.uniform(-30, 30, 2 * n), defocus, common))


def coarse(layout: Layout, true: Array, seed: int) -> Array:
    """What coarse alignment leaves: off by +-3 nm, +-0.3 um and +-2 degrees, uniformly; no astigmatism."""
    first = true + layout.spread(START) * np.random.default_rng((seed, 2)).uniform(-1, 1, len(true))
    if layout.astigmatic:
        first[-2:] = 0.0
    return first


def about(axis: int, degrees: float) -> Array:
    """Right-handed rotation about x, y or z (0, 1, 2)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def frequencies(size: int, step: float) -> tuple[Array, Array]:
    f = np.fft.fftfreq(size, step)
    return f[None, :], f[:, None]


SLICE = 40.0  # thickness of a slice [angstrom]
VOXEL = 1.5  # of what holds no solvent [angstrom]


@lru_cache(maxsize=128)
def exit_wave(layout: Layout, image: int, copy: int) -> NDArray[np.complex64]:
    """psi - 1 of a copy in the plane of its own middle, on a box of pixels half as large, by multislice."""
    rot, tilt, psi = layout.poses[copy][3:]
    own = (about(2, rot) @ about(1, tilt) @ about(2, psi)).T
    turn = about(2, layout.axis_deg) @ about(1, layout.scheme.angles_deg[image]) @ own
    atoms, step = layout.specimen.transformed(turn), layout.pixel / 2
    reach = float(np.linalg.norm(atoms.positions, axis=1).max())
    box = 2 * scipy.fft.next_fast_len(math.ceil((reach + 100) / step))
    fx, fy = frequencies(box, step)
    q2 = fx * fx + fy * fy
    exposure = DOSE * (len(layout.scheme.earlier(image)) + 0.5)
    with np.errstate(divide="ignore"):
        damage = np.exp(-0.5 * exposure / (0.245 * q2 ** (-0.5 * 1.665) + 2.81))
    sigma, wavelength = (float(f(OPTICS.voltage_kv)) for f in (cryoet.interaction_constant, cryoet.wavelength_angstrom))
    loss = OPTICS.amplitude_contrast / math.sqrt(1 - OPTICS.amplitude_contrast**2)
    wave, height = np.ones((box, box), dtype=np.complex128), 0.0
    number = np.floor(atoms.positions[:, 2] / SLICE).astype(int)
    if layout.thresholded:
        dry = np.concatenate([VOXEL * (np.argwhere(full) + low) for full, low in cryoet.displaced_voxels(atoms, VOXEL)])
    for k in sorted(set(number.tolist()), reverse=True):  # the electrons come from above
        mine, middle = number == k, (k + 0.5) * SLICE
        part = Specimen.from_atoms(
            atoms.positions[mine],
            atoms.atomic_numbers[mine],
            weights=atoms.weights[mine],
            b_factors=atoms.b_factors[mine],
            hydrogens=atoms.hydrogens[mine],
        )
        potential = cryoet.projected_potential(part, (box, box), step, solvent=not layout.thresholded)
        if layout.thresholded:
            within = dry[np.floor(dry[:, 2] / SLICE) == k, 1::-1] / step + box // 2
            thickness = np.zeros((box, box))
            cryoet.add_linear(thickness, within, np.full(len(within), VOXEL**3 / step**2))
            potential -= cryoet.ice_potential() * thickness
        phase = sigma * scipy.fft.ifft2(scipy.fft.fft2(potential) * damage).real
        wave = _travelled(wave, (height - middle) * wavelength, q2) * np.exp((1j - loss) * phase)
        height = middle
    wave = _travelled(wave, height * wavelength, q2)
    return (wave - 1).astype(np.complex64)


def turned(phase: Array) -> NDArray[np.complex64]:
    """exp(i phase); the phase is double, the result single."""
    phase = np.remainder(phase, 2 * math.pi).astype(np.float32)
    return np.cos(phase) + np.complex64(1j) * np.sin(phase)


def _travelled(wave: NDArray[np.complex128], distance: float, q2: Array) -> NDArray[np.complex128]:
    return scipy.fft.ifft2(scipy.fft.fft2(wave) * np.exp(1j * math.pi * distance * q2))


def expected(layout: Layout, true: Array) -> Array:
    """Electrons that each pixel can expect, (images, rows, columns), by the code that the fit does not use."""
    n, step = layout.images, layout.pixel / 2
    size = 2 * scipy.fft.next_fast_len(layout.size + 80)
    fx, fy = frequencies(size, step)
    q2 = fx * fx + fy * fy
    wavelength = float(cryoet.wavelength_angstrom(OPTICS.voltage_kv))
    spread = float(cryoet.focal_spread_angstrom(OPTICS.voltage_kv, OPTICS.energy_spread_ev, OPTICS.cc_mm))
    cs, b, convergence = 1e7 * OPTICS.cs_mm, OPTICS.b_factor_angstrom2, 1e-3 * OPTICS.convergence_mrad
    cutoff = 0.5e-3 * OPTICS.aperture_um / OPTICS.focal_length_mm / wavelength
    envelope = np.exp(-0.25 * b * q2 - 0.5 * (math.pi * wavelength * spread * q2) ** 2) * (q2 < cutoff**2)
    pixel = (np.sinc(fx * layout.pixel) * np.sinc(fy * layout.pixel)).astype(np.float32)
    direction = 2 * np.arctan2(fy, fx)
    astigmatism = true[-2] * np.cos(direction) + true[-1] * np.sin(direction) if layout.astigmatic else 0.0
    images = np.empty((n, layout.size, layout.size))
    for t, tilt in enumerate(layout.scheme.angles_deg):
        local = 1e4 * (true[2 * n + t] + astigmatism)
        chi = math.pi * wavelength * local * q2 - 0.5 * math.pi * cs * wavelength**3 * q2**2
        lens = envelope * np.exp(-((math.pi * convergence) ** 2) * (local - cs * wavelength**2 * q2) ** 2 * q2)
        spectrum = np.zeros((size, size), dtype=np.complex64)
        for copy, pose in enumerate(layout.poses):
            # Copies are side by side: what they scatter adds up.
            x, y, z = about(2, layout.axis_deg) @ about(1, tilt) @ np.array(pose[:3]) + [true[t], true[n + t], 0.0]
            box = exit_wave(layout, t, copy)
            wave = np.zeros((size, size), dtype=np.complex64)
            inside = slice(size // 2 - len(box) // 2, size // 2 - len(box) // 2 + len(box))
            wave[inside, inside] = box
            way = (
                turned(math.pi * (wavelength * z * q2)) * turned(-2 * math.pi * x * fx) * turned(-2 * math.pi * y * fy)
            )
            spectrum += scipy.fft.fft2(np.fft.ifftshift(wave)) * way
        psi = 1 + scipy.fft.ifft2(spectrum * lens.astype(np.float32) * turned(chi))
        intensity = np.fft.fftshift(scipy.fft.ifft2(scipy.fft.fft2(np.abs(psi) ** 2) * pixel).real)
        first = size // 2 - 2 * (layout.size // 2)
        seen = slice(first, first + 2 * layout.size, 2)
        passed = math.exp(-THICKNESS / (FREE_PATH * math.cos(math.radians(tilt))))
        images[t] = intensity[seen, seen] * (DOSE * layout.pixel**2 * passed)
    return images


def recorded(electrons: Array, seed: int) -> Array:
    """Counted electrons: each is detected with the probability DQE times a gain of its image, and offsets are added."""
    random, n = np.random.default_rng((seed, 3)), len(electrons)
    gain, offset = random.uniform(0.9, 1.1, n), np.rint(random.uniform(-3, 3, n))
    slopes = random.uniform(-0.02, 0.02, (2, n, 1, 1))
    u = np.linspace(-1, 1, electrons.shape[1])
    sensitivity = DQE * gain[:, None, None] * (1 + slopes[0] * u[None, :, None] + slopes[1] * u)
    return random.poisson(electrons * sensitivity) + offset[:, None, None]


# --- the fit ------------------------------------------------------------------------------------------------------


class Columns:
    """The series as a function of a few numbers: by how much all images' x, y, defocus, and what is common, move."""

    def __init__(self, series: TiltSeries, theta: Array, offset: float = 0.0) -> None:
        self.series, self.theta, self.offset = series, theta, offset

    def __call__(self, move: Array) -> NDArray[np.float32]:
        moved = self.theta + np.concatenate((np.repeat(move[:3], self.series.output_shape[0]), move[3:]))
        return self.series(inputs(self.series, moved, self.offset)[None], np.zeros(1, dtype=np.uint64))[0]


def binned(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Means of factor x factor pixels of (..., rows, columns); what is left over at the end is cut off."""
    rows, columns = (factor * (n // factor) for n in images.shape[-2:])
    parts = images[..., :rows, :columns].reshape(*images.shape[:-2], rows // factor, factor, columns // factor, factor)
    return parts.mean(dim=(-3, -1))


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products along the last axis. Sums, not matrix products, whose last bits depend on where memory begins."""
    return (a * b).sum(-1)


def orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of some vectors (k, m), by Gram & Schmidt, twice for the rounding."""
    basis: list[torch.Tensor] = []
    for row in rows:
        for _ in range(2):
            for known in basis:
                row = row - dot(known, row) * known
        basis.append(row / dot(row, row).sqrt())
    return torch.stack(basis)


def without(basis: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Vectors (..., m) less what an orthonormal basis makes of them."""
    for known in basis:
        rows = rows - dot(known, rows)[..., None] * known
    return rows


class Misfit:
    """Whitened residuals of one binning, with what is unknown of each image projected out."""

    def __init__(self, target: Array, factor: int) -> None:
        self.target = binned(torch.tensor(target), factor)
        n, rows, columns = self.target.shape
        y, x = (torch.linspace(-1, 1, k, dtype=torch.float64) for k in (rows, columns))
        ones = torch.ones(rows, columns, dtype=torch.float64)
        self.plane = torch.stack((ones, y[:, None] * ones, x * ones)).reshape(3, -1)
        flat = self.target.reshape(n, -1)
        # Electrons' variance is their mean, which the contrast changes by a hundredth.
        fitted = flat - without(orthonormal(self.plane), flat)
        self.weight = factor / fitted.clamp_min(1.0).sqrt()  # (images, pixels)

    def normal(self, value: torch.Tensor, jacobian: torch.Tensor, free_gain: bool) -> tuple[Array, Array, Array]:
        """(images, k, k) J^T J, (images, k) J^T r and (images,) r^T r for k columns.

        Args:
            value, jacobian: (images, rows, columns) and (images, k, rows, columns), binned.
            free_gain: the contrast has an unknown factor; else it is that of the images' means.
        """
        blocks: list[tuple[Array, Array, float]] = []
        for y, f, columns, w in zip(self.target, value, jacobian, self.weight, strict=True):
            gain = y.mean() / f.mean()
            seen, model, slopes = y.reshape(-1) * w, gain * f.reshape(-1) * w, gain * columns.flatten(1) * w
            basis = orthonormal(self.plane * w)
            residual = without(basis, seen - model)
            if free_gain:
                # The gain that fits best scales the Jacobian as well (variable projection, Kaufman 1975).
                contrast = without(basis, model)
                slopes = slopes * (1 + dot(contrast, residual) / dot(contrast, contrast)).clamp(0.3, 3.0)
                basis = torch.cat((basis, orthonormal(contrast[None])))
                residual = without(basis, residual)
            slopes = without(basis, slopes)
            blocks.append(
                (dot(slopes[:, None], slopes).numpy(), dot(slopes, residual).numpy(), float(dot(residual, residual)))
            )
        return tuple(np.array(part) for part in zip(*blocks, strict=True))  # type: ignore[return-value]


def solved(matrix: Array, right: Array) -> Array:
    """matrix^-1 right, in torch's memory: the same bits in every process."""
    return torch.linalg.solve(torch.tensor(matrix), torch.tensor(right)).numpy()


def assembled(blocks: Array) -> Array:
    """(images, k, ...) of each image to all d parameters: an arrow, what is common in the last rows and columns."""
    n, k = blocks.shape[:2]
    own, common = np.arange(n)[:, None] + n * np.arange(3), np.tile(np.arange(3 * n, 3 * n + k - 3), (n, 1))
    total = np.zeros((3 * n + k - 3,) * (blocks.ndim - 1))
    for index, block in zip(np.hstack((own, common)), blocks, strict=True):
        total[np.ix_(*(index,) * block.ndim)] += block
    return total


def drift_precision(layout: Layout, dimension: int) -> Array:
    """(d, d) precision of the prior: the defocus is a level, smooth changes over tilts (a Gaussian process), jitter."""
    angles, n = np.asarray(layout.scheme.angles_deg), layout.images
    covariance = 10.0 + DRIFT_UM**2 * np.exp(-0.5 * ((angles[:, None] - angles) / DRIFT_DEG) ** 2)
    precision = np.zeros((dimension, dimension))
    precision[2 * n : 3 * n, 2 * n : 3 * n] = np.linalg.inv(covariance + JITTER_UM**2 * np.eye(n))
    return precision


@dataclass(frozen=True)
class Alignment:
    """Where a fit ended: parameters, normal matrix and gradient there, the path, and the runs spent."""

    theta: Array
    normal: Array
    gradient: Array
    path: tuple[Array, ...]
    chi2: tuple[float, ...]
    runs: int

    def with_prior(self, precision: Array) -> Array:
        """The parameters if the prior is believed as well; needs no further run."""
        return self.theta + solved(self.normal + precision, self.gradient - precision @ self.theta)


def align(
    layout: Layout,
    target: Array,
    first: Array,
    seed: int,
    schedule: Sequence[tuple[int, float]] = SCHEDULE,
) -> Alignment:
    """Gauss-Newton on the smoothed Jacobian, a few columns for all parameters, coarse to fine."""
    finest, larger = (layout.series(larger=k) for k in (1, 2))
    k, spread, samples = layout.kinds, layout.spread(START), layout.runs_a_step
    theta, path, losses, runs = first.copy(), [first.copy()], [], 0
    misfits = {factor: Misfit(target, factor) for factor, _ in schedule}
    normal = gradient = np.zeros(0)
    for step, (factor, width) in enumerate((*schedule, *schedule[-1:] * REPEATS)):
        if step >= len(schedule) and settled(layout, path[-1] - path[-2], normal):
            break
        series, done = (larger, 2) if factor > 1 else (finest, 1)
        # The middle of two pixels is half a pixel from that of the first.
        columns = Columns(series, theta, 0.5 * (done - 1) * layout.pixel)
        if step == len(schedule) - 3:
            theta = columns.theta = tried(layout, columns, first, misfits[factor], seed, factor // done)
            runs += TRIALS
        box = black_box(columns, k)
        smoothed = bridge.smooth(box, seed=seed, num_samples=samples, points="antithetic-orthogonal", scale=width)
        estimate = smoothed.estimate(torch.zeros(k), step)
        value = binned(estimate.value, factor // done).to(torch.float64)
        jacobian = binned(estimate.jacobian().movedim(-1, 1), factor // done).to(torch.float64)
        fine = factor == 1
        blocks, slopes, squares = misfits[factor].normal(value, jacobian, free_gain=fine)
        normal, gradient = assembled(blocks), assembled(slopes)
        # Coarse images say little of the defocus: what coarse alignment leaves at most is believed until the end.
        belief = np.zeros(len(theta)) if fine else 3 / spread**2
        move = solved(normal + np.diag(belief), gradient - belief * (theta - first))
        theta = theta + np.clip(move, -spread, spread)
        if not fine:
            theta = np.clip(theta, first - 1.1 * spread, first + 1.1 * spread)
        runs += estimate.num_evaluations
        losses.append(float(squares.sum()) / misfits[factor].target.numel())
        path.append(theta.copy())
    # What is left of the gradient after the last step, to first order.
    left = gradient - normal @ (theta - path[-2])
    return Alignment(theta, normal, left, tuple(path), tuple(losses), runs)


def settled(layout: Layout, move: Array, normal: Array) -> bool:
    """Whether a step moved the shifts by no more than noise in the Jacobian makes it move them for ever."""
    relative = (move / np.sqrt(np.diag(np.linalg.inv(normal))))[: 2 * layout.images]
    return float(np.sqrt(np.mean(relative**2))) < SETTLED


def black_box(columns: Columns, kinds: int) -> Simulator:
    return bridge.as_simulator(
        columns,
        names=(*KINDS, *COMMON)[:kinds],
        natural_scale=UNITS[:kinds].tolist(),
        output_shape=columns.series.output_shape,
    )


def tried(layout: Layout, columns: Columns, first: Array, misfit: Misfit, seed: int, factor: int) -> Array:
    """The parameters with each image where it fits best: as it is, or at one of the places around the start's."""
    n, theta = layout.images, columns.theta
    around = np.linspace(-1.05, 1.05, ACROSS) * START[0]
    places = np.zeros((ACROSS**2, layout.kinds))
    places[:, 0], places[:, 1] = (grid.ravel() for grid in np.meshgrid(around, around))
    begin = np.concatenate((first[: 2 * n], theta[2 * n :]))
    squares = []
    for base, moves in ((theta, places[:1] * 0), (begin, places)):
        columns.theta = base
        # Next to no smoothing: one run for each place, for all images at once.
        plain = bridge.smooth(black_box(columns, layout.kinds), seed=seed, num_samples=1, points="mc", scale=1e-9)
        with torch.no_grad():
            images = binned(plain(torch.from_numpy(moves).float()), factor).to(torch.float64)
        squares += [misfit.normal(image, image[:, None], free_gain=False)[2] for image in images]
    best = np.argmin(squares, axis=0)
    shifts = np.stack(
        [theta[t] if k == 0 else begin[t] + places[k - 1, t // n] for t, k in enumerate(np.tile(best, 2))]
    )
    return np.concatenate((shifts, theta[2 * n :]))


def correlated(layout: Layout, target: Array, first: Array) -> Array:
    """The start with each image's shift from the peak of its cross-correlation with the model: one run."""
    series, n = layout.series(), layout.images
    model = series(inputs(series, first)[None], np.zeros(1, dtype=np.uint64))[0].astype(np.float64)
    theta, reach = first.copy(), math.ceil(1.5 * START[0] / layout.pixel)
    around = np.arange(-reach, reach + 1)
    for t in range(n):
        spectra = [scipy.fft.rfft2(image - image.mean()) for image in (target[t], model[t])]
        peaks = scipy.fft.irfft2(spectra[0] * spectra[1].conj(), s=target[t].shape)[np.ix_(around, around)]
        row, column = np.unravel_index(np.argmax(peaks), peaks.shape)
        theta[[t, n + t]] += layout.pixel * np.array([around[column], around[row]])
    return theta


def fisher(layout: Layout, theta: Array) -> Array:
    """(d, d) Fisher information of counted electrons, what is unknown of each image taken out of it.

    Derivatives are those of the smooth mode, exact (forward-mode automatic differentiation).
    """
    series, n, k = layout.series("smooth"), layout.images, layout.kinds
    point, columns = torch.from_numpy(inputs(series, theta)).float(), []
    for j in range(k):
        tangent = np.zeros(len(theta))
        tangent[slice(j * n, (j + 1) * n) if j < 3 else 3 * n + j - 3] = 1.0
        if j > 3:  # through the polar form of the astigmatism
            c, s = theta[-2:]
            a, unit = math.hypot(c, s), np.array([j == 4, j == 5], dtype=float)
            tangent[-2:] = unit @ [c, s] / a, 0.5 * math.degrees(unit @ [-s, c] / a**2)
        rate, column = torch.func.jvp(series.electrons, (point,), (torch.from_numpy(tangent).float(),))
        columns.append(column.double() * DQE)
    mean = rate.double() * DQE
    blocks, _, _ = Misfit(mean.numpy(), 1).normal(mean, torch.stack(columns, 1), free_gain=True)
    return assembled(blocks)


# --- other methods at as many runs --------------------------------------------------------------------------------


def cma_es(layout: Layout, target: Array, first: Array, seed: int, budget: int) -> Array:
    """CMA-ES on all parameters; the loss is that of images binned by two, what is unknown of them projected out."""
    import cma

    series, misfit, unit = layout.series(), Misfit(target, 2), layout.spread(START) / 2
    search = cma.CMAEvolutionStrategy(np.zeros(len(first)), 1.0, {"seed": seed + 1, "verbose": -9})
    best, left = (math.inf, first), budget
    while left > 0:
        points = search.ask()[:left]
        losses = []
        for point in points:
            theta = first + unit * point
            image = torch.from_numpy(series(inputs(series, theta)[None], np.zeros(1, dtype=np.uint64))[0])
            value = binned(image, 2).to(torch.float64)
            losses.append(float(misfit.normal(value, value[:, None], free_gain=False)[2].sum()))
            best = min(best, (losses[-1], theta), key=lambda pair: pair[0])
        left -= len(points)
        if len(points) == search.popsize:
            search.tell(points, losses)
    return best[1]


def adam(layout: Layout, target: Array, first: Array, seed: int, budget: int, structured: bool) -> Array:
    """Adam along the smoothed gradient of all parameters, with or without `TiltSeries.structure`; binned by two."""
    series, misfit, unit = layout.series(), Misfit(target, 2), layout.spread(UNITS)
    black_box = bridge.as_simulator(
        lambda x: series(inputs(series, x)[None], np.zeros(1, dtype=np.uint64))[0],
        names=series.space.names,
        natural_scale=unit.tolist(),
        output_shape=series.output_shape,
        structure=series.structure if structured else None,
    )
    steps = budget // 8
    smoothed = bridge.smooth(black_box, seed=seed, num_samples=8, scale=1.0, points="antithetic")
    point = torch.zeros(len(first), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([point], lr=1.0, betas=(0.5, 0.9))
    for step in range(steps):
        width = 3.0 * (0.2 / 3.0) ** (step / max(steps - 1, 1))
        optimiser.param_groups[0]["lr"] = 0.5 * width
        optimiser.zero_grad()
        theta = torch.from_numpy(first) + torch.from_numpy(unit) * point
        value = binned(smoothed(theta, step, scale=torch.from_numpy(width * unit)), 2)
        ratio = (misfit.target.mean((1, 2)) / value.detach().mean((1, 2)))[:, None, None]
        loss = (((ratio * value - misfit.target).flatten(1) * misfit.weight) ** 2).mean()
        loss.backward()
        optimiser.step()
    return first + unit * point.detach().numpy()


# --- tables and pictures ------------------------------------------------------------------------------------------


# Name, unit and factor of each kind of error.
PRINTED = (("x", "nm", 0.1), ("y", "nm", 0.1), ("defocus", "nm", 1e3), ("axis", "deg", 1.0), ("astigmatism", "nm", 1e3))


@dataclass(frozen=True)
class Errors:
    """How one method did on one target, by kind: shift x, shift y, defocus, axis, and astigmatism where it is fitted.

    rms: root mean square error. bound: that of the Cramer-Rao bounds. ratio: root mean square of error / bound.
    """

    method: str
    target: int
    runs: int
    rounds: int
    cpu_s: float
    rms: list[float]
    bound: list[float]
    ratio: list[float]
    own: list[float]  # root mean square of error / the fit's own standard error; empty where it has none

    def line(self) -> str:
        kinds = zip((name for name, *_ in PRINTED), self.rms, self.ratio, strict=False)
        figures = "  ".join(f"{name} {rms:.4g} ({ratio:.2f})" for name, rms, ratio in kinds)
        return f"{self.target:3} {self.method:12} {self.runs:4} runs {self.cpu_s:6.1f} s  {figures}"


def by_kind(layout: Layout, values: Array) -> list[float]:
    """Root mean square of each image's own kinds, of the axis, and of both parts of a fitted astigmatism."""
    n = layout.images
    parts = [values[:n], values[n : 2 * n], values[2 * n : 3 * n], values[3 * n : 3 * n + 1], values[3 * n + 1 :]]
    parts = parts[: 5 if layout.astigmatic else 4]
    return [float(np.sqrt(np.mean(np.square(part)))) for part in parts]


def digest(theta: Array) -> str:
    """Tells parameters apart to the last bit."""
    return hashlib.sha256(theta.tobytes()).hexdigest()[:16]


METHODS = ("columns", "correlation", "clean", "cma", "adam", "adam-blocks")


def compare(
    layout: Layout, seed: int, methods: Sequence[str], information: Array
) -> tuple[list[Errors], dict[str, Array]]:
    """All methods on one target, and arrays for pictures."""
    true = truth(layout, seed)
    electrons = expected(layout, true)
    target, first = recorded(electrons, seed), coarse(layout, true, seed)
    precision = drift_precision(layout, len(true))
    bound = np.sqrt(np.diag(np.linalg.inv(information)))
    bound_prior = np.sqrt(np.diag(np.linalg.inv(information + precision)))
    arrays = {"true": true, "first": first, "bound": bound, "bound_prior": bound_prior, "target": target}
    results: list[Errors] = []

    def add(name: str, theta: Array, limit: Array, runs: int, rounds: int, began: float, own: Array | None) -> None:
        error = theta - true
        of_own = [] if own is None else by_kind(layout, error / own)
        results.append(
            Errors(
                name,
                seed,
                runs,
                rounds,
                time.process_time() - began,
                by_kind(layout, error),
                by_kind(layout, limit),
                by_kind(layout, error / limit),
                of_own,
            )
        )
        arrays[name] = theta
        if bridge.is_root():
            print(results[-1].line(), flush=True)

    add("start", first, bound, 0, 0, time.process_time(), None)
    budget = layout.runs_a_step * len(SCHEDULE) + TRIALS
    for name in methods:
        began = time.process_time()
        if name in ("columns", "clean", "correlation"):
            images, begin, schedule = (electrons * DQE if name == "clean" else target), first, SCHEDULE
            if name == "correlation":
                begin, schedule = correlated(layout, target, first), AFTER_CORRELATION
                add("peaks alone", begin, bound, 1, 1, began, None)
            found = align(layout, images, begin, seed, schedule)
            own = np.sqrt(np.diag(np.linalg.inv(found.normal)))
            runs = found.runs + (name == "correlation")
            rounds = len(schedule) + 1 + (name == "correlation")
            more = len(found.path) - 1 - len(schedule)
            if more:
                add(
                    f"{name}, first",
                    found.path[len(schedule)],
                    bound,
                    runs - layout.runs_a_step * more,
                    rounds,
                    began,
                    None,
                )
            add(name, found.theta, bound, runs, rounds + more, began, own)
            if name == "columns":
                own = np.sqrt(np.diag(np.linalg.inv(found.normal + precision)))
                add("with prior", found.with_prior(precision), bound_prior, runs, rounds, began, own)
                arrays |= {"chi2": np.array(found.chi2), "path": np.array(found.path)}
        elif name == "cma":
            add(name, cma_es(layout, target, first, seed, budget), bound, budget, budget // 17, began, None)
        else:
            theta = adam(layout, target, first, seed, budget, structured=name == "adam-blocks")
            add(name, theta, bound, budget, budget // 8, began, None)
    return results, arrays


def summary(results: Sequence[Errors]) -> str:
    """Over the targets: root mean squares of errors and bounds, and their quotients."""
    lines = [f"{'method':14}{'targets':>8}{'runs':>6}{'CPU s':>8}   error / bound = quotient (worst target)"]
    for name in dict.fromkeys(r.method for r in results):
        mine = [r for r in results if r.method == name]
        parts = []
        for k, (kind, unit, factor) in enumerate(PRINTED[: len(mine[0].rms)]):
            rms, bound, ratio = (
                np.sqrt(np.mean([getattr(r, f)[k] ** 2 for r in mine])) for f in ("rms", "bound", "ratio")
            )
            worst = max(r.ratio[k] for r in mine)
            parts.append(f"{kind} {factor * rms:.3g} / {factor * bound:.3g} {unit} = {ratio:.2f} ({worst:.2f})")
        cpu, runs = np.median([r.cpu_s for r in mine]), np.mean([r.runs for r in mine])
        lines.append(f"{name:14}{len(mine):8}{runs:6.0f}{cpu:8.1f}   " + ", ".join(parts))
        if mine[0].own:
            own = [np.sqrt(np.mean([r.own[k] ** 2 for r in mine])) for k in range(len(mine[0].rms))]
            lines.append(f"{'':36}   error / own standard error: " + ", ".join(f"{v:.2f}" for v in own))
    return "\n".join(lines)


def pictures(layout: Layout, arrays: dict[str, Array], folder: Path) -> None:
    """montage.png, thon.png and parameters.png."""
    from align_tilt_series_pictures import draw

    series, seed = layout.series(), np.zeros(1, dtype=np.uint64)
    models = {name: series(inputs(series, arrays[name])[None], seed)[0] / layout.gain for name in ("first", "columns")}
    draw(layout.scheme.angles_deg, layout.pixel, OPTICS, arrays, models, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", default="0:1", help="first:end of the series' seeds")
    parser.add_argument("--methods", default="columns", help=f"of {', '.join(METHODS)}, joined by commas")
    parser.add_argument("--images", type=int, default=41)
    parser.add_argument("--size", type=int, default=400, help="rows and columns")
    parser.add_argument("--pixel", type=float, default=5.0, help="[angstrom]")
    parser.add_argument("--subunits", type=int, default=147, help="of the helix")
    parser.add_argument("--single", action="store_true", help="one copy instead of two")
    parser.add_argument("--astigmatism", action="store_true", help="fit it as well; the images have 0.058 um of it")
    parser.add_argument("--same-solvent", action="store_true", help="images whose solvent is that of the fit's model")
    parser.add_argument("--gain", type=float, default=1000.0, help="of the fit's simulator [counts an electron]")
    parser.add_argument("--output", type=Path, help="write the errors here (JSON)")
    parser.add_argument("--pictures", type=Path, help="draw the first target's here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    poses = MIDDLE if arguments.single else Layout.poses
    layout = Layout(
        Specimen.helix(arguments.subunits),
        poses,
        arguments.images,
        size=arguments.size,
        pixel=arguments.pixel,
        astigmatic=arguments.astigmatism,
        thresholded=arguments.same_solvent,
        gain=arguments.gain,
    )
    methods = arguments.methods.split(",")
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}")
    first, end = map(int, arguments.targets.split(":"))
    results: list[Errors] = []
    # The bounds hardly change from one target to the next: they are those of the first one's truth.
    information = fisher(layout, truth(layout, first))
    for seed in range(first, end):
        found, arrays = compare(layout, seed, methods, information)
        results += found
        if bridge.is_root():
            if arguments.output:
                arguments.output.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")
            if arguments.pictures and seed == first:
                pictures(layout, arrays, arguments.pictures)
            print("parameters", digest(arrays[methods[0]]), flush=True)
    if bridge.is_root():
        print(summary(results))


if __name__ == "__main__":
    main()
