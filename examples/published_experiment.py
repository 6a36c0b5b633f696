"""Voltage, focal length and place of a particle from one micrograph: the published experiment with TEM-simulator.

    python examples/published_experiment.py --parameters 2 --starts 0:10 --targets clean,0,1,2
    python examples/published_experiment.py --parameters 4 --structure 2OM3.pdb --transforms 2OM3_transf.txt --theta 90
    TEM_SIMULATOR=... python examples/published_experiment.py --simulator program --structure 2OM3.pdb ... --starts 0:3

A micrograph of 400 x 400 pixels of 0.5 nm at 300 kV and a focal length of 3 mm, one particle in the middle, without
noise ("clean") or with the detector's (numbers are its seeds; SNR 0.03). Two parameters: voltage in [0, 1000] kV and x
in [-5, 5] nm. Four: voltage in [0, 600] kV, focal length in [0, 6] mm, x and y in [-3, 3] nm. Starts are uniform in the
box; there are no voltages below 1 kV, and here no focal lengths below 0.1 mm: queries beyond are moved there.

The simulator is `TEMSim`, which gives TEM-simulator's images without the program, or with `--simulator program` the
program itself (by its adapter). The particle is this repository's protein, or the structure named; the published one is
the tobacco mosaic virus, PDB 2OM3, seen from the side.

The method: one round is one dispatch of simulations.
1. The start and a scrambled Sobol' design over the box. Voltage and focal length are taken from the point of least
   loss, the place from that of largest correlation: brightness tells the former, the pattern the latter.
2. Gauss-Newton on the smoothed Jacobian, in log voltage, log focal length, x and y. Each round evaluates the proposed
   point together with a cross of 2 d points around it, for the next Jacobian (`Cross`). The scale matrix L is a root of
   (J^T J / KAPPA + 1 / width^2)^-1: the noise is wide along what the image hardly shows, a valley of one brightness,
   V = 100 f, and narrow across it. A step must lower the loss, else the trust region shrinks,
   and opens again once it has collapsed.

Reference: Petersen, Borgelt, Mishra, Ermon, arXiv 2410.08125; results: docs/published_experiment/README.md.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import qmc

import bridge
from bridge import Distribution, Nodes, Specimen, TEMSim, cryoet

Array = NDArray[np.float64]

PROTEIN = Path(__file__).resolve().parent / "data" / "6wg6.cif.gz"
BOUNDS = {
    2: {"voltage_kv": (1.0, 1000.0), "x_nm": (-5.0, 5.0)},
    4: {"voltage_kv": (1.0, 600.0), "focal_length_mm": (0.1, 6.0), "x_nm": (-3.0, 3.0), "y_nm": (-3.0, 3.0)},
}
TRUTH = {"voltage_kv": 300.0, "focal_length_mm": 3.0, "x_nm": 0.0, "y_nm": 0.0}
NEAR = {"voltage_kv": 6.0, "focal_length_mm": 0.1, "x_nm": 0.1, "y_nm": 0.1}
# Natural scales of log voltage, log focal length, x and y [nm].
NATURAL = {"voltage_kv": 0.3, "focal_length_mm": 0.3, "x_nm": 1.0, "y_nm": 1.0}
BRIGHTNESS = ("voltage_kv", "focal_length_mm")  # the parameters that are logarithmic, and found by brightness

# Of the method, chosen on starts and targets other than those reported.
DESIGN = 8  # points of the first round for each parameter
WIDTHS = (0.02, 0.5)  # least and largest width of the smoothing, in natural units
KAPPA = 10.0  # perturbations change the loss by about half of it
LIMITS = (1.0, 1.5)  # the first and the largest trust region, in natural units
ENOUGH = 0.01  # it ends where a step would gain less: the loss is in units of the noise

Residual = Callable[[torch.Tensor], torch.Tensor]


class Cross(bridge.PointSet):
    """Pairs eps, -eps along d orthogonal directions, turned at random, all of length sqrt(d); a single point is 0.

    As a rule of integration it is exact for Gaussian moments up to the third, and least squares on it are always well
    posed, where independent lengths leave one direction nearly unseen now and then.
    """

    name = "cross"

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        raise NotImplementedError("The cross is made of Gaussian nodes, not of points of the unit cube.")

    def nodes(self, distribution: Distribution, n: int, d: int, rng: np.random.Generator) -> Nodes:
        if n == 1:
            return Nodes(np.zeros((1, d)), np.zeros((1, d)), np.ones(1), 1)
        if n % (2 * d):
            raise bridge.errors.InputError(f"Expected a multiple of {2 * d} samples, or one, got {n}.")
        q, r = np.linalg.qr(rng.standard_normal((n // (2 * d), d, d)))
        q = (q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]).reshape(-1, d) * np.sqrt(d)
        eps = np.stack([q, -q], axis=1).reshape(n, d)
        return Nodes(eps, eps.copy(), np.full(n, 1 / n), 2 * d, paired=True)


@dataclass(frozen=True)
class Logarithmic:
    """A simulator whose voltage and focal length are given by their logarithms."""

    inner: Any

    @property
    def space(self) -> bridge.ParameterSpace:
        inner = self.inner.space
        lower, upper = self.coordinates(inner.lower), self.coordinates(inner.upper)
        rows = zip(inner.names, lower.tolist(), upper.tolist(), strict=True)
        return bridge.ParameterSpace(tuple(bridge.Parameter(n, "", a, b, NATURAL[n]) for n, a, b in rows))

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.inner.output_shape  # type: ignore[no-any-return]

    @property
    def logarithmic(self) -> NDArray[np.bool_]:
        return np.array([name in BRIGHTNESS for name in self.inner.space.names])

    def coordinates(self, theta: Array) -> Array:
        return np.where(self.logarithmic, np.log(np.where(self.logarithmic, theta, 1.0)), theta)

    def parameters(self, u: Array) -> Array:
        return np.where(self.logarithmic, np.exp(np.where(self.logarithmic, u, 0.0)), u)

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[Any]:
        space = self.inner.space  # the exponential of a bound may miss it by a rounding
        return self.inner(np.clip(self.parameters(inputs), space.lower, space.upper), seeds)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Problem:
    """A simulator in logarithmic coordinates, a target, and the losses: half the squared norm of a residual.

    All residuals are in units of the noise: their square has about one unit a pixel at the truth.

    Args:
        simulator: of clean images.
        target: (rows, columns) counts, float64.
        camera: gain, DQE and MTF of the detector.
        loss: "l2"; "whitened", after division by the MTF, which makes the noise white; "ncc", whitened, with the gain
            and the offset that fit best: a function of the normalised cross-correlation alone; "poisson", the
            deviance of counted electrons.
    """

    simulator: Logarithmic
    target: torch.Tensor
    camera: cryoet.Camera
    loss: str = "whitened"

    @property
    def variance(self) -> float:
        """Of a pixel's noise before the MTF: gain^2 electrons / DQE."""
        return self.camera.gain * float(self.target.mean()) / self.camera.dqe

    def _white(self, image: torch.Tensor) -> torch.Tensor:
        shape = (int(image.shape[-2]), int(image.shape[-1]))
        spectrum = torch.fft.rfft2(image) / self.camera.mtf(shape).to(torch.float64)
        return torch.fft.irfft2(spectrum, s=shape) / self.variance**0.5

    def residual(self, image: torch.Tensor, loss: str | None = None) -> torch.Tensor:
        """Of an image (rows, columns) float64; differentiable."""
        loss = loss or self.loss
        if loss == "l2":
            mtf = self.camera.mtf((int(image.shape[0]), int(image.shape[1]))).to(torch.float64)
            # The columns of a half spectrum count twice, but for the first and the last.
            power = 2 * (mtf**2).sum() - (mtf[:, 0] ** 2).sum() - (mtf[:, -1] ** 2).sum() * (image.shape[1] % 2 == 0)
            return (image - self.target) / (self.variance * power / image.numel()).sqrt()
        if loss == "whitened":
            return self._white(image - self.target)
        if loss == "ncc":
            ours, theirs = (x - x.mean() for x in (self._white(image), self._white(self.target)))
            return ours * ((ours * theirs).sum() / (ours.square().sum() + 1e-12)) - theirs
        if loss == "poisson":
            # m - n + n log(n / m) = m g(n / m), g(1 + t) = (1 + t) log(1 + t) - t = t^2 / 2 - t^3 / 6 + ...
            mean = (image / self.camera.gain).clamp(min=1e-3)
            t = (self.target / self.camera.gain).clamp(min=1e-3) / mean - 1
            small = t.abs() < 1e-3
            safe = torch.where(small, torch.ones_like(t), t)
            ratio = torch.where(small, 1 - t / 3 + t * t / 6, 2 * ((1 + safe) * torch.log1p(safe) - safe) / safe**2)
            return -t * (self.camera.dqe * mean * ratio).sqrt()
        raise bridge.errors.InputError(f"Unknown loss {loss!r}. Known: l2, whitened, ncc, poisson.")

    def value(self, image: NDArray[Any] | torch.Tensor, loss: str | None = None) -> float:
        r = self.residual(torch.as_tensor(image, dtype=torch.float64), loss)
        return 0.5 * float((r * r).sum())

    def linearised(self, image: torch.Tensor, jacobian: torch.Tensor) -> tuple[Array, Array]:
        """The residual (m,) and its derivatives (m, d), by the chain rule from those of the image."""
        columns = [torch.func.jvp(self.residual, (image,), (t.contiguous(),)) for t in jacobian.unbind(dim=-1)]
        return columns[0][0].reshape(-1).numpy(), np.stack([c[1].reshape(-1).numpy() for c in columns], axis=1)

    def images(self, points: Array) -> NDArray[Any]:
        """Of k points, in one dispatch: all ranks share the work, and all have the images."""
        plain = bridge.smooth(self.simulator, seed=0, num_samples=1, points=Cross())
        return plain.estimate(torch.as_tensor(points)).value.numpy()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Answer:
    """The best point after so many runs in so many rounds (batches that need each other's results)."""

    runs: int
    rounds: int
    parameters: Array
    loss: float


