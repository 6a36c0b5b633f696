"""The distance of an output from the target, and what each method of fitting needs of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bridge.arrays import Array, floating, one_number, real_array
from bridge.errors import InputError
from bridge.fitting.robust import Robust
from bridge.fitting.soundness import unusable
from bridge.simulator.protocol import Simulator, simulator_name
from bridge.simulator.space import ParameterSpace

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LinearMap = Callable[[torch.Tensor], torch.Tensor]


def checked_target(
    target: ArrayLike | torch.Tensor, mask: ArrayLike | torch.Tensor | None, sim: Simulator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The target, 0 where it is masked, and where that is: None where nowhere.

    Args:
        mask: True where a number is no data, as `numpy.ma` has it; besides that of a masked target.
    """
    array = np.array(floating(real_array(target, "as the target", InputError)), dtype=np.float64)
    if sim.output_shape is not None and array.shape != sim.output_shape:
        raise InputError(
            f"Expected a target of shape {sim.output_shape}, as {simulator_name(sim)!r} gives, got {array.shape}."
        )
    if array.size == 0:
        raise InputError(f"Expected a target with numbers, got an empty one, of shape {array.shape}.")
    masked = np.zeros(array.shape, dtype=bool)
    if isinstance(target, np.ma.MaskedArray):
        masked |= np.ma.getmaskarray(target)
    if mask is not None:
        given = real_array(mask, "as the mask", InputError)
        if given.shape != array.shape or not np.isin(given, (0, 1)).all():
            raise InputError(
                f"Expected a mask of the target's shape {array.shape}, True where a number is to be left out, got "
                f"shape {given.shape}, dtype {given.dtype}."
            )
        masked |= given.astype(bool)
    array[masked] = 0.0
    if not np.isfinite(array).all():
        raise InputError(
            "Expected a finite target, got NaN or infinity. Leave such numbers out: mask=~numpy.isfinite(target), or a "
            "numpy.ma array."
        )
    if masked.all():
        raise InputError("Expected a target with a number that is not masked, got none. In a mask True means no data.")
    return torch.as_tensor(array), torch.as_tensor(masked) if masked.any() else None


def checked_linear(given: LinearMap, shape: tuple[int, ...], what: str) -> torch.Tensor:
    """What a linear map makes of random numbers of a shape: exactly 0 where it makes 0 of all.

    Raises:
        InputError: it is not linear, or not made of torch operations on real numbers.
    """
    rng = np.random.Generator(np.random.Philox(key=1))
    a, b = (torch.as_tensor(rng.normal(size=shape)) for _ in range(2))
    try:
        results = [given((2 * a + 3 * b).requires_grad_(True)), given(a), given(b)]
    except Exception as error:
        raise InputError(
            f"Expected {what} to map a float64 tensor of shape {shape}, got {type(error).__name__}: {error}."
        ) from error
    if not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in results) or not results[0].requires_grad:
        raise InputError(
            f"Expected {what} to make a real, differentiable tensor of a tensor. Use torch operations; for Fourier "
            "transforms torch.view_as_real, or transform back."
        )
    whole, one, two = (x.detach() for x in results)
    if not bool(((whole - 2 * one - 3 * two).abs() <= 1e-5 * (1 + whole.abs())).all()):
        raise InputError(f"Expected {what} to be linear, T(2a + 3b) = 2 T(a) + 3 T(b), got another result.")
    return one.abs() + two.abs()


