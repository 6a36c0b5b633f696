"""The pose of many teapots: the example's method, its variants and its competitors, at equal numbers of renders.

    python tests/benchmarks/bench_pose.py --list                    # the cells
    python tests/benchmarks/bench_pose.py                           # a few of them with 12 seeds, as a check
    python tests/benchmarks/bench_pose.py CELL ... --results docs/pose_of_teapots
    python tests/benchmarks/bench_pose.py big --results docs/pose_of_teapots      # 768 seeds; `make overnight`

CELL is a part of a cell's name; cells with "big" in it are run when asked for by it only. Every outcome is written to
`--journals` at once, and a command that was stopped goes on where it was. Under mpirun the ranks share the seeds.
docs/pose_of_teapots/README.md says what is compared. Needs `pip install cma nevergrad` for those two.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bridge

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import pose_of_a_teapot as pose_example
from pose_of_a_teapot import ARRIVED, SAMPLES, SCREENED, SPREAD, SUCCESS_DEG, UNIT, Array, Outcome, Strategy, Task

# Scales at which the densities have the standard deviation of a Gaussian of scale 1, or (Cauchy) its quartiles.
STRATEGIES = {
    "gaussian": Strategy(),
    "gaussian-latin": Strategy(points="antithetic-rqmc-latin"),
    "logistic": Strategy("logistic", "antithetic-rqmc-latin", scale=0.5513),
    "gumbel": Strategy("gumbel", "rqmc-latin", scale=0.7797),
    "cauchy": Strategy("cauchy", "antithetic-rqmc-latin", scale=0.6745),
    "laplace": Strategy("laplace", "antithetic-rqmc-latin", scale=0.7071),
    "triangular": Strategy("triangular", "antithetic-qmc-latin", scale=2.449),
}
ROUND = SCREENED + pose_example.STARTS * (pose_example.STEPS * SAMPLES + 1)  # renders of a round
ADAM_SAMPLES = 16
LEARNING_RATES = {
    1000: 3.0,
    4000: 1.0,
    16000: 0.3,
}  # [deg and what does as much]; 0.3, as published, is for 1,000 steps
RAW_UNIT = np.array([10.0, 10.0, 0.6, 2.5])  # of elevation, azimuth [deg], distance, half angle [deg]


class Arrived(Exception):  # noqa: N818 - not an error
    """The best pose is wrong in two pixels or fewer, or the budget is spent."""


class Search:
    """The hard loss of poses in units around the sized start, with what was best."""

    def __init__(self, task: Task, budget: int) -> None:
        self.task, self.budget = task, budget
        self.centre = task.sized()
        self.best, self.best_loss = self.centre, np.inf

    def __call__(self, moves: Array, unit: Array = UNIT) -> Array:
        poses = self.centre + unit * np.atleast_2d(moves)
        poses = poses[: self.budget - self.task.renders]
        if not len(poses):
            raise Arrived
        losses = self.task.losses(poses)
        if losses.min() < self.best_loss:
            self.best, self.best_loss = poses[int(losses.argmin())], float(losses.min())
        if self.best_loss < ARRIVED:
            raise Arrived
        return losses


def nevergrad(task: Task, seed: int, budget: int, name: str) -> Array:
    import nevergrad as ng

    search = Search(task, budget)
    moves = ng.p.Array(init=np.zeros(4)).set_mutation(sigma=3.0)
    moves.random_state = np.random.RandomState(seed)
    optimiser = ng.optimizers.registry[name](moves, budget=budget - task.renders)
    try:
        while True:
            asked = optimiser.ask()
            optimiser.tell(asked, float(search(asked.value)[0]))
    except Arrived:
        return search.best


def random_search(task: Task, seed: int, budget: int, shrinking: bool) -> Array:
    """Random poses around the start; with `shrinking` in the second half around the best, ever nearer."""
    search, rng = Search(task, budget), np.random.default_rng([17, seed])
    pure = budget // 2 if shrinking else budget
    try:
        while not shrinking or task.renders < pure:
            search(rng.normal(size=(16, 4)), SPREAD)
        while True:
            share = (task.renders - pure) / (budget - pure)
            move = (search.best - search.centre) / UNIT
            search(move + 2.0 * (0.02 / 2.0) ** share * rng.normal(size=(16, 4)))
    except Arrived:
        return search.best


def differences(task: Task, seed: int, budget: int) -> Array:
    """The example's loop with central differences, a scale wide, in the place of the smoothed Jacobian."""
    pooled = {polishing: pose_example.Pooled(task, 2 if polishing else 4) for polishing in (False, True)}

    def step(pose: Array, scale: float, polishing: bool, number: int) -> Array:
        del number  # nothing is drawn
        simulator, moves = pooled[polishing], np.diag(scale * UNIT)
        task.renders += SAMPLES
        images = simulator(np.concatenate([pose + moves, pose - moves]), np.zeros(8, np.uint64)).reshape(8, -1)
        jacobian = (images[:4] - images[4:]).T / (2 * scale * UNIT)
        return pose_example.damped_step(task, pose, scale * UNIT, simulator.target - images.mean(axis=0), jacobian)

    return pose_example.multi_start(task, seed, budget, step)


