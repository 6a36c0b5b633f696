"""How well the parameters can be known from one noisy micrograph: the Cramer-Rao bound."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bridge.errors import InputError
from simulators.cryoet.microscope.detector import Detector, dead_pixels
from simulators.cryoet.simulator import CryoET


class CramerRao(NamedTuple):
    """Result of `cramer_rao`.

    Attributes:
        standard_deviation: (d,) lower bounds of the standard deviations of unbiased estimates.
        fisher: (d, d) Fisher information.
    """

    standard_deviation: NDArray[np.float64]
    fisher: NDArray[np.float64]


def cramer_rao(simulator: CryoET, theta: ArrayLike | torch.Tensor) -> CramerRao:
    r"""Cramer-Rao bounds of the parameters of one micrograph, all of them unknown at once.

    F = sum_pixels (DQE / lambda) (d lambda / d theta) (d lambda / d theta)^T; bounds: sqrt(diag F^{-1}).

    lambda are the expected electrons before the MTF. For a DQE of 1 this is the exact information of Poisson counts.
    Below, the noise has variance lambda / DQE; what the variance itself tells about theta, of relative size
    1 / (2 lambda), is left out, so that the true bound is slightly lower. The MTF filters signal and noise alike: it
    correlates the counts but is an invertible linear map (it is nowhere zero), so the information is what it was
    before, and no MTF appears in the formula. (At the edge of the image this neglects the little that blur carries
    across.) Rounding and saturation are not counted; dead pixels are left out of the sum.

    Args:
        simulator: in mode "smooth"; its derivatives are exact (forward-mode automatic differentiation).
        theta: (d,) parameters.

    Returns:
        the bounds, each in its parameter's unit, and F.

    Raises:
        InputError: hard mode, wrong shape, or parameters that the image cannot tell apart.

    Reference:
        Kay (1993), Fundamentals of Statistical Signal Processing: Estimation Theory, section 3.7.
    """
    if simulator.mode != "smooth":
        raise InputError('Expected a simulator in mode "smooth", got "hard". Use simulator.replace(mode="smooth").')
    given = torch.as_tensor(theta)
    point = torch.from_numpy(simulator.space.vector(given.detach().cpu().numpy())).to(simulator.device)
    rate, slopes = simulator.electrons(point), torch.func.jacfwd(simulator.electrons)(point)
    camera = cast(Detector, simulator.detector)
    weight = camera.dqe / rate
    dead = dead_pixels(camera.dead_pixel_fraction, camera.dead_pixel_seed, simulator.output_shape, rate.device)
    if dead is not None:
        weight = weight.masked_fill(dead, 0.0)
    fisher = torch.einsum("hw,hwi,hwj->ij", weight, slopes, slopes).cpu().numpy()
    size = np.sqrt(np.diag(fisher))
    blind = [n for n, s in zip(simulator.space.names, size, strict=True) if not s > 0]
    if blind:
        raise InputError(f"Expected an image that depends on every parameter; it does not on {', '.join(blind)}.")
    # Units differ by orders of magnitude: judge and invert in units of each parameter's own information.
    correlation = fisher / np.outer(size, size)
    eigenvalues, vectors = np.linalg.eigh(correlation)
    if eigenvalues[0] < 1e-10:
        worst = [n for n, v in zip(simulator.space.names, vectors[:, 0], strict=True) if abs(v) > 0.3]
        raise InputError(
            f"Expected parameters that one image can tell apart; {', '.join(worst)} compensate each other. Fix one."
        )
    return CramerRao(np.sqrt(np.diag(np.linalg.inv(correlation))) / size, fisher)
