"""How open a protein is, from a few noisy projections: three elastic-network modes and the pose of each image.

    python examples/structure_from_projections.py --seeds 0:8
    mpirun -n 2 python examples/structure_from_projections.py --seeds 0:8 --methods smoothed

The protein of `examples/data` deforms along the three softest modes of its elastic network. Known are the protein, its
modes, and the microscope; unknown are the amplitudes, common to all images, and of each image three rotations and two
shifts, as a coarse search on a grid of 12 degrees and 10 angstrom leaves them: off by up to 6 degrees and 5 angstrom.
Poses are of each image, as for single particles: nothing has to be known of how images belong together. Images are
counted electrons.

The target comes from other code than the fit: the atoms in slabs, each an exact projection on a grid three times as fine,
less the solvent displaced on voxels two thirds as wide, the wave travelling from slab to slab, the image cropped in
Fourier space, and numpy's Poisson numbers. The fit knows nothing of slabs, projects the whole at the pixel of the image,
and its counts are integers: `CryoET` in hard mode.

"smoothed" is `bridge.fit` by Gauss-Newton on the smoothed Jacobian; an image's pose touches that image alone, which is
declared. "cma" is CMA-ES on the same misfit with the same number of runs (`pip install cma`), in the same natural units.
A run is all images once. Standard errors are those of `bridge.fit`; the Cramer-Rao bound is from the exact derivatives of
the smooth mode at the truth.

Reference: Atilgan et al. (2001), Biophys. J. 80, 505, for the network; arXiv 2410.08125 for the smoothing.
"""  # noqa: E501

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import torch
from numpy.typing import NDArray

import bridge
from bridge import (
    BlockStructure,
    CryoET,
    Deformation,
    Detector,
    Microscope,
    Parameter,
    ParameterSpace,
    Specimen,
    cramer_rao,
    cryoet,
)

Array = NDArray[np.float64]

PROTEIN = Path(__file__).resolve().parent / "data" / "6wg6.cif.gz"
POSE = ("x_tilt_deg", "y_tilt_deg", "rotation_deg", "x_angstrom", "y_angstrom")
MODES = 3
BENDING = Deformation(modes=MODES, cutoff_angstrom=12.0)
SHAPE, PIXEL = (44, 44), 4.0
LENS = Microscope(defocus_um=1.2, b_factor_angstrom2=30.0)
DOSE = 40.0  # electrons per square angstrom
AMPLITUDE = 2.5  # largest true amplitude in size [angstrom]
COARSE_DEG, COARSE_ANGSTROM = 6.0, 5.0  # what a coarse search leaves, at most
SLABS, VOXEL = 4, 1.0  # of the target; voxels of displaced solvent [angstrom]
SAMPLES, STEPS, SCALES = 48, 8, (1.5, 0.3)  # of an estimate; of Gauss-Newton; of the smoothing, in natural units
CMA_WIDTH = 0.5  # of the first generation, in natural units


