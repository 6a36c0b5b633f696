"""Settings of an electron microscope from a micrograph, by four methods at equal numbers of simulations.

    python examples/published_experiment.py --parameters 2 --seeds 0:4
    python examples/published_experiment.py --parameters 4 --seeds 0:4 --structure 2OM3.pdb --transforms 2OM3_transf.txt --theta 90

The experiment of generalized stochastic smoothing with TEM-simulator: a clean micrograph of 400 x 400 pixels of 0.5 nm at
300 kV and a focal length of 3 mm, one particle in the middle. Two parameters: voltage in [0, 1000] kV and x in [-5, 5]
nm. Four: voltage in [0, 600] kV, focal length in [0, 6] mm, x and y in [-3, 3] nm. Starts are uniform in the domain, less
the voltages below 20 kV and focal lengths below 0.5 mm: there is no microscope like it. The simulator is `TEMSim`, which
gives the program's images in a hundredth of a second; the particle is this repository's protein, or the one named.

"adam" is descent along smoothed gradients with Adam (betas 0.5 and 0.9), "gauss-newton" is `bridge.fit`
from the best of a quarter of the budget at random; "random" takes the best of uniform points, and "cma" is CMA-ES with restarts (`pip install cma`). All may run `budget` simulations.

Found is what comes within 5 % of voltage and focal length, and 0.25 nm, half a pixel, of the place. What can be found at
all the standard errors say: those of an unbiased estimate from one micrograph with the detector's noise.

Reference: Petersen, Borgelt, Mishra, Ermon, arXiv 2410.08125.
"""  # noqa: E501

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import bridge
from simulators.cryoet import Specimen, TEMSim

Array = NDArray[np.float64]

PROTEIN = Path(__file__).resolve().parent / "data" / "6wg6.cif.gz"
BOUNDS = {
    2: {"voltage_kv": (20.0, 1000.0), "x_nm": (-5.0, 5.0)},
    4: {
        "voltage_kv": (20.0, 600.0),
        "focal_length_mm": (0.5, 6.0),
        "x_nm": (-3.0, 3.0),
        "y_nm": (-3.0, 3.0),
    },
}
NATURAL = {"voltage_kv": 60.0, "focal_length_mm": 0.6, "x_nm": 1.0, "y_nm": 1.0}
NEAR = {"voltage_kv": 15.0, "focal_length_mm": 0.15, "x_nm": 0.25, "y_nm": 0.25}
SAMPLES = 16  # of an estimate
SCALES = (1.0, 0.1)  # of the smoothing, first and last, in natural units
SCREENED = 0.25  # share of the runs that looks for the start of Gauss-Newton
LEARNING_RATE = 0.5  # of Adam, in units of the scale


@dataclass(frozen=True)
class Task:
    """A simulator, its target, and the variance of a pixel's noise."""

    simulator: TEMSim
    target: Array
    variance: float

    def losses(self, points: Array) -> Array:
        """Half the mean square misfit of each of k parameter vectors, in units of the noise."""
        images = self.simulator(points, np.zeros(len(points), dtype=np.uint64))
        misfit = images.reshape(len(points), -1) - self.target.reshape(1, -1)
        return 0.5 * (misfit * misfit).mean(axis=1, dtype=np.float64) / self.variance

    def start(self, seed: int) -> Array:
        space = self.simulator.space
        return np.random.Generator(np.random.Philox(key=seed)).uniform(space.lower, space.upper)


def random_search(task: Task, seed: int, budget: int) -> Array:
    """The best of the start and of uniform points."""
    space = task.simulator.space
    points = np.random.Generator(np.random.Philox(key=(seed, 1))).uniform(
        space.lower, space.upper, (budget - 1, space.dimension)
    )
    points = np.concatenate((task.start(seed)[None], points))
    return points[np.argmin([task.losses(p[None])[0] for p in points])]


def cma_es(task: Task, seed: int, budget: int) -> Array:
    import cma

    space, left = task.simulator.space, budget
    width, best = space.upper - space.lower, (math.inf, task.start(seed))
    first, restart = (task.start(seed) - space.lower) / width, 0
    while left > 0:
        options = {
            "seed": 1 + 1000 * seed + restart,
            "bounds": [0, 1],
            "verbose": -9,
            "tolfun": 1e-9,
            "maxfevals": left,
        }
        search = cma.CMAEvolutionStrategy(first, 0.25, options)
        while left > 0 and not search.stop():
            asked = search.ask()
            losses = task.losses(space.lower + width * np.array(asked[:left]))
            best = min([best, *zip(losses.tolist(), space.lower + width * np.array(asked[:left]), strict=True)],
                       key=lambda pair: pair[0])  # fmt: skip
            if len(asked) > left:
                left = 0
                break
            left -= len(asked)
            search.tell(asked, losses.tolist())
        restart += 1
        first = np.random.Generator(np.random.Philox(key=(seed, restart))).random(space.dimension)
    return best[1]