def differences_adam(task: Task, seed: int, budget: int) -> Array:
    """One start, Adam on central differences of the hard loss, 2 deg wide."""
    del seed
    search = Search(task, budget)
    moved, width = torch.zeros(4, dtype=torch.float64, requires_grad=True), 0.2
    steps = max((budget - task.renders) // 8, 1)
    optimiser, schedule = _adam(moved, LEARNING_RATES[budget], steps)
    try:
        for _ in range(steps):
            losses = search(np.concatenate([moved.detach().numpy() + s * width * np.eye(4) for s in (1, -1)]))
            if len(losses) < 8:
                break
            moved.grad = torch.from_numpy((losses[:4] - losses[4:]) / (2 * width))
            optimiser.step()
            schedule.step()
    except Arrived:
        return search.best
    return search.centre + UNIT * moved.detach().numpy()


def _adam(moved: torch.Tensor, learning_rate: float, steps: int) -> tuple[Any, Any]:
    optimiser = torch.optim.Adam([moved], lr=learning_rate / 10, betas=(0.5, 0.99))  # natural units are 10 deg
    return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)


def adam(task: Task, seed: int, budget: int, strategy: Strategy, loss: str, raw: bool) -> Array:
    """Plain stochastic smoothing: one start, the gradient of a loss of the mean image, Adam, a falling scale."""
    pose = task.sized()
    unit = RAW_UNIT if raw else UNIT

    def to_log(poses: Array) -> Array:
        if not raw:
            return poses
        elevation, azimuth, distance, half = poses.T
        seen = np.log(distance * np.tan(np.deg2rad(half)))
        return np.stack([seen, elevation, azimuth, np.log(distance)], axis=1)

    def images(poses: Array) -> Any:
        return task.render(to_log(poses))

    inf = np.inf
    bounds = (
        [(-inf, inf), (-inf, inf), (0.05, 200), (0.5, 85)] if raw else [(-5, 5), (-inf, inf), (-inf, inf), (-3, 5.3)]
    )
    simulator = bridge.as_simulator(images, bounds=bounds, natural_scale=unit.tolist(), vectorized=True)
    smoothed = bridge.smooth(
        simulator,
        seed=seed,
        num_samples=ADAM_SAMPLES,
        distribution=strategy.distribution,
        points="qmc-latin" if strategy.points == "qmc-latin" else "rqmc-latin",
        covariate="loo",
    )
    half = np.rad2deg(np.arctan(np.exp(pose[0] - pose[3])))
    first = torch.from_numpy(np.array([pose[1], pose[2], np.exp(pose[3]), half]) if raw else pose)
    target, units = torch.from_numpy(task.target), torch.from_numpy(unit)
    moved = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    steps = (budget - task.renders) // ADAM_SAMPLES
    optimiser, schedule = _adam(moved, LEARNING_RATES[budget], steps)
    for step in range(steps):
        optimiser.zero_grad()
        scale = strategy.scale * pose_example.scale_at(step, steps, (1.5, 0.1))
        image = smoothed(first + units * moved, step=step, scale=scale)
        task.renders += ADAM_SAMPLES
        if loss == "iou":
            value = 1 - (image * target).sum() / (image + target - image * target).sum()
        else:
            value = ((image - target) ** 2).mean()
        value.backward()
        optimiser.step()
        schedule.step()
    return to_log((first + units * moved).detach().numpy()[None])[0]


