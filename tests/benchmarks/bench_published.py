"""The published experiment: its method against others at equal numbers of simulations.

    python tests/benchmarks/bench_published.py race --parameters 4 --structure 2OM3.pdb --theta 90 ... --out DIR
    python tests/benchmarks/bench_published.py losses | spread | errors | figures [the same options]

The others: Adam on the smoothed gradient (betas 0.5 and 0.9, Cartesian points, leave-one-out), random search, CMA-ES
with restarts (`pip install cma`), Nelder and Mead with restarts (scipy), Py-BOBYQA (`pip install Py-BOBYQA`). Each
twice:

plain   the loss is L2, the coordinates are the parameters over their box, the start is as given;
helped  with all that the method has: the whitened loss, logarithms of voltage and focal length, and the point that the
        method's first design gives; its runs count.

"race" writes the runs until all further answers are within the tolerances. "losses" runs the method with each loss,
"spread" on many noisy micrographs, "errors" are the standard errors to compare with; "figures" draws.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import published_experiment as experiment
from published_experiment import TRUTH, Answer, Array, Problem

import bridge

REPETITIONS = 20  # of random search


class SpentError(Exception):
    """The budget is used up, or nothing is left to be gained."""


@dataclass
class Race:
    """A loss over the unit cube that counts its runs, keeps the best point, and stops at the budget."""

    problem: Problem
    budget: int
    logarithmic: bool
    runs: int = 0
    rounds: int = 0
    answers: list[Answer] = field(default_factory=list)

    @property
    def box(self) -> tuple[Array, Array]:
        space = self.problem.simulator.space if self.logarithmic else self.problem.simulator.inner.space
        return space.lower, space.upper

    def parameters(self, z: Array) -> Array:
        lower, upper = self.box
        x = lower + np.clip(z, 0.0, 1.0) * (upper - lower)
        simulator = self.problem.simulator
        return (
            np.clip(simulator.parameters(x), simulator.inner.space.lower, simulator.inner.space.upper)
            if self.logarithmic
            else x
        )

    def unit(self, theta: Array) -> Array:
        lower, upper = self.box
        return ((self.problem.simulator.coordinates(theta) if self.logarithmic else theta) - lower) / (upper - lower)

    def together(self, points: Array) -> list[float]:
        """The losses of a batch whose points do not need each other's results; Nan where the budget does not reach."""
        left = self.budget - self.runs
        if left <= 0:
            raise SpentError
        self.rounds += 1
        losses = []
        for z in points[:left]:
            theta = self.parameters(np.asarray(z, dtype=np.float64))
            (image,) = self.problem.simulator.inner(theta[None], np.zeros(1, dtype=np.uint64))
            self.runs += 1
            losses.append(self.problem.value(image))
            if not self.answers or losses[-1] < self.answers[-1].loss:
                self.answers.append(Answer(self.runs, self.rounds, theta, losses[-1]))
        if len(points) > left or self.answers[-1].loss < experiment.ENOUGH:  # of a clean target; no better is needed
            raise SpentError
        return losses

    def one(self, z: Array) -> float:
        return self.together(z[None])[0]


def fresh(seed: int) -> Iterator[Array]:
    """Generators' uniform draws for restarts."""
    number = 0
    while True:
        number += 1
        yield np.random.Generator(np.random.Philox(key=(seed, number)))


def random_search(race: Race, z: Array, seed: int) -> None:
    race.together(np.concatenate((z[None], next(fresh(seed)).random((race.budget, len(z))))))


def cma_es(race: Race, z: Array, seed: int, sigma: float = 0.25) -> None:
    import cma

    for number, rng in enumerate(fresh(seed)):
        options = {"seed": 1 + 1000 * seed + number, "bounds": [0, 1], "verbose": -9, "tolfun": 1e-6}
        search = cma.CMAEvolutionStrategy(np.clip(z, 0, 1), sigma, options)
        while not search.stop():
            asked = search.ask()
            search.tell(asked, race.together(np.array(asked)))
        z = rng.random(len(z))


