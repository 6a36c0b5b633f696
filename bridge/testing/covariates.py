"""What is asked of a covariate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.estimators.covariates import Covariate
from bridge.estimators.design import make_design
from bridge.estimators.distributions import Gaussian
from bridge.estimators.strategy import Strategy
from bridge.estimators.weights import Weights, make_weights, resolve_covariate
from bridge.evaluation.memory import Memory
from bridge.simulator.function import as_simulator
from bridge.smoothing.smooth import smooth
from bridge.smoothing.smoothed import SmoothedSimulator
from bridge.testing.common import Contract, short_descent
from bridge.testing.truth import Quadrature, assert_mean, mean_differs

_DRAWS, _FEW_DRAWS, _ROWS, _SCALE = 1500, 150, 12, 0.5
_A = np.array([[0.9, -0.4], [0.3, 0.8]])
_X = np.array([0.2, -0.3])
_SETS = ("mc", "antithetic-mc", "sobol")


class CovariateContract(Contract):
    """The contract of `bridge.Covariate`, for a test class that names one.

        class TestMine(bridge.testing.CovariateContract):
            made = MyCovariate()

    Attributes:
        ignores_constants: whether a constant that is added to the outputs changes no gradient.
        unbiased: whether gradients of independent rows have the exact mean; else it may be off by `bias`, relative.
        power: the relative error that the statistical test of `unbiased` has to notice.
    """

    made: ClassVar[Covariate]
    ignores_constants: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    bias: ClassVar[float] = 0.25
    power: ClassVar[float] = 0.15

    def fit_settings(self, made: Any) -> dict[str, Any]:
        return {"method": short_descent(covariate=made)}

    def test_weights_of_the_value_sum_to_one_and_those_of_slopes_to_zero(self) -> None:
        for points in _SETS:
            weights, _ = self._weights(self._strategy(points), 0)
            assert abs(weights.value.sum() - 1) < 1e-10, "the weights of the value do not sum to 1"
            if self.ignores_constants:
                assert weights.scale is not None
                for name, columns in (("theta", weights.theta), ("scale", weights.scale)):
                    assert np.abs(columns.sum(axis=0)).max() < 1e-9, f"the weights of {name} do not sum to 0"

    def test_constants_change_no_gradient(self) -> None:
        if not self.ignores_constants:
            return
        x, v = torch.from_numpy(_X), torch.ones(2)
        for points in _SETS:
            found = []
            for constant in (0.0, 100.0):
                f = partial(_plus, constant)
                smoothed = _smoothed(f, seed=1, num_samples=_ROWS, points=points, covariate=self.made)
                estimate = smoothed.estimate(x, scale_gradient=True)
                found.append(np.append(estimate.jacobian().numpy().ravel(), estimate.vjp_scale(v).numpy()))
            np.testing.assert_allclose(found[0], found[1], rtol=1e-8, atol=1e-9)

    def test_gradients_have_the_exact_mean(self) -> None:
        strategy = self._strategy("mc")
        samples, scales = [], []
        for step in range(_FEW_DRAWS if self.made.needs_outputs else _DRAWS):
            weights, F = self._weights(strategy, step)
            assert weights.scale is not None
            samples.append(F.T @ weights.theta / _SCALE)
            scales.append(F.T @ weights.scale / _SCALE)
        _, jacobian, of_scale = self._truth()
        strong = np.abs(jacobian) > 0.25
        found = np.stack(samples)
        if self.unbiased:
            assert_mean(found[:, strong], jacobian[strong], power=self.power)
            assert not mean_differs(np.stack(scales), of_scale), "the mean of derivatives in the scale is another"
            assert mean_differs(np.stack(scales), of_scale + 0.5)
        else:
            error = np.abs(found.mean(axis=0)[strong] / jacobian[strong] - 1).max()
            assert error < self.bias, f"a bias of {error:.0%}, more than {self.bias:.0%}"

    def test_errors_fall_with_the_number_of_rows(self) -> None:
        smoothed = _smoothed(_function, seed=0, num_samples=256, points="sobol", covariate=self.made)
        estimate = smoothed.estimate(torch.from_numpy(_X))
        value, jacobian, _ = self._truth()
        assert np.abs(estimate.value.numpy() - value).max() < 0.02
        assert np.abs(estimate.jacobian().numpy() - jacobian).max() < 0.1
        assert estimate.covariate_reason

    def test_rows_that_are_dropped_have_no_weight(self) -> None:
        for points in _SETS:
            strategy = self._strategy(points)
            valid = np.ones(strategy.num_rows, dtype=bool)
            valid[[2, 3, 8, 9]] = False  # whole pairs
            weights, _ = self._weights(strategy, 3, valid)
            assert weights.scale is not None
            for columns in (weights.value, weights.theta, weights.scale):
                assert np.isfinite(columns).all()
                assert not columns[~valid].any(), "a dropped row has a weight"
            assert abs(weights.value.sum() - 1) < 1e-10, "the weights of the value do not sum to 1"
            if self.ignores_constants:
                assert np.abs(weights.theta.sum(axis=0)).max() < 1e-9, "the weights of slopes do not sum to 0"

    def test_it_says_before_the_run_what_it_needs(self) -> None:
        for points in _SETS:
            strategy = self._strategy(points)
            chosen, why = resolve_covariate(strategy, make_design(strategy, 0, 0, 2).nodes)
            assert why, "it does not say why"
            assert isinstance(chosen, Covariate)
            assert chosen.resolve is not None
            first, _ = self._weights(strategy, 0)
            again, _ = self._weights(strategy, 0, others=1)
            depends = not np.array_equal(first.theta, again.theta)
            assert self.made.needs_outputs or not depends, "weights depend on outputs, and needs_outputs is False"

    def test_kept_and_streamed_outputs_give_the_same(self) -> None:
        if self.made.needs_outputs:
            return  # they are always kept
        found = []
        for keep in (0.0, 100.0):
            smoothed = _smoothed(
                _repeated, seed=2, num_samples=40, points="mc", covariate=self.made, memory=Memory(keep)
            )
            found.append(smoothed.estimate(torch.from_numpy(_X)).jacobian().numpy())
        np.testing.assert_allclose(found[0], found[1], rtol=1e-9, atol=1e-12)

    def test_a_single_row_is_refused_or_has_finite_numbers(self) -> None:
        try:
            smoothed = _smoothed(_function, seed=0, num_samples=1, covariate=self.made)
        except InputError:
            return
        assert smoothed.estimate(torch.from_numpy(_X)).jacobian().isfinite().all()

    # -- the function that is smoothed ------------------------------------------------------------------------------

    def _strategy(self, points: str) -> Strategy:
        return _smoothed(_function, seed=5, num_samples=_ROWS, points=points, covariate=self.made).strategy

    def _weights(self, strategy: Strategy, step: int, valid: Any = None, others: int = 0) -> tuple[Weights, Array]:
        """The weights of a design, and the outputs of its rows; projections are those of other outputs, if asked."""
        nodes = make_design(strategy, step, 0, 2).nodes
        F = _function(_X + _SCALE * nodes.eps)
        shown = np.column_stack([F, F**2]) if not others else np.column_stack([F[::-1], np.exp(F)])
        weights = make_weights(strategy, nodes, "diagonal", valid, shown)
        return weights, np.vstack([F, _function(_X[None])]) if strategy.extra_row else F

    def _truth(self) -> tuple[Array, Array, Array]:
        """Value (2,), Jacobian (2, 2) and derivative in the scale's diagonal (2, 2), by quadrature without scores."""
        rule = Quadrature(24)
        nodes = rule.nodes(Gaussian(), rule.size(Gaussian(), 2), 2, np.random.default_rng(0))
        at = np.tanh((_X + _SCALE * nodes.eps) @ _A.T)
        slope = (1 - at**2)[:, :, None] * _A
        jacobian = np.einsum("n,nmd->md", nodes.weight, slope)
        return nodes.weight @ at + 0.7, jacobian, np.einsum("n,nmd,nd->md", nodes.weight, slope, nodes.eps)


def _smoothed(function: Callable[[Array], Array], **settings: Any) -> SmoothedSimulator:
    return smooth(as_simulator(function, vectorized=True), scale=_SCALE, **settings)


def _plus(constant: float, x: Array) -> Array:
    return _function(x) + constant


def _repeated(x: Array) -> Array:
    return np.repeat(_function(x), 50, axis=1)


def _function(x: Array) -> Array:
    return np.asarray(np.tanh(x @ _A.T) + 0.7)
