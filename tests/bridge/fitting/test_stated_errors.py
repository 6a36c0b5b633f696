"""Errors are stated where they hold, and else not, with words that say why: of residuals as they are, and of fits."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtr, ndtri, stdtrit

import bridge
from bridge.fitting.normal import normal_of
from bridge.fitting.rounding import Lattice
from bridge.fitting.uncertainty import Evidence
from tests.lab.fits import circuit

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_coverage

T = np.linspace(0, 1, 25)


def slopes(number):
    """Of six models, whitened by 2 % of their range."""
    f, truth, natural = bench_coverage.MODELS[number % 6]
    x, unit = np.array(truth), np.array(natural)
    J = np.stack([f((x + h)[None])[0] - f((x - h)[None])[0] for h in np.diag(unit * 1e-3)], axis=1) / 2e-3
    return J / (0.02 * np.ptp(f(x[None])))


def least_squares(noise, known, count=300):
    """Share of 95 % intervals that hold, of errors that are stated, and what is said, in fits that are linear."""
    rng, inside, total, said = np.random.default_rng(3), [], 0, []
    for k in range(count):
        J = slopes(k)
        m, d = J.shape
        e = noise(rng, m)
        away = np.linalg.lstsq(J, e, rcond=None)[0]
        stated = Evidence(normal_of([J]), J.T @ J, J @ away - e, (m,)).stated(np.zeros((d, d)), known, None)
        error = np.sqrt(np.diag(stated.covariance))
        reach = ndtri(0.975) if np.isinf(stated.dof) else stdtrit(stated.dof, 0.975)
        total += d
        inside += list((np.abs(away) < reach * error)[np.isfinite(error)])
        said += [note.text for note in stated.notes]
        assert np.isfinite(error).all() or stated.notes
    return np.mean(inside), len(inside) / total, said


def correlated(rho):
    def noise(rng, m):
        return np.linalg.cholesky(rho ** np.abs(np.subtract.outer(np.arange(m), np.arange(m)))) @ rng.normal(size=m)

    return noise


def one_loud(rng, m):
    e = rng.normal(size=m)
    e[rng.integers(m)] *= 30
    return e


def missing_curve(rng, m):
    """A smooth curve that the model lacks, three times the noise."""
    frequencies, phases = 12 * rng.uniform(size=(6, 1)), 6.28 * rng.uniform(size=(6, 1))
    return 3 * np.sin(frequencies * np.linspace(0, 1, m) + phases).mean(axis=0) * np.sqrt(12) + rng.normal(size=m)


@pytest.mark.parametrize(
    ("noise", "known", "least_stated"),
    [
        (lambda rng, m: rng.normal(size=m), True, 0.99),
        (lambda rng, m: rng.normal(size=m), False, 0.85),
        (lambda rng, m: 3 * rng.normal(size=m), True, 0.85),  # a variance that is too small
        (lambda rng, m: rng.standard_t(3, size=m), False, 0.7),
        (correlated(0.3), False, 0.85),
        (correlated(0.6), False, 0.85),
        (correlated(0.8), False, 0.85),
    ],
)
def test_intervals_hold_in_linear_fits(noise, known, least_stated):
    coverage, stated, _ = least_squares(noise, known)
    assert 0.90 <= coverage <= 0.98
    assert stated >= least_stated


def test_noise_of_counts_is_that_of_each_output():
    """A histogram of 2,000 draws of a normal distribution, with the noise of counts, of which nothing is said."""
    edges = np.linspace(-4, 6, 21)

    def counts(p):
        return 2000 * np.diff(ndtr((edges - p[0]) / p[1]))

    rng, inside = np.random.default_rng(0), {True: [], False: []}
    for _ in range(300):
        truth = np.array([1.0, 1.2]) + [0.3, 0.15] * rng.normal(size=2)
        J = np.stack([counts(truth + h) - counts(truth - h) for h in 1e-3 * np.eye(2)], axis=1) / 2e-3
        e = rng.poisson(counts(truth)) - counts(truth)
        away = np.linalg.lstsq(J, e, rcond=None)[0]
        for told in inside:
            size = counts(truth) + J @ away if told else None
            evidence = Evidence(normal_of([J]), J.T @ J, J @ away - e, (20,), output=size)
            stated = evidence.stated(np.zeros((2, 2)), False, None)
            error = np.sqrt(np.diag(stated.covariance))
            inside[told] += list((np.abs(away) < stdtrit(stated.dof, 0.975) * error)[np.isfinite(error)])
    assert len(inside[True]) > 570
    assert 0.9 < np.mean(inside[True]) < 0.98
    assert np.mean(inside[False]) < 0.88  # as if all bins had the same


@pytest.mark.parametrize("known", [True, False])
def test_a_curve_that_the_model_lacks_is_seen_in_neighbours(known):
    """One in seven leaves residuals that are no larger than noise, a third of these no sign at all."""
    coverage, stated, said = least_squares(missing_curve, known)
    assert stated > 0.85
    assert coverage > 0.85
    assert any("neighbouring outputs are alike" in w for w in said)


def test_what_residuals_do_not_tell_is_not_stated_and_why_is_said():
    _, stated, said = least_squares(one_loud, False)
    assert stated < 0.5
    assert any("far noisier than the others" in w and "variance=" in w and "output [" in w for w in said)
    _, stated, said = least_squares(correlated(0.9), False)
    assert stated > 0.8
    assert len(said) > 200
    assert all("neighbouring outputs are alike" in w or "far noisier" in w for w in said)


def test_a_misfit_scales_the_errors():
    J, e = slopes(0), (-1.0) ** np.arange(25)  # no neighbours alike
    e -= J @ np.linalg.lstsq(J, e, rcond=None)[0]
    e *= np.sqrt(22 / (e @ e))
    of_one, of_many = (
        Evidence(normal_of([J]), J.T @ J, size * e, (25,)).stated(np.zeros((3, 3)), True, None) for size in (1.0, 4.0)
    )
    assert of_one.notes == ()
    np.testing.assert_allclose(of_one.covariance, np.linalg.inv(J.T @ J))
    np.testing.assert_allclose(of_many.covariance, 16 * np.linalg.inv(J.T @ J), rtol=0.01)
    assert "4 times as large" in of_many.notes[0].text


def descents(lag, wander, slope_noise, count=400):
    """rms of (found - true) / stated of a parameter: a descent ends some way off the minimum, which slopes tell."""
    rng, m = np.random.default_rng(5), 25
    J, away = np.ones((m, 1)), []  # its error is 1 / 5
    for _ in range(count):
        e = rng.normal(size=m)
        least = float(e.mean())  # of the minimum, the truth is 0
        end = least + lag * rng.normal()
        step = np.array([least - end + slope_noise * rng.normal()])
        evidence = Evidence(
            normal_of([J]),
            J.T @ J,
            J @ [end] - e,
            (m,),
            step=step,
            wander=np.array([[wander**2]]),
            jitter=25 * slope_noise**2,
            newton=False,
        )
        error = np.sqrt(evidence.stated(np.zeros((1, 1)), True, None).covariance[0, 0])
        away.append(end / error)
    away = np.array(away)
    return np.sqrt(np.mean(away[np.isfinite(away)] ** 2)), np.mean(np.isfinite(away))


@pytest.mark.parametrize(
    ("lag", "wander", "slope_noise"),
    [(0.1, 0.1, 0.01), (0.1, 0.1, 0.1), (0.1, 0.1, 0.3), (0.15, 0.01, 0.02), (0.02, 0.02, 0.2)],
)
def test_a_descent_s_end_counts_once_by_its_steps_and_by_slopes(lag, wander, slope_noise):
    rms, stated = descents(lag, wander, slope_noise)
    assert 0.85 < rms < 1.12
    assert stated > 0.4


def test_a_first_order_descent_states_nothing_along_a_valley_where_it_has_not_moved():
    def f(x):  # outputs tell x[0] + x[1] well, and their difference hardly
        return (x[0] + x[1]) * np.sin(3 * T) + 0.003 * (x[0] - x[1]) * np.cos(9 * T)

    y = f(np.array([1.0, 0.5])) + 0.02 * np.random.default_rng(1).normal(size=25)
    found = {
        method.name: bridge.fit(f, y, [0.9, 0.2], seed=0, method=method, variance=4e-4)
        for method in (bridge.Adam(num_samples=8), bridge.GaussNewton(num_samples=8))
    }
    assert np.isnan(found["adam"].standard_error).all()
    assert any("along the valley" in w and "gauss-newton" in w for w in found["adam"].warnings)
    assert not any("along the valley in which" in w for w in found["gauss-newton"].warnings)


@pytest.mark.parametrize(("noise", "least", "most"), [(0.0, 0.6, 0.8), (0.3, 0.2, 0.7), (1.0, 0.0, 0.02)])
def test_where_rounding_explains_a_rounded_target_errors_are_those_of_rounding(noise, least, most):
    """Half a step of either: the target is one run, the outputs are others. With noise beside it residuals tell."""
    rng, inside, certain = np.random.default_rng(8), [], []
    for k in range(400):
        J = slopes(k)
        m, d = J.shape
        e = rng.uniform(-0.5, 0.5, m) + rng.uniform(-0.5, 0.5, m) + noise * rng.normal(size=m)
        away = np.linalg.lstsq(J, e, rcond=None)[0]
        evidence = Evidence(
            normal_of([J]), J.T @ J, J @ away - e, (m,), rounding=np.full(m, 1 / 12), floor=np.full(m, 1 / 12)
        )
        stated = evidence.stated(np.zeros((d, d)), False, None)
        error = np.sqrt(np.diag(stated.covariance))
        certain.append(np.isinf(stated.dof) and np.allclose(error, np.sqrt(np.diag(np.linalg.inv(J.T @ J)) / 6)))
        reach = ndtri(0.975) if np.isinf(stated.dof) else stdtrit(stated.dof, 0.975)
        inside += list((np.abs(away) < reach * error)[np.isfinite(error)])
    assert 0.92 < np.mean(inside) < 0.98
    assert least <= np.mean(certain) <= most


def test_steps_of_outputs_are_found():
    rng = np.random.default_rng(0)
    kinds = {
        1.0: lambda: np.floor(20 * rng.normal(size=8)),
        0.01: lambda: np.round(rng.normal(size=8), 2),
        0.0123: lambda: 5 + np.floor(rng.normal(size=8) / 0.0123) * 0.0123,
        0.0: lambda: rng.normal(size=8),
    }
    for step, draw in kinds.items():
        lattice = Lattice()
        lattice.add(np.array([draw() for _ in range(12)]))
        np.testing.assert_allclose(lattice.steps, step, rtol=1e-6)
        assert lattice.holds(draw()).all() == (step > 0)
    flags = Lattice()  # each changes but once
    flags.add(np.vstack([np.zeros(8), np.eye(8), np.full(8, np.nan)]))
    np.testing.assert_allclose(flags.steps, 1.0)
    same = Lattice()
    same.restore(flags.to_dict())
    np.testing.assert_array_equal(same.steps, flags.steps)


def test_integer_outputs_do_not_make_errors_of_nothing():
    """Of 120 whole numbers that are met exactly: the loss is 0, the error is not."""
    t, rng = np.arange(60) * 0.04, np.random.default_rng(0)

    def throw(p):
        angle = np.radians(p[1])
        return np.floor(np.concatenate([10 * p[0] * np.cos(angle) * t, 10 * (p[0] * np.sin(angle) * t - 4.9 * t * t)]))

    simulator = bridge.as_simulator(throw, names=["speed", "angle"], bounds=[(5, 40), (5, 85)], natural_scale=[1, 2])
    z = []
    for seed in range(3):
        truth = np.array([rng.uniform(15, 30), rng.uniform(30, 60)])
        result = bridge.fit(simulator, throw(truth), [20.0, 45.0], seed=seed, stop=bridge.Stop(runs=100))
        assert np.isfinite(result.standard_error).all() or result.warnings
        z += list((result.parameters - truth) / result.standard_error)
    assert np.nanmax(np.abs(z)) < 4


def test_a_simulator_as_noisy_as_its_target_has_finite_errors():
    truth, z = np.array([2.0, 1.5, 0.5]), []

    def clean(x):
        return x[0] * np.exp(-x[1] * T) + x[2]

    for seed in (1,):
        rng = np.random.default_rng([seed, 4])
        start, target = truth + 0.2 * rng.normal(size=3), clean(truth) + 0.05 * rng.normal(size=25)
        simulator = bridge.as_simulator(
            lambda x, s: clean(x) + 0.05 * np.random.default_rng(s).normal(size=25),
            names=["a", "b", "c"],
            natural_scale=[0.3] * 3,
            seeded=True,
        )
        result = bridge.fit(simulator, target, start, seed=seed, method="kriging", variance=0.05**2)
        assert not any("do not depend" in w for w in result.warnings)
        z += list((result.parameters - truth) / result.standard_error)
    assert np.isfinite(z).all()
    assert np.abs(z).max() < 4


def test_intervals_are_students_and_end_at_the_bounds():
    def line(p):
        return p[0] + p[1] * T

    simulator = bridge.as_simulator(line, names=["a", "b"], bounds=[(-5, 5), (1.95, 5)], natural_scale=[0.1, 0.1])
    target = line([1.0, 2.0]) + 0.1 * (-1.0) ** np.arange(25)
    result = bridge.fit(simulator, target, [0.9, 2.1], seed=0)
    lower, upper = result.interval(0.9)
    reach = stdtrit(result.interval_dof, 0.95) * result.standard_error
    assert result.interval_dof == pytest.approx(23, abs=1e-6)
    assert upper[0] == pytest.approx(result.parameters[0] + reach[0])
    assert lower[1] == 1.95
    known = bridge.fit(simulator, target, [0.9, 2.1], seed=0, variance=0.01)
    assert np.isinf(known.interval_dof)
    with pytest.raises(bridge.InputError, match="level between 0 and 1"):
        result.interval(95)
    few = bridge.fit(lambda p: p[0] + p[1] * T[:2], target[:2], [0.9, 2.1], seed=0, stop=bridge.Stop(runs=40))
    assert np.isnan(few.standard_error).all()
    assert any("2 outputs do not tell 2 parameters" in w for w in few.warnings)


def noisy(function, size):
    return lambda p, seed: function(p) + size * np.random.default_rng(seed).normal(size=25)


@pytest.mark.parametrize("method", ["kriging", "gauss-newton"])
def test_words_tell_what_is_not_there_from_a_valley(method):
    target = 1 + 2 * T + 0.1 * np.random.default_rng(0).normal(size=25)

    def said(function):
        simulator = bridge.as_simulator(function, names=["a", "b", "c"])
        stop = bridge.Stop(runs=50 if method == "kriging" else None)
        result = bridge.fit(simulator, target, [1.0, 1.0, 1.0], seed=0, method=method, variance=0.01, stop=stop)
        return result, " ".join(result.warnings)

    result, words = said(lambda p: p[0] * T + p[1])
    assert "c is not determined by the target" in words
    assert "outputs do not depend on it" in words
    assert np.isfinite(result.standard_error).tolist() == [True, True, False]
    result, words = said(lambda p: (p[0] + 2 * p[1]) * T + p[2])
    assert "depend on it" not in words
    assert "a, b are not determined one by one" in words
    assert np.isfinite(result.standard_error).tolist() == [False, False, True]


def test_natural_scales_that_are_far_off_are_named_with_better_ones():
    simulator = bridge.as_simulator(
        lambda p: p[0] * 1e6 + p[1] * 1e-6 * T + p[2] * T**2, names=["a", "b", "c"], natural_scale=[1.0, 1.0, 1.0]
    )
    target = 3 + 4 * T + 2 * T**2
    result = bridge.fit(simulator, target, [1e-6, 1e6, 0.0], seed=0, method="gauss-newton")
    (said,) = [w for w in result.warnings if w.startswith("Natural scales do not fit")]
    assert "a 2e-06" in said
    assert "b" in said.split("larger one for")[1]


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["smooth", "rounded", "stochastic-1", "correlated"])
def test_a_part_of_the_audit(cell):
    """See `tests/benchmarks/bench_coverage.py`: never small and wrong, never silent."""
    records = [bench_coverage.refit(cell, given, "kriging", n) for given in (True, False) for n in range(12)]
    told = bench_coverage.summary(records)
    assert told["wrong"] == ""


def test_a_valley_that_bends_has_no_small_error():
    """A circuit's response to a step depends on l c and r / l alone: (r, l, 1 / c) may all be s times as large."""
    t = np.linspace(0, 1e-4, 101)
    response = circuit(t)
    bounds = [(10, 500), (1e-4, 1e-2), (1e-8, 1e-6)]
    simulator = bridge.as_simulator(response, names=["r", "l", "c"], bounds=bounds)
    truth = np.array([50, 1e-3, 1e-7])
    for seed in range(3):
        target = response(truth) + 0.01 * np.random.default_rng(seed).normal(size=len(t))
        result = bridge.fit(simulator, target, [90, 2e-3, 1.8e-7], seed=seed, variance=1e-4, stop=bridge.Stop(runs=120))
        lower, upper = result.interval()
        assert (~np.isfinite(lower) | (lower < truth) & (truth < upper)).all()
        assert result.warnings


