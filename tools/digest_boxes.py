"""The black boxes of `digests.py`, apart from the cases: this is all that the children of a pool import, not torch."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import bridge

# Runs until this process kills itself.
LIVES = {"left": math.inf}


@dataclass(frozen=True)
class Box:
    """d parameters -> m numbers (0: one number, without an axis): waves, and steps of height 0.2.

    Attributes:
        failing: "raise" or "nan": what a fifth of the runs do. lacking: whether a third lack some of their numbers.
        blocks: whether each half of the outputs depends on half of the parameters, and the simulator says so.
        named: whether parameters have names, units and bounds. rough: how much of the steps there is.
    """

    d: int = 3
    m: int = 12
    dtype: str = "float64"
    vectorized: bool = False
    seeded: bool = False
    failing: str = ""
    lacking: bool = False
    blocks: bool = False
    named: bool = False
    rough: float = 1.0

    def simulator(self) -> Any:
        box = self

        def seeded_waves(inputs: Any, seeds: Any) -> Any:
            return box.outputs(inputs, seeds)

        def waves(inputs: Any) -> Any:
            return box.outputs(inputs, None)

        names = [f"p{i}" for i in range(self.d)]
        bounds = [(-1.0, 2.0 if i else 1.0) for i in range(self.d)]
        half = np.arange(self.d) % 2, np.arange(self.m) * 2 // max(1, self.m)
        return bridge.as_simulator(
            seeded_waves if self.seeded else waves,
            **({"names": names, "units": ["nm"] * self.d, "bounds": bounds} if self.named else {}),
            vectorized=self.vectorized,
            seeded=self.seeded,
            structure=bridge.BlockStructure(*half) if self.blocks else None,
            identity=f"digests of {self}",
        )

    def outputs(self, inputs: Any, seeds: Any = None) -> Any:
        X, m = np.atleast_2d(inputs), max(1, self.m)
        LIVES["left"] -= len(X)
        if LIVES["left"] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        i, j = np.arange(self.d)[:, None], np.arange(m)
        touches = (i % 2 == j * 2 // m) if self.blocks else np.ones((self.d, m), dtype=bool)
        Y = np.sin(X @ (touches * np.cos(0.2 * (i + 1) * j + i))) + self.rough * 0.2 * np.floor(2 * X @ touches)
        if self.seeded:
            Y += [0.05 * np.random.default_rng(int(s)).normal(size=m) for s in np.atleast_1d(seeds)]
        odd = np.sin(1e3 * X[:, 0])
        if self.lacking:
            Y[np.ix_(odd > 0.5, j > 0.7 * m)] = np.nan
        if self.failing == "raise" and (odd > 0.8).any():
            raise ValueError("it does not converge")
        Y[odd > (0.8 if self.failing else 2.0)] = np.nan
        Y = (10 * Y).astype(self.dtype) if self.dtype.startswith("int") else Y.astype(self.dtype)
        Y = Y if self.m else Y[:, 0]
        return Y if self.vectorized else Y[0]


def wave(shape: Sequence[int], about: float = 0.0, size: float = 1.0) -> Any:
    """Numbers that are no two alike."""
    return about + size * np.cos(1.0 + 0.7 * np.arange(math.prod(shape))).reshape(tuple(shape))