def start_of(simulator: Any, seed: int) -> Array:
    """Uniform in the box (d,)."""
    space = simulator.space
    return np.random.Generator(np.random.Philox(key=seed)).uniform(space.lower, space.upper)


def first_design(problem: Problem, seed: int) -> tuple[Array, Answer]:
    """The start and Sobol' points: where Gauss-Newton begins, and the answer so far."""
    simulator, box = problem.simulator, problem.simulator.inner.space
    points = box.lower + (box.upper - box.lower) * qmc.Sobol(box.dimension, rng=seed).random(DESIGN * box.dimension)
    points[0] = start_of(simulator.inner, seed)
    points = simulator.coordinates(points)
    images = problem.images(points)
    losses = [problem.value(image) for image in images]
    pattern = [problem.value(image, "ncc") for image in images]
    best, alike = points[int(np.argmin(losses))], points[int(np.argmin(pattern))]
    first = np.where(simulator.logarithmic, best, alike)
    return first, Answer(len(points), 1, simulator.parameters(best), min(losses))


def descend(problem: Problem, u: Array, before: Answer, *, seed: int, budget: int, limit: float) -> list[Answer]:
    """Gauss-Newton from the point u; one answer a round.

    Args:
        before: what has been paid for, and the answer so far.
        budget: of runs, those before included.
        limit: of the first step, in natural units.
    """
    simulator, space = problem.simulator, problem.simulator.space
    d, natural = space.dimension, space.natural_scale
    scale, answers = np.diag(natural) * min(limit, WIDTHS[1]), [before]
    loss, opened, expected = np.inf, np.inf, 0.0
    while before.runs + len(answers) * (2 * d + 1) <= budget:
        step = len(answers)
        smoothed = bridge.smooth(
            simulator, seed=seed, num_samples=2 * d, points=Cross(), scale=torch.as_tensor(scale)
        ).straight_through()
        estimate = smoothed.estimate(torch.as_tensor(u), step)
        value = problem.value(estimate.value)
        if value <= loss:
            gained = (loss - value) / expected if expected else 1.0
            if expected:
                limit = min(2 * limit, LIMITS[1]) if gained > 0.7 else limit if gained > 0.25 else 0.5 * limit
            centre, loss = u, value
            residual, slopes = problem.linearised(estimate.value, estimate.jacobian())
            slopes = slopes * natural
            normal, gradient = slopes.T @ slopes, slopes.T @ residual
        else:
            limit *= 0.5
        last, runs = answers[-1], before.runs + step * (2 * d + 1)
        better = loss < last.loss
        answers.append(
            Answer(
                runs,
                before.rounds + step,
                *((simulator.parameters(centre), loss) if better else (last.parameters, last.loss)),
            )
        )
        # Levenberg and Marquardt's damping, as much as keeps the step within the trust region.
        damping = 1e-9 * float(np.trace(normal)) + 1e-300
        while np.abs(move := -np.linalg.solve(normal + damping * np.eye(d), gradient)).max() > limit:
            damping *= 2
        expected = loss - 0.5 * float(np.sum((residual + slopes @ move) ** 2))
        if expected < ENOUGH:
            break
        u = np.clip(centre + move * natural, space.lower, space.upper)
        if limit < LIMITS[0] / 64:  # a step of the simulator holds it: look again from here, with wide noise
            if opened - loss < ENOUGH:
                break
            u, limit, expected, opened = centre, LIMITS[0], 0.0, loss
        width = np.clip(limit, *WIDTHS)
        scale = natural[:, None] * np.linalg.cholesky(np.linalg.inv(normal / KAPPA + np.eye(d) / width**2))
    return answers


