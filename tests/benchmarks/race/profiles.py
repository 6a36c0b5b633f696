"""Data and performance profiles of a race's journal, and how sure they are.

data profile         share of problems that are solved within alpha (d + 1) runs, against alpha; its area is the mean
                     over alpha from 0 to 60
performance profile  share of problems that are solved within r times the runs of the fastest solver, against r

Each problem counts alike, whatever its number of seeds. Solvers are compared on the problems and seeds that both have
run. Reference: Moré, Wild, SIAM J. Optim. 20 (2009) 172.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Line = Mapping[str, Any]
Instance = tuple[str, int]  # problem and seed
LIMIT = 60.0  # of alpha
OURS = "ours"


@dataclass(frozen=True)
class Hit:
    """What a solver needed for one instance; infinite where it did not solve it."""

    runs: float
    rounds: float
    dimension: int

    @property
    def alpha(self) -> float:
        return self.runs / (self.dimension + 1)

    @property
    def area(self) -> float:
        """Of the data profile of this instance alone, a step at alpha."""
        return max(0.0, 1.0 - self.alpha / LIMIT)


Hits = dict[str, dict[Instance, Hit]]


def least_known(lines: Iterable[Line]) -> dict[Instance, float]:
    """f_L of each instance that is judged by its loss: the least that is known, or that any solver has met."""
    least: dict[Instance, float] = {}
    for line in lines:
        values = [line["way"][-1][2]] if line["way"] else []
        values += [line["start"]] if line["least"] is None else [line["least"]]
        at = (line["problem"], line["seed"])
        least[at] = min([*values, least.get(at, np.inf)])
    return least


def hits(lines: list[Line], tau: float | None = None) -> Hits:
    """solver -> instance -> what it needed.

    Args:
        tau: of the test on the loss, in place of each problem's own.
    """
    least, found = least_known(lines), {}
    for line in lines:
        at = (line["problem"], line["seed"])
        if line["criterion"] == "loss":
            wanted = least[at] + (tau or line["tau"]) * (line["start"] - least[at])
            way = [step for step in line["way"] if step[2] <= wanted]
        else:
            way = [step for step in line["way"] if step[2] < 1]
        run, number = way[0][:2] if way else (np.inf, np.inf)
        found.setdefault(line["solver"], {})[at] = Hit(float(run), float(number), line["dimension"])
    return found


def by_problem(values: Mapping[Instance, float]) -> list[Array]:
    groups: dict[str, list[float]] = {}
    for (problem, _), value in sorted(values.items()):
        groups.setdefault(problem, []).append(value)
    return [np.array(group) for group in groups.values()]


def mean(values: Mapping[Instance, float]) -> float:
    """Over problems, of the mean over seeds."""
    return float(np.mean([group.mean() for group in by_problem(values)])) if values else float("nan")


def area(found: Mapping[Instance, Hit]) -> float:
    return mean({at: hit.area for at, hit in found.items()})


def profile(found: Mapping[Instance, Hit], alphas: Array, rounds: bool = False) -> Array:
    """Share solved within alpha (d + 1) runs, or within alpha rounds, for each alpha."""
    need = {at: hit.rounds if rounds else hit.alpha for at, hit in found.items()}
    return np.array([mean({at: float(n <= alpha) for at, n in need.items()}) for alpha in alphas])


def performance(found: Hits, solver: str, ratios: Array) -> Array:
    """Share solved within so many times the runs of the fastest, over the instances that this solver has run."""
    mine = found[solver]
    fastest = {at: min(hit[at].runs for hit in found.values() if at in hit) for at in mine}
    ratio = {at: mine[at].runs / fastest[at] if np.isfinite(fastest[at]) else np.inf for at in mine}
    return np.array([mean({at: float(v <= r) for at, v in ratio.items()}) for r in ratios])


def common(a: Mapping[Instance, Hit], b: Mapping[Instance, Hit]) -> list[Instance]:
    return sorted(set(a) & set(b))


def bootstrap(differences: list[Array], seed: int, resamples: int = 4000) -> tuple[float, float]:
    """95 % interval of the mean over problems of the means over seeds, problems and then seeds drawn anew."""
    rng = np.random.default_rng(seed)
    means = np.stack([g[rng.integers(len(g), size=(resamples, len(g)))].mean(axis=1) for g in differences], axis=1)
    # Seeds of a problem that is drawn twice are the same redraw; with many problems that makes no difference.
    chosen = rng.integers(len(differences), size=(resamples, len(differences)))
    low, high = np.quantile(np.take_along_axis(means, chosen, axis=1).mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def area_difference(a: Mapping[Instance, Hit], b: Mapping[Instance, Hit], seed: int = 0) -> tuple[float, float, float]:
    """Area of a less that of b, and its 95 % interval, paired."""
    both = {at: a[at].area - b[at].area for at in common(a, b)}
    if not both:
        return (float("nan"),) * 3
    return mean(both), *bootstrap(by_problem(both), seed)


def median_ratio(a: Mapping[Instance, Hit], b: Mapping[Instance, Hit], of: str) -> float:
    """Median of "runs" or "rounds" of a over those of b, where one of both solved it: infinite where a did not."""
    ratios = []
    for at in common(a, b):
        mine, theirs = getattr(a[at], of), getattr(b[at], of)
        if np.isfinite(mine) or np.isfinite(theirs):
            ratios.append(0.0 if np.isinf(theirs) else mine / theirs)
    if not ratios:
        return float("nan")
    low, high = np.sort(ratios)[[(len(ratios) - 1) // 2, len(ratios) // 2]]
    return float(low if low == high else (low + high) / 2)


def medians(a: Mapping[Instance, Hit], b: Mapping[Instance, Hit], of: str) -> tuple[float, float]:
    """Medians of "runs" or "rounds" of each, over the instances of both; infinite where most are unsolved."""
    needs = [np.array([getattr(found[at], of) for at in common(a, b)]) for found in (a, b)]
    mine, theirs = (float(np.median(need)) if len(need) else float("nan") for need in needs)
    return mine, theirs


def chosen(found: Hits, problems: Iterable[str]) -> Hits:
    wanted = set(problems)
    return {solver: {at: h for at, h in of.items() if at[0] in wanted} for solver, of in found.items()}


def show(value: float, digits: int = 2) -> str:
    return "-" if np.isnan(value) else "never" if np.isinf(value) else f"{value:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
