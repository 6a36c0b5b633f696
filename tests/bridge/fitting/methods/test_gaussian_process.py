"""The model of all outputs from their Gram matrix, against what it replaces: one Gaussian process for each output."""

import numpy as np
import pytest
from scipy.optimize import check_grad

from bridge.fitting.methods.gaussian_process import GaussianProcess, fit_gaussian_process


@pytest.fixture
def data():
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(9, 3))
    outputs = np.stack([np.sin(rows @ rng.normal(size=3) + k) for k in range(40)], axis=1)
    return rows, outputs


def of_numbers(rows, outputs, kernel):
    return GaussianProcess(rows, outputs @ outputs.T, np.array(kernel), 2.0)


KERNEL = [0.5, 0.8, 0.2, -2.0, -4.0]


def one_by_one(rows, y, z, kernel):
    """Ordinary kriging of one output, written out as its textbook system with a Lagrange multiplier."""
    n = len(rows)
    lengths, rough, nugget = np.exp(kernel[:3]), np.exp(kernel[3]), np.exp(kernel[4])

    def k(a, b):
        r2 = (((a[:, None] - b[None]) / lengths) ** 2).sum(axis=2)
        # About another place than the model's: the constant takes up the difference.
        linear = ((a - 0.7) / lengths) @ ((b - 0.7) / lengths).T
        return np.exp(-r2 / 2) + rough * np.exp(-np.sqrt(r2 + 1e-12) / 3) + 9 * linear

    system = np.block([[k(rows, rows) + nugget * np.eye(n), np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    right = np.append(k(rows, z[None])[:, 0], 1.0)
    solution = np.linalg.solve(system, right)
    own = 1 + rough + 9 * (((z - 0.7) / lengths) ** 2).sum()
    return solution[:n] @ y, own - solution @ right


def test_the_prediction_of_every_output_is_that_of_a_process_of_its_own(data):
    rows, outputs = data
    model, z = of_numbers(rows, outputs, KERNEL), np.array([0.3, -0.2, 0.1])
    w, variance, _, _ = model.at(z)
    assert w.sum() == pytest.approx(1, abs=1e-12)
    for o in range(outputs.shape[1]):
        mean, own = one_by_one(rows, outputs[:, o], z, KERNEL)
        assert w @ outputs[:, o] == pytest.approx(mean, abs=1e-10)
        assert variance / model.amplitude == pytest.approx(own, abs=1e-10)
    value, _, normal = model.loss(z, 0.0)
    assert value == pytest.approx(0.5 * ((w @ outputs) ** 2).sum(), rel=1e-10)
    J = np.stack([(model.at(z + h)[0] - model.at(z - h)[0]) @ outputs for h in 1e-5 * np.eye(3)]) / 2e-5
    np.testing.assert_allclose(normal, J @ J.T, rtol=1e-6, atol=1e-6 * np.abs(normal).max())


def test_the_smooth_part_alone_is_predicted_as_if_the_rough_one_were_noise():
    """Of one output: k_s(z) K^-1 in place of k(z) K^-1; so it goes past the rows, and past an edge."""
    rng = np.random.default_rng(8)
    rows = np.sort(rng.uniform(-2, 2, size=(30, 1)), axis=0)
    outputs = rows + 0.3 * np.sign(np.sin(9 * rows))
    model = of_numbers(rows, outputs, [1.0, -1.0, -6.0])
    K = model._covariance(rows)[0] + model.nugget * np.eye(30)
    for z in (rows[7], np.array([0.123])):
        k = np.exp(-0.5 * ((rows - z) ** 2).sum(axis=1) * np.exp(-2.0))
        k += 9 * ((rows - rows.mean()) * (z - rows.mean())).sum(axis=1) * np.exp(-2.0)
        system = np.block([[K, np.ones((30, 1))], [np.ones((1, 30)), np.zeros((1, 1))]])
        expected = np.linalg.solve(system, np.append(k, 1.0))[:30] @ outputs[:, 0]
        assert model.at(z, rough=False)[0] @ outputs[:, 0] == pytest.approx(expected, abs=1e-8)
        assert model.loss(z, 0.0, rough=False)[0] == pytest.approx(0.5 * expected**2, abs=1e-8)
        assert abs(expected - z[0]) < 0.2  # the outputs are off by 0.3
    assert model.at(rows[7])[0] @ outputs[:, 0] == pytest.approx(outputs[7, 0], abs=0.05)
    assert abs(outputs[7, 0] - rows[7, 0]) > 0.29


@pytest.mark.parametrize("what", ["loss", "smooth", "draw"])
def test_gradients_against_differences(data, what):
    rows, outputs = data
    model = of_numbers(rows, outputs, KERNEL)
    draw = model.draw(np.random.default_rng(5))

    def function(z):
        return draw.loss(z) if what == "draw" else model.loss(z, 0.7, rough=what == "loss")

    for z in (np.array([0.3, -0.2, 0.1]), np.array([2.0, 1.0, -1.5])):
        error = check_grad(lambda x: function(x)[0], lambda x: function(x)[1], z)
        assert error < 1e-5 * np.linalg.norm(function(z)[1])
    wrong = check_grad(lambda x: function(x)[0], lambda x: 1.01 * function(x)[1], z)
    assert wrong > 1e-3 * np.linalg.norm(function(z)[1])


def test_many_points_at_once(data):
    model = of_numbers(*data, KERNEL)
    points = np.random.default_rng(0).normal(size=(7, 3))
    np.testing.assert_allclose(model.weights(points), [model.at(z)[0] for z in points], atol=1e-10)
    draw = model.draw(np.random.default_rng(5))
    np.testing.assert_allclose(draw.losses(points), [draw.loss(z)[0] for z in points], rtol=1e-9)


@pytest.mark.parametrize("rough", [-2.0, -12.0])
def test_draws_have_the_posteriors_mean_and_variance(data, rough):
    """The loss of a draw is 1/2 (|mu|^2 + variance) on average: a sum over outputs, of whatever they are made."""
    rows, outputs = data
    kernel = [*KERNEL[:3], rough, -4.0]
    model = of_numbers(rows, outputs, kernel)
    # The amplitude that belongs to these outputs, as a fit has it.
    P = np.linalg.inv(model._covariance(rows)[0] + model.nugget * np.eye(9))
    P -= np.outer(P.sum(axis=0), P.sum(axis=0)) / P.sum()
    model = GaussianProcess(rows, model.gram, np.array(kernel), float(np.trace(P @ model.gram)) / 8)
    rng = np.random.default_rng(6)
    draws = [model.draw(rng) for _ in range(1500)]
    wide = [model.draw(rng, 2.0) for _ in range(1500)]
    for z in (np.array([0.3, -0.2, 0.1]), np.array([1.5, 1.0, -1.5])):
        for some, variance in ((draws, 1.0), (wide, 4.0)):
            losses = np.array([draw.loss(z)[0] for draw in some])
            error = losses.std() / len(losses) ** 0.5
            assert losses.mean() == pytest.approx(model.loss(z, variance)[0], abs=4 * error)
            assert abs(model.loss(z, 1.5 * variance)[0] - model.loss(z, variance)[0]) > 4 * error  # it can tell


def test_a_linear_simulator_gives_its_normal_matrix():
    rng = np.random.default_rng(1)
    rows, J = rng.normal(size=(12, 3)), rng.normal(size=(50, 3))
    outputs = rows @ J.T + 1
    model = fit_gaussian_process(rows, outputs @ outputs.T)
    dw = model.differences(np.zeros(3), np.full(3, 0.1))
    np.testing.assert_allclose(dw.T @ model.gram @ dw, J.T @ J, rtol=2e-3, atol=0.1)


def test_the_nugget_finds_the_simulators_noise():
    rng = np.random.default_rng(2)
    rows, J = rng.normal(size=(40, 2)), rng.normal(size=(60, 2))
    for sigma in (0.3, 1.0):
        outputs = rows @ J.T + sigma * rng.normal(size=(40, 60))
        model = fit_gaussian_process(rows, outputs @ outputs.T)
        assert model.noise / 60 == pytest.approx(sigma**2, rel=0.15)
        each = model.residual_noise(outputs)
        assert each.sum() == pytest.approx(model.noise)
        # One output far noisier than the others is found to be.
        outputs[:, 7] += 20 * sigma * rng.normal(size=40)
        each = fit_gaussian_process(rows, outputs @ outputs.T).residual_noise(outputs)
        assert each.argmax() == 7
        assert each[7] > 50 * np.median(each)


def test_lengths_tell_which_parameter_matters():
    rows = np.random.default_rng(4).uniform(-1, 1, size=(30, 2))
    outputs = np.sin(3 * rows[:, :1] + np.arange(10)) + 1e-3 * rows[:, 1:]
    model = fit_gaussian_process(rows, outputs @ outputs.T)
    assert model.kernel[1] > model.kernel[0] + 1