def recover(problem: Problem, seed: int, budget: int) -> list[Answer]:
    """The method of this example, from the start of that seed."""
    first, answer = first_design(problem, seed)
    return descend(problem, first, answer, seed=seed, budget=budget, limit=LIMITS[0])


def optimum(problem: Problem, budget: int = 200) -> Array:
    """The least loss near the truth: with a noisy target it is not at the truth, and no method can know better."""
    truth = np.array([TRUTH[name] for name in problem.simulator.space.names])
    u = problem.simulator.coordinates(truth)
    (value,) = map(problem.value, problem.images(u[None]))
    return descend(problem, u, Answer(1, 1, truth, value), seed=1, budget=budget, limit=0.1)[-1].parameters


def found_after(answers: list[Answer], aim: Array, names: tuple[str, ...]) -> Answer | None:
    """The first answer from which on all are within the tolerances of the aim; None where the last is not."""
    near = np.array([NEAR[name] for name in names])
    first = None
    for answer in answers:
        inside = bool((np.abs(answer.parameters - aim) < near).all())
        first = (first or answer) if inside else None
    return first


def covariance(problem: Problem, theta: Array, scale: float = 0.1) -> Array:
    """Of an unbiased estimate from one noisy micrograph: (J^T J)^-1 of the whitened smoothed Jacobian."""
    d, u = len(theta), problem.simulator.coordinates(theta)
    smoothed = bridge.smooth(problem.simulator, seed=0, num_samples=16 * d, points=Cross(), scale=scale)
    estimate = smoothed.estimate(torch.as_tensor(u))
    white = Problem(problem.simulator, problem.target, problem.camera, "whitened")
    _, slopes = white.linearised(estimate.value, estimate.jacobian())
    slopes = slopes / np.where(problem.simulator.logarithmic, theta, 1.0)
    return np.linalg.inv(slopes.T @ slopes)