def nelder_mead(race: Race, z: Array, seed: int, size: float = 0.2) -> None:
    from scipy.optimize import minimize

    for rng in fresh(seed):
        simplex = np.vstack((z, z + size * np.diag(np.where(z < 0.5, 1.0, -1.0))))
        minimize(
            race.one,
            z,
            method="Nelder-Mead",
            bounds=[(0, 1)] * len(z),
            options={"initial_simplex": simplex, "xatol": 1e-5, "fatol": 1e-3, "maxfev": 10**6},
        )
        z = rng.random(len(z))


def bobyqa(race: Race, z: Array, seed: int, radius: float = 0.1) -> None:
    import pybobyqa

    n = len(z)
    for rng in fresh(seed):
        np.random.seed(seed)  # noqa: NPY002  # it draws from numpy's own generator
        z = np.clip(z, 1e-6, 1 - 1e-6)
        most = max(race.budget, 2 * n + 2)
        box = (np.zeros(n), np.ones(n))
        pybobyqa.solve(race.one, z, bounds=box, rhobeg=radius, rhoend=1e-5, maxfun=most, do_logging=False)
        z = rng.random(n)


# Scale [natural units of the plain parameters], its end, and the rate, in units of the scale.
PLAIN_NATURAL = {"voltage_kv": 60.0, "focal_length_mm": 0.6, "x_nm": 1.0, "y_nm": 1.0}


def adam(race: Race, z: Array, seed: int, first: float = 1.0, last: float = 0.1, rate: float = 0.5) -> None:
    """Its iterates are the answers; only the perturbed runs are paid for."""
    problem, d = race.problem, len(z)
    simulator = problem.simulator if race.logarithmic else problem.simulator.inner
    unit = np.array([(experiment.NATURAL if race.logarithmic else PLAIN_NATURAL)[n] for n in simulator.space.names])
    samples = {2: 9, 4: 16}[d]
    lower, upper = race.box
    theta = torch.from_numpy((lower + z * (upper - lower)) / unit).requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=rate, betas=(0.5, 0.9))
    steps = (race.budget - race.runs) // samples
    for step in range(steps):
        scale = first * (last / first) ** (step / max(steps - 1, 1))
        optimiser.param_groups[0]["lr"] = rate * scale
        smoothed = bridge.smooth(
            simulator,
            seed=seed,
            num_samples=samples,
            scale=torch.from_numpy(scale * unit),
            points="rqmc-cartesian",
            covariate="loo",
        )
        optimiser.zero_grad()
        loss = problem.residual(smoothed(theta * torch.from_numpy(unit), step=step)).square().sum() / 2
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            theta.clamp_(torch.from_numpy(lower / unit), torch.from_numpy(upper / unit))
        race.runs += samples
        race.rounds += 1
        x = theta.detach().numpy() * unit
        race.answers.append(
            Answer(race.runs, race.rounds, simulator.parameters(x) if race.logarithmic else x, loss.item())
        )


METHODS: dict[str, Callable[..., None]] = {
    "random": random_search,
    "adam": adam,
    "cma": cma_es,
    "nelder-mead": nelder_mead,
    "bobyqa": bobyqa,
}
# Chosen on other starts than those reported.
HELPED: dict[str, dict[str, float]] = {
    "cma": {"sigma": 0.05},
    "nelder-mead": {"size": 0.05},
    "bobyqa": {"radius": 0.05},
    "adam": {"first": 0.3, "last": 0.03},
}
PLAIN: dict[str, dict[str, float]] = {}


