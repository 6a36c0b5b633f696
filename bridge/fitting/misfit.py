"""The distance of an output from the target, and what each method of fitting needs of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array, one_number
from bridge.errors import InputError
from bridge.fitting.prior import Prior
from bridge.fitting.robust import RobustLoss
from bridge.fitting.soundness import unusable
from bridge.fitting.target import Cholesky, LinearMap, touched

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@final
@dataclass(frozen=True)
class Misfit:
    """sum_j rho(r_j) + prior, r = B(T(y - t) / sigma): the loss, and what each method needs of it.

    With a loss l of one's own, l(B T(y), B T(t)) + prior.

    Numbers that an output lacks are NaN, in the output and in its residuals. Where outputs are compared with each other
    they count as much as those that are there do on average: a run must not look better for what it lacks. A loss of
    one's own gets them as they are.

    Attributes:
        target: t. variance: sigma^2 of T(t), a number or of its shape. loss: l, None for least squares.
        prior: of the parameters in natural units. whiten: T. blur: B. robust: rho, r^2 / 2 where None.
        masked: which numbers of t are no data; None for none. counts: which of T(t)'s are; None for all.
        partial: whether outputs may lack numbers.
    """

    target: torch.Tensor
    variance: torch.Tensor
    loss: Loss | None
    prior: Prior
    whiten: LinearMap | None = None
    robust: RobustLoss | None = None
    blur: LinearMap | None = None
    masked: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    partial: bool = False

    @property
    def plain(self) -> bool:
        """Whether outputs can be had back from residuals."""
        return self.whiten is None and self.blur is None and self.counts is None

    @property
    def deviation(self) -> Array:
        """The noise's standard deviation, (m,) or (1,)."""
        return np.sqrt(self.variance.numpy().reshape(-1))

    def _mapped(self, x: torch.Tensor) -> torch.Tensor:
        """B(T(x) / sigma) of one x of the target's shape; sigma is left out for a loss of one's own."""
        if self.masked is not None:
            x = torch.where(self.masked, 0.0, x)
        x = x if self.whiten is None else self.whiten(x)
        if self.loss is None:
            x = x / self.variance.sqrt()
        if self.counts is not None:
            x = torch.where(self.counts, x, 0.0)
        return x if self.blur is None else self.blur(x)

    def _data(self, x: torch.Tensor) -> torch.Tensor:
        """The numbers of T(x) that are data, flattened. Blurred ones are all."""
        return x[self.counts] if self.counts is not None and self.blur is None else x.reshape(-1)

    def of_data(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Flags of the target's numbers as those of the residuals, where these are the same numbers."""
        if self.whiten is not None or self.blur is not None or self.counts is None:
            return flags
        return np.asarray(flags[self.counts.numpy().reshape(-1)])

    def residual(self, output: torch.Tensor) -> torch.Tensor:
        """r, flattened: (m,); NaN where the output lacks a number, 0 there before a blur."""
        self._check(output)
        difference = output.to(torch.float64) - self.target
        lacks = self._lacks(output)
        if lacks is None:
            return self._data(self._mapped(difference))
        r = self._mapped(torch.where(lacks, 0.0, difference))
        return self._data(r if self.blur is not None else torch.where(touched(self.whiten, lacks), torch.nan, r))

    def _lacks(self, output: torch.Tensor) -> torch.Tensor | None:
        """Which numbers the output lacks, of those that are data."""
        if not self.partial:
            return None
        lacks = torch.isnan(output.detach())
        lacks = lacks if self.masked is None else lacks & ~self.masked
        return lacks if bool(lacks.any()) else None

    def _whole(self, output: torch.Tensor) -> float:
        """How many numbers are data over how many of them the output has."""
        lacks = self._lacks(output)
        if lacks is None:
            return 1.0
        counts = torch.ones_like(touched(self.whiten, lacks)) if self.counts is None else self.counts
        there = int((counts & ~touched(self.whiten, lacks)).sum())
        return int(counts.sum()) / there if there else float("nan")

    def value(self, output: torch.Tensor, z: Array) -> float:
        """The loss by which outputs are compared with each other."""
        with torch.no_grad():
            if self.loss is not None:
                self._check(output)
                value = self.loss(self._mapped(output.to(torch.float64)), self._mapped(self.target))
                return one_number(value, "from the loss", InputError) + self.prior(z)[0]
            r = self.residual(output).numpy()
            return self._whole(output) * self.cost(r) + self.prior(z)[0]

    def value_there(self, output: torch.Tensor, z: Array) -> float:
        """The loss of what the output has."""
        if self.loss is not None:
            return self.value(output, z)
        with torch.no_grad():
            return self.cost(self.residual(output).numpy()) + self.prior(z)[0]

    def ordinary_cost(self) -> float:
        """sum rho(r) of an output that is the target's mean everywhere."""
        data = self.target if self.masked is None else self.target[~self.masked]
        return self.cost(self.residual(torch.full_like(self.target, float(data.mean()))).numpy())

    def cost(self, r: Array) -> float:
        """sum rho(r) of what there is."""
        if self.partial:
            r = r[~np.isnan(r)]
        return 0.5 * float(r @ r) if self.robust is None else float(self.robust.rho(r).sum())

    def _check(self, output: torch.Tensor) -> None:
        if output.shape != self.target.shape:
            raise InputError(f"Expected a target of shape {tuple(output.shape)}, got {tuple(self.target.shape)}.")

    def value_and_gradient(self, output: torch.Tensor, z: Array) -> tuple[float, torch.Tensor, Array]:
        """The loss of an output at z, and its derivatives in the output and, by the prior alone, in z.

        With least squares the derivatives are those of the loss over m, so that a learning rate does not depend on m.
        """
        prior, slope = self.prior(z)
        leaf = output.detach().to(torch.float64).requires_grad_(True)
        if self.loss is not None:
            self._check(output)
            value = self.loss(self._mapped(leaf), self._mapped(self.target))
            number = one_number(value, "from the loss", InputError)
            if not (isinstance(value, torch.Tensor) and value.requires_grad):
                raise InputError(
                    f"Expected a loss made of torch operations on the output, got a {type(value).__name__} without a "
                    "gradient. Use torch functions, or method='natural', which needs none."
                )
            (gradient,) = torch.autograd.grad(value.reshape(()), leaf)
            return number + prior, torch.where(torch.isnan(leaf.detach()), 0.0, gradient), slope
        residual = self.residual(leaf)
        r = residual.detach().numpy()
        psi = r if self.robust is None else self.robust.weight(r) * r
        there = ~np.isnan(r) if self.partial else np.ones(len(r), dtype=bool)
        m, whole = residual.numel(), self._whole(output)
        (gradient,) = torch.autograd.grad(
            residual[torch.as_tensor(there)], leaf, torch.as_tensor(whole * psi[there] / m)
        )
        return whole * self.cost(r) + prior, gradient, slope / m

    def shares(self, output: torch.Tensor) -> Array | None:
        """The part that each output has in sum r^2, of the target's shape; None where `whiten` mixes outputs.

        With a covariance V they are e V^-1 e elementwise, e = y - t: they add up to 1, and one may be negative. What is
        masked or lacking has none.
        """
        e = output.to(torch.float64) - self.target
        if self.masked is not None:
            e = torch.where(self.masked, 0.0, e)
        if self.partial:
            e = torch.where(torch.isnan(e), 0.0, e)
        if self.whiten is None:
            part = e**2 / self.variance
        elif isinstance(self.whiten, Cholesky):
            data = self.whiten.data(e)
            one = data * torch.cholesky_solve(data, self.whiten.factor)
            part = (
                one
                if self.whiten.keep is None
                else torch.zeros(e.numel(), 1).to(e).index_copy(0, self.whiten.keep, one)
            )
            part = part.reshape(e.shape)
        else:
            return None
        total = float(part.sum())
        return (part / total if total > 0 else torch.zeros_like(part)).numpy()

    def jacobian(self, jacobian: torch.Tensor, natural: Array) -> torch.Tensor:
        """dr/dz (m, d) in natural units, of the output's (*shape, d) in the parameters' own; 0 for what is lacking."""
        J = jacobian.to(torch.float64)
        if self.plain:
            J = (J / self.variance.sqrt()[..., None]).reshape(-1, J.shape[-1])
            J = torch.where(torch.isnan(J), 0.0, J) if self.partial else J
        else:
            lacks = self._lacks(jacobian[..., 0])
            J = J if lacks is None else torch.where(lacks[..., None], 0.0, J)
            columns = [self._mapped(column) for column in J.movedim(-1, 0)]
            if lacks is not None and self.blur is None:
                columns = [torch.where(touched(self.whiten, lacks), 0.0, column) for column in columns]
            J = torch.stack([self._data(column) for column in columns], dim=1)
        return J * torch.as_tensor(natural)

    def normal(self, J: torch.Tensor, r: torch.Tensor, z: Array) -> tuple[Array, Array]:
        """J^T W J + P of the prior, (d, d), and the gradient of sum_j rho(r_j) + prior, (d,), of what there is.

        W = psi(r) / r, 1 for least squares: iteratively reweighted least squares.
        """
        if self.partial:
            there = ~torch.isnan(r)
            J, r = J[there], r[there]
        if self.robust is None:
            H, g = J.T @ J, J.T @ r
        else:
            w = torch.as_tensor(self.robust.weight(r.numpy()))
            H, g = (J * w[:, None]).T @ J, J.T @ (w * r)
        return H.numpy() + self.prior.information, g.numpy() + self.prior(z)[1]

    def usable(self, outputs: Array) -> NDArray[np.bool_]:
        """(n,) which outputs (n, ...) can be compared with the target: finite, but for numbers that may be lacking."""
        if not self.partial:
            return ~unusable(outputs)
        rows = outputs.reshape(len(outputs), -1)
        if rows.shape[1] != self.target.numel():  # of runs that have all failed
            return np.zeros(len(rows), dtype=bool)
        data = slice(None) if self.masked is None else ~self.masked.numpy().reshape(-1)
        there = ~np.isnan(rows[:, data]).all(axis=1)
        return np.asarray(there & ~unusable(np.where(np.isnan(rows), 0.0, rows)))

    def spread_of(self, deviation: Array) -> Array:
        """(m,) variances of residuals of outputs with independent errors of such standard deviations, (*shape).

        Exact without `whiten` and blur, else the mean over sixteen draws of signs.
        """
        scale = torch.as_tensor(deviation, dtype=torch.float64).reshape(self.target.shape)
        if self.whiten is None and self.blur is None:
            return np.asarray(self._data((scale**2 / self.variance).expand(self.target.shape)).numpy())
        rng = np.random.Generator(np.random.Philox(key=2))
        signs = rng.choice([-1.0, 1.0], size=(16, *self.target.shape))
        drawn = [self._data(self._mapped(scale * torch.as_tensor(x))).numpy() ** 2 for x in signs]
        return np.asarray(np.mean(drawn, axis=0))

    def residuals_of(self, outputs: Array) -> Array:
        """(n, m) of outputs (n, *shape), not finite where they are not."""
        rows = torch.as_tensor(outputs, dtype=torch.float64)
        if self.whiten is None and self.blur is None:
            whitened = ((rows - self.target) / self.variance.sqrt()).reshape(len(rows), self.target.numel())
            return np.asarray((whitened if self.counts is None else whitened[:, self.counts.reshape(-1)]).numpy())
        mapped = np.full((len(rows), self.residual(self.target).numel()), np.nan)
        for i in np.flatnonzero(self.usable(outputs)):
            mapped[i] = self.residual(rows[i]).numpy()
        return mapped
