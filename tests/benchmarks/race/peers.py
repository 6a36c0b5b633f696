"""The solvers, each in one configuration for all problems: its defaults, with the natural scales, bounds and start.

All work in natural units, with a first step (sigma, radius of the trust region) of one; those with a flag for noise
are told. Each ends by itself, or when the counter says that the budget is spent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import numpy as np

from bridge.errors import SetupError

from .counting import Counter, Watched
from .problem import Array


def _need(module: str, distribution: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise SetupError(
            f"Expected the package {distribution} for this solver of the race, got: {error}. Install it with "
            "pip install 'simulation-bridge[race]', or leave the solver out with --solvers."
        ) from error


def ours(counter: Counter, seed: int) -> None:
    import bridge

    problem = counter.problem
    bridge.fit(
        Watched(counter),
        problem.target,
        problem.start,
        seed=seed,
        variance=problem.variance if problem.noisy_target else None,
        stop=bridge.Stop(runs=counter.budget),
        watch=lambda step: counter.ends.append(step.num_evaluations),
    )


def pycma(counter: Counter, seed: int) -> None:
    """CMA-ES with the restarts of BIPOP."""
    cma = _need("cma", "cma")
    options = {
        "bounds": [list(counter.lower), list(counter.upper)],
        "seed": seed + 1,
        "verbose": -9,
        "maxfevals": 10**9,
    }
    cma.fmin2(
        None,
        counter.start,
        1.0,
        options,
        restarts=99,
        bipop=True,
        parallel_objective=lambda points: counter.losses(np.array(points)).tolist(),
    )


def cmaes(counter: Counter, seed: int) -> None:
    """CMA-ES with restarts, each with twice the population (IPOP)."""
    CMA = _need("cmaes", "cmaes").CMA
    bounds, size, number = np.stack([counter.lower, counter.upper], axis=1), None, 0
    while True:
        search = CMA(mean=counter.start, sigma=1.0, bounds=bounds, seed=1 + 1000 * seed + number, population_size=size)
        while not search.should_stop():
            points = [search.ask() for _ in range(search.population_size)]
            search.tell(list(zip(points, counter.losses(np.array(points)).tolist(), strict=True)))
        size, number = 2 * search.population_size, number + 1


def _nevergrad(counter: Counter, seed: int, name: str) -> None:
    ng = _need("nevergrad", "nevergrad")
    space = ng.p.Array(init=counter.start).set_bounds(counter.lower, counter.upper, full_range_sampling=False)
    space.set_mutation(sigma=1.0)
    space.random_state.seed(seed + 1)
    search = ng.optimizers.registry[name](parametrization=space, budget=counter.budget, num_workers=1)
    search.suggest(counter.start)
    while True:
        candidate = search.ask()
        search.tell(candidate, counter.loss(candidate.value))


def ngopt(counter: Counter, seed: int) -> None:
    _nevergrad(counter, seed, "NGOpt")


def one_plus_one(counter: Counter, seed: int) -> None:
    _nevergrad(counter, seed, "OnePlusOne")


def _seeded(seed: int) -> None:
    np.random.seed(seed)  # noqa: NPY002  # these two draw from numpy's own generator
    logging.getLogger().setLevel(logging.ERROR)


def _radius(counter: Counter) -> float:
    return float(min(1.0, 0.49 * (counter.upper - counter.lower).min()))


RESTARTS = {"restarts.use_restarts": True}  # their own, by default for noise only; otherwise they end early


def dfols(counter: Counter, seed: int) -> None:
    """Gauss-Newton on interpolated residuals; its d + 1 first points count as one round."""
    package = _need("dfols", "DFO-LS")
    _seeded(seed)
    counter.design = counter.dimension + 1
    package.solve(
        lambda z: counter.residuals(z)[0],
        counter.start,
        bounds=(counter.lower, counter.upper),
        maxfun=counter.budget,
        rhobeg=_radius(counter),
        objfun_has_noise=counter.problem.noisy,
        do_logging=False,
        user_params=RESTARTS,
    )


def bobyqa(counter: Counter, seed: int) -> None:
    """Quadratic models of the loss; its 2 d + 1 first points count as one round."""
    package = _need("pybobyqa", "Py-BOBYQA")
    _seeded(seed)
    counter.design = 2 * counter.dimension + 1
    package.solve(
        counter.loss,
        counter.start,
        bounds=(counter.lower, counter.upper),
        maxfun=counter.budget,
        rhobeg=_radius(counter),
        objfun_has_noise=counter.problem.noisy,
        do_logging=False,
        user_params=RESTARTS,
    )


def xnes(counter: Counter, seed: int) -> None:
    """Exponential natural evolution strategy."""
    evotorch = _need("evotorch", "evotorch")
    algorithms, torch = _need("evotorch.algorithms", "evotorch"), _need("torch", "torch")
    problem = evotorch.Problem(
        "min",
        lambda x: torch.as_tensor(counter.losses(x.numpy())),
        solution_length=counter.dimension,
        initial_bounds=(-1.0, 1.0),
        dtype=torch.float64,
        vectorized=True,
        seed=seed,
    )
    search = algorithms.XNES(problem, stdev_init=1.0, center_init=torch.as_tensor(counter.start))
    while True:
        search.step()


BATCH = 4


def turbo(counter: Counter, seed: int) -> None:
    """A Gaussian process in a trust region, four points of Thompson sampling a round (TuRBO-1, Eriksson 2019)."""
    torch = _need("torch", "torch")
    models, fit = _need("botorch.models", "botorch"), _need("botorch.fit", "botorch")
    outcome = _need("botorch.models.transforms.outcome", "botorch")
    sampling, mlls = _need("botorch.generation", "botorch"), _need("gpytorch.mlls", "gpytorch")
    torch.manual_seed(seed)
    d, lower, upper = counter.dimension, counter.lower, counter.upper
    sobol = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed)
    shrink_after = int(np.ceil(max(4.0 / BATCH, d / BATCH)))

    def region(centre: Array, sides: Array, count: int) -> Array:
        low, high = np.maximum(centre - sides / 2, lower), np.minimum(centre + sides / 2, upper)
        return low + (high - low) * sobol.draw(count, dtype=torch.float64).numpy()

    while True:
        side, good, bad = 4.0, 0, 0  # of the region, in natural units
        centre = counter.start
        x = np.concatenate([centre[None], region(centre, np.full(d, side), 2 * d)])
        y = np.log(counter.losses(x) + 1e-12)
        while side > 4.0 / 2**7:
            best = int(np.argmin(y))
            train = torch.as_tensor((x - x[best]) / side)
            model = models.SingleTaskGP(train, -torch.as_tensor(y)[:, None], outcome_transform=outcome.Standardize(1))
            fit.fit_gpytorch_mll(mlls.ExactMarginalLogLikelihood(model.likelihood, model))
            scales = _length_scales(model)
            sides = side * scales / np.exp(np.log(scales).mean())
            candidates = region(x[best], sides, min(2000, 200 * d))
            with torch.no_grad():
                sampler = sampling.MaxPosteriorSampling(model=model, replacement=False)
                new = (
                    sampler(torch.as_tensor((candidates - x[best]) / side), num_samples=BATCH).numpy() * side + x[best]
                )
            values = np.log(counter.losses(new) + 1e-12)
            better = values.min() < y.min() - 1e-3 * abs(y.min())
            good, bad = (good + 1, 0) if better else (0, bad + 1)
            if good == 3:
                side, good = min(2 * side, 16.0), 0
            elif bad == shrink_after:
                side, bad = side / 2, 0
            x, y = np.concatenate([x, new]), np.concatenate([y, values])


def _length_scales(model: Any) -> Array:
    kernel = model.covar_module
    kernel = getattr(kernel, "base_kernel", kernel)
    return kernel.lengthscale.detach().numpy().ravel()


MEMBERS, LEFT, KEPT = 12, 0.1, 0.8  # chosen on problems other than the race's


def kalman(counter: Counter, seed: int) -> None:
    """Ensemble Kalman inversion, regularised as Levenberg and Marquardt's method, with inflation.

    z_j += C_zy (C_yy + alpha I)^-1 (y - g(z_j)), with the least alpha (by factors of two) that leaves a tenth of the
    mean residual, |alpha (C_yy + alpha I)^-1 r| >= 0.1 |r|; the spread falls by no more than a fifth a step.

    Reference: Iglesias, Inverse Problems 32 (2016) 025002.
    """
    rng, d = np.random.default_rng([107, seed]), counter.dimension
    members = max(MEMBERS, 2 * d)
    z = counter.start + rng.standard_normal((members, d))
    while True:
        r = np.clip(np.nan_to_num(counter.residuals(z), nan=1e6), -1e6, 1e6)
        middle = r.mean(axis=0)
        a, spread = (r - middle) / (members - 1) ** 0.5, z - z.mean(axis=0)
        inner = a @ a.T  # (members, members): C_yy = A^T A has the same eigenvalues but for zeros
        values, vectors = np.linalg.eigh(inner)
        values, along = np.maximum(values, 0.0), (vectors.T @ (a @ middle)) ** 2
        whole, alpha = float(middle @ middle), 1e-8 * float(np.trace(inner)) + 1e-300
        for _ in range(60):
            left = whole - 2 * (along / (values + alpha)).sum() + (values * along / (values + alpha) ** 2).sum()
            if left >= LEFT**2 * whole:
                break
            alpha *= 2
        z = z - np.linalg.solve(inner + alpha * np.eye(members), a @ r.T).T @ spread / (members - 1) ** 0.5
        after = z - z.mean(axis=0)
        kept = float(np.linalg.norm(after) / max(np.linalg.norm(spread), 1e-300))
        z = np.clip(z.mean(axis=0) + after * max(1.0, KEPT / max(kept, 1e-300)), counter.lower, counter.upper)


def random_search(counter: Counter, seed: int) -> None:
    """Uniform in the box, after the start; one round."""
    rng = np.random.default_rng([108, seed])
    points = counter.lower + (counter.upper - counter.lower) * rng.random((counter.budget, counter.dimension))
    points[0] = counter.start
    batch = max(1, 2_000_000 // counter.problem.target.size)  # memory; it stays one round
    counter.design = counter.budget
    for first in range(0, len(points), batch):
        counter.losses(points[first : first + batch])


@dataclass(frozen=True)
class Solver:
    """A solver and what it may spend.

    Attributes:
        solve: (counter, seed) -> None.
        distribution: its package. most_runs: less than the budget, of what is dear. seeds: likewise, only so many.
    """

    solve: Callable[[Counter, int], None]
    distribution: str = ""
    most_runs: int | None = None
    seeds: int | None = None

    @property
    def version(self) -> str:
        if not self.distribution:
            return ""
        try:
            return f"{self.distribution} {metadata.version(self.distribution)}"
        except metadata.PackageNotFoundError:
            return ""


SOLVERS = {
    "ours": Solver(ours),
    "pycma": Solver(pycma, "cma"),
    "cmaes": Solver(cmaes, "cmaes"),
    "nevergrad NGOpt": Solver(ngopt, "nevergrad", seeds=10),
    "nevergrad OnePlusOne": Solver(one_plus_one, "nevergrad"),
    "DFO-LS": Solver(dfols, "DFO-LS"),
    "Py-BOBYQA": Solver(bobyqa, "Py-BOBYQA"),
    "EvoTorch XNES": Solver(xnes, "evotorch"),
    "BoTorch TuRBO": Solver(turbo, "botorch", most_runs=120, seeds=3),
    "ensemble Kalman": Solver(kalman),
    "random": Solver(random_search),
}