@dataclass(frozen=True)
class Cell:
    """One line of the table: 64 seeds (big: 768) of one method."""

    method: str
    budget: int
    output: str = "silhouette"
    loss: str = "mse"
    distribution: str = "gaussian"
    parameters: str = "log"
    big: bool = False

    @property
    def name(self) -> str:
        words = [self.method, self.output, self.loss, self.distribution, self.parameters, str(self.budget)]
        return "/".join(words + ["big"] * self.big)

    @property
    def seeds(self) -> range:
        return range(768 if self.big else 64)

    def solve(self, seed: int, comm: Any) -> Outcome:
        started = time.process_time()
        task = Task(seed, comm, "rgb" if self.output == "shaded" else self.output)
        strategy = STRATEGIES[self.distribution]
        solvers: dict[str, Callable[[], Array]] = {
            "smoothing": lambda: pose_example.smoothing(task, seed, self.budget, strategy),
            "cma": lambda: pose_example.cma_es(task, seed, self.budget),
            "adam": lambda: adam(task, seed, self.budget, strategy, self.loss, self.parameters == "raw"),
            "differences": lambda: differences(task, seed, self.budget),
            "differences-adam": lambda: differences_adam(task, seed, self.budget),
            "nevergrad-NGOpt": lambda: nevergrad(task, seed, self.budget, "NGOpt"),
            "nevergrad-OnePlusOne": lambda: nevergrad(task, seed, self.budget, "OnePlusOne"),
            "random": lambda: random_search(task, seed, self.budget, shrinking=False),
            "random-shrinking": lambda: random_search(task, seed, self.budget, shrinking=True),
        }
        return pose_example.outcome(task, solvers[self.method](), self.method, seed, self.budget, started)


def all_cells() -> list[Cell]:
    cells = []
    for budget in (1000, 4000):
        for method in ("smoothing", "cma"):
            cells += [Cell(method, budget, output) for output in ("silhouette", "depth", "shaded")]
        cells += [Cell("smoothing", budget, distribution=name) for name in STRATEGIES if name != "gaussian"]
        for parameters in ("raw", "log"):
            cells.append(Cell("adam", budget, loss="iou", parameters=parameters))
            cells += [
                Cell("adam", budget, output, parameters=parameters) for output in ("silhouette", "depth", "shaded")
            ]
        distributions = [name for name in STRATEGIES if not name.startswith("gaussian")]
        cells += [Cell("adam", budget, distribution=name) for name in distributions]
        methods = (
            "differences",
            "differences-adam",
            "nevergrad-NGOpt",
            "nevergrad-OnePlusOne",
            "random",
            "random-shrinking",
        )
        cells += [Cell(method, budget) for method in methods]
    return cells + [Cell(m, b, big=True) for m in ("smoothing", "cma", "differences") for b in (1000, 4000, 16000)]


def inherit(cell: Cell, journals: Path, journal: Path) -> None:
    """Takes over, from runs of the same seeds with smaller budgets, what a larger one cannot change.

    These methods look at what is left of the budget only where that is less than a round: a search that arrived
    before is the same, render by render.
    """
    if cell.method not in ("smoothing", "cma", "differences"):
        return
    known = {one.seed for one in pose_example.merge(journal, {}).values()}
    for smaller in all_cells():
        path = journals / f"{smaller.name.replace('/', '_')}.jsonl"
        if replace(smaller, budget=cell.budget) == cell and smaller.budget < cell.budget and path.exists():
            for one in pose_example.merge(path, {}).values():
                if one.seed not in known and one.loss < ARRIVED and one.renders + ROUND <= one.budget:
                    known.add(one.seed)
                    with journal.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(replace(one, budget=cell.budget))) + "\n")


def line_of(cell: Cell, outcomes: list[Outcome]) -> dict[str, str]:
    """The cell's line of results.csv."""
    success = np.array([o.error < SUCCESS_DEG for o in outcomes])
    line = {name: str(getattr(cell, name)) for name in ("method", "output", "loss", "distribution", "parameters")}
    line |= {"budget": str(cell.budget), "seeds": str(len(outcomes)), "success": f"{success.mean():.4f}"}
    line["standard_error"] = f"{np.sqrt(success.mean() * (1 - success.mean()) / len(success)):.4f}"
    for number, (low, high) in enumerate(pose_example.BINS):
        line[f"{low}-{high}"] = f"{success[[o.bin == number for o in outcomes]].mean():.3f}"
    line["mean_renders"] = f"{np.mean([o.renders for o in outcomes]):.0f}"
    line["median_error_deg"] = f"{np.median([o.error for o in outcomes]):.2f}"
    line["cpu_s"] = f"{sum(o.cpu_s for o in outcomes):.1f}"
    return line


def write_results(folder: Path, lines: list[dict[str, str]]) -> None:
    """Enters lines into results.csv, in the place of those of the same cells."""
    folder.mkdir(parents=True, exist_ok=True)
    path, key = folder / "results.csv", slice(0, 7)
    known: dict[tuple[str, ...], dict[str, str]] = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            known = {tuple(line.values())[key]: line for line in csv.DictReader(file)}
    known |= {tuple(line.values())[key]: line for line in lines}
    places = {
        ((c.method, c.output, c.loss, c.distribution, c.parameters, str(c.budget)), c.big): place
        for place, c in enumerate(all_cells())
    }
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        big = len(Cell("smoothing", 1000, big=True).seeds)
        order = sorted(known, key=lambda k: (-int(k[6]), places.get((k[:6], int(k[6]) == big), 0)))
        writer.writerows(known[k] for k in order)