def checked_noise(
    variance: float | ArrayLike | None, whiten: LinearMap | None, goal: torch.Tensor, masked: torch.Tensor | None
) -> tuple[torch.Tensor, LinearMap | None, torch.Tensor | None]:
    """The variance of the residuals, a number or of their shape, the linear map that comes before it, and which of its
    numbers are data: None for all.

    No data are those that depend on a masked number, those that the map makes 0 of all outputs, and those of infinite
    variance.

    Raises:
        InputError: a variance that is not positive, or of neither the residuals' shape nor that of their covariance.
    """
    given = real_array(1.0 if variance is None else variance, "as the variance", InputError)
    tensor = torch.as_tensor(np.array(given, dtype=np.float64))
    if whiten is None:
        size = torch.ones(goal.shape, dtype=torch.float64)
    else:
        size = checked_linear(whiten, tuple(goal.shape), "whiten")
    if tensor.ndim and tensor.shape != size.shape:
        m = goal.numel()
        if whiten is not None or goal.ndim == 0 or tensor.shape not in ((m, m), goal.shape + goal.shape):
            raise InputError(
                f"Expected a variance that is a number, {tuple(size.shape)}, or the covariance of all numbers, "
                f"({m}, {m}), got {tuple(tensor.shape)}."
            )
        return torch.ones((), dtype=torch.float64), _whitening(tensor.reshape(m, m), masked), None
    if not bool((tensor > 0).all()) or (tensor.ndim == 0 and not bool(torch.isfinite(tensor))):
        raise InputError(
            "Expected a positive, finite variance of the target; in an array inf where there are no data; got "
            f"{float(tensor.min()):g}."
        )
    counts = (size > 0) & torch.isfinite(tensor)
    if masked is not None:
        counts &= ~touched(whiten, masked)
    if not bool(counts.any()):
        raise InputError(
            "Expected a number that is compared, got none: whiten= makes 0 of all outputs, or mixes masked numbers "
            "into every one of its results. Leave whiten= out, give variance= as a covariance, or whiten locally."
        )
    return tensor, whiten, None if bool(counts.all()) else counts


def touched(whiten: LinearMap | None, where: torch.Tensor) -> torch.Tensor:
    """Which numbers of T(y) depend on some numbers of y."""
    if whiten is None:
        return where
    rng = np.random.Generator(np.random.Philox(key=2))
    with torch.no_grad():
        made = whiten(torch.as_tensor(rng.normal(size=tuple(where.shape))) * where).abs()
    return made > 1e-9 * float(made.max())


def _whitening(covariance: torch.Tensor, masked: torch.Tensor | None) -> LinearMap:
    """x -> C^-1 x of what is not masked, flattened, with C the Cholesky factor: its covariance is then the identity."""
    keep = None
    if masked is not None:
        keep = torch.nonzero(~masked.reshape(-1)).flatten()
        covariance = covariance[keep][:, keep]
    if not bool(torch.isfinite(covariance).all()):
        raise InputError("Expected a finite covariance of the target. What is to be left out is said by mask=.")
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or not torch.allclose(covariance, covariance.T, rtol=1e-8, atol=0):
        raise InputError("Expected a covariance of the target that is symmetric and positive definite.")
    return Cholesky(factor, keep)


@final
@dataclass(frozen=True)
class Cholesky:
    """keep: which numbers are data; None for all."""

    factor: torch.Tensor
    keep: torch.Tensor | None = None

    def data(self, x: torch.Tensor) -> torch.Tensor:
        """(m, 1)."""
        flat = x.reshape(-1, 1)
        return flat if self.keep is None else flat[self.keep]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.factor, self.data(x), upper=False)[:, 0]


@final
@dataclass(frozen=True)
class Prior:
    """A Gaussian: 1/2 (z - mu)^T P (z - mu) of parameters in natural units.

    Attributes:
        information: P, (d, d), 0 where nothing is known. mean: mu, (d,).
    """

    information: Array
    mean: Array

    def __call__(self, z: Array) -> tuple[float, Array]:
        slope = self.information @ (z - self.mean)
        return 0.5 * float(slope @ (z - self.mean)), np.asarray(slope)

    @property
    def known(self) -> int:
        """How many numbers it says something of."""
        return int(np.linalg.matrix_rank(self.information))


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
    robust: Robust | None = None
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


PriorOf = Mapping[Any, tuple[Any, Any]] | tuple[Any, Any]