TIME = np.linspace(0, 5, 50)


def fading(p):
    return p[0] * np.exp(-p[1] * TIME) + p[2]


def faded(seed):
    return fading([2.0, 0.7, 0.5]) + 0.02 * np.random.default_rng(seed).normal(size=len(TIME))


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_a_minimum_at_a_bound_is_one(seed):
    """The slope along a bound is no step that is left, and what the others are is known."""
    simulator = bridge.as_simulator(fading, names=["amp", "rate", "off"], bounds={"rate": (0.75, 3)})
    r = bridge.fit(simulator, faded(seed), [1.5, 1.0, 0.3], seed=0, variance=4e-4)
    assert r.parameters[1] == 0.75
    assert not any("standard errors away" in w for w in r.warnings)
    assert np.isfinite(r.standard_error[[0, 2]]).all()
    assert np.isnan(r.standard_error[1])
    J = np.stack([np.exp(-0.75 * TIME), np.ones(len(TIME))], axis=1)  # linear in the others
    np.testing.assert_allclose(r.parameters[[0, 2]], np.linalg.lstsq(J, faded(seed), rcond=None)[0], rtol=1e-4)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_where_all_rounded_outputs_are_met_warnings_are_about_the_stated_errors(seed):
    def rounded(p):
        return np.round(fading(p), 2)

    r = bridge.fit(rounded, rounded([2.0, 0.7, 0.5]), [1.6, 0.9, 0.4], seed=seed, stop=bridge.Stop(runs=80))
    assert r.loss == 0
    assert np.isfinite(r.standard_error).all()
    assert not any("or more" in w or "not determined" in w for w in r.warnings)


