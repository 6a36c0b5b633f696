"""Standard errors where the Jacobian itself is estimated: its noise must not count as information."""

import numpy as np
import pytest

import bridge
from bridge.fitting.normal import normal_of

M, D, TAU = 60, 3, 0.5
RNG = np.random.default_rng(6)
SIGNAL = np.linalg.qr(RNG.normal(size=(M, D)))[0] * [10.0, 6.0, 5.0]


def estimates(rng, replicates):
    return [SIGNAL + TAU * rng.normal(size=(M, D)) for _ in range(replicates)]


@pytest.mark.parametrize("replicates", [2, 4])
def test_the_normal_matrix_of_independent_jacobians_is_unbiased_and_knows_its_noise(replicates):
    """E J^T J = N + m tau^2 / R I; what is subtracted is that, on average, and leaves the deviation that is said."""
    rng, count = np.random.default_rng(1), 2000
    normals = [normal_of(estimates(rng, replicates)) for _ in range(count)]
    truth, added = SIGNAL.T @ SIGNAL, M * TAU**2 / replicates
    naive, left = (np.mean([getattr(n, what) for n in normals], axis=0) for what in ("naive", "unbiased"))
    entries = np.array([n.unbiased for n in normals])
    error = entries.std(axis=0) / np.sqrt(count)
    assert (np.abs(left - truth) < 5 * error).all()
    assert (np.abs(naive - truth - added * np.eye(D)) < 5 * error).all()
    assert (np.abs(np.diag(naive - truth)) > 30 * np.diag(error)).all()
    # The deviation, with the number of independent outputs known: none is told more than there are.
    exact = 2 * np.sqrt(added * (np.diag(truth) + added * replicates / (2 * (replicates - 1))) / M)
    np.testing.assert_allclose(entries.std(axis=0)[range(D), range(D)], exact, rtol=0.06)
    said = normals[0].deviation(np.diag(truth), np.full(D, added)) * np.sqrt(normals[0].independent / M)
    np.testing.assert_allclose(said, exact, rtol=0.12)
    assert 5 < np.median([n.independent for n in normals]) <= M
    pattern = rng.normal(size=(M, 1))
    alike = [SIGNAL + pattern * rng.normal(size=D) for _ in range(2)]
    assert normal_of(alike).independent == pytest.approx(1)


def test_the_matrix_that_is_told_is_the_closed_form_of_a_diagonal_one():
    """mu of the naive matrix is left, less what the noise of the steps adds: beta = B / N, (1 + 2 b) / (1 + 3 b)."""
    J = np.zeros((40, 3))
    J[range(3), range(3)] = [4.0, 3.0, 2.0]
    noise = np.zeros((40, 3))
    noise[range(10, 13), range(3)] = [0.0, 1.0, 5.0]
    normal = normal_of([J + noise, J - noise])
    np.testing.assert_allclose(np.diag(normal.unbiased), [16, 8, -21])
    one = normal_of([J])
    np.testing.assert_allclose(one.information(), J.T @ J)
    told = np.diag(normal.information())
    # No pair of columns is alike: the outputs' noise counts as independent, as far as three columns tell.
    assert normal.independent == pytest.approx((1 + 0.25) / 0.25)
    # Of the last nothing is left: in its place stands the deviation, that of all noise.
    np.testing.assert_allclose(told, [16, 8, 4 * 2 / np.sqrt(5)], rtol=1e-9)
    beta = 2 / 8
    assert np.diag(normal.information(2.0))[:2] == pytest.approx([16, 8 * (1 + 2 * beta) / (1 + 3 * beta)])
    with_idle = [np.hstack([x, np.zeros((40, 1))]) for x in (J + noise, J - noise)]
    np.testing.assert_allclose(normal_of(with_idle).information()[3], 0)


def noisy_linear(signal, noise):
    """Q diag(30, 30, signal) theta + noise of each run: J^T J of N runs at scale s has m noise^2 / (N s^2) of it."""
    matrix = np.linalg.qr(np.random.default_rng(0).normal(size=(M, D)))[0] * [30.0, 30.0, signal]

    def simulator(theta, seed):
        return matrix @ theta + noise * np.random.default_rng(seed).normal(size=M)

    return matrix, bridge.as_simulator(simulator, names=["a", "b", "c"], seeded=True)