@dataclass(frozen=True, eq=False)
class Projections:
    """Several images of one deforming protein, each with a pose of its own; a `bridge.Simulator`.

    Args:
        images: one `CryoET` each; they share their projector.
    """

    images: tuple[CryoET, ...]

    @classmethod
    def of(cls, specimen: Specimen, views: Array, mode: str = "hard") -> Projections:
        """One image of each view (k, 3): x-tilt, y-tilt and rotation, about which the pose is sought [degree]."""
        names = (*BENDING.values, *POSE)
        first: CryoET | None = None
        images = []
        for view in views:
            limits = {name: (angle - 25, angle + 25) for name, angle in zip(POSE, view.tolist(), strict=False)}
            settings: dict[str, Any] = {"bounds": {**limits, "x_angstrom": (-30, 30), "y_angstrom": (-30, 30)}}
            if first is None:
                first = CryoET(
                    specimen,
                    SHAPE,
                    PIXEL,
                    LENS,
                    Detector(DOSE, dqe=1.0),
                    names,
                    mode=mode,  # type: ignore[arg-type]
                    deformation=BENDING,
                    **settings,
                )
            images.append(first.replace(**settings))
        return cls(tuple(images))

    @property
    def space(self) -> ParameterSpace:
        """The amplitudes, then five parameters of each image, as x_tilt_deg[0]."""
        parameters = list(self.images[0].space.parameters[:MODES])
        for i, image in enumerate(self.images):
            for p in image.space.parameters[MODES:]:
                natural = min(p.natural_scale, 2.0)  # 2 degrees and 2 angstrom: smoothing must not blur the image
                parameters.append(Parameter(f"{p.name}[{i}]", p.unit, p.lower, p.upper, natural))
        return ParameterSpace(tuple(parameters))

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (len(self.images), *SHAPE)

    @property
    def structure(self) -> BlockStructure:
        """A pose touches its own image, amplitudes touch all."""
        number = len(self.images)
        return BlockStructure([-1] * MODES + np.repeat(np.arange(number), len(POSE)).tolist(), np.arange(number))

    def split(self, theta: Any) -> list[Any]:
        """The parameters of each image, from those of all (..., d)."""
        join = torch.cat if isinstance(theta, torch.Tensor) else np.concatenate
        size = len(POSE)
        return [
            join((theta[..., :MODES], theta[..., MODES + size * i : MODES + size * (i + 1)]), -1)
            for i in range(len(self.images))
        ]

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        parts = zip(self.images, self.split(np.asarray(inputs)), strict=True)
        return np.stack([image(own, seeds) for image, own in parts], axis=1)


@dataclass(frozen=True)
class Problem:
    """What is to be found, and from what."""

    simulator: Projections
    truth: Array
    start: Array
    target: Array

    @property
    def variance(self) -> float:
        """Of a pixel's counts: the mean count, since contrast is weak."""
        return DOSE * PIXEL**2


def views(number: int) -> Array:
    """Far apart on the half-sphere: a spiral; (number, 3) x-tilt, y-tilt, rotation [degree]."""
    k = np.arange(number) + 0.5
    polar, around = np.rad2deg(np.arccos(1 - k / number)), 137.508 * np.arange(number)
    return np.stack((polar * np.cos(np.deg2rad(around)), polar * np.sin(np.deg2rad(around)), 20.0 * k), axis=1)


def problem(seed: int, number: int) -> Problem:
    """A random truth, images of it, and what a coarse search might have left."""
    random = np.random.Generator(np.random.Philox(key=(seed, 2)))
    specimen = Specimen.from_file(PROTEIN)
    simulator = Projections.of(specimen, views(number))
    amplitudes = random.uniform(-AMPLITUDE, AMPLITUDE, MODES)
    poses = np.concatenate((views(number) + random.uniform(-5, 5, (number, 3)), random.uniform(-4, 4, (number, 2))), 1)
    bent = BENDING.applied(specimen, dict(zip(BENDING.values, amplitudes.tolist(), strict=True)))
    counts = [random.poisson(expected_counts(bent, pose)) for pose in poses]
    errors = random.uniform(-1, 1, (number, len(POSE))) * ([COARSE_DEG] * 3 + [COARSE_ANGSTROM] * 2)
    truth = np.concatenate((amplitudes, poses.reshape(-1)))
    start = np.concatenate((np.zeros(MODES), (poses + errors).reshape(-1)))
    return Problem(simulator, truth, start, np.array(counts, dtype=np.float64))


