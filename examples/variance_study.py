"""The published variance study of stochastic smoothing, all 447 feasible cells, and the strategies that beat it.

    python examples/variance_study.py                    # sorting and shortest paths, about half an hour on two cores
    python examples/variance_study.py --parts sorting    # 249 cells and the further ones, a few minutes

For each problem, density and strategy the Jacobian of the smoothed function is estimated many times and compared with
the truth. Sorting n = 3 and 5 numbers has an exact one (`simulators.analytic`); that of shortest paths is sampled, and
the sampling error is taken off. Writes `cells.csv`, `README.md` and a figure for each problem into docs/variance_study.

Reference: arXiv 2410.08125, section on variance reduction.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import bridge
from bridge import HardSort, InputError, ShortestPath, terrain

Array = NDArray[np.float64]
OUT = Path(__file__).resolve().parents[1] / "docs" / "variance_study"

DISTRIBUTIONS = ("gaussian", "logistic", "gumbel", "cauchy", "laplace", "triangular")
POINTS = ("mc", "qmc-latin", "rqmc-latin", "rqmc-cartesian")
COVARIATES = ("none", "f(x)", "loo")
# What the library has beyond the published strategies: name -> points, antithetic, covariate.
BEYOND = {
    "sobol": ("sobol", False, "block"),
    "halton": ("halton", False, "block"),
    "net": ("rqmc-net", False, "block"),
    "net, regression": ("rqmc-net", False, "regression"),
    "orthogonal pairs, regression": ("orthogonal", True, "regression"),
    "net, quadrature": ("rqmc-net", False, "bq"),
    "auto": ("auto", False, "auto"),
}
SIZES = (64, 256, 1024)
REPETITIONS = {"sorting": 64, "paths": 32}
PATH_SCALE = 0.5
_ORACLE_BATCHES = 256  # of 2,048 rows each
_QUADRATURE_ROWS = 256  # Bayesian quadrature solves with N x N matrices


@dataclass(frozen=True)
class Problem:
    """A black box, where it is smoothed, and by how much."""

    simulator: Any
    theta: Array
    scale: float


@cache
def problem(name: str) -> Problem:
    if name == "sorting 3":
        return Problem(HardSort(3), np.array([-0.41, 0.08, 0.57]), 1.0)
    if name == "sorting 5":
        return Problem(HardSort(5), np.array([-0.71, -0.29, 0.04, 0.36, 0.82]), 1.0)
    size = int(name.removeprefix("paths "))
    return Problem(ShortestPath(size), terrain(size), PATH_SCALE)


PARTS = {"sorting": ("sorting 3", "sorting 5"), "paths": ("paths 8", "paths 12")}


@dataclass(frozen=True)
class Cell:
    """One strategy on one problem under one density; `beyond` names those that are not in the published study."""

    problem: str
    distribution: str
    points: str
    antithetic: bool
    covariate: str
    beyond: str = ""

    @property
    def name(self) -> str:
        return self.beyond or f"{self.points}{' antithetic' if self.antithetic else ''} + {self.covariate}"

    def smoothed(self, n: int) -> bridge.SmoothedSimulator:
        p = problem(self.problem)
        return bridge.smooth(
            p.simulator,
            seed=0,
            num_samples=n,
            distribution=self.distribution,
            scale=p.scale,
            points=f"antithetic-{self.points}" if self.antithetic else self.points,
            covariate=self.covariate,
            on=bridge.Ranks(leaf_size=n),
        )

    def feasible_size(self, n: int) -> int | None:
        """The largest number of rows up to n that this strategy can have, if that is at least n/2 - 1."""
        d = len(problem(self.problem).theta)
        if self.points == "rqmc-cartesian":
            pairs = 2 if self.antithetic else 1
            side = next(k for k in itertools.count(2) if pairs * (k + 1) ** d > n)
            size = pairs * side**d
            return size if size <= n and 2 * (size + 1) >= n else None
        if self.covariate == "bq" and n > _QUADRATURE_ROWS:
            return None
        return None if self.covariate == "regression" and n // (1 + self.antithetic) <= d else n


def published(part: str) -> Iterator[Cell]:
    """The feasible cells of the published study: 249 of sorting, 198 of paths.

    Not feasible: antithetic pairs of a density that is not symmetric (Gumbel); pairs of cartesian points in five
    dimensions, where 2 k^5 leaves k = 3 alone; cartesian points in 64 and 144 dimensions.
    """
    for name, distribution, points, covariate, antithetic in itertools.product(
        PARTS[part], DISTRIBUTIONS, POINTS, COVARIATES, (False, True)
    ):
        d = len(problem(name).theta)
        if antithetic and distribution == "gumbel":
            continue
        if points == "rqmc-cartesian" and (d > 5 or (d == 5 and antithetic)):
            continue
        yield Cell(name, distribution, points, antithetic, covariate)


def beyond(part: str) -> Iterator[Cell]:
    """The further strategies, wherever the library does not refuse them."""
    for name, distribution in itertools.product(PARTS[part], DISTRIBUTIONS):
        for label, (points, antithetic, covariate) in BEYOND.items():
            if covariate == "bq" and part == "paths":
                continue  # kernels in 64 and 144 dimensions have nothing to interpolate
            cell = Cell(name, distribution, points, antithetic, covariate, label)
            try:
                cell.smoothed(256)
            except InputError:
                continue
            yield cell


# -- measuring ---------------------------------------------------------------------------------------------------------


def jacobians(smoothed: bridge.SmoothedSimulator, theta: Array, repetitions: int, step: int = 0) -> Array:
    """Independent estimates (repetitions, m, d): a batch of equal problems, each with noise of its own."""
    batch = torch.as_tensor(theta, dtype=torch.float64).expand(repetitions, len(theta))
    J: Array = smoothed.estimate(batch, step).jacobian().reshape(repetitions, -1, len(theta)).numpy()
    return J


@cache
def oracle(name: str, distribution: str) -> tuple[Array, float]:
    """The true Jacobian (m, d) and the mean square of its own error: exact for sorting, sampled for paths."""
    p = problem(name)
    if isinstance(p.simulator, HardSort):
        return p.simulator.smoothed(p.theta, p.scale, distribution)[1].reshape(-1, len(p.theta)), 0.0
    # Points with bounded scores where these have no variance (their bias is that of 131,072 rows).
    endless = distribution == "triangular"
    n = 131_072 if endless else 2048
    smoothed = bridge.smooth(
        p.simulator,
        seed=1,
        num_samples=n,
        distribution=distribution,
        scale=p.scale,
        points="qmc-latin" if endless else "mc",
        covariate="mean" if endless else "loo",
        on=bridge.Ranks(leaf_size=n),
        memory=bridge.Memory(keep_mb=1e4),
    )
    batches = [jacobians(smoothed, p.theta, 1, step)[0] for step in range(2 if endless else _ORACLE_BATCHES)]
    mean = np.mean(batches, axis=0)
    spread = sum(float(np.sum((J - mean) ** 2)) for J in batches) / (len(batches) - 1)
    return mean, spread / len(batches)


@dataclass(frozen=True)
class Row:
    """Errors of one cell at one number of rows, as Frobenius norms.

    Attributes:
        n: rows asked for; size: rows used, the nearest feasible number below.
        rms: root mean square error of the Jacobian; rms_error: its standard error.
        mean: mean error, the published measure. relative: rms over the norm of the truth.
        bias: norm of the mean estimate's error, its noise taken off (0 where noise explains it).
    """

    problem: str
    distribution: str
    strategy: str
    published: bool
    n: int
    size: int
    repetitions: int
    rms: float
    rms_error: float
    mean: float
    relative: float
    bias: float


def measure(cell: Cell, n: int, repetitions: int) -> Row | None:
    """One cell at one number of rows; None where that is not feasible."""
    size = cell.feasible_size(n)
    if size is None:
        return None
    p = problem(cell.problem)
    truth, uncertain = oracle(cell.problem, cell.distribution)
    J = jacobians(cell.smoothed(size), p.theta, repetitions)
    squares = np.maximum(np.sum((J - truth) ** 2, axis=(1, 2)) - uncertain, 0.0)
    rms = math.sqrt(squares.mean())
    noise = float(J.var(axis=0, ddof=1).sum()) / repetitions
    bias = float(np.sum((J.mean(axis=0) - truth) ** 2)) - noise - uncertain
    return Row(
        cell.problem,
        cell.distribution,
        cell.name,
        not cell.beyond,
        n,
        size,
        repetitions,
        rms,
        squares.std(ddof=1) / math.sqrt(repetitions) / (2 * rms),
        float(np.sqrt(squares).mean()),
        rms / float(np.linalg.norm(truth)),
        math.sqrt(max(bias, 0.0)),
    )


def _measure_all(task: tuple[list[Cell], Sequence[int], int]) -> list[Row]:
    cells, sizes, repetitions = task
    torch.set_num_threads(1)
    return [row for cell in cells for n in sizes if (row := measure(cell, n, repetitions)) is not None]


def study(cells: Iterable[Cell], sizes: Sequence[int], repetitions: int, workers: int) -> list[Row]:
    """All cells at all sizes. Cells of one problem and density share an oracle, so one worker does them."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.problem, cell.distribution), []).append(cell)
    tasks = [(group, sizes, repetitions) for group in groups.values()]
    if workers == 1:
        return [row for task in tasks for row in _measure_all(task)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(_measure_all, reversed(tasks)) for row in rows]