def make_prior(prior: PriorOf | None, space: ParameterSpace) -> Prior:
    """A prior from what is known of parameters, or of several together.

    Args:
        prior: name -> (mean, standard deviation); several names, in a tuple or with commas between them -> (means,
            covariance) of these together; (means, covariance) of all.

    Raises:
        InputError: an unknown name, one that is named twice, a standard deviation that is not positive, or a covariance
            that is not symmetric and positive definite.
    """
    d, natural = space.dimension, space.natural_scale
    information, mean = np.zeros((d, d)), np.zeros(d)
    seen: set[int] = set()
    for names, (centre, spread) in _by_names(prior, space).items():
        at = [space.index(name) for name in names]
        if len(set(at)) < len(at) or seen & set(at):
            raise InputError(f"Expected each parameter once in prior=, got one of {', '.join(names)} again.")
        seen |= set(at)
        centres, covariance = np.atleast_1d(centre), spread
        what = f"prior[{', '.join(map(repr, names))}]"
        if len(at) == 1 and covariance.ndim == 0:
            if centres.shape != (1,) or not (np.isfinite(centres[0]) and covariance > 0):
                raise InputError(f"Expected {what} = (mean, standard deviation > 0), got ({centre}, {spread}).")
            information[at[0], at[0]] = (natural[at[0]] / float(covariance)) ** 2
        else:
            information[np.ix_(at, at)] = _inverse_covariance(what, centres, covariance, natural[at])
        mean[at] = centres / natural[at]
    return Prior(information, mean)


def marginal_deviations(prior: PriorOf | None, space: ParameterSpace) -> dict[str, float]:
    """The standard deviation of each parameter of which a prior says something; what is no prior is passed over."""
    found: dict[str, float] = {}
    for names, (_, spread) in _by_names(prior, space).items():
        variances = np.diag(spread) if spread.ndim == 2 else np.square(spread).reshape(-1)
        sizes = np.sqrt(np.maximum(variances, 0))
        found |= {name: float(s) for name, s in zip(names, sizes, strict=False) if np.isfinite(s) and s > 0}
    return found


def _inverse_covariance(what: str, means: Array, covariance: Array, unit: Array) -> Array:
    """Of several parameters, in natural units."""
    k = len(unit)
    if means.shape == (k,) and covariance.shape == (k, k):
        sizes = np.sqrt(np.maximum(np.diag(covariance), 0))
        if np.isfinite(means).all() and np.isfinite(covariance).all() and (sizes > 0).all():
            correlation = covariance / np.outer(sizes, sizes)  # parameters may have very different units
            if (
                np.allclose(correlation, correlation.T, rtol=0, atol=1e-8)
                and np.linalg.eigvalsh(correlation)[0] > 1e-12
            ):
                inverse = np.linalg.inv(correlation) / np.outer(sizes / unit, sizes / unit)
                return np.asarray((inverse + inverse.T) / 2)
    raise InputError(
        f"Expected {what} = (means of shape ({k},), covariance ({k}, {k}), symmetric and positive definite), got "
        f"shapes {means.shape} and {covariance.shape}, or numbers that are no covariance."
    )


def _by_names(prior: PriorOf | None, space: ParameterSpace) -> dict[tuple[str, ...], tuple[Array, Array]]:
    if prior is None:
        return {}
    given = prior if isinstance(prior, Mapping) else {space.names: prior}
    named = {}
    for key, value in given.items():
        if isinstance(key, str):
            names = (key,) if key in space.names else tuple(name.strip() for name in key.split(","))
        else:
            names = tuple(key)
        try:
            if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
                raise TypeError
            centre, spread = (np.asarray(x, dtype=np.float64) for x in value)
        except (TypeError, ValueError):
            raise InputError(
                f"Expected prior[{', '.join(names)}] = (mean, standard deviation), or (means, covariance) of several "
                f"parameters, got {value!r}."
            ) from None
        named[names] = (centre, spread)
    return named
