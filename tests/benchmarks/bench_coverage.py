"""The audit of stated errors: how often the 95 % intervals of `bridge.fit` hold the truth, in many kinds of problem.

    python tests/benchmarks/bench_coverage.py [--cells smooth,integers] [--methods kriging] [--refits 200] [--jobs 2]
        [--kept FOLDER]

Each cell is a kind of problem, with the variance given or left out, and a method. Its refits take six models in turn,
each with a truth, a start and noise of its own. An interval is that of `FitResult.interval`. Where no finite error is
stated, the fit must say why: it counts as not stated, and as "silent" where no warning says anything.

Refits are kept as JSON lines in FOLDER, by the sources of the package at HEAD, and are not made again. The table is
printed at the end: coverage [%] of the intervals that were stated, share of the parameters for which none was, rms of
(found - true) / stated, and what is wrong with a cell. Coverage is in range between 90 and 98 %, by three standard
deviations of the refits at hand where there are fewer than 200.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # the problems are small: several threads for each only wait for each other

import numpy as np  # noqa: E402

import bridge  # noqa: E402

T = np.linspace(0.0, 1.0, 25)
METHODS = ("kriging", "gauss-newton", "adam")


class Model(NamedTuple):
    """A function of (k, d) parameters, a truth, and a natural scale."""

    function: Callable[[np.ndarray], np.ndarray]
    truth: tuple[float, ...]
    natural: tuple[float, ...]


def _decay(p):
    return p[:, :1] * np.exp(-p[:, 1:2] * T) + p[:, 2:]


def _wave(p):
    return p[:, :1] * np.sin(6 * p[:, 1:2] * T + p[:, 2:])


def _saturation(p):
    return p[:, :1] * T / (np.abs(p[:, 1:2]) + T + 1e-3)


def _peak(p):
    return p[:, :1] * np.exp(-0.5 * ((T - p[:, 1:2]) / p[:, 2:]) ** 2)


def _growth(p):
    return p[:, :1] / (1 + np.exp(-np.clip(10 * p[:, 1:2] * (T - p[:, 2:]), -50, 50)))


def _throw(p):
    t, angle = np.linspace(0, 2, 12), np.radians(p[:, 1:2])
    return np.hstack([p[:, :1] * np.cos(angle) * t, p[:, :1] * np.sin(angle) * t - 4.9 * t * t])


MODELS = (
    Model(_decay, (2.0, 1.5, 0.5), (0.3, 0.3, 0.2)),
    Model(_wave, (1.5, 1.0, 0.4), (0.2, 0.1, 0.2)),
    Model(_saturation, (3.0, 0.4), (0.3, 0.1)),
    Model(_peak, (4.0, 0.5, 0.15), (0.5, 0.05, 0.03)),
    Model(_growth, (5.0, 1.0, 0.45), (0.5, 0.2, 0.05)),
    Model(_throw, (20.0, 45.0), (2.0, 4.0)),
)


class Problem(NamedTuple):
    """What a refit is given, and the truth."""

    simulator: Any
    target: np.ndarray
    truth: np.ndarray
    start: np.ndarray
    variance: Any


class Draw(NamedTuple):
    """What all cells begin from: a model, its truth, outputs there, the noise of the target, and a generator."""

    model: Model
    truth: np.ndarray
    clean: np.ndarray
    sigma: float
    rng: np.random.Generator
    number: int

    def problem(
        self, function=None, target=None, variance=None, *, seeded=False, truth=None, natural=None, bounds=None
    ):
        rng, truth = self.rng, self.truth if truth is None else truth
        natural = np.array(self.model.natural if natural is None else natural)
        target = self.clean + self.sigma * rng.normal(size=self.clean.size) if target is None else target
        start = truth + natural * np.clip(rng.normal(size=len(truth)), -1.5, 1.5)
        bounds = [(-np.inf, np.inf)] * len(truth) if bounds is None else bounds
        start = np.clip(start, *np.array(bounds).T)
        simulator = bridge.as_simulator(
            self.model.function if function is None else function,
            names=[f"p{i}" for i in range(len(truth))],
            natural_scale=natural,
            bounds=bounds,
            vectorized=True,
            seeded=seeded,
        )
        return Problem(simulator, target, truth, start, self.sigma**2 if variance is None else variance)


def smooth(draw: Draw) -> Problem:
    return draw.problem()


def _on_steps(draw: Draw, step: np.ndarray | float) -> Problem:
    """Outputs are multiples of a step, the target is another run (even numbers), or has noise of its own (odd ones)."""
    down = np.floor if draw.number % 4 < 2 else np.round

    def stepped(p):
        return down(draw.model.function(p) / step) * step

    target = stepped(draw.truth[None])[0]
    if draw.number % 2:
        target = draw.clean + draw.sigma * draw.rng.normal(size=target.size) - (0.5 * step if down is np.floor else 0)
        return draw.problem(stepped, target)
    return draw.problem(stepped, target, np.mean(np.square(step)) / 12)


def integers(draw: Draw) -> Problem:
    size = 20 / np.ptp(draw.clean)  # some twenty steps from the least to the largest output
    model = draw.model._replace(function=lambda p: size * draw.model.function(p))
    return _on_steps(draw._replace(model=model, clean=size * draw.clean, sigma=0.7), 1.0)


def rounded(draw: Draw) -> Problem:
    return _on_steps(draw, 0.01 * np.ptp(draw.clean))


def _stochastic(part: float) -> Callable[[Draw], Problem]:
    def cell(draw: Draw) -> Problem:
        return draw.problem(_noisy(draw.model.function, part * draw.sigma), seeded=True)

    return cell


def _noisy(function, deviation):
    def noisy(p, seeds):
        y = function(p)
        noise = [np.random.Generator(np.random.Philox(key=int(s))).normal(size=y.shape[1]) for s in seeds]
        return y + deviation * np.array(noise)

    return noisy


def loud(draw: Draw) -> Problem:
    """One output has fifty times the noise of the others: in the target; in the runs too, and with a large signal."""
    m, function = draw.clean.size, draw.model.function
    deviation = np.full(m, draw.sigma)
    if draw.number % 2:
        deviation[draw.rng.integers(m)] *= 50
        return draw.problem(None, draw.clean + deviation * draw.rng.normal(size=m), deviation**2)
    deviation = np.append(deviation, 2000 * draw.sigma)
    weights = draw.rng.normal(size=len(draw.truth)) / np.array(draw.model.natural)

    def wider(p):
        return np.hstack([function(p), 20000 * draw.sigma * (p @ weights)[:, None]])

    clean = wider(draw.truth[None])[0]
    return draw.problem(
        _noisy(wider, deviation), clean + deviation * draw.rng.normal(size=m + 1), deviation**2, seeded=True
    )


def wrong(draw: Draw) -> Problem:
    """Something is in the target that the model does not have: of each output its own, or a smooth curve."""
    m, rng = draw.clean.size, draw.rng
    if draw.number % 2:
        extra = 2 * draw.sigma * rng.normal(size=m)
    else:
        frequencies, phases = 12 * rng.uniform(size=(6, 1)), 6.28 * rng.uniform(size=(6, 1))
        extra = 3 * draw.sigma * np.sin(frequencies * np.linspace(0, 1, m) + phases).mean(axis=0) * np.sqrt(12)
    return draw.problem(None, draw.clean + extra + draw.sigma * rng.normal(size=m))


def few(draw: Draw) -> Problem:
    """As many outputs as parameters, or one fewer."""
    d = len(draw.truth)
    which = np.linspace(2, draw.clean.size - 2, d).astype(int)[: d - draw.number % 2]
    target = draw.clean[which] + draw.sigma * draw.rng.normal(size=len(which))
    return draw.problem(lambda p: draw.model.function(p)[:, which], target)


def bound(draw: Draw) -> Problem:
    """The truth of one parameter is at a bound, or (odd numbers) somewhat within."""
    d, i = len(draw.truth), draw.number % len(draw.truth)
    lower = np.full(d, -np.inf)
    lower[i] = draw.truth[i] - 0.05 * draw.model.natural[i] * (draw.number % 2)
    return draw.problem(bounds=[(low, np.inf) for low in lower])


def valley(draw: Draw) -> Problem:
    """One parameter more, of which outputs say next to nothing: by itself, or only beside another."""
    function, natural = draw.model.function, draw.model.natural
    pattern = 0.3 * draw.sigma * np.cos(np.linspace(0, 9, draw.clean.size))
    if draw.number % 2:

        def wider(p):
            return function(p[:, :-1]) + p[:, -1:] * pattern
    else:

        def wider(p):
            moved = p[:, :-1].copy()
            moved[:, 0] += natural[0] * p[:, -1]
            return function(moved) + p[:, -1:] * pattern

    truth = np.append(draw.truth, 0.0)
    return draw.problem(wider, truth=truth, natural=(*natural, 1.0))


def correlated(draw: Draw) -> Problem:
    """Noise alike in neighbouring outputs."""
    m = draw.clean.size
    covariance = draw.sigma**2 * 0.6 ** np.abs(np.subtract.outer(np.arange(m), np.arange(m)))
    target = draw.clean + np.linalg.cholesky(covariance) @ draw.rng.normal(size=m)
    return draw.problem(None, target, covariance)


CELLS: dict[str, Callable[[Draw], Problem]] = {
    "smooth": smooth,
    "integers": integers,
    "rounded": rounded,
    "stochastic-0.3": _stochastic(0.3),
    "stochastic-1": _stochastic(1.0),
    "stochastic-3": _stochastic(3.0),
    "loud": loud,
    "wrong": wrong,
    "few": few,
    "bound": bound,
    "valley": valley,
    "correlated": correlated,
}


def make(cell: str, number: int) -> Problem:
    rng = np.random.default_rng([number, 7])
    model = MODELS[(number // 4) % len(MODELS)]
    truth = np.array(model.truth) + 0.5 * np.array(model.natural) * rng.uniform(-1, 1, size=len(model.truth))
    clean = model.function(truth[None])[0]
    return CELLS[cell](Draw(model, truth, clean, 0.02 * float(np.ptp(clean)), rng, number))


def refit(cell: str, given: bool, method: str, number: int) -> dict[str, Any]:
    problem = make(cell, number)
    few = {"gauss-newton": bridge.GaussNewton(num_samples=8), "adam": bridge.Adam(num_samples=8)}
    begin = time.perf_counter()
    result = bridge.fit(
        problem.simulator,
        problem.target,
        problem.start,
        seed=number,
        variance=problem.variance if given else None,
        method=few.get(method, method),
        stop=bridge.Stop(runs=60 if method == "kriging" else None),
    )
    seconds = time.perf_counter() - begin
    error = np.full(len(problem.truth), np.nan) if result.standard_error is None else result.standard_error
    lower, upper = result.interval(0.95)
    stated = np.isfinite(error)
    away = np.where(stated, result.parameters - problem.truth, np.nan) / np.where(stated, error, 1)
    inside = (lower <= problem.truth) & (problem.truth <= upper)
    return {
        "cell": cell,
        "given": given,
        "method": method,
        "number": number,
        "z": [round(float(z), 4) if np.isfinite(z) else None for z in away],
        "inside": [bool(x) if ok else None for x, ok in zip(inside, stated, strict=True)],
        "silent": bool((~stated).any() and not result.warnings),
        "runs": result.num_evaluations,
        "stop": result.stop_reason,
        "seconds": round(seconds, 3),
        "warnings": list(result.warnings),
    }


def _one(task: tuple[str, bool, str, int]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return refit(*task)
        except Exception as error:
            named = dict(zip(("cell", "given", "method", "number"), task, strict=True))
            return {**named, "error": f"{type(error).__name__}: {error}"}


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Coverage of a cell, share that is not stated, rms of z, and what is wrong with it."""
    fine = [r for r in records if "error" not in r]
    inside = [x for r in fine for x in r["inside"]]
    stated = [x for x in inside if x is not None]
    z = np.array([x for r in fine for x in r["z"] if x is not None])
    coverage = float(np.mean(stated)) if stated else np.nan
    # Parameters of one fit are not independent: the refits count.
    deviation = np.sqrt(0.95 * 0.05 / max(len(stated) / max(len(inside), 1) * len(fine), 1))
    slack = 0.0 if len(fine) >= 200 else max(0.0, 3 * deviation - 0.05)
    wrong_ = [f"{len(records) - len(fine)} fail"] if len(fine) < len(records) else []
    if stated and len(stated) > 0.03 * len(inside) and coverage < 0.90 - slack:
        wrong_.append("too small")
    if stated and len(stated) > 0.03 * len(inside) and coverage > 0.98 + slack:
        wrong_.append("too large")
    if silent := sum(r["silent"] for r in fine):
        wrong_.append(f"{silent} silent")
    return {
        "refits": len(records),
        "coverage": coverage,
        "unstated": 1 - len(stated) / max(len(inside), 1),
        "rms": float(np.sqrt(np.mean(z**2))) if len(z) else np.nan,
        "wrong": "; ".join(wrong_),
        "seconds": float(np.mean([r["seconds"] for r in fine])) if fine else np.nan,
        "runs": float(np.median([r["runs"] for r in fine])) if fine else np.nan,
    }