def write_outcomes(folder: Path, outcomes: list[Outcome]) -> None:
    """Enters the outcomes of a big cell into outcomes.csv."""
    path = folder / "outcomes.csv"
    header = "method,budget,seed,renders,error_deg,wrong_pixels\n"
    old = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if path.exists() else []
    cell = f"{outcomes[0].method},{outcomes[0].budget},"
    lines = [line for line in old if not line.startswith(cell)]
    lines += [f"{cell}{o.seed},{o.renders},{o.error:.3f},{round(o.loss * 4096)}\n" for o in outcomes]
    path.write_text(header + "".join(lines), encoding="utf-8")


def plot(folder: Path) -> None:
    """Success of the big cells against renders, allowed and used, from outcomes.csv."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with (folder / "outcomes.csv").open(encoding="utf-8", newline="") as file:
        rows = [(r["method"], int(r["budget"]), int(r["renders"]), float(r["error_deg"])) for r in csv.DictReader(file)]
    figure, axis = pyplot.subplots(figsize=(5.5, 3.6))
    names = {
        "smoothing": ("smoothing, Gauss-Newton", "tab:blue"),
        "differences": ("central differences, Gauss-Newton", "tab:green"),
        "cma": ("CMA-ES with restarts", "tab:orange"),
    }
    for place, (method, (name, colour)) in enumerate(names.items()):
        for number, budget in enumerate(sorted({b for m, b, _, _ in rows if m == method})):
            found = np.array([row[2:] for row in rows if row[:2] == (method, budget)])
            n, used, p = len(found), found[:, 0].mean(), float((found[:, 1] < SUCCESS_DEG).mean())
            # Wilson's interval of one standard error, which has a width where all succeed.
            middle = (p + 1 / (2 * n)) / (1 + 1 / n)
            half = np.sqrt(p * (1 - p) / n + 1 / (4 * n**2)) / (1 + 1 / n)
            bars = [[max(p - middle + half, 0)], [max(middle + half - p, 0)]]
            beside = budget * 1.06 ** (place - 1)  # or they would hide each other
            axis.errorbar(beside, p, bars, fmt="o", color=colour, capsize=3, label=None if number else name)
            axis.plot([used, beside], [p, p], ":", color=colour, linewidth=0.8)
            axis.plot(used, p, "|", color=colour, markersize=10)
    axis.set_xscale("log")
    ticks = [250, 500, 1000, 4000, 16000]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("renders allowed (o) and used on average (|)")
    axis.set_ylabel("share of poses within 5 deg")
    axis.grid(alpha=0.3)
    axis.legend(loc="center right", fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "success.png", dpi=130)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("cells", nargs="*", help="parts of names; a cell is run that has one of them")
    options.add_argument("--list", action="store_true", help="list the cells and end")
    options.add_argument("--seeds", help="FIRST:END instead of all seeds of a cell")
    options.add_argument("--journals", type=Path, default=Path("runs/pose"), help="folder of the outcomes")
    options.add_argument("--results", type=Path, help="folder of results.csv, outcomes.csv and success.png")
    arguments = options.parse_args()
    chosen = [
        cell
        for cell in all_cells()
        if any(part in cell.name for part in arguments.cells) and (not cell.big or "big" in " ".join(arguments.cells))
    ]
    seeds, journals = arguments.seeds, arguments.journals
    if not arguments.cells:
        chosen = [Cell("smoothing", 1000), Cell("smoothing", 1000, "shaded"), Cell("random-shrinking", 1000)]
        seeds, journals = "1000:1012", None
    if arguments.list:
        print("\n".join(cell.name for cell in all_cells()))
        return
    world, _ = pose_example.communicators()
    rank = 0 if world is None else world.rank
    for cell in chosen:
        wanted = range(*map(int, seeds.split(":"))) if seeds else cell.seeds
        journal = journals / f"{cell.name.replace('/', '_')}.jsonl" if journals else None
        if journal:
            journal.parent.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                inherit(cell, journals, journal)
        outcomes = pose_example.solve_all(wanted, cell.solve, journal, "seeds")
        if outcomes is None:
            continue
        print(f"{cell.name}: {pose_example.summary(outcomes)}", flush=True)
        if arguments.results:
            write_results(arguments.results, [line_of(cell, outcomes)])
            if cell.big:
                write_outcomes(arguments.results, outcomes)
                plot(arguments.results)


if __name__ == "__main__":
    main()