SETTINGS = {"energy_spread_ev": 1.3, "defocus_um": 5.0, "cs_mm": 2.0, "cc_mm": 2.0, "aperture_um": 50.0}


def make_temsim(arguments: argparse.Namespace, **changes: Any) -> TEMSim:
    path, bounds = Path(arguments.structure), BOUNDS[arguments.parameters]
    return TEMSim(
        path if path.suffix == ".pdb" else Specimen.from_file(path),
        arguments.transforms,
        shape=(arguments.size, arguments.size),
        optics={**SETTINGS, "cond_ap_angle_mrad": 0.1, "voltage_kv": 300.0, "focal_length_mm": 3.0},
        placement={"theta_deg": arguments.theta},
        parameters=tuple(bounds),
        bounds=bounds,
        **changes,
    )


def make_program(arguments: argparse.Namespace, noise: str = "none") -> Any:
    """The program itself, by its adapter; a deck with the same settings."""
    from bridge import TEMSimulator

    place = Path(arguments.out or ".") / "coordinates.txt"
    place.parent.mkdir(parents=True, exist_ok=True)
    own = place.with_name(f"{place.name}.{os.getpid()}")  # ranks write it at the same time
    own.write_text(f"1 6\n0 0 0 0 {arguments.theta:g} 0\n", encoding="utf-8")
    own.replace(place)
    particle = {"source": "pdb", "voxel_size": 0.1, "pdb_file_in": str(Path(arguments.structure).absolute())}
    if arguments.transforms:
        particle["pdb_transf_file_in"] = str(Path(arguments.transforms).absolute())
    optics = {"magnification": 30000, "gen_defocus": True, "defocus_nominal": 5, "cs": 2, "cc": 2, "aperture": 50}
    detector = {"det_pix_x": arguments.size, "det_pix_y": arguments.size, "pixel_size": 15, "gain": 10, "dqe": 0.4}
    mtf = {"mtf_a": 0.7, "mtf_b": 0.2, "mtf_c": 0.1, "mtf_alpha": 10, "mtf_beta": 40}
    deck = {
        "sample": {"diameter": 1000, "thickness_center": 50, "thickness_edge": 150},
        "particle one": particle,
        "particleset": {"particle_type": "one", "particle_coords": "file", "coord_file_in": str(place.absolute())},
        "geometry": {"gen_tilt_data": True, "ntilts": 1, "theta_start": 0, "theta_incr": 0, "geom_errors": "none"},
        "electronbeam": {"acc_voltage": 300, "energy_spread": 1.3, "gen_dose": True, "dose_per_im": 6000},
        "optics": {**optics, "focal_length": 3, "cond_ap_angle": 0.1},
        "detector": {**detector, "use_quantization": True, **mtf},
    }
    bounds = BOUNDS[arguments.parameters]
    return TEMSimulator(deck, tuple(bounds), bounds=bounds, noise=noise)  # type: ignore[arg-type]


