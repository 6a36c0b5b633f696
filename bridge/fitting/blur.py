"""From coarse to fine on the outputs: linear maps that blur what is compared, less and less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from bridge.errors import InputError
from bridge.fitting.target import LinearMap, checked_linear


@final
@dataclass(frozen=True)
class Blur:
    """Gaussian blurs along the last one or two axes, as a matrix for each axis.

    matrices: for the last axes, in order, each (length, length).
    """

    matrices: tuple[torch.Tensor, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.matrices[-1].T
        return x if len(self.matrices) == 1 else self.matrices[0] @ x


def make_blur(width: float, shape: tuple[int, ...], keeps: str) -> Blur:
    """A Gaussian of a width [pixels], cut off at the edges.

    Args:
        keeps: "noise": white noise of variance 1 keeps that variance, at the edges as well: rows of unit 2-norm.
            "mean": a constant stays what it is: rows of unit sum.
    """
    matrices = []
    for length in shape[-2:]:
        apart = np.arange(length)[:, None] - np.arange(length)
        rows = np.exp(-0.5 * (apart / width) ** 2)
        rows /= np.linalg.norm(rows, ord=2 if keeps == "noise" else 1, axis=1, keepdims=True)
        matrices.append(torch.as_tensor(rows))
    return Blur(tuple(matrices))


def make_blur_schedule(
    coarse: Sequence[float | LinearMap] | None, shape: tuple[int, ...], keeps: str
) -> tuple[LinearMap | None, ...]:
    """The map of each stage, and none in the last.

    Args:
        coarse: widths [pixels] of Gaussian blurs along the last two axes, or linear maps, from coarse to fine; a last
            width of 0 may be left out.
        shape: of what is mapped.

    Raises:
        InputError: a negative width, a map that is not linear, or numbers without an axis to blur along.
    """
    if coarse is None:
        return (None,)
    stages: list[LinearMap | None] = []
    for given in coarse:
        if isinstance(given, int | float):
            if not (np.isfinite(given) and given >= 0) or not shape:
                raise InputError(
                    f"Expected widths in pixels of 0 or more in blur=, for outputs of one axis or more, got "
                    f"{given!r} for outputs of shape {shape}."
                )
            stages.append(make_blur(float(given), shape, keeps) if given > 0 else None)
        else:
            checked_linear(given, shape, "blur")
            stages.append(given)
    return tuple(stages) if stages and stages[-1] is None else (*stages, None)


def stage_at(stages: int, step: int, steps: int) -> int:
    """Which stage a step is in: equal shares of the first four fifths of the steps, then the last one."""
    return min(stages - 1, int(stages * step / max(1.0, 0.8 * (steps - 1))))
