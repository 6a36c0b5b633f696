"""How outputs are compared with the target: the settings of `misfit=`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from numpy.typing import ArrayLike

from bridge.checks import Settings, can_be_called_with
from bridge.errors import InputError
from bridge.fitting.misfit import Loss
from bridge.fitting.robust import RobustLoss
from bridge.fitting.target import LinearMap


@final
@dataclass(frozen=True)
class LeastSquares(metaclass=Settings):
    """1/2 sum((T(f(x)) - T(target))^2 / variance): half the chi-square where the variance is known.

    Attributes:
        variance: of the target's noise: a number, an array of its shape, or the covariance (m, m) of its m numbers.
            Left out, 1 in the loss, and standard errors come from the mean squared residual.
        mask: True where a number of the target is no data, as in `numpy.ma`, whose masked arrays are targets as well.
            What is masked counts nowhere, nor do numbers of infinite variance, and those that `whiten` makes of masked
            ones or makes 0 of all outputs.
        whiten: T, a linear map of torch tensors, of one output and of the target before they are compared; `variance`
            is then that of its result.
        robust: "huber", "cauchy" or "soft-l1", or (name, width in standard deviations), or a `RobustLoss`, in place of
            squares of residuals; needs `variance`.
    """

    variance: float | ArrayLike | None = None
    mask: ArrayLike | torch.Tensor | None = None
    whiten: LinearMap | None = None
    robust: str | tuple[str, float] | RobustLoss | None = None


@final
@dataclass(frozen=True)
class CustomLoss(metaclass=Settings):
    """A loss of one's own, l(output, target) -> number, of torch tensors.

    Attributes:
        function: l. mask: as in `LeastSquares`: l gets 0 there for both.
        whiten: a linear map of output and target before l sees them.
    """

    function: Loss
    mask: ArrayLike | torch.Tensor | None = None
    whiten: LinearMap | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(
                f"Expected a loss as a function of output and target, got {self.function!r}. Least squares need none: "
                "leave it out."
            )
        if not can_be_called_with(self.function, 2):
            raise InputError(
                "Expected a loss as a function of two arguments, loss(output, target), got one of other arguments."
            )


Comparison = LeastSquares | CustomLoss


def make_comparison(misfit: Comparison | Callable[..., Any] | None, variance: Any) -> Comparison:
    """How outputs are compared: least squares, a function of one's own, or what is given.

    Args:
        variance: that of least squares, for short.

    Raises:
        InputError: something else, or a variance beside what has one of its own or no use for one.
    """
    if misfit is None:
        return LeastSquares(variance=variance)
    if isinstance(misfit, type) or not (isinstance(misfit, Comparison) or callable(misfit)):
        raise InputError(
            f"Expected bridge.LeastSquares(...), bridge.CustomLoss(...) or a function loss(output, target) as misfit=, "
            f"got {misfit!r}."
        )
    made = misfit if isinstance(misfit, Comparison) else CustomLoss(misfit)
    if variance is None:
        return made
    if isinstance(made, CustomLoss):
        raise InputError("Expected no variance= with a loss of your own, which has no use for it. Leave it out.")
    if made.variance is not None:
        raise InputError("Expected the variance once, got variance= and that of misfit=. Leave one out.")
    return replace(made, variance=variance)
