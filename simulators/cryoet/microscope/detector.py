"""The detector: dose, counting statistics, DQE, MTF, and what makes counts integers.

The order of steps: expected electrons of each pixel -> Poisson -> excess noise (DQE) -> MTF, for signal and noise
alike -> gain -> (hard mode) dead pixels, saturation, rounding to integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from bridge.errors import InputError
from simulators.cryoet.device import CPU
from simulators.cryoet.microscope.optics import check_range

_EXACT_BELOW = 50.0


@dataclass(frozen=True)
class Detector:
    """A direct electron detector.

    Args:
        dose_e_per_angstrom2: exposure [electrons/angstrom^2].
        dqe: detective quantum efficiency at zero frequency, in (0, 1]; the variance of a pixel is lambda / dqe.
        mtf: modulation transfer function; None for 1, a number for its value at the Nyquist frequency (a
            Lorentzian, 1 / (1 + (1 / mtf - 1) (2 xi)^2)), or pairs (xi [cycles/pixel], value), joined by lines.
        gain: counts per electron.
        bits: counts are limited to [0, 2^bits - 1] (hard mode); None for no limit.
        dead_pixel_fraction: pixels that read 0 (hard mode).
        dead_pixel_seed: which pixels those are; a property of the detector, the same in every image.
    """

    dose_e_per_angstrom2: float = 40.0
    dqe: float = 0.8
    mtf: float | Sequence[Sequence[float]] | None = None
    gain: float = 1.0
    bits: int | None = 16
    dead_pixel_fraction: float = 0.0
    dead_pixel_seed: int = 0

    def __post_init__(self) -> None:
        check_range("Detector", "dose_e_per_angstrom2", self.dose_e_per_angstrom2, 0.0, 1e6, open_lower=True)
        check_range("Detector", "dqe", self.dqe, 0.0, 1.0, open_lower=True)
        check_range("Detector", "gain", self.gain, 0.0, 1e6, open_lower=True)
        check_range("Detector", "dead_pixel_fraction", self.dead_pixel_fraction, 0.0, 0.99)
        check_range("Detector", "dead_pixel_seed", self.dead_pixel_seed, 0, 2**63)
        if self.bits is not None:
            check_range("Detector", "bits", self.bits, 1, 24)
        if self.mtf is None:
            return
        if isinstance(self.mtf, int | float):
            check_range("Detector", "mtf", self.mtf, 0.0, 1.0, open_lower=True)
            return
        table = np.asarray(self.mtf, dtype=np.float64)
        if table.ndim != 2 or table.shape[1] != 2 or len(table) < 2:
            raise InputError(
                f"Expected Detector.mtf to be None, a number or pairs (cycles/pixel, value), got shape {table.shape}."
            )
        if not ((np.diff(table[:, 0]) > 0).all() and (table[:, 1] > 0).all() and table[0, 0] == 0):
            raise InputError(
                "Expected Detector.mtf to start at 0 cycles/pixel, to rise in frequency and to be > 0. Correct it."
            )
        # Tuples, so that the detector can be hashed.
        object.__setattr__(self, "mtf", tuple(map(tuple, table.tolist())))


@lru_cache(maxsize=16)
def mtf_filter(
    detector: Detector, shape: tuple[int, int], dtype: torch.dtype, device: torch.device = CPU
) -> torch.Tensor | None:
    """The MTF in the order of `torch.fft.rfft2` over `shape`; None where it is 1."""
    if detector.mtf is None:
        return None
    xi = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :])
    if isinstance(detector.mtf, int | float):
        values = 1 / (1 + (1 / detector.mtf - 1) * (2 * xi) ** 2)
    else:
        table = np.asarray(detector.mtf)
        values = np.interp(xi, table[:, 0], table[:, 1])
    return torch.from_numpy(values).to(device, dtype)


@lru_cache(maxsize=16)
def dead_pixels(fraction: float, seed: int, shape: tuple[int, int], device: torch.device = CPU) -> torch.Tensor | None:
    """Which pixels are dead (H, W) bool; None for none."""
    if fraction == 0.0:
        return None
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=seed)).random(shape) < fraction).to(device)


def filtered(image: torch.Tensor, transfer: torch.Tensor | None) -> torch.Tensor:
    """The image after a filter given in the order of `torch.fft.rfft2`."""
    if transfer is None:
        return image
    return torch.fft.irfft2(torch.fft.rfft2(image) * transfer, s=image.shape[-2:])


def poisson_quantile(normal: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    r"""Poisson counts from standard normal numbers: k = F^{-1}(Phi(z); lambda).

    A pixel's count rises with its rate for fixed z, so that images of one seed at neighbouring parameters have common
    random numbers; a rejection sampler would redraw the noise. Below 50 electrons the inversion is exact. Above, it
    is the Cornish-Fisher expansion to order lambda^{-1/2}, rounded to integers.

    Args:
        normal: standard normal numbers, float64.
        rate: expected electrons, of the same shape, >= 0, float64, on the same device.

    Returns:
        counts, float64.

    Reference:
        Cornish & Fisher (1938), Rev. Inst. Int. Stat. 5, 307; Hill & Davis (1968), Ann. Math. Stat. 39, 1264.
    """
    root, z2 = rate.sqrt(), normal * normal
    counts = (rate + normal * root + (z2 - 1) / 6 + normal * (1 - z2) / (72 * root)).round()
    low = rate < _EXACT_BELOW
    if low.any():
        counts[low] = _exact_quantile(torch.special.ndtr(normal[low]), rate[low])
    return counts.clamp_min(0.0)


def _exact_quantile(u: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Smallest k with F(k; rate) >= u, by summing probabilities from k = 0."""
    probability = torch.exp(-rate)
    cumulative = probability.clone()
    counts = torch.zeros_like(rate)
    top = float(rate.max())
    for k in range(1, int(top + 12 * top**0.5 + 40)):
        above = cumulative < u
        if not above.any():
            break
        counts = torch.where(above, float(k), counts)
        probability = probability * rate / k
        cumulative = cumulative + probability
    return counts


