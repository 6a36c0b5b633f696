"""What one step tells about the smoothed function: value, derivatives, and how good they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from bridge.arrays import real_array
from bridge.errors import InputError
from bridge.estimators.points import Auto
from bridge.estimators.scale import as_tensor, pull_back_scale, pull_back_theta
from bridge.estimators.weights import resolve_covariate
from bridge.evaluation.kept import Kept
from bridge.evaluation.linear_forms import LinearForms
from bridge.evaluation.streamed import Streamed
from bridge.smoothing.median import median_columns
from bridge.smoothing.surrogate import Corrected


class SquaredError(NamedTuple):
    """Mean squared error of the smoothed value, unbiased, with its gradients; see `Estimate.squared_error`.

    value: (*batch,). gradient: (*batch, d), in x. scale_gradient: in L, where the estimate has derivatives in it.
    """

    value: torch.Tensor
    gradient: torch.Tensor
    scale_gradient: torch.Tensor | None


class Estimate:
    """Value, Jacobian and products with it, standard errors, covariance and median, at one vector or at a batch.

    Attributes:
        value: (*batch, *output_shape), the smoothed value E[f(x + L eps)], or f(x) with `straight_through()`.
        num_evaluations: simulator runs, the unperturbed row included. num_cached: those of them that were found in the
            store, and so not carried out.
        num_surrogate_evaluations: runs of the surrogate; num_surrogate_failed: those of them that failed.
        surrogate_weight: (*batch, R), alpha of each replicate; None without a surrogate.
        num_failed: runs that failed and were dropped, or have the penalty as output; the estimate is then that of the
            runs that succeed, which is another quantity unless failing has nothing to do with the perturbation.
        failures: how many of them failed how: "error", "timeout", "non-finite".
        clipped_fraction: share of the queries that lay outside the bounds and were moved onto them.
        points, points_reason: the point set that was used, and why.
        covariate, covariate_reason: the control variate that was used, and why.
        streamed: whether outputs were added up as they came (True) or are kept.
    """

    def __init__(
        self,
        evaluation: LinearForms,
        batch: tuple[int, ...],
        finish: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._evaluation, self._batch, self._finish = evaluation, batch, finish
        shape = (*batch, *evaluation.output_shape)
        # In full precision for what follows, whatever the parameters have; the caller may change his own in place.
        self._wide = torch.stack([evaluation.value(b) for b in self._all]).reshape(shape)
        self.value = finish(self._wide.clone())
        account = evaluation.account
        self.num_evaluations, self.num_cached = account.num_evaluations, account.num_cached
        self.num_failed, self.failures = account.num_failed, account.failures
        self.num_surrogate_evaluations = account.num_surrogate_evaluations
        self.num_surrogate_failed = account.num_surrogate_failed
        self.surrogate_weight: torch.Tensor | None = None
        if isinstance(evaluation, Corrected):
            self.surrogate_weight = torch.from_numpy(evaluation.weights).reshape((*batch, -1))
        self.clipped_fraction = account.clipped_fraction
        self.streamed = evaluation.streamed
        strategy, nodes = evaluation.strategy, evaluation.problems[0].design.nodes
        self._centring, self.covariate_reason = resolve_covariate(strategy, nodes)
        self.covariate = self._centring.name
        self.points, self.points_reason = repr(strategy.points), "as asked"
        if isinstance(strategy.points, Auto):
            chosen, self.points_reason = strategy.points.choose(strategy.distribution, *nodes.eps.shape)
            self.points = repr(chosen)

    @property
    def _all(self) -> range:
        return range(self._evaluation.num_vectors)

    def _rows_for(self, what: str) -> Kept:
        """The evaluation, where it has rows of its own."""
        evaluation = self._evaluation
        if isinstance(evaluation, Corrected):
            raise InputError(
                f"Expected no surrogate for {what}, got one: the estimate is then a sum of means over different rows. "
                "Standard errors come from replicates (pass replicates=8); leave surrogate= out for the rest."
            )
        if isinstance(evaluation, Streamed):
            raise evaluation.needs_rows(what)
        assert isinstance(evaluation, Kept)
        if evaluation.lacks:
            raise InputError(
                f"Expected outputs that lack no numbers for {what}, got some with NaN. Standard errors come from "
                "replicates (pass replicates=8); leave the numbers out of the outputs for the rest."
            )
        return evaluation

    # -- derivatives ------------------------------------------------------------------------------------------------

    def jacobian(self) -> torch.Tensor:
        """J = E[f (L^-T s)^T]: (*batch, *output_shape, d). Collective under MPI."""
        means = [torch.stack(self._evaluation.replicate_jacobians(b)).mean(dim=0) for b in self._all]
        return self._finish(self._shaped(means))

    def _shaped(self, jacobians: list[torch.Tensor]) -> torch.Tensor:
        shape = (*self._batch, *self._evaluation.output_shape, self._evaluation.dimension)
        return torch.stack(jacobians).reshape(shape)

    def of_replicates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and Jacobian of each replicate: (R, *batch, *output_shape) and (..., d), float64. Collective."""
        evaluation = self._evaluation
        values = torch.stack([evaluation.replicate_values(b) for b in self._all], dim=1)
        jacobians = [torch.stack(evaluation.replicate_jacobians(b)) for b in self._all]
        shape = (-1, *self._batch, *evaluation.output_shape)
        both = values.reshape(shape), torch.stack(jacobians, dim=1).reshape((*shape, evaluation.dimension))
        return both[0].to(torch.float64), both[1].to(torch.float64)

    def vjp(self, v: torch.Tensor) -> torch.Tensor:
        """J^T v for v of the value's shape: (*batch, d). Never builds J. Collective under MPI."""
        return self._finish(self._vjp(v, 0).mean(dim=-2))

    def vjp_scale(self, v: torch.Tensor) -> torch.Tensor:
        """d<v, value>/dL for v of the value's shape: (*batch, d) or (*batch, d, d). Collective under MPI.

        Raises:
            InputError: the estimate was made without `scale_gradient=True` and the scale does not require grad.
        """
        self._require_scale()
        return self._finish(self._vjp(v, 1).mean(dim=len(self._batch)))

    def _require_scale(self) -> None:
        if not self._evaluation.has_scale:
            raise InputError(
                "Expected an estimate with derivatives in the scale; use estimate(..., scale_gradient=True)."
            )

    def _rows(self, v: torch.Tensor) -> torch.Tensor:
        v = as_tensor(v)
        if v.shape != self.value.shape:
            raise InputError(f"Expected a vector of shape {tuple(self.value.shape)}, got {tuple(v.shape)}.")
        return v.reshape(self._evaluation.num_vectors, self._evaluation.num_outputs)

    def _vjp(self, v: torch.Tensor, which: int) -> torch.Tensor:
        """(*batch, R, ...): a product for each replicate."""
        gradients = [pair[which] for pair in self._evaluation.vjp(list(enumerate(self._rows(v))))]
        stacked = torch.from_numpy(np.stack([g for g in gradients if g is not None]))
        return stacked.reshape((*self._batch, *stacked.shape[1:]))

    def jvp(self, t: torch.Tensor) -> torch.Tensor:
        """J t for t of the parameters' shape (*batch, d): (*batch, *output_shape). Collective under MPI."""
        shape = (*self._batch, self._evaluation.dimension)
        tangent = as_tensor(t).detach().to("cpu", torch.float64)
        if tuple(tangent.shape) != shape:
            raise InputError(f"Expected a tangent of shape {shape}, got {tuple(tangent.shape)}.")
        rows = tangent.reshape(math.prod(self._batch), -1).numpy()
        products = self._evaluation.jvp([(b, row, None) for b, row in enumerate(rows)])
        return self._finish(torch.stack(products).reshape(self.value.shape))

    # -- how good they are ------------------------------------------------------------------------------------------

    @property
    def degrees_of_freedom(self) -> int:
        """Of Student's t that belongs to the standard errors: replicates - 1, or the independent rows - 1."""
        strategy = self._evaluation.strategy
        if strategy.replicates > 1:
            return strategy.replicates - 1
        self._require_independent_rows()
        return strategy.num_samples - self.num_failed // len(self._evaluation.problems) - 1

    def interval(self, standard_error: torch.Tensor, level: float = 0.95) -> torch.Tensor:
        """Half the width of the confidence interval that belongs to a standard error of this estimate."""
        return standard_error * float(stats.t.ppf(0.5 + level / 2, self.degrees_of_freedom))

    def _require_independent_rows(self) -> Kept:
        what = "standard errors from single rows (replicates=4 needs none)"
        if isinstance(self._evaluation, Corrected):
            return self._rows_for(what)
        evaluation = self._evaluation
        nodes = evaluation.problems[0].design.nodes
        if nodes.block != 1 or self._centring.subtracts == "fit":
            raise InputError(
                f"Expected replicates for a standard error with {self.points} and covariate {self.covariate!r}, whose "
                "rows are not independent of each other: pass replicates=4 (or 8) to smooth, which splits num_samples "
                "into independent parts."
            )
        return self._rows_for(what)

    @property
    def standard_error(self) -> torch.Tensor:
        """Of the value, of its shape: from replicates, else from independent rows. Collective under MPI."""
        evaluation = self._evaluation
        if evaluation.strategy.replicates > 1:
            values = torch.stack([evaluation.replicate_values(b) for b in self._all]).to(torch.float64)
            error = values.std(dim=1) / math.sqrt(evaluation.strategy.replicates)
            return self._finish(error.reshape(self.value.shape))
        kept = self._require_independent_rows()
        if kept.strategy.forward == "unsmoothed":
            return torch.zeros_like(self.value)
        errors = []
        for b in self._all:
            good = kept.surviving(b)
            (squares,) = kept.second_moments(b, [good[None].astype(float)], kept.value(b))
            count = int(good.sum())
            errors.append((squares[0] / (count * (count - 1))).sqrt())
        return self._finish(torch.stack(errors).reshape(self.value.shape))

    def jacobian_standard_error(self) -> torch.Tensor:
        """Of each entry of the Jacobian, of its shape: from replicates, else from independent rows. Collective."""
        evaluation = self._evaluation
        if evaluation.strategy.replicates > 1:
            scale = math.sqrt(evaluation.strategy.replicates)
            errors = [torch.stack(evaluation.replicate_jacobians(b)).std(dim=0) / scale for b in self._all]
            return self._finish(self._shaped(errors))
        evaluation = self._require_independent_rows()
        errors = []
        for b in self._all:
            # Row i contributes (F_i - b) g_i^T, g = L^-T s.
            problem, good = evaluation.problems[b], evaluation.surviving(b)
            g = np.stack([pull_back_theta(problem.scale, s) for s in problem.design.nodes.score]) * good[:, None]
            (squares,) = evaluation.second_moments(b, [(g * g).T], self._centre_of_rows(evaluation, b))
            (jacobian,) = evaluation.replicate_jacobians(b)
            count = int(good.sum())
            variance = squares.T / count - jacobian.square()
            errors.append((variance.clamp(min=0) / (count - 1)).sqrt())
        return self._finish(self._shaped(errors))

    def _centre_of_rows(self, evaluation: Kept, b: int) -> torch.Tensor:
        """What the covariate subtracts from each row: (m,)."""
        if self._centring.subtracts == "nothing":
            return torch.zeros_like(evaluation.value(b))
        return evaluation.unperturbed(b) if self._centring.subtracts == "f(x)" else evaluation.mean_of_rows(b)

    def vjp_standard_error(self, v: torch.Tensor) -> torch.Tensor:
        """Of `vjp(v)`, (*batch, d): from replicates, else from independent rows. Collective under MPI."""
        evaluation = self._evaluation
        if evaluation.strategy.replicates > 1:
            return self._finish(self._vjp(v, 0).std(dim=-2) / math.sqrt(evaluation.strategy.replicates))
        evaluation = self._require_independent_rows()
        errors = []
        for b, row in enumerate(self._rows(v)):
            problem, good = evaluation.problems[b], evaluation.surviving(b)
            (c,) = evaluation.row_products(b, row)
            centre = float(
                torch.dot(self._centre_of_rows(evaluation, b).to(torch.float64), row.to("cpu", torch.float64))
            )
            g = np.stack([pull_back_theta(problem.scale, s) for s in problem.design.nodes.score])
            contributions = ((c - centre)[:, None] * g)[good]
            errors.append(torch.from_numpy(contributions.std(axis=0, ddof=1) / math.sqrt(len(contributions))))
        return self._finish(torch.stack(errors).reshape((*self._batch, evaluation.dimension)))

    # -- the distribution of the outputs ----------------------------------------------------------------------------

    def covariance(self) -> torch.Tensor:
        """Cov[f(x + L eps)], unbiased: (*batch, m, m), float64, for outputs flattened to m. Collective under MPI.

        Rows must be independent; needs kept outputs and holds m^2 numbers.
        """
        return self._finish_batch([self._mean_over(b, self._covariance) for b in self._all])

    def covariance_vjp(self, V: torch.Tensor) -> torch.Tensor:
        """d<V, C>/dx for V (*batch, m, m): (*batch, d), by the unbiased third k-statistic (Theorem 8). Collective."""
        return self._covariance_vjp(V, 0)

    def covariance_vjp_scale(self, V: torch.Tensor) -> torch.Tensor:
        """d<V, C>/dL: (*batch, d) or (*batch, d, d). Collective under MPI."""
        self._require_scale()
        return self._covariance_vjp(V, 1)

    def variance_vjp(self, v: torch.Tensor) -> torch.Tensor:
        """d<v, diag C>/dx for v of the value's shape: (*batch, d); O(N m), never builds C. Collective under MPI."""
        rows = self._rows(v).to("cpu", torch.float64)
        return self._finish_batch([self._third(b, partial(_diagonal_form, rows[b].clone()), 0) for b in self._all])

    def _finish_batch(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack(tensors)
        return self._finish(stacked.reshape((*self._batch, *stacked.shape[1:])))

    def _mean_over(self, b: int, function: Callable[[int], torch.Tensor]) -> torch.Tensor:
        return torch.stack([function(p) for p in self._evaluation.replicates(b)]).mean(dim=0)

    def _require_rows_for(self, what: str) -> Kept:
        evaluation = self._rows_for(what)
        nodes = evaluation.problems[0].design.nodes
        if nodes.block != 1:
            raise InputError(
                f"Expected independent rows for {what}, got {self.points}, under which it is biased. Use points='mc'."
            )
        return evaluation

    def _covariance(self, p: int) -> torch.Tensor:
        evaluation = self._require_rows_for("the covariance")
        F = evaluation.gather_rows(p)[torch.from_numpy(evaluation.surviving(p))]
        F = F - F.mean(dim=0)
        return F.T @ F / (len(F) - 1)

    def _covariance_vjp(self, V: torch.Tensor, which: int) -> torch.Tensor:
        m = self._evaluation.num_outputs
        V = as_tensor(V).to("cpu", torch.float64)
        if tuple(V.shape) != (*self._batch, m, m):
            raise InputError(f"Expected a matrix of shape {(*self._batch, m, m)}, got {tuple(V.shape)}.")
        matrices = V.reshape(-1, m, m)
        return self._finish_batch([self._third(b, partial(_full_form, matrices[b].clone()), which) for b in self._all])

    def _third(self, b: int, form: Callable[[torch.Tensor], torch.Tensor], which: int) -> torch.Tensor:
        """N / ((N-1)(N-2)) sum_i q_i (g_i - mean g), q_i = form(F_i - mean F), pulled back."""
        evaluation = self._require_rows_for("derivatives of the covariance")
        results = []
        for p in evaluation.replicates(b):
            good = evaluation.surviving(p)
            mean = evaluation.mean_of_rows(p).to("cpu", torch.float64)
            # (The forms get memory of torch's own, so that the bits do not depend on where it lies.)
            q = evaluation.row_scalars(p, partial(_of_centred, form, mean))[good]
            problem = evaluation.problems[p]
            s, eps = problem.design.nodes.score[good], problem.design.nodes.eps[good]
            n = len(s)
            if n < 3:
                raise InputError(f"Expected at least three rows for derivatives of the covariance, got {n}.")
            factor = n / ((n - 1) * (n - 2))
            if which == 0:
                total = factor * (q[:, None] * (s - s.mean(axis=0))).sum(axis=0)
                results.append(pull_back_theta(problem.scale, total))
                continue
            g = s * eps - 1 if problem.scale.ndim == 1 else s[:, :, None] * eps[:, None, :] - np.eye(s.shape[1])
            weight = q.reshape((-1,) + (1,) * (g.ndim - 1))
            results.append(pull_back_scale(problem.scale, factor * (weight * (g - g.mean(axis=0))).sum(axis=0)))
        return torch.from_numpy(np.mean(results, axis=0))

    # -- squared error ------------------------------------------------------------------------------------------------

    def squared_error(self, target: torch.Tensor, weight: torch.Tensor | float = 1.0) -> SquaredError:
        """mean_j w_j (f_L(x)_j - t_j)^2 of the smoothed value and its gradients, all unbiased. Collective under MPI.

        The plug-in |mean F - t|^2 is too large by tr C / N, C the covariance of the output, because the same noise is
        squared; its gradient 2 J^T (mean F - t), with leave-one-out weights, by (2 / N) d tr C / dx. Both are
        subtracted, estimated from the same rows by the second and third k-statistic.

        Args:
            target: t, of the value's shape or that of one output. weight: w, a number or such a tensor.

        Raises:
            InputError: rows that depend on each other, streamed outputs, or a covariate other than loo or block.
        """
        evaluation = self._require_rows_for("the bias correction of the squared error")
        if not self._centring.leaves_own_out or evaluation.strategy.forward != "smoothed":
            raise InputError(
                "Expected covariate='loo' and a smoothed value for an unbiased squared error, got covariate "
                f"{self.covariate!r} and a value that is {evaluation.strategy.forward}."
            )
        if not isinstance(target, torch.Tensor):
            target = torch.as_tensor(real_array(target, "as the target", InputError).astype(np.float64))
        try:
            t = as_tensor(target).detach().to(self._wide).expand(self.value.shape)
            w = as_tensor(weight).detach().to(self._wide).expand(self.value.shape) / evaluation.num_outputs
        except RuntimeError as error:
            raise InputError(
                f"Expected a target and a weight of shape {tuple(self.value.shape)}, got "
                f"{tuple(as_tensor(target).shape)} and {tuple(as_tensor(weight).shape)}."
            ) from error
        residual = self._wide - t
        weights = self._rows(w).to("cpu", torch.float64)
        plain = (w * residual**2).reshape(evaluation.num_vectors, -1).sum(dim=1).to("cpu", torch.float64)
        share = [np.mean([1 / s.sum() for s in map(evaluation.surviving, evaluation.replicates(b))]) for b in self._all]
        per_row = torch.from_numpy(np.array(share)) / evaluation.strategy.replicates  # 1/N of all rows

        def excess(which: int) -> torch.Tensor:
            forms = [partial(_diagonal_form, weights[b].clone()) for b in self._all]
            thirds = torch.stack([self._third(b, forms[b], which) for b in self._all])
            return 2 * per_row.reshape((-1,) + (1,) * (thirds.ndim - 1)) * thirds

        traces = torch.stack([self._mean_over(b, partial(self._trace, weights[b].clone())) for b in self._all])
        both = [self._vjp(2 * w * residual, which) for which in range(1 + evaluation.has_scale)]
        gradients = []
        for which, products in enumerate(both):
            g = products.mean(dim=len(self._batch))
            gradients.append(self._finish(g - excess(which).reshape(g.shape)))
        value = self._finish((plain - per_row * traces).reshape(self._batch))
        return SquaredError(value, gradients[0], gradients[1] if len(gradients) > 1 else None)

    def _trace(self, weight: torch.Tensor, p: int) -> torch.Tensor:
        """sum_j w_j Var F_j, unbiased."""
        evaluation = self._require_rows_for("the variance")
        good = evaluation.surviving(p)
        mean = evaluation.mean_of_rows(p).to("cpu", torch.float64)
        q = evaluation.row_scalars(p, partial(_of_centred, partial(_diagonal_form, weight), mean))[good]
        return torch.from_numpy(np.asarray(q.sum() / (len(q) - 1)))

    def median(self, k: int = 3) -> torch.Tensor:
        """E[median of f(x + L eps_1), ..., f(x + L eps_k)], elementwise, k odd: of the value's shape. Collective.

        The U-statistic over all k-subsets of the rows, O(N log N) for each output. Exists where the mean does not.
        Rows must be independent; needs kept outputs.
        """
        results = [self._mean_over(b, lambda p: self._median(p, k)[0]) for b in self._all]
        return self._finish(torch.stack(results).reshape(self.value.shape))

    def median_jacobian(self, k: int = 3) -> torch.Tensor:
        """d median / dx: (*batch, *output_shape, d), with the scores of all k rows of each subset. Collective."""
        return self._finish(self._shaped([self._mean_over(b, lambda p: self._median(p, k)[1]) for b in self._all]))

    def median_vjp(self, v: torch.Tensor, k: int = 3) -> torch.Tensor:
        """The median's Jacobian's transpose times v of the value's shape: (*batch, d). Collective under MPI."""
        rows = self._rows(v).to("cpu", torch.float64)
        return self._finish_batch([rows[b] @ self._mean_over(b, lambda p: self._median(p, k)[1]) for b in self._all])

    def _median(self, p: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        evaluation = self._require_rows_for("the k-sample median")
        good = evaluation.surviving(p)
        problem = evaluation.problems[p]
        g = np.stack([pull_back_theta(problem.scale, s) for s in problem.design.nodes.score[good]])
        both = evaluation.by_columns(p, partial(median_columns, good, g, k))
        return both[0], both[1:].T


def _diagonal_form(v: torch.Tensor, F: torch.Tensor) -> torch.Tensor:
    return (F * F) @ v


def _full_form(V: torch.Tensor, F: torch.Tensor) -> torch.Tensor:
    return ((F @ V) * F).sum(dim=1)


def _of_centred(form: Callable[[torch.Tensor], torch.Tensor], mean: torch.Tensor, F: torch.Tensor) -> torch.Tensor:
    return form(F - mean)
