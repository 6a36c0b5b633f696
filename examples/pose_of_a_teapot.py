"""Finds the pose of a teapot from its silhouette: four parameters, hard 64 x 64 images, few renders.

    python examples/pose_of_a_teapot.py --seeds 0:24 --budget 1000
    python examples/pose_of_a_teapot.py --seeds 0:24 --budget 1000 --method cma     # needs `pip install cma`
    mpirun -n 2 python examples/pose_of_a_teapot.py --seeds 0:96 --budget 4000      # ranks share the seeds

The task is that of GenDR's camera experiment: a goal pose (distance U(2.5, 4), elevation and azimuth N(0, 60 deg), half
angle of view 20 deg), into which the mesh is turned, so that the truth is elevation = azimuth = 0; a start whose
direction is off by 15-35, 35-55 or 55-75 deg, with distance U(2, 10) and half angle U(10, 30) deg. Success: sqrt(el^2 +
az^2) below 5 deg. Distance and angle of view are found as well, but not judged: they are nearly interchangeable.

Every method starts alike, by matching the apparent size of the start to the target's (two renders), and may ask for
`budget` renders. "smoothing" looks at random poses around the start, takes the best few, and follows each by
Gauss-Newton steps on the smoothed Jacobian, from a scale of 15 deg down to 1 deg (again from 5 deg where that came
near), until the loss says that it has arrived. "adam" is plain stochastic smoothing: one start, one gradient a step.
"cma" is CMA-ES with restarts.

Reference: Petersen, Goldluecke, Borgelt, Deussen: GenDR (CVPR 2022), experiments/opt_camera.py; arXiv 2410.08125.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import bridge
from adapters.cameras import turntable_pose
from adapters.pose_metrics import direction_angle_deg, mask_iou
from adapters.pyrender import teapot
from adapters.raster import RasterSimulator

Array = NDArray[np.float64]

BINS = ((15, 35), (35, 55), (55, 75))  # how far the start's direction is off [deg]
SUCCESS_DEG = 5.0
ARRIVED = 0.0012  # mean squared error of hard silhouettes: five pixels of 4,096
SAMPLES = 8  # of an estimate: four directions and their opposites, the least for a Jacobian in four parameters
STEPS = 10  # of Gauss-Newton from one start
SCALES = (1.5, 0.1)  # of the smoothing, first and last [natural units: 10 deg, 15 %]
NEAR = 0.015  # a loss at which a pose is worth polishing
POLISH_STEPS = 8
POLISH_SCALES = (0.5, 0.1)
SCREENED = 0.15  # share of the budget that goes to random poses
STARTS = 4  # the best of them
SPREAD = (2.0, 4.0, 4.0, 2.0)  # standard deviation of random poses around the start [natural units]
DAMPING = 0.02  # of Gauss-Newton, as a share of the mean curvature
LONGEST_STEP = 2.0  # [scales]
POOL = 4  # pixels of a block whose mean enters the fit: edges move by parts of a block


class Task:
    """A goal, a start, and renders that are counted; seed -> everything."""

    def __init__(self, seed: int, segments: int = 6) -> None:
        rng = np.random.default_rng([7, seed])
        elevation, azimuth = rng.normal(0, 60, 2)
        distance = rng.uniform(2.5, 4)
        mesh = teapot(segments)
        mesh.vertices -= mesh.bounds.mean(axis=0)
        mesh.vertices /= np.linalg.norm(mesh.vertices, axis=1).max()
        turn = turntable_pose(azimuth, elevation, 0.0)
        mesh.apply_transform(np.linalg.inv(turn))
        self.simulator = RasterSimulator(mesh, camera="turntable-log", normalise=False)
        self.space, self.output_shape, self.row_by_row = self.simulator.space, (64 // POOL, 64 // POOL), True
        self.bin = seed % len(BINS)
        length, direction = rng.uniform(*BINS[self.bin]), rng.uniform(0, 2 * np.pi)
        far, half = rng.uniform(2, 10), rng.uniform(10, 30)
        self.truth = np.array([_log_half_height(distance, 20), 0, 0, np.log(distance)])
        self.start = np.array(
            [_log_half_height(far, half), length * np.cos(direction), length * np.sin(direction), np.log(far)]
        )
        self.renders = 0
        self.target = self.render(self.truth[None])[0]
        self.renders = 0  # the target is given

    def render(self, poses: Array) -> NDArray[np.float32]:
        """(k, 64, 64) silhouettes; poses outside the bounds are brought inside."""
        self.renders += len(poses)
        inside, _ = self.space.admit(np.atleast_2d(poses))
        return self.simulator(inside, np.zeros(len(inside), np.uint64))[:, 0]

    def loss(self, poses: Array) -> Array:
        """(k,) mean squared error of hard silhouettes."""
        return ((self.render(poses) - self.target) ** 2).mean(axis=(1, 2), dtype=np.float64)

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        """As a `bridge.Simulator`: silhouettes averaged over blocks of pixels."""
        return pooled(self.render(inputs))

    def sized(self) -> Array:
        """The start with the apparent size of the target, from the covered areas."""
        pose = self.start.copy()
        pose[3] = max(pose[3], np.log(1.6))  # well outside the object
        for _ in range(2):
            pose[0] += 0.5 * np.log(max(self.render(pose[None]).mean(), 1 / 4096) / self.target.mean())
        return pose


def _log_half_height(distance: float, half_angle_deg: float) -> float:
    return float(np.log(distance * np.tan(np.deg2rad(half_angle_deg))))


def pooled(images: NDArray[np.float32]) -> NDArray[np.float32]:
    return images.reshape(len(images), 64 // POOL, POOL, 64 // POOL, POOL).mean(axis=(2, 4))


def scale_at(step: int, steps: int, scales: tuple[float, float] = SCALES) -> float:
    first, last = scales
    return float(first * (last / first) ** (step / max(steps - 1, 1)))


def smoothing(task: Task, seed: int, budget: int, comm: Any) -> Array:
    """Random poses, the best few, Gauss-Newton from each on the smoothed Jacobian, until one has arrived."""
    smoothed = bridge.smooth(task, seed=seed, num_samples=SAMPLES, points="orthogonal", antithetic=True, comm=comm)
    unit, target = task.space.natural_scale, pooled(task.target[None])[0].ravel()
    rng = np.random.default_rng([11, seed])
    centre = task.sized()
    best, best_loss, number = centre, np.inf, 0
    cost = STEPS * SAMPLES + 1

    def descend(pose: Array, steps: int, scales: tuple[float, float]) -> tuple[Array, float]:
        """Gauss-Newton with a falling scale; the pose and its hard loss."""
        nonlocal number
        for step in range(steps):
            pose = gauss_newton(smoothed, pose, target, unit, scale_at(step, steps, scales), number)
            number += 1
        return pose, float(task.loss(pose[None])[0])

    def polish() -> None:
        """Again from the best pose with a small scale, as long as that helps."""
        nonlocal best, best_loss
        while best_loss >= ARRIVED:
            steps = min(POLISH_STEPS, (budget - task.renders - 1) // SAMPLES)
            if steps < 3:
                return
            before = best_loss
            pose, loss = descend(best, steps, POLISH_SCALES)
            if loss < best_loss:
                best, best_loss = pose, loss
            if best_loss >= 0.9 * before:
                return

    while budget - task.renders > cost:
        left = budget - task.renders
        starts = int(np.clip((left - SCREENED * budget) // cost, 1, STARTS))
        poses = centre + np.array(SPREAD) * unit * rng.normal(size=(int(SCREENED * budget), len(unit)))
        if not number:
            poses[0] = centre
        poses = poses[: left - starts * cost]
        for first in _apart(poses, task.loss(poses), starts):
            if budget - task.renders < cost:
                break
            pose, loss = descend(first, STEPS, SCALES)
            if loss < best_loss:
                best, best_loss = pose, loss
                if loss < NEAR:
                    polish()
            if best_loss < ARRIVED:
                return best
    polish()
    return best


def _apart(poses: Array, losses: Array, count: int) -> list[Array]:
    """The best `count` poses whose directions differ by at least 10 deg."""
    chosen: list[Array] = []
    for i in np.argsort(losses):
        if len(chosen) < count and all(np.hypot(*(poses[i] - other)[1:3]) > 10 for other in chosen):
            chosen.append(poses[i])
    return chosen


def gauss_newton(smoothed: Any, pose: Array, target: Array, unit: Array, scale: float, step: int) -> Array:
    """One damped step towards the target, at most `LONGEST_STEP` scales long."""
    estimate = smoothed.estimate(torch.from_numpy(pose), step=step, scale=scale)
    residual = target - estimate.value.numpy().ravel()
    jacobian = estimate.jacobian().numpy().reshape(-1, len(pose)) * (scale * unit)
    curvature = jacobian.T @ jacobian
    damping = DAMPING * np.trace(curvature) / len(pose) + 1e-12
    move = np.linalg.solve(curvature + damping * np.eye(len(pose)), jacobian.T @ residual)
    move *= min(1.0, LONGEST_STEP / max(float(np.linalg.norm(move)), 1e-12))
    return np.clip(pose + scale * unit * move, smoothed.simulator.space.lower, smoothed.simulator.space.upper)


def adam(task: Task, seed: int, budget: int, comm: Any) -> Array:
    """Plain stochastic smoothing: the gradient of the loss of the mean image, Adam, a falling scale."""
    samples = 2 * SAMPLES
    smoothed = bridge.smooth(task, seed=seed, num_samples=samples, comm=comm)
    pose = task.sized()
    unit, target = torch.from_numpy(task.space.natural_scale), torch.from_numpy(pooled(task.target[None])[0])
    moved = torch.zeros(len(pose), dtype=torch.float64, requires_grad=True)  # in natural units
    steps = (budget - task.renders) // samples
    optimiser = torch.optim.Adam([moved], lr=0.1, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        optimiser.zero_grad()
        image = smoothed(torch.from_numpy(pose) + unit * moved, step=step, scale=scale_at(step, steps))
        ((image - target) ** 2).mean().backward()
        optimiser.step()
        schedule.step()
    return pose + (unit * moved).detach().numpy()


def cma_es(task: Task, seed: int, budget: int, comm: Any) -> Array:
    """CMA-ES on the hard loss, from the start and then from random poses around it; population and step as tuned."""
    import cma

    unit, centre, popsize = task.space.natural_scale, task.sized(), 24
    best, best_loss, restart = centre, np.inf, 0
    while task.renders + popsize <= budget and best_loss >= ARRIVED / 4:
        rng = np.random.default_rng([13, seed, restart])
        first = np.array([1, 3, 3, 1]) * rng.normal(size=4) * (restart > 0)
        options = {"popsize": popsize, "seed": int(rng.integers(1, 2**31)), "verbose": -9, "tolfun": 1e-6, "tolx": 1e-3}
        search = cma.CMAEvolutionStrategy(first, 3.0, options)
        while not search.stop() and task.renders + popsize <= budget:
            asked = search.ask()
            poses = centre + unit * np.array(asked)
            losses = task.loss(poses)
            search.tell(asked, losses.tolist())
            if losses.min() < best_loss:
                best, best_loss = poses[int(losses.argmin())], float(losses.min())
        restart += 1
    return best


METHODS = {"smoothing": smoothing, "adam": adam, "cma": cma_es}


@dataclass(frozen=True)
class Outcome:
    """What came out for one seed; angles [deg]."""

    seed: int
    bin: int
    renders: int
    error: float
    geodesic: float
    iou: float
    pose: list[float]


def solve(method: str, seed: int, budget: int, comm: Any) -> Outcome:
    task = Task(seed)
    pose = METHODS[method](task, seed, budget, comm)
    renders = task.renders
    if renders > budget:
        raise RuntimeError(f"{method} took {renders} renders of {budget}")
    error = float(np.hypot(pose[1], pose[2]))
    geodesic = float(direction_angle_deg(pose[2], pose[1], 0, 0))
    iou = float(mask_iou(task.render(pose[None])[0], task.target))
    return Outcome(seed, task.bin, renders, error, geodesic, iou, pose.tolist())


def summary(outcomes: list[Outcome]) -> str:
    success = np.array([o.error < SUCCESS_DEG for o in outcomes])
    bins = []
    for number, (low, high) in enumerate(BINS):
        chosen = [s for s, o in zip(success, outcomes, strict=True) if o.bin == number]
        bins.append(f"{low}-{high} deg {np.mean(chosen):.2f}" if chosen else f"{low}-{high} deg none")
    error = np.sqrt(success.mean() * (1 - success.mean()) / len(success))
    return (
        f"success {success.mean():.3f} +- {error:.3f} of {len(success)} seeds ({', '.join(bins)}); "
        f"geodesic {np.mean([o.geodesic < SUCCESS_DEG for o in outcomes]):.3f}; "
        f"median error {np.median([o.error for o in outcomes]):.2f} deg; "
        f"{np.mean([o.renders for o in outcomes]):.0f} renders a seed"
    )


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Target, start, fit and difference of one seed of each bin, and of one that failed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [next((o for o in outcomes if o.bin == b and o.error < SUCCESS_DEG), None) for b in range(len(BINS))]
    shown.append(next((o for o in outcomes if o.error >= SUCCESS_DEG), None))
    rows = [o for o in shown if o is not None]
    figure, axes = pyplot.subplots(len(rows), 4, figsize=(6, 1.55 * len(rows) + 0.2), squeeze=False)
    for line, outcome in zip(axes, rows, strict=True):
        task = Task(outcome.seed)
        start, fit = task.render(np.array([task.start, outcome.pose]))
        images = (task.target, start, fit, fit - task.target)
        for axis, image, lowest in zip(line, images, (0, 0, 0, -1), strict=True):
            axis.imshow(image, cmap="RdBu" if lowest else "gray", vmin=lowest, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        off = np.hypot(*task.start[1:3])
        line[0].set_ylabel(f"seed {outcome.seed}", fontsize=8)
        line[1].set_xlabel(f"off by {off:.0f} deg", fontsize=8)
        line[2].set_xlabel(f"off by {outcome.error:.2f} deg", fontsize=8)
        line[3].set_xlabel(f"IoU {outcome.iou:.3f}", fontsize=8)
    for axis, title in zip(axes[0], ("target", "start", "fit", "fit - target"), strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", default="0:24", help="FIRST:END; the settings were tuned on seeds from 1000 on")
    options.add_argument("--budget", type=int, default=1000, help="renders a seed")
    options.add_argument("--method", choices=list(METHODS), default="smoothing")
    options.add_argument("--output", type=Path, help="write every outcome here (JSON)")
    options.add_argument("--picture", type=Path, help="draw target, start, fit and difference here (PNG)")
    arguments = options.parse_args()
    first, _, end = arguments.seeds.partition(":")
    seeds = range(int(first), int(end))
    world, alone = _communicators()
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    # Each rank has tasks of its own, and smooths by itself.
    mine = [solve(arguments.method, seed, arguments.budget, alone) for seed in seeds[rank::size]]
    parts = [mine] if world is None else world.gather(mine)
    if rank:
        return
    outcomes = sorted((o for part in parts for o in part), key=lambda o: o.seed)
    print(f"{arguments.method}, {arguments.budget} renders: {summary(outcomes)}")
    if arguments.output:
        arguments.output.write_text(json.dumps([vars(o) for o in outcomes], indent=1) + "\n", encoding="utf-8")
    if arguments.picture:
        draw(outcomes, arguments.picture)


def _communicators() -> tuple[Any, Any]:
    """All ranks, and this one alone, where a launcher has started us; else (None, None)."""
    if not any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "SLURM_NTASKS")):
        return None, None
    from mpi4py import MPI

    return MPI.COMM_WORLD, MPI.COMM_SELF


if __name__ == "__main__":
    main()