@pytest.mark.parametrize("runs", [2, 3])
def test_too_few_runs_are_not_the_target_s_fault(runs):
    r = bridge.fit(fading, faded(0), [1.5, 1.0, 0.3], seed=0, variance=4e-4, stop=bridge.Stop(runs=runs))
    assert r.standard_error is not None
    assert np.isnan(r.standard_error).all()
    assert any(f"not tell {len(r.parameters)} parameters apart" in w for w in r.warnings)
    assert not any("not determined" in w or "as large" in w for w in r.warnings)


def test_where_no_error_is_stated_nothing_is_said_of_errors_but_why():
    """Fringes: far from the answer the model of the runs is of no use."""
    wave = np.linspace(1.5, 1.52, 200)

    def fringes(p):
        return 1 / (1 + p[1] * np.sin(2 * np.pi * p[0] / wave) ** 2)

    for seed in range(4):
        target = fringes([100.0, 10.0]) + 0.02 * np.random.default_rng(seed).normal(size=200)
        r = bridge.fit(fringes, target, [100.3, 6.0], seed=seed, variance=4e-4, stop=bridge.Stop(runs=60))
        if np.isfinite(r.standard_error).any():
            continue
        assert not any(w.startswith(("Standard errors are", "Residuals of neighbouring")) for w in r.warnings)
        assert any("standard error" in w or "not determined" in w or "runs do not tell" in w for w in r.warnings)


@pytest.mark.parametrize(("method", "call"), [("gauss-newton", 50), ("adam", 300)])
def test_the_loss_of_an_interrupted_descent_is_that_of_its_parameters(method, call):
    calls = []

    def stopped(p):
        calls.append(p)
        if len(calls) == call:
            raise KeyboardInterrupt
        return fading(p)

    r = bridge.fit(stopped, faded(0), [1.5, 1.0, 0.3], seed=0, variance=4e-4, method=method)
    assert r.stop_reason == "interrupted"
    (at,) = [step for step in r.history if step.loss == r.loss]
    assert at.parameters == tuple(r.parameters)
    assert at.loss == min(step.loss for step in r.history)