def drawn(random: np.random.Generator, like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers of a tensor's shape, float64, on its device.

    The stream is numpy's on any device: numbers are drawn by the processor and copied.
    """
    return torch.from_numpy(random.standard_normal(tuple(like.shape))).to(like.device)


def noise(rate: torch.Tensor, detector: Detector, seed: int, kind: str) -> torch.Tensor:
    r"""Deviation of the electrons that are detected from their expectation, before the MTF.

    "poisson": n - lambda, n ~ Poisson(lambda). "full": plus a normal number of variance lambda (1/DQE - 1), so that the
    variance is lambda / DQE.

    Args:
        rate: lambda (H, W).
        detector: for its DQE.
        seed: of the image; the noise is a function of the seed and the rate of each pixel alone, on any device: the
            stream is that of numpy's Philox generator with the key `seed`.
        kind: "poisson" or "full".

    Returns:
        (H, W), in the dtype of `rate` and on its device.
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    expected = rate.detach().to(torch.float64).clamp_min(0.0)
    deviation = poisson_quantile(drawn(random, expected), expected) - expected
    if kind == "full" and detector.dqe < 1.0:
        deviation += drawn(random, expected) * (expected * (1 / detector.dqe - 1)).sqrt()
    return deviation.to(rate.dtype)


def read_out(counts: torch.Tensor, detector: Detector) -> torch.Tensor:
    """The hard end of the chain: integers, within the range of the converter, dead pixels 0."""
    counts = counts.round()
    counts = counts.clamp(0, 2**detector.bits - 1) if detector.bits is not None else counts
    dead = dead_pixels(detector.dead_pixel_fraction, detector.dead_pixel_seed, tuple(counts.shape[-2:]), counts.device)
    return counts if dead is None else counts.masked_fill(dead, 0.0)