def run(method: str, problem: Problem, seed: int, budget: int, helped: bool, **settings: float) -> list[Answer]:
    problem = replace(problem, loss="whitened" if helped else "l2")
    race = Race(problem, budget, helped)
    theta = experiment.start_of(problem.simulator.inner, seed)
    if helped:
        first, answer = experiment.first_design(problem, seed)
        theta, race.runs, race.rounds = problem.simulator.parameters(first), answer.runs, answer.rounds
        race.answers.append(answer)
    with suppress(SpentError):
        METHODS[method](race, race.unit(theta), seed, **{**(HELPED if helped else PLAIN).get(method, {}), **settings})
    return race.answers


def write(path: Path, rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def race(arguments: argparse.Namespace) -> None:
    budget = arguments.budget or {2: 160, 4: 300}[arguments.parameters]
    rows: list[list[Any]] = [
        ["simulator", "target", "method", "kind", "start", "runs", "rounds", "found", "truth", *TRUTH]
    ]
    simulator = None
    for target in arguments.targets.split(","):
        problem = experiment.make_problem(arguments, target, simulator)
        simulator, names = problem.simulator.inner, problem.simulator.space.names
        truth = np.array([TRUTH[name] for name in names])
        for method in arguments.methods.split(","):
            for kind in ("ours",) if method == "ours" else arguments.kinds.split(","):
                loss = "l2" if kind == "plain" else "whitened"
                aim = truth if target == "clean" else experiment.optimum(replace(problem, loss=loss))
                seeds = experiment.numbers(arguments.starts)
                seeds = range(REPETITIONS) if method == "random" else seeds
                hits = []
                for seed in seeds:
                    answers = (
                        experiment.recover(problem, seed, budget)
                        if method == "ours"
                        else run(method, problem, seed, budget, kind == "helped")
                    )
                    hit, true = (experiment.found_after(answers, at, names) for at in (aim, truth))
                    last = dict(zip(names, answers[-1].parameters.tolist(), strict=True))
                    rows.append(
                        [
                            arguments.simulator,
                            target,
                            method,
                            kind,
                            seed,
                            hit.runs if hit else "",
                            hit.rounds if hit else "",
                            int(hit is not None),
                            int(true is not None),
                            *(f"{last[n]:.5g}" if n in last else "" for n in TRUTH),
                        ]
                    )
                    hits.append(hit)
                found = sorted(h.runs for h in hits if h)
                middle = f"median {np.median([h.runs if h else np.inf for h in hits]):g} runs, " if hits else ""
                rounds = [h.rounds if h else np.inf for h in hits]
                print(
                    f"{arguments.simulator:8} {target:6} {method:12} {kind:7} {len(found)} of {len(hits)}: {middle}"
                    f"{np.median(rounds):g} rounds; {found}",
                    flush=True,
                )
                if arguments.out:
                    write(Path(arguments.out) / f"race_{arguments.simulator}_{arguments.parameters}.csv", rows)


def losses(arguments: argparse.Namespace) -> None:
    budget = arguments.budget or {2: 48, 4: 300}[arguments.parameters]
    rows: list[list[Any]] = [["target", "loss", "start", "runs", "found", "truth"]]
    simulator = None
    for target in arguments.targets.split(","):
        problem = experiment.make_problem(arguments, target, simulator)
        simulator, names = problem.simulator.inner, problem.simulator.space.names
        truth = np.array([TRUTH[name] for name in names])
        for loss in ("l2", "poisson", "whitened", "ncc"):
            one = replace(problem, loss=loss)
            aim = truth if target == "clean" else experiment.optimum(one)
            hits = []
            for seed in experiment.numbers(arguments.starts):
                answers = experiment.recover(one, seed, budget)
                hit, true = (experiment.found_after(answers, at, names) for at in (aim, truth))
                hits.append((hit, true))
                found = [int(x is not None) for x in (hit, true)]
                rows.append([target, loss, seed, hit.runs if hit else "", *found])
            runs, true_ones = [h.runs for h, _ in hits if h], sum(t is not None for _, t in hits)
            middle = f"median {np.median(runs):g} runs" if runs else "none"
            print(
                f"{target:6} {loss:9} least loss {len(runs)}, truth {true_ones} of {len(hits)}; {middle}; least at "
                f"{np.round(aim, 3)}",
                flush=True,
            )
    if arguments.out:
        write(Path(arguments.out) / f"losses_{arguments.parameters}.csv", rows)


def spread(arguments: argparse.Namespace) -> None:
    """Answers from many noisy micrographs."""
    budget = arguments.budget or {2: 48, 4: 300}[arguments.parameters]
    simulator, rows = None, []
    for target in arguments.targets.split(","):
        problem = experiment.make_problem(arguments, target, simulator)
        simulator, names = problem.simulator.inner, problem.simulator.space.names
        answers = experiment.recover(problem, 1000 + int(target), budget)
        rows.append([target, answers[-1].runs, *(f"{v:.6g}" for v in answers[-1].parameters)])
        print(rows[-1], flush=True)
    truth = np.array([TRUTH[name] for name in names])
    errors = np.array([[float(v) for v in row[2:]] for row in rows]) - truth
    print("names", names, "rms error", np.sqrt((errors**2).mean(axis=0)), "mean", errors.mean(axis=0))
    if arguments.out:
        write(Path(arguments.out) / f"spread_{arguments.parameters}.csv", [["target", "runs", *names], *rows])


def errors(arguments: argparse.Namespace) -> None:
    """Standard errors by smoothed Jacobians of several widths, and by differences of the simulator itself."""
    problem = experiment.make_problem(arguments, "clean")
    names = problem.simulator.space.names
    truth = np.array([TRUTH[name] for name in names])
    rows: list[list[Any]] = [["derivatives by", *names]]
    for scale in (0.02, 0.05, 0.1, 0.2):
        error = np.sqrt(np.diag(experiment.covariance(problem, truth, scale)))
        rows.append([f"smoothing, scale {scale}", *(f"{e:.3g}" for e in error)])
    covariance = experiment.covariance(problem, truth)
    relative = covariance / np.outer(*(2 * [np.where(problem.simulator.logarithmic, truth, 1.0)]))
    values, vectors = np.linalg.eigh(relative)
    for value, vector in zip(values, vectors.T, strict=True):
        rows.append([f"principal direction, log or nm: error {value**0.5:.2g}", *(f"{v:.2f}" for v in vector)])
    # Of the focal length, by an interval within a step, and over many steps.
    for focal in (1e-3, 0.2) if "focal_length_mm" in names else (0.2,):
        steps = {"voltage_kv": 0.5, "focal_length_mm": focal, "x_nm": 0.02, "y_nm": 0.02}
        columns = []
        for k, name in enumerate(names):
            h = steps[name] * np.eye(len(names))[k]
            there, back = problem.simulator.inner(np.stack((truth + h, truth - h)), np.zeros(2, dtype=np.uint64))
            columns.append((there.astype(np.float64) - back) / (2 * steps[name]))
        _, slopes = replace(problem, loss="whitened").linearised(problem.target, torch.as_tensor(np.stack(columns, -1)))
        information = slopes.T @ slopes
        known = np.linalg.cond(information) < 1e14
        bound = np.sqrt(np.diag(np.linalg.pinv(information))) if known else np.full(len(names), np.inf)
        rows.append([f"differences, focal length over +-{focal} mm", *(f"{b:.3g}" for b in bound)])
        rows.append(["  each alone", *(f"{1 / v**0.5 if v else np.inf:.3g}" for v in np.diag(information))])
    for row in rows:
        print(*row, sep="  ")
    if arguments.out:
        write(Path(arguments.out) / f"errors_{arguments.parameters}.csv", rows)


def figures(arguments: argparse.Namespace) -> None:
    """Target, start, fit and difference; Thon rings; the valley with paths in it; the table with error bars."""
    import matplotlib

    matplotlib.use("Agg")
    out = Path(arguments.out)
    target = arguments.targets.split(",")[0]
    problem = experiment.make_problem(arguments, target)
    clean = experiment.make_problem(arguments, "clean", problem.simulator.inner)
    seed = experiment.numbers(arguments.starts)[0]
    answers = experiment.recover(problem, seed, 300)
    draw_fit(
        problem, clean, experiment.start_of(problem.simulator.inner, seed), answers[-1].parameters, out / "fit.png"
    )
    draw_valley(clean, experiment.numbers(arguments.starts), out / "valley.png")
    draw_parameters(clean, out / f"spread_{arguments.parameters}.csv", out / "parameters.png")


def blurred(image: Any, pixels: float = 2.0) -> Any:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(np.asarray(image, dtype=np.float64), pixels)


def rings(image: Any) -> tuple[Array, Array]:
    """Power of each ring of spatial frequencies, over that of white noise; frequencies [1/nm], pixels of 0.5 nm."""
    image = np.asarray(image, dtype=np.float64)
    power = np.abs(np.fft.fft2(image - image.mean())) ** 2 / image.size
    n = len(image)
    radius = np.rint(n * np.hypot(np.fft.fftfreq(n)[:, None], np.fft.fftfreq(n))).astype(int)
    sums, counts = (np.bincount(radius.ravel(), weights=w)[1 : n // 2] for w in (power.ravel(), None))
    return np.arange(1, n // 2) / (0.5 * n), sums / counts


def draw_fit(problem: Problem, clean: Problem, start: Array, end: Array, path: Path) -> None:
    from matplotlib import pyplot as plt

    seeds = np.zeros(1, dtype=np.uint64)
    first, last = (problem.simulator.inner(theta[None], seeds)[0].astype(np.float64) for theta in (start, end))
    noisy, truth = problem.target.numpy(), clean.target.numpy()
    figure, axes = plt.subplots(2, 4, figsize=(15, 7.6), constrained_layout=True)
    names = problem.simulator.space.names
    told = [
        ", ".join(f"{n.split('_')[0]} {v:.3g}" for n, v in zip(names, theta, strict=True)) for theta in (start, end)
    ]
    panels = (
        ("target, with noise", noisy),
        ("the same, blurred by 2 pixels", blurred(noisy)),
        (f"start\n{told[0]}", first),
        (f"fit\n{told[1]}", last),
        ("start - target, blurred", blurred(first - noisy)),
        ("fit - target, blurred", blurred(last - noisy)),
    )
    for axis, (title, image) in zip(axes.ravel(), panels, strict=False):
        middle, width = float(np.median(image)), 3 * float(image.std())
        if "blurred" in title:
            width = 3 * float(blurred(last - noisy).std()) if "-" in title else width
        drawn = axis.imshow(image, cmap="gray", vmin=middle - width, vmax=middle + width)
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
        figure.colorbar(drawn, ax=axis, shrink=0.7, label="counts")
    left, right = axes.ravel()[6:]
    for label, image, style in (("start", first, ":"), ("fit", last, "-"), ("truth without noise", truth, "--")):
        left.semilogy(*rings(image), style, label=label)
    mtf = problem.camera.mtf((400, 400))[:, 0].numpy()[1:200] ** 2
    s, power = rings(noisy)
    right.plot(s, power, lw=0.7, label="target")
    right.plot(s, rings(last)[1] + problem.variance * mtf, label="fit + the noise's expected power")
    right.set(
        title="Thon rings of target and fit", xlabel="spatial frequency [1/nm]", ylim=(0, 4 * problem.variance * mtf[5])
    )
    left.set(title="Thon rings, clean images", xlabel="spatial frequency [1/nm]", ylabel="power", ylim=(1, None))
    for axis in (left, right):
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=70)


def draw_valley(problem: Problem, seeds: range, path: Path) -> None:
    """The whitened loss over voltage and focal length, at the true place; and along the valley's floor."""
    from matplotlib import pyplot as plt

    def loss(volts: float, focal: float) -> float:
        theta = np.array([[volts, focal, 0.0, 0.0]])
        return problem.value(problem.simulator.inner(theta, np.zeros(1, dtype=np.uint64))[0])

    volts, focal = np.geomspace(60, 600, 18), np.geomspace(0.6, 6, 18)
    surface = np.array([[loss(v, f) for v in volts] for f in focal])
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.6), constrained_layout=True)
    drawn = left.contourf(volts, focal, np.log10(surface + 1), levels=24, cmap="viridis")
    figure.colorbar(drawn, ax=left, label="log10(1 + loss), in units of the noise")
    for kind, colour, settings in (("ours", "white", None), ("bobyqa", "red", "plain")):
        for k, seed in enumerate(seeds):
            answers = (
                experiment.recover(problem, seed, 300) if settings is None else run(kind, problem, seed, 300, False)
            )
            points = np.array([a.parameters[:2] for a in answers])
            left.plot(*points.T, "-o", ms=3, lw=0.8, color=colour, label=None if k else kind)
    left.plot(300, 3, "*", ms=16, color="magenta", label="truth")
    left.set(xscale="log", yscale="log", xlim=(60, 600), ylim=(0.6, 6))
    left.set(xlabel="voltage [kV]", ylabel="focal length [mm]")
    left.set_title("loss of a clean target at the true place, and answers")
    left.legend(loc="lower right", fontsize=8)

    floor = []
    for v in np.append(volts, 300.0):
        low, high = 0.3, 6.0
        for _ in range(14):  # of one brightness: the mean falls with the focal length
            middle = 0.5 * (low + high)
            (image,) = problem.simulator.inner(np.array([[v, middle, 0.0, 0.0]]), np.zeros(1, dtype=np.uint64))
            low, high = (middle, high) if image.mean() > float(problem.target.mean()) else (low, middle)
        floor.append((v, middle, loss(v, middle)))
    floor.sort()
    right.semilogy(*np.array(floor).T[[0, 2]], "-o", ms=4)
    right.set(
        xlabel="voltage [kV]", ylabel="loss, in units of the noise", title="along the floor of the valley, V = 100 f"
    )
    right.axhline(0.5, color="grey", lw=0.7)
    right.annotate("one standard error", (420, 0.55), color="grey", fontsize=8)
    figure.savefig(path, dpi=70)


def draw_parameters(clean: Problem, table: Path, path: Path) -> None:
    """Answers from noisy micrographs, with the standard errors of the smoothed Jacobian."""
    from matplotlib import pyplot as plt

    with open(table, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = clean.simulator.space.names
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 4), constrained_layout=True, squeeze=False)
    found = [np.array([float(row[name]) for name in names]) for row in rows]
    errors = np.sqrt([np.diag(experiment.covariance(clean, theta)) for theta in found])
    for k, (axis, name) in enumerate(zip(axes[0], names, strict=True)):
        axis.errorbar([theta[k] for theta in found], range(len(rows)), xerr=errors[:, k], fmt="o", ms=4, capsize=2)
        axis.axvline(TRUTH[name], color="magenta")
        axis.axvspan(
            TRUTH[name] - experiment.NEAR[name], TRUTH[name] + experiment.NEAR[name], color="magenta", alpha=0.12
        )
        axis.set(xlabel=name, ylabel="noisy micrograph" if k == 0 else "")
    figure.suptitle("answers and standard errors; truth, and the tolerance asked for", fontsize=10)
    figure.savefig(path, dpi=70)


def main() -> None:
    options = experiment.parser()
    options.add_argument("what", choices=("race", "losses", "spread", "errors", "figures"))
    options.add_argument("--methods", default="ours," + ",".join(METHODS))
    options.add_argument("--kinds", default="plain,helped")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    {"race": race, "losses": losses, "spread": spread, "errors": errors, "figures": figures}[arguments.what](arguments)


if __name__ == "__main__":
    main()
