"""Finds the pose of a teapot from its silhouette: four parameters, hard 64 x 64 images, few renders.

    python examples/pose_of_a_teapot.py --seeds 0:24 --budget 1000
    python examples/pose_of_a_teapot.py --seeds 0:24 --budget 1000 --method cma     # needs `pip install cma`
    mpirun -n 2 python examples/pose_of_a_teapot.py --seeds 0:96 --budget 4000      # ranks share the seeds
    mpirun -n 2 python examples/pose_of_a_teapot.py --seeds 0:4 --share perturbations   # ... or the renders of each

The task is that of GenDR's camera experiment: a goal pose (distance U(2.5, 4), elevation and azimuth N(0, 60 deg), half
angle of view 20 deg), into which the mesh is turned, so that the truth is elevation = azimuth = 0; a start whose
direction is off by 15-35, 35-55 or 55-75 deg, with distance U(2, 10) and half angle U(10, 30) deg. Success: sqrt(el^2 +
az^2) below 5 deg. Distance and angle of view are found as well, but not judged: they are nearly interchangeable.

Every method starts alike, by matching the apparent size of the start to the target's (two renders), may ask for
`budget` renders, and stops when its best pose's silhouette is wrong in two pixels or fewer. "smoothing" looks at random
poses around the start, takes the best few, and follows each by Gauss-Newton steps on the smoothed Jacobian while the
scale falls; where that came near it goes on with smaller scales. "cma" is CMA-ES from the best of as many random
poses, with restarts.

Reference: Petersen, Goldluecke, Borgelt, Deussen: GenDR (CVPR 2022), experiments/opt_camera.py; arXiv 2410.08125.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import bridge
from bridge import RasterSimulator, cameras, pose_metrics, teapot

Array = NDArray[np.float64]

BINS = ((15, 35), (35, 55), (55, 75))  # how far the start's direction is off [deg]
SUCCESS_DEG = 5.0
ARRIVED = 0.0006  # mean squared error of hard silhouettes: two pixels of 4,096
# Of log half height, elevation, azimuth [deg], log distance: changes that move a silhouette about alike. Apparent size
# moves it far more than perspective does; with one unit for both, most fits end on the way.
UNIT = np.array([0.05, 10.0, 10.0, 0.4])
SPREAD = np.array([0.3, 40.0, 40.0, 0.3])  # standard deviations of random poses around the start
SCREENED = 90  # random poses of a round
STARTS = 4  # of a round: the best of them
SAMPLES = 8  # of an estimate: four directions and their opposites, the least for a Jacobian in four parameters
STEPS = 8  # of Gauss-Newton from one start, and again from where that came near
SCALES = (1.5, 0.1)  # of the smoothing, first and last [UNIT]
NEAR = 0.015  # a loss at which a pose is worth polishing
POLISH_SCALES = (0.5, 0.03)
DAMPING = 0.02  # of Gauss-Newton, as a share of the mean curvature
LONGEST_STEP = 2.0  # [scales]


class Task:
    """A goal, a start, and renders that are counted; seed -> everything.

    Attributes:
        renders: asked for so far. With `comm` its ranks make them together, and each knows the number of all.
        made: by this process.
        path: poses on the way, for the animation.
    """

    def __init__(self, seed: int, comm: Any = None, output: str = "silhouette") -> None:
        rng = np.random.default_rng([7, seed])
        elevation, azimuth = rng.normal(0, 60, 2)
        distance = rng.uniform(2.5, 4)
        mesh = teapot(6)
        mesh.vertices -= mesh.bounds.mean(axis=0)
        mesh.vertices /= np.linalg.norm(mesh.vertices, axis=1).max()
        mesh.apply_transform(np.linalg.inv(cameras.turntable_pose(azimuth, elevation, 0.0)))
        self.simulator = RasterSimulator(mesh, outputs=output, camera="turntable-log", normalise=False)
        self.space, self.comm = self.simulator.space, comm
        self.bin = seed % len(BINS)
        length, direction = rng.uniform(*BINS[self.bin]), rng.uniform(0, 2 * np.pi)
        far, half = rng.uniform(2, 10), rng.uniform(10, 30)
        self.truth = np.array([_log_half_height(distance, 20), 0, 0, np.log(distance)])
        self.start = np.array(
            [_log_half_height(far, half), length * np.cos(direction), length * np.sin(direction), np.log(far)]
        )
        self.renders = self.made = 0
        self.brightness = np.float32(1)
        target = self.render(self.truth[None])[0]
        self.brightness = target[target > 0].mean()  # 1 for silhouettes; depths and shades are brought to alike
        self.target = target / self.brightness
        self.made = 0  # the target is given
        self.path = [self.start]

    def render(self, poses: Array) -> NDArray[np.float32]:
        """(k, 64, 64) images; poses outside the bounds are brought inside."""
        self.made += len(poses)
        inside, _ = self.space.admit(poses)
        return self.simulator(inside, np.zeros(len(inside), np.uint64))[:, 0] / self.brightness

    def losses(self, poses: Array) -> Array:
        """(k,) mean squared errors of hard images; the ranks of `comm` share them."""
        self.renders += len(poses)
        part = poses if self.comm is None else np.array_split(poses, self.comm.size)[self.comm.rank]
        losses = ((self.render(part) - self.target) ** 2).mean(axis=(1, 2), dtype=np.float64)
        return losses if self.comm is None else np.concatenate(self.comm.allgather(losses))

    def sized(self) -> Array:
        """The start with the apparent size of the target, from the covered areas."""
        pose = self.start.copy()
        pose[3] = max(pose[3], np.log(1.6))  # well outside the object
        for _ in range(2):
            self.renders += 1
            covered = (self.render(pose[None]) > 0).mean()
            pose[0] += 0.5 * np.log(max(covered, 1 / 4096) / (self.target > 0).mean())
        self.path.append(pose)
        return pose


def _log_half_height(distance: float, half_angle_deg: float) -> float:
    return float(np.log(distance * np.tan(np.deg2rad(half_angle_deg))))


class Pooled:
    """The images of a task averaged over blocks of pixels: edges then move by parts of a block; a `Simulator`."""

    row_by_row = True

    def __init__(self, task: Task, block: int) -> None:
        self.task, self.block, self.space = task, block, task.space
        self.output_shape = (64 // block, 64 // block)
        self.target = self.pooled(task.target[None])[0].ravel()

    def pooled(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        height, width = self.output_shape
        return images.reshape(len(images), height, self.block, width, self.block).mean(axis=(2, 4))

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        return self.pooled(self.task.render(inputs))


@dataclass(frozen=True)
class Strategy:
    """How the images are smoothed; `scale` is the distribution's that does as the Gaussian's 1 does."""

    distribution: str = "gaussian"
    points: str = "antithetic-orthogonal"
    scale: float = 1.0


def scale_at(step: int, steps: int, scales: tuple[float, float]) -> float:
    first, last = scales
    return float(first * (last / first) ** (step / max(steps - 1, 1)))


def random_poses(centre: Array, count: int, rng: np.random.Generator, with_centre: bool) -> Array:
    poses = centre + SPREAD * rng.normal(size=(count, len(centre)))
    if with_centre:
        poses[:1] = centre
    return poses


def smoothing(task: Task, seed: int, budget: int, strategy: Strategy = Strategy()) -> Array:
    """Random poses, the best few, Gauss-Newton from each on the smoothed Jacobian, until one has arrived."""
    coarse, fine = (
        bridge.smooth(
            Pooled(task, block),
            seed=seed,
            num_samples=SAMPLES,
            distribution=strategy.distribution,
            points=strategy.points,
            on=bridge.Ranks(task.comm),
        )
        for block in (4, 2)
    )
    unit = strategy.scale * UNIT

    def step(pose: Array, scale: float, fits: bool, number: int) -> Array:
        return gauss_newton(task, fine if fits else coarse, pose, scale * unit, number)

    return multi_start(task, seed, budget, step)


def multi_start(task: Task, seed: int, budget: int, step: Callable[[Array, float, bool, int], Array]) -> Array:
    """Rounds of random poses and descents by `step(pose, scale, polishing, number)`, which takes SAMPLES renders."""
    rng = np.random.default_rng([11, seed])
    centre = task.sized()
    best, best_loss, number = centre, np.inf, 0
    cost = STEPS * SAMPLES + 1

    def descend(pose: Array, steps: int, polishing: bool) -> bool:
        """Steps with a falling scale; whether they led to the best pose so far."""
        nonlocal best, best_loss, number
        for k in range(steps):
            pose = step(pose, scale_at(k, steps, POLISH_SCALES if polishing else SCALES), polishing, number)
            task.path.append(pose)
            number += 1
        loss = float(task.losses(pose[None])[0])
        better = loss < best_loss
        if better:
            best, best_loss = pose, loss
        return better

    def polish(patience: int) -> None:
        """Again from the best pose with small scales, until that has not helped `patience` times."""
        while best_loss >= ARRIVED and patience:
            steps = min(STEPS, (budget - task.renders - 1) // SAMPLES)
            if steps < 3:
                return
            before = best_loss
            descend(best, steps, polishing=True)
            patience -= best_loss >= 0.9 * before

    while budget - task.renders > cost:
        left = budget - task.renders
        starts = int(np.clip((left - SCREENED) // cost, 1, STARTS))
        poses = random_poses(centre, SCREENED, rng, with_centre=not number)[: left - starts * cost]
        for first in _apart(poses, task.losses(poses), starts):
            if budget - task.renders < cost:
                break
            task.path.append(first)
            if descend(first, STEPS, polishing=False) and best_loss < NEAR:
                polish(patience=1)
            if best_loss < ARRIVED:
                return best
    polish(patience=budget)
    return best


def _apart(poses: Array, losses: Array, count: int) -> list[Array]:
    """The best `count` poses whose directions differ by at least 10 deg."""
    chosen: list[Array] = []
    for i in np.argsort(losses, kind="stable"):
        if len(chosen) < count and all(np.hypot(*(poses[i] - other)[1:3]) > 10 for other in chosen):
            chosen.append(poses[i])
    return chosen


def gauss_newton(task: Task, smoothed: Any, pose: Array, scale: Array, number: int) -> Array:
    """A damped step towards the target on the smoothed images."""
    estimate = smoothed.estimate(torch.from_numpy(pose), step=number, scale=torch.from_numpy(scale))
    task.renders += estimate.num_evaluations
    residual = smoothed.simulator.target - estimate.value.numpy().ravel()
    return damped_step(task, pose, scale, residual, estimate.jacobian().numpy().reshape(-1, len(pose)))


def damped_step(task: Task, pose: Array, scale: Array, residual: Array, jacobian: Array) -> Array:
    """Solves (J^T J + damping) move = J^T residual in units of the scale; at most `LONGEST_STEP` scales long."""
    jacobian = jacobian * scale
    curvature = jacobian.T @ jacobian
    damping = DAMPING * np.trace(curvature) / len(pose) + 1e-12
    move = np.linalg.solve(curvature + damping * np.eye(len(pose)), jacobian.T @ residual)
    move *= min(1.0, LONGEST_STEP / max(float(np.linalg.norm(move)), 1e-12))
    return np.clip(pose + scale * move, task.space.lower, task.space.upper)


def cma_es(task: Task, seed: int, budget: int) -> Array:
    """CMA-ES on the hard loss from the best of random poses, again and again; population and step as tuned."""
    import cma

    centre, popsize = task.sized(), 12
    best, best_loss, first_time = centre, np.inf, True
    rng = np.random.default_rng([13, seed])
    while task.renders + popsize <= budget and best_loss >= ARRIVED:
        poses = random_poses(centre, min(SCREENED, budget - task.renders - popsize), rng, first_time)
        if len(poses):
            losses = task.losses(poses)
            first = poses[int(losses.argmin())]
        else:
            first = best
        options = {"popsize": popsize, "seed": int(rng.integers(1, 2**31)), "verbose": -9, "tolfun": 1e-6, "tolx": 1e-3}
        search = cma.CMAEvolutionStrategy((first - centre) / UNIT, 0.7, options)
        first_time = False
        while not search.stop() and task.renders + popsize <= budget and best_loss >= ARRIVED:
            asked = search.ask()
            poses = centre + UNIT * np.array(asked)
            losses = task.losses(poses)
            search.tell(asked, losses.tolist())
            if losses.min() < best_loss:
                best, best_loss = poses[int(losses.argmin())], float(losses.min())
                task.path.append(best)
    return best


METHODS: dict[str, Callable[[Task, int, int], Array]] = {"smoothing": smoothing, "cma": cma_es}


@dataclass(frozen=True)
class Outcome:
    """What came out for one seed; angles [deg], CPU time of rank 0 [s]."""

    method: str
    budget: int
    seed: int
    bin: int
    renders: int
    error: float
    geodesic: float
    loss: float
    iou: float
    cpu_s: float
    pose: list[float]


def solve(method: str, seed: int, budget: int, comm: Any = None) -> Outcome:
    """Solves one task by a method of `METHODS`, together with the ranks of `comm`."""
    started = time.process_time()
    task = Task(seed, comm)
    return outcome(task, METHODS[method](task, seed, budget), method, seed, budget, started)


def outcome(task: Task, pose: Array, method: str, seed: int, budget: int, started: float) -> Outcome:
    """Judges a pose; `pose` is in the order of "turntable-log"."""
    cpu, renders = time.process_time() - started, task.renders
    if renders > budget or (task.comm is None and task.made != renders):
        raise RuntimeError(f"{method} made {task.made} renders, counted {renders}, and had {budget}")
    silhouette, target = task.render(np.array([pose, task.truth])) > 0
    loss = float(np.mean(silhouette != target))
    error = float(np.hypot(pose[1], pose[2]))
    geodesic = float(pose_metrics.direction_angle_deg(pose[2], pose[1], 0, 0))
    iou = float(pose_metrics.mask_iou(silhouette, target))
    return Outcome(method, budget, seed, task.bin, renders, error, geodesic, loss, iou, round(cpu, 4), pose.tolist())


def solve_all(
    seeds: Sequence[int], solver: Callable[[int, Any], Outcome], journal: Path | None, share: str
) -> list[Outcome] | None:
    """Solves the tasks of many seeds; ranks share the seeds, or the perturbations of each.

    Every outcome is one line of `journal` as soon as it is known (with several ranks, of a part for each rank), so that
    a run that was stopped goes on where it was, on any number of ranks.

    Returns:
        the outcomes in the order of their seeds; None on ranks other than 0.
    """
    world, alone = communicators()
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    known = merge(journal, {}) if journal and not rank else {}
    known = known if world is None else world.bcast(known)
    rest = [seed for seed in seeds if seed not in known]
    found = []
    for seed in rest[rank::size] if share == "seeds" else rest:
        found.append(solver(seed, alone if share == "seeds" else world))
        if journal and (share == "seeds" or not rank):
            with _part(journal, rank).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(found[-1])) + "\n")
    parts = [found] if world is None or share != "seeds" else world.gather(found)
    if parts is None or rank:
        return None
    known |= {one.seed: one for part in parts for one in part}
    if journal:
        merge(journal, known)
    return [known[seed] for seed in sorted(seeds)]


def _part(journal: Path, rank: int | str) -> Path:
    return journal.with_name(f"{journal.name}.{rank}")


def merge(journal: Path, known: dict[int, Outcome]) -> dict[int, Outcome]:
    """Enters into `known` what a journal and its parts hold, and leaves a journal without parts."""
    parts = sorted(journal.parent.glob(_part(journal, "*").name))
    for path in [journal, *parts]:
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with suppress(json.JSONDecodeError):  # a line that was cut short
                one = Outcome(**json.loads(line))
                known.setdefault(one.seed, one)
    lines = [json.dumps(asdict(known[seed])) + "\n" for seed in sorted(known)]
    new = journal.with_name(f"{journal.name}-new")
    new.write_text("".join(lines), encoding="utf-8")
    new.replace(journal)
    for path in parts:
        path.unlink()
    return known


def communicators() -> tuple[Any, Any]:
    """All ranks, and this one alone, where a launcher has started us; else (None, None)."""
    if not any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "SLURM_NTASKS")):
        return None, None
    from mpi4py import MPI

    return MPI.COMM_WORLD, MPI.COMM_SELF


def summary(outcomes: list[Outcome]) -> str:
    success = np.array([o.error < SUCCESS_DEG for o in outcomes])
    bins = []
    for number, (low, high) in enumerate(BINS):
        chosen = [s for s, o in zip(success, outcomes, strict=True) if o.bin == number]
        bins.append(f"{low}-{high} deg {np.mean(chosen):.3f}" if chosen else f"{low}-{high} deg none")
    error = np.sqrt(success.mean() * (1 - success.mean()) / len(success))
    return (
        f"success {success.mean():.4f} +- {error:.4f} of {len(success)} seeds ({', '.join(bins)}); "
        f"geodesic {np.mean([o.geodesic < SUCCESS_DEG for o in outcomes]):.4f}; "
        f"median error {np.median([o.error for o in outcomes]):.2f} deg; "
        f"{np.mean([o.renders for o in outcomes]):.0f} renders and {np.mean([o.cpu_s for o in outcomes]):.2f} s of CPU "
        "a seed"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", default="0:24", help="FIRST:END; the settings were tuned on seeds from 1000 on")
    options.add_argument("--budget", type=int, default=1000, help="renders a seed")
    options.add_argument("--method", choices=list(METHODS), default="smoothing")
    options.add_argument("--share", choices=("seeds", "perturbations"), default="seeds", help="what ranks share")
    options.add_argument("--output", type=Path, help="a line for every outcome (JSON lines); goes on where it ended")
    options.add_argument("--picture", type=Path, help="draw a solved seed of each bin here (PNG)")
    options.add_argument("--animation", type=Path, help="draw the way of the same seeds here (GIF)")
    arguments = options.parse_args()
    first, _, end = arguments.seeds.partition(":")
    method, budget = arguments.method, arguments.budget

    def solver(seed: int, comm: Any) -> Outcome:
        return solve(method, seed, budget, comm)

    outcomes = solve_all(range(int(first), int(end)), solver, arguments.output, arguments.share)
    if outcomes is None:
        return
    if any((o.method, o.budget) != (method, budget) for o in outcomes):
        options.error(f"{arguments.output} holds outcomes of another method or budget: name another file")
    print(f"{method}, {budget} renders: {summary(outcomes)}")
    if arguments.picture or arguments.animation:
        import pose_pictures

        rows = [next((o for o in outcomes if o.bin == b and o.error < SUCCESS_DEG), None) for b in range(len(BINS))]
        rows.append(next((o for o in outcomes if o.error >= SUCCESS_DEG), None))
        shown = [o for o in rows if o is not None]
        if arguments.picture:
            pose_pictures.draw([(Task(o.seed), np.array(o.pose)) for o in shown], arguments.picture)
        if arguments.animation:
            tasks = [Task(o.seed) for o in shown]
            for task, one in zip(tasks, shown, strict=True):
                task.path.append(METHODS[method](task, one.seed, budget))
            pose_pictures.animate(tasks, arguments.animation)


if __name__ == "__main__":
    main()