# -- reading the results -----------------------------------------------------------------------------------------------


def sizes_for(curve: Sequence[tuple[int, float]], error: float) -> float:
    """The number of rows at which a curve of (rows, error) reaches an error, by lines in the logarithms of both; the
    outermost lines go on beyond the ends."""
    x, y = (np.log(np.array(v, dtype=np.float64)) for v in zip(*sorted(curve), strict=True))
    i = int(np.clip(np.searchsorted(-y, -math.log(error)) - 1, 0, len(x) - 2))
    return float(np.exp(x[i] + (math.log(error) - y[i]) * (x[i + 1] - x[i]) / (y[i + 1] - y[i])))


def curves(rows: Iterable[Row]) -> dict[str, list[tuple[int, float]]]:
    """(rows, relative RMS error) of each strategy of one problem and density."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        found.setdefault(row.strategy, []).append((row.size, row.relative))
    return {name: sorted(set(points)) for name, points in found.items()}


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def read_csv(path: Path) -> list[Row]:
    kinds = {"str": str, "int": int, "float": float, "bool": lambda text: text == "True"}
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Row)}) for line in csv.DictReader(file)]


def table(rows: Sequence[Row], name: str) -> list[str]:
    """Markdown: the best published strategy, MC + loo and the further ones under each density, at each size."""
    lines = [
        f"### {name}",
        "",
        "RMS error of the Jacobian over its norm; published strategies use up to N rows where N is not feasible.",
        "",
        "| density | N | MC + loo | best published | " + " | ".join(BEYOND) + " | auto / MC + loo |",
        "| --- | ---: | ---: | :--- |" + " ---: |" * (len(BEYOND) + 1),
    ]
    for distribution, n in itertools.product(DISTRIBUTIONS, SIZES):
        here = {r.strategy: r for r in rows if (r.problem, r.distribution, r.n) == (name, distribution, n)}
        if not here:
            continue
        best = min((r for r in here.values() if r.published), key=lambda r: r.rms)
        used = f" ({best.size})" if best.size != n else ""
        plain, auto = here["mc + loo"], here["auto"]
        noise = math.hypot(plain.rms_error / plain.rms, auto.rms_error / auto.rms) * auto.rms / plain.rms
        ours = " | ".join(f"{here[k].relative:.3g}" if k in here else "-" for k in BEYOND)
        lines.append(
            f"| {distribution} | {n} | {plain.relative:.3g} | {best.relative:.3g} {best.strategy}{used} | {ours} | "
            f"{auto.rms / plain.rms:.2f} ± {noise:.2f} |"
        )
    return [*lines, ""]


def draw(rows: Sequence[Row], name: str, path: Path) -> None:
    """Error against rows, a panel for each density."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    figure.suptitle(f"{name}: error of the smoothed Jacobian (root mean square, relative)")
    for ax, distribution in zip(axes.flat, DISTRIBUTIONS, strict=True):
        here = [r for r in rows if (r.problem, r.distribution) == (name, distribution)]
        everything = curves(here)
        known = {r.strategy for r in here if r.published}
        for strategy, points in everything.items():
            if strategy in known:
                ax.plot(*zip(*points, strict=True), color="0.8", lw=0.8, zorder=1)
        chosen = ["mc + none", "mc + loo", "rqmc-latin + loo", "qmc-latin + none", "rqmc-cartesian + loo", "auto"]
        for colour, strategy in zip(("0.35", "C0", "C1", "C4", "C2", "C3"), chosen, strict=True):
            if strategy in everything:
                style = {"lw": 2.2, "marker": "o"} if strategy == "auto" else {"lw": 1.3, "marker": "."}
                ax.plot(*zip(*everything[strategy], strict=True), color=colour, label=strategy, zorder=3, **style)
        ax.set(xscale="log", yscale="log", title=distribution)
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, 1e-3), min(high, 20))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_locator(NullLocator())
        ax.set_xticks(SIZES, [str(n) for n in SIZES])
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("simulations")
    axes[0, 0].legend(fontsize=8, title="grey: all published", title_fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


PAGE = """# Variance of strategies

How well each strategy estimates the Jacobian of a smoothed function, on the problems of the published study
(arXiv 2410.08125): hard permutation matrices of n = 3 and 5 numbers at scale 1, and 8-neighbour shortest paths through
8 x 8 and 12 x 12 landscapes at scale {scale} of the log costs. {count} published cells, {more} further ones.

    python examples/variance_study.py

Errors are root mean squares over {sorting} (sorting) and {paths} (paths) repetitions; `cells.csv` has all of them, with
their standard errors, mean errors and biases. Columns: `sobol`, `halton` and `net` (a scrambled digital net) are
centred on the mean of the rows; `regression` is least squares on the scores; `quadrature` is Bayesian quadrature (up to
256 rows); `auto` is what the library takes when nothing is asked for. The score of the triangular density has infinite
variance: errors of its strategies are finite only where points stay in the middle of their cells (qmc-latin, auto).

"""


def write_page(rows: Sequence[Row], out: Path) -> None:
    names = [name for names in PARTS.values() for name in names if any(r.problem == name for r in rows)]
    cells = {(r.problem, r.distribution, r.strategy, r.published) for r in rows}
    text = PAGE.format(
        scale=PATH_SCALE, count=sum(c[3] for c in cells), more=sum(not c[3] for c in cells), **REPETITIONS
    )
    for name in names:
        picture = f"{name.replace(' ', '_')}.png"
        draw(rows, name, out / picture)
        text += "\n".join([*table(rows, name), f"![Error against simulations, {name}]({picture})", "", ""])
    (out / "README.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cells.csv"
    # What an earlier call found of the other parts stays.
    redone = {name for part in args.parts for name in PARTS[part]}
    rows = [row for row in read_csv(path) if row.problem not in redone] if path.exists() else []
    for part in args.parts:
        cells = [*published(part), *beyond(part)]
        rows += study(cells, SIZES, REPETITIONS[part], args.workers)
    order = {name: i for i, name in enumerate(name for names in PARTS.values() for name in names)}
    rows.sort(key=lambda r: (order[r.problem], DISTRIBUTIONS.index(r.distribution), not r.published, r.strategy, r.n))
    write_csv(rows, path)
    write_page(rows, args.out)
    print(f"{len(rows)} rows in {path}, tables in {args.out / 'README.md'}")


if __name__ == "__main__":
    main()
