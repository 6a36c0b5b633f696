"""A study of estimators on a simulator of one's own: which strategy, distribution and scale give most for the runs.

Everything is measured on the simulator itself, at one parameter vector: each candidate is repeated with independent
noise, and the spread of its Jacobians is its error. Nothing is assumed about the simulator.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from bridge.checks import is_whole, known_keywords
from bridge.errors import InputError, SetupError
from bridge.evaluation.places import Where
from bridge.simulator.function import as_simulator, counts_runs
from bridge.simulator.protocol import Simulator, simulator_name
from bridge.simulator.space import ParameterSpace
from bridge.smoothing.settings import Smoothing
from bridge.smoothing.smooth import smooth
from bridge.storage.files import write_whole

REPEATS = 8
_LEAST_ROWS = 4
_ENOUGH = 0.5  # relative error of a Jacobian with which one can descend

# Names of strategies, and what they are to `smooth`. The first is what others are compared with.
STRATEGIES: Mapping[str, Smoothing] = {
    "mc + loo": Smoothing(points="mc", covariate="loo"),
    "mc antithetic": Smoothing(points="antithetic-mc", covariate="block"),
    "rqmc-latin": Smoothing(points="rqmc-latin", covariate="block"),
    "sobol": Smoothing(points="sobol", covariate="block"),
    "sobol + regression": Smoothing(points="sobol", covariate="regression"),
    "halton": Smoothing(points="halton", covariate="block"),
    "auto": Smoothing(),
}
DISTRIBUTIONS = ("gaussian", "logistic", "gumbel", "laplace", "triangular", "cauchy")
FACTORS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class StudyRow:
    """One candidate.

    Attributes:
        strategy, distribution, factor: what it is; factor multiplies the scale.
        num_samples: rows of one estimate.
        error: expected relative error of one estimate's Jacobian, root of sums of squares over all entries with
            parameters in natural units, from the spread of the repetitions; above 1 the gradient is mostly noise.
        bias: the relative distance of the repetitions' mean from that of an unbiased strategy where it stands out of
            the noise, else 0; nan for unbiased strategies and where none was measured.
        runs: that one estimate would need for a relative error of 10 %, by the 1/sqrt(N) law (points better than
            random need fewer); inf where no signal was seen.
        blur: |f_L(x) - f(x)| / |f(x)|, what smoothing itself changes.
    """

    strategy: str
    distribution: str
    factor: float
    num_samples: int
    error: float
    bias: float
    runs: float
    blur: float


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
        rows: all candidates. best: that of them which is recommended.
        recommended: its settings, for `bridge.smooth(simulator, result.recommended, seed=...)`.
        reason: why it, in words. left_out: candidates that are not feasible, with the reason.
        num_evaluations: simulator runs spent.
    """

    simulator: str
    rows: tuple[StudyRow, ...]
    best: StudyRow
    recommended: Smoothing
    reason: str
    left_out: Mapping[str, str]
    num_evaluations: int

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The candidates as a Markdown table, best first, and the recommendation."""
        lines = [
            "| strategy | distribution | scale x | N | error of the Jacobian | bias | runs for 10 % | blur |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for r in sorted(self.rows, key=lambda r: r.runs):
            bias = "-" if math.isnan(r.bias) else f"{r.bias:.2g}"
            lines.append(
                f"| {r.strategy} | {r.distribution} | {r.factor:g} | {r.num_samples} | {r.error:.3g} | {bias} | "
                f"{r.runs:.3g} | {r.blur:.2g} |"
            )
        lines += [
            "",
            f"Recommended for {self.simulator}: {self.reason}",
            "",
            f"    bridge.smooth(..., {self.recommended})",
        ]
        lines += [f"\nLeft out: {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """The candidates as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(StudyRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in self.rows)
        return text.getvalue()

    def draw(self, path: str | Path) -> Path:
        """Writes a PNG: runs for 10 % of each candidate as bars.

        Raises:
            SetupError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise SetupError(
                "Expected matplotlib for the picture. Install it: pip install 'simulation-bridge[report]'."
            ) from error
        rows = sorted((r for r in self.rows if math.isfinite(r.runs)), key=lambda r: -r.runs)
        figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
        ax = figure.subplots()
        names = [f"{r.strategy}, {r.distribution}, scale x {r.factor:g}" for r in rows]
        colours = ["C1" if r is self.best else "C0" for r in rows]
        ax.barh(range(len(rows)), [r.runs for r in rows], color=colours)
        ax.set_yticks(range(len(rows)), names, fontsize=8)
        ax.set_xscale("log")
        ax.set_xlabel("simulator runs for a relative error of the Jacobian of 10 %")
        ax.set_title(f"{self.simulator}: orange is recommended", fontsize=10)
        ax.grid(axis="x", alpha=0.3)
        return write_whole(Path(path), lambda p: figure.savefig(p, dpi=110, format="png"))


@known_keywords
def study(
    simulator: Callable[..., Any] | Simulator,
    theta: Mapping[str, float] | ArrayLike,
    *,
    seed: int | None = None,
    budget: int | None = None,
    scale: float | ArrayLike | Mapping[str, float] = 1.0,
    strategies: Sequence[str] = tuple(STRATEGIES),
    distributions: Sequence[str] = DISTRIBUTIONS,
    factors: Sequence[float] = FACTORS,
    on: Where = None,
) -> StudyResult:
    """Compares estimators on a simulator and recommends one. Collective under MPI.

    In three stages, each with what the one before found best: strategies (Gaussian noise, the scale as given), then
    distributions, then scales. Each candidate gets 8 independent repetitions of N rows, N the power of two that the
    budget allows.

    Args:
        simulator: as in `smooth`. theta: where: name -> value, or (d,).
        seed: of all noise. budget: simulator runs that may be spent.
        scale: a number (natural units), (d,) diagonal, or name -> its entry. factors: it is multiplied by each.
        strategies: of `bridge.studies.STRATEGIES`. distributions, on: as in `smooth`.

    Returns:
        a `StudyResult`. At a given scale the recommendation is the candidate of fewest runs; a larger scale always
        has less noise but smooths more away, so the scale is the smallest at which one estimate of N rows has an error
        of 50 % or less (enough to descend); where there is none, the reason says that the budget was too small.

    Raises:
        InputError: a budget that leaves fewer than 4 rows, unknown names, theta of the wrong shape.
    """
    sim = as_simulator(simulator)
    counts_runs(sim)
    if unknown := sorted(set(strategies) - set(STRATEGIES)):
        raise InputError(f"Unknown strategies {unknown}. Known: {', '.join(STRATEGIES)}.")
    if not strategies or not distributions or not factors or min(factors) <= 0:
        raise InputError("Expected at least one strategy and distribution, and positive factors.")
    if sim.space is None and isinstance(theta, Mapping):
        raise InputError(
            "Expected parameters as a vector: the simulator does not name its parameters. Name them: "
            f"bridge.as_simulator(f, names={list(theta)})."
        )
    space = sim.space or ParameterSpace.unnamed(len(np.atleast_1d(np.asarray(theta))))
    x = torch.as_tensor(space.vector(theta))
    if isinstance(scale, Mapping):
        scale = space.vector(scale)
    if seed is None:
        raise InputError("Expected a seed, got None. Results are a function of the seed: give one, say seed=0.")
    if budget is None or not is_whole(budget, 1):
        raise InputError(f"Expected a whole number of runs as budget, got {budget!r}.")
    candidates = len(strategies) + len(set(distributions) - {"gaussian"}) + len(set(factors) - {1.0})
    each = (budget - 1) // (candidates * REPEATS)
    if each < _LEAST_ROWS:
        raise InputError(
            f"Expected a budget of {candidates * REPEATS * _LEAST_ROWS + 1} runs or more for {candidates} candidates, "
            f"got {budget!r}."
        )
    rows = 1 << (each.bit_length() - 1)
    measure = _Measure(sim, x, seed, rows, np.asarray(scale, dtype=np.float64), on)
    for name in strategies:
        measure(name, "gaussian", 1.0)
    if not measure.found:
        raise InputError(f"Expected a feasible strategy, got none: {measure.left_out}.")
    best = measure.best()
    for distribution in distributions:
        measure(best.strategy, distribution, 1.0)
    best = measure.best()
    for factor in factors:
        measure(best.strategy, best.distribution, factor)
    chosen, reason = _recommended(measure, rows, budget)
    recommended = replace(
        STRATEGIES[chosen.strategy],
        num_samples=rows,
        scale=(np.asarray(scale, dtype=np.float64) * chosen.factor).tolist(),
        distribution=chosen.distribution,
    )
    name = simulator_name(sim)
    return StudyResult(name, measure.rows(), chosen, recommended, reason, measure.left_out, measure.spent)


def _recommended(measure: _Measure, rows: int, budget: int) -> tuple[StudyRow, str]:
    """The candidate to take, and why, in words."""
    best, table = measure.best(), measure.rows()
    at_scales = [r for r in table if (r.strategy, r.distribution) == (best.strategy, best.distribution)]
    good = [r for r in at_scales if r.error <= _ENOUGH]
    chosen = min(good, key=lambda r: r.factor) if good else min(at_scales, key=lambda r: r.runs)
    name = f"{chosen.strategy} with {chosen.distribution} noise and the scale x {chosen.factor:g}"
    if good:
        first = table[0]
        reason = f"{name}: the smallest scale at which {rows} rows give the Jacobian to {chosen.error:.0%}."
        if best is not first and math.isfinite(first.runs) and best.runs > 0:
            ratio = first.runs / best.runs
            reason += f" At the given scale it needs {ratio:.2g} times fewer runs than {first.strategy}."
    else:
        reason = (
            f"undecided. No candidate gives the Jacobian to {_ENOUGH:.0%} with {rows} rows: the order is mostly noise."
        )
        if math.isfinite(chosen.error):
            more = budget * (chosen.error / _ENOUGH) ** 2
            reason += f" A budget of about {more:.2g} runs would tell; so far {name} is ahead."
    return chosen, reason


@dataclass(frozen=True)
class _Found:
    """What was measured of one candidate; `noise`: variance of one repetition, summed over all entries."""

    strategy: str
    distribution: str
    factor: float
    mean: torch.Tensor
    noise: float
    unbiased: bool
    blur: float


class _Measure:
    """Evaluates candidates, each once."""

    def __init__(
        self,
        simulator: Simulator,
        theta: torch.Tensor,
        seed: int,
        rows: int,
        scale: np.ndarray[Any, np.dtype[np.float64]],
        on: Where,
    ) -> None:
        self._simulator, self._theta, self._seed, self._n = simulator, theta, seed, rows
        self._scale, self._on = scale, on
        space = simulator.space or ParameterSpace.unnamed(len(theta))
        # Parameters of different units are compared in their natural ones.
        self._natural = torch.as_tensor(space.natural_scale, dtype=torch.float64)
        self.found: list[_Found] = []
        self.left_out: dict[str, str] = {}
        once = smooth(simulator, seed=seed, num_samples=1, points="mc", covariate="none", on=on).straight_through()
        with torch.no_grad():
            self._plain = once(theta).to(torch.float64)
        self.spent = 2

    def best(self) -> StudyRow:
        """The candidate of fewest runs at the given scale."""
        return min((r for r in self.rows() if r.factor == 1.0), key=lambda r: (r.runs, r.error))

    def rows(self) -> tuple[StudyRow, ...]:
        """All candidates, in the order in which they were measured."""
        return tuple(self._row(f) for f in self.found)

    def _row(self, found: _Found) -> StudyRow:
        # All strategies of one density and scale estimate one Jacobian: its size is taken from the least noisy.
        same = [f for f in self.found if (f.distribution, f.factor) == (found.distribution, found.factor)]
        quiet = min(same, key=lambda f: f.noise)
        signal = float(quiet.mean.square().sum()) - quiet.noise / REPEATS
        error = math.sqrt(found.noise / signal) if signal > 0 else math.inf
        bias = math.nan
        references = [f for f in same if f.unbiased and f is not found]
        if references and signal > 0 and not found.unbiased:
            reference = min(references, key=lambda f: f.noise)
            apart = float((found.mean - reference.mean).square().sum())
            expected = (found.noise + reference.noise) / REPEATS
            # Less than this is what noise alone does.
            bias = math.sqrt((apart - expected) / signal) if apart > 2 * expected else 0.0
        total = math.hypot(error, bias) if math.isfinite(bias) else error
        runs = self._n * (total / 0.1) ** 2
        return StudyRow(found.strategy, found.distribution, found.factor, self._n, error, bias, runs, found.blur)

    def __call__(self, strategy: str, distribution: str, factor: float) -> None:
        if any((f.strategy, f.distribution, f.factor) == (strategy, distribution, factor) for f in self.found):
            return
        try:
            smoothed = smooth(
                self._simulator,
                replace(
                    STRATEGIES[strategy],
                    num_samples=self._n,
                    distribution=distribution,
                    scale=torch.as_tensor(self._scale * factor),
                ),
                seed=self._seed,
                on=self._on,
            )
            # A batch of the same vector: repetitions with noise of their own, in one dispatch.
            estimate = smoothed.estimate(self._theta.expand(REPEATS, -1), step=len(self.found))
        except InputError as refusal:
            self.left_out[f"{strategy}, {distribution}"] = str(refusal)
            return
        self.spent += estimate.num_evaluations
        jacobians = (estimate.jacobian().to(torch.float64) * self._natural).flatten(1)
        mean = jacobians.mean(dim=0)
        noise = float((jacobians - mean).square().sum()) / (REPEATS - 1)
        value = estimate.value.to(torch.float64).mean(dim=0)
        size = float(self._plain.norm())
        blur = float((value - self._plain).norm()) / size if size > 0 else math.nan
        unbiased = estimate.covariate in ("none", "loo") or (estimate.covariate == "block" and "mc" in strategy)
        self.found.append(_Found(strategy, distribution, factor, mean, noise, unbiased, blur))