def expected_counts(specimen: Specimen, pose: Array, finer: int = 3, slabs: int = SLABS) -> Array:
    """Expected electrons of each pixel by multislice on a finer grid; `pose` in the order of `POSE`."""
    x_tilt, y_tilt, turn = np.deg2rad(pose[:3])
    about_x = [[1, 0, 0], [0, np.cos(x_tilt), -np.sin(x_tilt)], [0, np.sin(x_tilt), np.cos(x_tilt)]]
    about_y = [[np.cos(y_tilt), 0, np.sin(y_tilt)], [0, 1, 0], [-np.sin(y_tilt), 0, np.cos(y_tilt)]]
    about_z = [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    xyz = specimen.positions @ (np.array(about_z) @ about_y @ about_x).T + [pose[3], pose[4], 0.0]
    step, size = PIXEL / finer, finer * 2 * (SHAPE[0] // 2 + 20)

    def part(which: NDArray[np.bool_]) -> Specimen:
        kept = {name: getattr(specimen, name)[which] for name in ("weights", "b_factors", "hydrogens")}
        return Specimen.from_atoms(xyz[which], specimen.atomic_numbers[which], **kept)

    voxels = cryoet.displaced_voxels(part(np.ones(len(xyz), dtype=np.bool_)), VOXEL)
    solvent = np.concatenate([(np.argwhere(full) + low) * VOXEL for full, low in voxels]).astype(np.float64)
    edges = np.linspace(solvent[:, 2].min() - 1e-6, solvent[:, 2].max() + 1e-6, slabs + 1)
    grid = cryoet.frequencies((size, size), step, torch.float64)
    q2 = grid.q2.numpy()
    drift = math.pi * cryoet.wavelength_angstrom(LENS.voltage_kv) * q2
    loss = LENS.amplitude_contrast / math.sqrt(1 - LENS.amplitude_contrast**2)
    spectrum = np.fft.fft2(np.ones((size, size), dtype=complex))
    height = edges[-1]
    # The electrons meet the highest slab first; height adds to the underfocus, whose phase is drift times height.
    for low, high in reversed(list(itertools.pairwise(edges))):
        here = (xyz[:, 2] >= low) & (xyz[:, 2] < high)
        middle = 0.5 * (low + high)
        spectrum = spectrum * np.exp(1j * drift * (height - middle))
        height = middle
        potential = np.zeros((size, size))
        if here.any():
            potential += cryoet.projected_potential(part(here), (size, size), step)
        inside = (solvent[:, 2] >= low) & (solvent[:, 2] < high)
        thickness = np.zeros((size, size))
        cryoet.add_linear(
            thickness, solvent[inside, 1::-1] / step + size // 2, np.full(int(inside.sum()), VOXEL**3 / step**2)
        )
        phase = cryoet.interaction_constant(LENS.voltage_kv) * (potential - cryoet.ice_potential() * thickness)
        spectrum = np.fft.fft2(np.fft.ifft2(spectrum) * np.exp((1j - loss) * phase))
    lens = cryoet.transfer_function(LENS.values(), grid, smooth=False).numpy()
    wave = np.fft.ifft2(spectrum * np.exp(1j * drift * height) * lens)
    intensity = scipy.fft.fft2(np.abs(wave) ** 2)
    keep = size // finer
    low = np.concatenate((np.arange(keep // 2), np.arange(-(keep // 2), 0)))
    image = scipy.fft.ifft2(intensity[np.ix_(low, low)]).real / finer**2
    edge = keep // 2 - SHAPE[0] // 2
    return np.maximum(image[edge : edge + SHAPE[0], edge : edge + SHAPE[1]] * DOSE * PIXEL**2, 0.0)


def bound(task: Problem) -> Array:
    """Cramer-Rao bounds (d,) at the truth: amplitudes see all images, a pose its own."""
    d, size = len(task.truth), len(POSE)
    fisher = np.zeros((d, d))
    for i, (image, own) in enumerate(zip(task.simulator.images, task.simulator.split(task.truth), strict=True)):
        index = np.concatenate((np.arange(MODES), MODES + size * i + np.arange(size)))
        fisher[np.ix_(index, index)] += cramer_rao(image.replace(mode="smooth"), own).fisher
    return np.sqrt(np.diag(np.linalg.inv(fisher)))


@dataclass(frozen=True)
class Found:
    """What a method ends with, and how many simulations of all images it took."""

    parameters: Array
    standard_error: Array | None
    runs: int


def smoothed(task: Problem, seed: int, steps: int = STEPS, samples: int = SAMPLES) -> Found:
    """Gauss-Newton on the smoothed Jacobian, coarse to fine."""
    result = bridge.fit(
        task.simulator,
        task.target,
        task.start,
        seed=seed,
        method=bridge.GaussNewton(steps=steps, num_samples=samples, scale=SCALES),
        variance=task.variance,
    )
    return Found(result.parameters, result.standard_error, result.num_evaluations)


def cma_es(task: Problem, seed: int, budget: int, width: float = CMA_WIDTH) -> Found:
    """CMA-ES on the mean square misfit, in natural units."""
    import cma

    space, none = task.simulator.space, np.zeros(1, dtype=np.uint64)
    natural = space.natural_scale
    bounds = [(space.lower / natural).tolist(), (space.upper / natural).tolist()]
    options = {"seed": seed + 1, "bounds": bounds, "verbose": -9, "maxfevals": budget, "tolfun": 1e-12}
    search = cma.CMAEvolutionStrategy(task.start / natural, width, options)
    best, runs = (math.inf, task.start), 0
    while runs < budget and not search.stop():
        asked = search.ask()
        losses = []
        for u in asked[: budget - runs]:
            point = np.clip(np.asarray(u) * natural, space.lower, space.upper)
            image = task.simulator(point[None], none)[0].astype(np.float64)
            losses.append(float(((image - task.target) ** 2).mean()) / task.variance)
            if losses[-1] < best[0]:
                best = losses[-1], point
        runs += len(losses)
        if len(losses) < len(asked):
            break
        search.tell(asked, losses)
    return Found(best[1], None, runs)


# --- reports ------------------------------------------------------------------------------------------------------


def in_bounds(found: Found, task: Problem, least: Array) -> dict[str, float]:
    """Root mean square errors in units of the Cramer-Rao bounds, of amplitudes and of poses."""
    z = (found.parameters - task.truth) / least
    return {
        "amplitudes": float(np.sqrt((z[:MODES] ** 2).mean())),
        "poses": float(np.sqrt((z[MODES:] ** 2).mean())),
        "largest": float(np.abs(z).max()),
        "runs": found.runs,
    }


def trace(amplitudes: Array) -> Array:
    """C-alpha atoms (n, 3) of the bent structure."""
    specimen = Specimen.from_file(PROTEIN)
    assert specimen.residues is not None
    bent = BENDING.applied(specimen, dict(zip(BENDING.values, amplitudes.tolist(), strict=True)))
    return bent.positions[specimen.residues.nodes]


def picture(task: Problem, found: Found, least: Array, path: Path) -> None:
    """Target, fit and difference of each image; the amplitudes; the structure before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    number = len(task.target)
    none = np.zeros(1, dtype=np.uint64)
    fit, start = (task.simulator(p[None], none)[0] for p in (found.parameters, task.start))
    figure = plt.figure(figsize=(13.5, 8.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.45, 1))
    axes = left.subplots(4, number)
    noise = math.sqrt(task.variance)
    rows = (
        ("target (counts)", task.target, 3.0),
        ("fit", fit, 0.7),
        ("target - fit", task.target - fit, 3.0),
        ("fit - start", fit - start, 0.7),
    )
    for line, (name, images, limit) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            centre = image.mean() if "-" not in name else 0.0
            axis.imshow(image, cmap="gray", vmin=centre - limit * noise, vmax=centre + limit * noise)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name)
    left.suptitle(
        f"{number} images of {DOSE:g} e/angstrom$^2$, {PIXEL:g} angstrom a pixel; grey: $\\pm$3 (counts) or "
        "0.7 standard deviations of the noise",
        fontsize=9,
    )
    upper, lower = right.subplots(2, 1, height_ratios=(1, 1.6))
    place = np.arange(MODES)
    error = found.standard_error[:MODES] if found.standard_error is not None else least[:MODES]
    upper.bar(place, task.truth[:MODES], 0.8, color="0.85", label="truth")
    upper.errorbar(
        place, found.parameters[:MODES], 2 * error, fmt="o", color="C3", capsize=4, label="fit, 2 std. errors"
    )
    upper.plot(place, task.start[:MODES], "x", color="C0", label="start")
    upper.axhline(0, color="0.5", linewidth=0.6)
    upper.set_xticks(place, [f"mode {k}" for k in place])
    upper.set_ylabel("amplitude [angstrom]")
    for k in place:
        value, sigma, bound_ = found.parameters[k], error[k], least[k]
        text = f"truth {task.truth[k]:+.2f}\nfit {value:+.2f} $\\pm$ {sigma:.2f}\nbound {bound_:.2f}"
        upper.annotate(text, (k, 0), (k, 0.02), textcoords=upper.get_xaxis_transform(), ha="center", fontsize=8)
    upper.set_ylim(-2.1 * AMPLITUDE, 1.5 * AMPLITUDE)
    upper.legend(fontsize=8, loc="upper right", ncols=3)
    for amplitudes, colour, name in (
        (task.start[:MODES], "C0", "start"),
        (task.truth[:MODES], "0.6", "truth"),
        (found.parameters[:MODES], "C3", "fit"),
    ):
        xyz = trace(amplitudes)
        breaks = np.linalg.norm(np.diff(xyz, axis=0), axis=1) > 6
        line = np.insert(xyz, np.flatnonzero(breaks) + 1, np.nan, axis=0)
        width = 3.5 if name == "truth" else 1.0
        lower.plot(line[:, 2], line[:, 0], color=colour, linewidth=width, label=name)
    lower.set_aspect("equal")
    lower.set_xlabel("z [angstrom]")
    lower.set_ylabel("x [angstrom]")
    lower.set_title("C-alpha traces along y", fontsize=10)
    lower.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def numbers(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last) if last else int(first) + 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seeds", type=numbers, default=range(1), help="first:last, the last left out")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=["smoothed", "cma"], default=["smoothed"])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of an estimate")
    parser.add_argument("--steps", type=int, default=STEPS, help="of Gauss-Newton")
    parser.add_argument("--output", type=Path, default=Path("structure"), help="folder of seed_0.json, ...")
    parser.add_argument("--picture", type=Path, help="PNG of the last seed's fit")
    options = parser.parse_args(arguments)
    for seed in options.seeds:
        task = problem(seed, options.images)
        least = bound(task)
        lines: dict[str, Any] = {"start": in_bounds(Found(task.start, None, 0), task, least)}
        budget = (options.steps + 1) * options.samples + 4  # what a fit takes, with its first and last images
        for method in options.methods:
            if method == "smoothed":
                found = smoothed(task, seed, options.steps, options.samples)
                if options.picture and bridge.is_root():
                    picture(task, found, least, options.picture)
            else:
                found = cma_es(task, seed, budget)
            lines[method] = in_bounds(found, task, least)
            if found.standard_error is not None:
                ratio = found.standard_error / least
                lines[method]["standard_error"] = float(np.sqrt((ratio**2).mean()))
            lines[method] |= {"parameters": found.parameters.tolist()}
        if bridge.is_root():
            lines |= {"truth": task.truth.tolist(), "bound": least.tolist(), "names": list(task.simulator.space.names)}
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / f"seed_{seed}.json").write_text(json.dumps(lines, indent=1) + "\n")
            for method in ("start", *options.methods):
                r = lines[method]
                print(
                    f"seed {seed} {method:8s} errors in bounds: amplitudes {r['amplitudes']:6.2f}, poses "
                    f"{r['poses']:6.2f}, largest {r['largest']:6.2f}; {r['runs']} runs",
                    flush=True,
                )


if __name__ == "__main__":
    main()