def make_problem(arguments: argparse.Namespace, target: str, simulator: Any = None) -> Problem:
    """The problem of a target, "clean" or the seed of its noise.

    Args:
        simulator: one made before, whose projection is kept.
    """
    if arguments.simulator == "program":
        simulator = simulator or make_program(arguments)
        source = simulator if target == "clean" else make_program(arguments, "noisy")
    else:
        simulator = simulator or make_temsim(arguments)
        source = simulator if target == "clean" else simulator.replace(noise="full")
    seed = np.array([0 if target == "clean" else int(target)], dtype=np.uint64)
    image = source(simulator.reference[None], seed)[0].astype(np.float64)
    return Problem(Logarithmic(simulator), torch.as_tensor(image), cryoet.Camera(), arguments.loss)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    result.add_argument("--parameters", type=int, choices=(2, 4), default=2)
    result.add_argument("--starts", default="0:4", help="first:end")
    result.add_argument("--targets", default="clean,0", help='"clean" and seeds of the noise')
    result.add_argument("--loss", default="whitened", choices=("l2", "whitened", "ncc", "poisson"))
    result.add_argument("--budget", type=int, default=None, help="runs of one recovery; default 48 or 300")
    result.add_argument("--simulator", default="temsim", choices=("temsim", "program"))
    result.add_argument("--size", type=int, default=400, help="rows and columns")
    result.add_argument("--structure", default=str(PROTEIN), help="PDB (read as TEM-simulator does) or mmCIF")
    result.add_argument("--transforms", default=None, help="table of 3 x 4 matrices, one a copy of a PDB file")
    result.add_argument("--theta", type=float, default=0.0, help="turn about x [degree]")
    result.add_argument("--out", default=None, help="folder for a table of the answers")
    return result


def numbers(text: str) -> range:
    first, end = map(int, text.split(":"))
    return range(first, end)


def main() -> None:
    arguments = parser().parse_args()
    torch.set_num_threads(1)
    budget, starts = arguments.budget or {2: 48, 4: 300}[arguments.parameters], numbers(arguments.starts)
    rows: list[list[Any]] = []
    simulator = None
    for target in arguments.targets.split(","):
        problem = make_problem(arguments, target, simulator)
        simulator, names = problem.simulator.inner, problem.simulator.space.names
        truth = np.array([TRUTH[name] for name in names])
        errors = np.sqrt(np.diag(covariance(problem, truth)))
        aim = truth if target == "clean" else optimum(problem)
        say(f"target {target}, {arguments.loss}; standard errors of one noisy micrograph and the least loss:")
        for name, error, value in zip(names, errors, aim, strict=True):
            say(f"  {name:<16} +- {error:<8.3g} {value:.4g}")
        for seed in starts:
            answers = recover(problem, seed, budget)
            last, hit, true = answers[-1], found_after(answers, aim, names), found_after(answers, truth, names)
            values = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, last.parameters, strict=True))
            told = f"found after {hit.runs} runs in {hit.rounds} rounds" if hit else "not found"
            say(f"  start {seed}: {told}{'' if true else ' (the truth is further off)'}; {last.runs} runs: {values}")
            after = (hit.runs, hit.rounds) if hit else ("", "")
            end = (*(f"{v:.6g}" for v in last.parameters), f"{last.loss:.6g}")
            rows.append([target, seed, arguments.loss, *after, int(true is not None), last.runs, *end])
    if arguments.out and bridge.is_root():
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
        header = ["target", "start", "loss", "runs_to_least_loss", "rounds", "truth_within_tolerance", "runs", *names]
        with open(
            Path(arguments.out) / f"answers_{arguments.parameters}.csv", "w", newline="", encoding="utf-8"
        ) as file:
            csv.writer(file).writerows([[*header, "loss_value"], *rows])


def say(text: str) -> None:
    if bridge.is_root():
        print(text, flush=True)


if __name__ == "__main__":
    main()