def adam(task: Task, seed: int, budget: int) -> Array:
    space, steps = task.simulator.space, budget // SAMPLES
    lower, upper, unit = (torch.from_numpy(v) for v in (space.lower, space.upper, space.natural_scale))
    theta = (torch.from_numpy(task.start(seed)) / unit).requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=LEARNING_RATE, betas=(0.5, 0.9))
    target = torch.from_numpy(task.target)
    for step in range(steps):
        scale = SCALES[0] * (SCALES[1] / SCALES[0]) ** (step / max(steps - 1, 1))
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * scale
        smoothed = bridge.smooth(task.simulator, seed=seed, num_samples=SAMPLES, scale=scale)
        optimiser.zero_grad()
        loss = ((smoothed(theta * unit, step=step) - target) ** 2).mean() / task.variance
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            theta.copy_(torch.minimum(torch.maximum(theta, lower / unit), upper / unit))
    return (theta.detach() * unit).numpy()


def gauss_newton(task: Task, seed: int, budget: int) -> Array:
    screened = int(SCREENED * budget)
    result = bridge.fit(
        task.simulator,
        task.target,
        random_search(task, seed, screened),
        seed=seed,
        method="gauss-newton",
        # The last runs show the start's and the result's images.
        steps=(budget - screened - 2) // SAMPLES,
        num_samples=SAMPLES,
        scale=SCALES,
        variance=task.variance,
    )
    return result.parameters


METHODS: dict[str, Callable[[Task, int, int], Array]] = {
    "random": random_search,
    "cma": cma_es,
    "adam": adam,
    "gauss-newton": gauss_newton,
}


def make_task(arguments: argparse.Namespace) -> Task:
    bounds = BOUNDS[arguments.parameters]
    path = Path(arguments.structure)
    structure = path if path.suffix == ".pdb" else Specimen.from_file(path)
    simulator = TEMSim(
        structure,
        arguments.transforms,
        shape=(arguments.size, arguments.size),
        placement={"theta_deg": arguments.theta},
        parameters=tuple(bounds),
        bounds=bounds,
        natural_scale={name: NATURAL[name] for name in bounds},
    )
    target = simulator(simulator.reference[None], np.zeros(1, dtype=np.uint64))[0].astype(np.float64)
    # Counts: gain^2 electrons / DQE. The MTF, which smooths the noise, is left out.
    return Task(simulator, target, 10.0 * float(target.mean()) / 0.4)


def standard_errors(task: Task) -> Array:
    """sqrt(diag((J^T J / variance)^-1)) at the truth, J of the smoothed simulator (a tenth of the natural units)."""
    smoothed = bridge.smooth(task.simulator, seed=0, num_samples=128, scale=0.1)
    jacobian = smoothed.estimate(torch.from_numpy(task.simulator.reference)).jacobian()
    j = np.asarray(jacobian, dtype=np.float64).reshape(-1, task.simulator.space.dimension)
    return np.sqrt(np.diag(np.linalg.inv(j.T @ j / task.variance)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=int, choices=(2, 4), default=2)
    parser.add_argument("--seeds", default="0:4", help="first:end")
    parser.add_argument("--budget", type=int, default=400, help="simulations of one recovery")
    parser.add_argument("--size", type=int, default=400, help="rows and columns")
    parser.add_argument("--structure", default=str(PROTEIN), help="PDB (read as TEM-simulator does) or mmCIF")
    parser.add_argument("--transforms", default=None, help="table of 3 x 4 matrices, one a copy of a PDB file")
    parser.add_argument("--theta", type=float, default=0.0, help="turn about x [degree]")
    parser.add_argument("--methods", default=",".join(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, end = map(int, arguments.seeds.split(":"))
    task = make_task(arguments)
    space, truth = task.simulator.space, task.simulator.reference
    near = np.array([NEAR[name] for name in space.names])
    print("standard errors of one noisy micrograph:", ", ".join(
        f"{name} {error:.2g}" for name, error in zip(space.names, standard_errors(task), strict=True)))  # fmt: skip
    header = f"{'method':<14}{'found':>8}" + "".join(f"{name:>18}" for name in space.names) + f"{'loss':>11}"
    print(
        f"{end - first} starts, {arguments.budget} simulations each; found, and the median error of each parameter\n"
        f"{header}"
    )
    for name in arguments.methods.split(","):
        if name == "cma" and importlib.util.find_spec("cma") is None:
            print(f"{name:<14} needs the package cma")
            continue
        ends = np.array([METHODS[name](task, seed, arguments.budget) for seed in range(first, end)])
        errors = np.abs(ends - truth)
        found = int((errors <= near).all(axis=1).sum())
        loss = float(np.median(task.losses(ends)))
        middle = "".join(f"{value:>18.3g}" for value in np.median(errors, axis=0))
        print(f"{name:<14}{found:>4} of {end - first}{middle}{loss:>11.2g}", flush=True)


if __name__ == "__main__":
    main()