def table(records: list[dict[str, Any]], wide: bool = False) -> str:
    cells: dict[tuple[str, bool, str], list[dict[str, Any]]] = {}
    for r in records:
        cells.setdefault((r["cell"], r["given"], r["method"]), []).append(r)
    lines = ["| problem | variance | method | refits | coverage | not stated | rms z | |", "| --- " * 8 + "|"]
    order = {name: i for i, name in enumerate(CELLS)}
    for key in sorted(cells, key=lambda k: (order[k[0]], not k[1], METHODS.index(k[2]))):
        s = summary(cells[key])
        more = f" {s['runs']:.0f} runs, {s['seconds']:.2f} s" if wide else ""
        percent = "-" if np.isnan(s["coverage"]) else f"{100 * s['coverage']:.1f} %"
        lines.append(
            f"| {key[0]} | {'given' if key[1] else 'absent'} | {key[2]} | {s['refits']} | {percent} | "
            f"{100 * s['unstated']:.0f} % | {s['rms']:.2f} | {s['wrong']}{more} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--variance", default="given,absent")
    parser.add_argument("--refits", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first refit: other truths and noise")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kept", type=Path, default=Path("build/coverage"))
    parser.add_argument("--fresh", action="store_true", help="make all refits again")
    parser.add_argument("--wide", action="store_true", help="with runs and seconds")
    given = parser.parse_args(arguments)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    given.kept.mkdir(parents=True, exist_ok=True)
    # What the numbers come from: the package and the problems, not the rest of the commit.
    sources = ["git", "rev-parse", "HEAD:bridge", f"HEAD:./{Path(__file__).name}"]
    here = Path(__file__).resolve().parent
    trees = subprocess.run(sources, capture_output=True, text=True, cwd=here).stdout.split()
    path = given.kept / f"{'-'.join(tree[:7] for tree in trees) or 'unknown'}.jsonl"
    if given.fresh:
        path.unlink(missing_ok=True)
    numbers = range(given.first, given.first + given.refits)
    wanted = [
        (cell, variance == "given", method, number)
        for cell in given.cells.split(",")
        for variance in given.variance.split(",")
        for method in given.methods.split(",")
        for number in numbers
    ]
    done = {}
    if path.exists():
        for line in path.read_text().splitlines():
            r = json.loads(line)
            done[r["cell"], r["given"], r["method"], r["number"]] = r
    todo = [task for task in wanted if task not in done]
    with path.open("a") as file, ProcessPoolExecutor(given.jobs) as pool:
        for future in as_completed([pool.submit(_one, task) for task in todo]):
            r = future.result()
            done[r["cell"], r["given"], r["method"], r["number"]] = r
            file.write(json.dumps(r) + "\n")
            file.flush()
    records = [done[task] for task in wanted]
    print(f"commit {commit}, {given.refits} refits a cell\n")
    print(table(records, given.wide))
    for error in sorted({r["error"] for r in records if "error" in r}):
        print("\n" + error)
    sys.exit(any(summary([r]).get("wrong", "").endswith("fail") for r in records if "error" in r))


if __name__ == "__main__":
    main(sys.argv[1:])