def refits(signal, count):
    """Errors of 16 runs a step at scale 0.1: (count, 3) deviations from the truth, standard errors, and warnings."""
    matrix, simulator = noisy_linear(signal, 0.2)
    truth, rng, away, stated, said = np.array([1.0, -1.0, 0.5]), np.random.default_rng(1), [], [], []
    for seed in range(count):
        result = bridge.fit(
            simulator,
            matrix @ truth + rng.normal(size=M),
            truth,
            seed=seed,
            variance=1.0,
            method=bridge.GaussNewton(
                steps=16, num_samples=16, scale=0.1, tolerance=0.0, simulator_seeds="independent"
            ),
        )
        assert result.num_evaluations == 18 * 16 + 3
        away.append(result.parameters - truth)
        stated.append(result.standard_error)
        said.append(result.warnings)
    return np.array(away), np.array(stated), said


def test_the_noise_of_the_jacobian_is_no_information():
    """Of c the target says N = 16, and the noise of one Jacobian as much again, B = 60 * 0.04 / (16 * 0.01) = 15.

    The errors of a single Jacobian would be (N + B)^-1/2 = 0.18. Those of the estimate have the variance
    (1 + beta / (1 + 2 beta)) / N, beta = B / N: 0.288^2.
    """
    away, stated, said = refits(4.0, 60)
    beta = 15 / 16
    truth = np.sqrt((1 + beta / (1 + 2 * beta)) / 16)
    # Where next to nothing is left beside the noise none is stated.
    finite = told = np.isfinite(stated[:, 2])
    assert told.mean() > 0.9
    assert np.median(stated[told, 2]) == pytest.approx(truth, rel=0.12)
    assert away[:, 2].std() == pytest.approx(truth, rel=0.25)
    np.testing.assert_allclose(np.nanmedian(stated[:, :2], axis=0), 1 / 30, rtol=0.05)
    assert (np.abs(away[told, 2]) < 1.96 * stated[told, 2]).mean() > 0.88
    assert (np.abs(away[:, 2]) < 1.96 / np.sqrt(16 + 15)).mean() < 0.85
    # No more is known of N than to within half of it, and that is said, with what to do; of a and b all is known.
    told = [[w for w in warnings if "noise of the estimated Jacobian" in w] for warnings in said]
    # In one of ten an estimate seems clear that is not: by chance, as in 0.1 of the draws of N's own estimate.
    assert np.mean([len(w) == 1 for w, known in zip(told, finite, strict=True) if known]) > 0.85
    assert all(w.startswith("c acts") for warnings in told for w in warnings)
    assert all(word in told[0][0] for word in ("num_samples=", "scale=", "natural scale of c", "method='kriging'"))


def test_where_the_signal_is_well_above_the_noise_nothing_is_said():
    away, stated, said = refits(16.0, 25)
    assert not any(said)
    np.testing.assert_allclose(np.median(stated, axis=0), [1 / 30, 1 / 30, 1 / 16], rtol=0.07)
    assert (np.abs(away) < 1.96 * stated).mean() > 0.85


@pytest.mark.parametrize("kind", [bridge.GaussNewton, bridge.Adam])
def test_of_hardly_any_signal_the_warning_comes_by_any_descent(kind):
    matrix, simulator = noisy_linear(1.0, 0.2)
    truth = np.array([1.0, -1.0, 0.5])
    method = kind(steps=4, num_samples=16, scale=0.1, simulator_seeds="independent")
    result = bridge.fit(simulator, matrix @ truth, truth, seed=0, method=method, variance=1.0)
    assert [w.split()[0] for w in result.warnings if "or more. Use more samples" in w] == ["c"]
    # A prior that says more than the target does: nothing to warn of.
    prior = {"c": (0.5, 0.1)}
    result = bridge.fit(simulator, matrix @ truth, truth, seed=0, method=method, variance=1.0, prior=prior)
    assert result.warnings == ()
    assert result.standard_error[2] == pytest.approx(0.1, rel=0.1)


def test_replicates_of_ones_own_need_no_second_jacobian():
    matrix, simulator = noisy_linear(4.0, 0.2)
    result = bridge.fit(
        simulator,
        matrix @ np.ones(3),
        np.ones(3),
        seed=0,
        variance=1.0,
        method=bridge.GaussNewton(steps=4, num_samples=16, scale=0.1, replicates=4, simulator_seeds="independent"),
    )
    assert result.num_evaluations == 5 * 16 + 3
    assert any(w.startswith("c acts") for w in result.warnings)
