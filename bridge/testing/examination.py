"""Whether a simulator keeps to what it is asked to, in words: what `bridge check` prints."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bridge.arrays import Array, real_array
from bridge.errors import BridgeError, InputError
from bridge.evaluation.workers import IsolatedSimulator
from bridge.simulator.function import unwatched
from bridge.simulator.protocol import Simulator
from bridge.simulator.repeatability import generators, same


@final
@dataclass(frozen=True)
class Finding:
    """One thing that `examine` has looked at.

    Attributes:
        what: it is. good: whether it is as it should be; None for what is only told. words: what was seen, what to do.
    """

    what: str
    good: bool | None
    words: str


def examine(simulator: Simulator, at: ArrayLike, seed: int = 0, elsewhere: bool = True) -> list[Finding]:
    """Looks at whether a simulator keeps to what `bridge.Simulator` asks: the same numbers for the same row and seed.

    Eleven rows about a place are run together, again, in reverse order, one by one, and in another process in reverse.

    Args:
        at: (d,) parameters. seed: of the rows and of the simulator. elsewhere: whether another process is tried.

    Returns:
        what was found, in the order in which it was looked for; it ends early where there is nothing to compare.
    """
    space, centre = simulator.space, np.asarray(at, dtype=np.float64)
    natural = np.ones(len(centre)) if space is None else space.natural_scale
    rng = np.random.Generator(np.random.Philox(key=[seed, 1 << 41]))
    x = centre + 0.1 * natural * rng.normal(size=(11, len(centre)))
    x[0] = centre
    if space is not None:
        x = np.clip(x, space.lower, space.upper)
    looking = _Examination(simulator, x, rng.integers(0, 2**63, size=len(x), dtype=np.uint64))
    unwatched(simulator)
    child: IsolatedSimulator | BridgeError | None = None
    if elsewhere:
        try:
            child = IsolatedSimulator(simulator)  # before it has run: what it keeps does not travel with it
        except BridgeError as error:
            child = error
    folder, here = Path.cwd(), sorted(os.listdir())
    try:
        looking.run_together()
        if not looking.compare_orders():
            return looking.found
        looking.change_seeds(rng.integers(0, 2**63, size=len(x), dtype=np.uint64))
        looking.look_at_folder(folder, here)
    except Exception as error:
        what = str(error) if isinstance(error, BridgeError) else f"{type(error).__name__}: {error}"
        looking.tell("runs", False, what)
        return looking.found
    if child is not None:
        looking.compare_elsewhere(child)
    return looking.found


class _Examination:
    """What `examine` looks at, step by step; `found` grows."""

    def __init__(self, simulator: Simulator, x: Array, seeds: NDArray[np.uint64]) -> None:
        self.simulator, self.x, self.seeds = simulator, x, seeds
        self.every = np.arange(len(x))
        self.found: list[Finding] = []
        self.keep = (
            "Keep nothing between calls, and draw from the seed alone: as_simulator(f, seeded=True) hands it over."
        )
        self.together: NDArray[Any] = np.empty(0)

    def tell(self, what: str, good: bool | None, words: str) -> None:
        self.found.append(Finding(what, good, words))

    def run(self, rows: NDArray[np.intp], seeds: NDArray[np.uint64] | None = None) -> NDArray[Any]:
        with_seeds = self.seeds if seeds is None else seeds
        given, own = self.x[rows].copy(), with_seeds[rows].copy()
        outputs = real_array(self.simulator(given, own), "from the simulator").copy()
        if not (np.array_equal(given, self.x[rows]) and np.array_equal(own, with_seeds[rows])):
            raise InputError("It changed the parameters that it was given. Work on a copy: theta = theta.copy().")
        return outputs

    def compare(self, what: str, rows: NDArray[np.intp], outputs: NDArray[Any], advice: str) -> bool:
        """Whether these are the outputs of the same rows, run together."""
        pairs = [(self.together[i], y) for i, y in zip(rows, outputs, strict=True)]
        alike = [same(first, y) for first, y in pairs]
        if not all(alike):
            self.tell(what, False, f"{len(alike) - sum(alike)} of {len(alike)} outputs are others. {advice}")
            return False
        bits = all(np.array_equal(first, y, equal_nan=y.dtype.kind == "f") for first, y in pairs)
        self.tell(what, True, "the same numbers" if bits else "the same but for the last digits")
        return True

    def run_together(self) -> None:
        """Shape, time, draws from global generators, numbers that are not finite."""
        states, begin = generators(), time.perf_counter()
        together = self.together = self.run(self.every)
        seconds = (time.perf_counter() - begin) / len(self.x)
        self.tell("runs", None, f"outputs of shape {together.shape[1:]} and {together.dtype}, {seconds:.3g} s each")
        declared = self.simulator.output_shape
        if declared is not None and together.shape[1:] != tuple(declared):
            self.tell("shape", False, f"it declares output_shape={declared} and gives {together.shape[1:]}.")
        drawn = [source for source, state in generators().items() if states.get(source, state) != state]
        if drawn:
            self.keep = f"It draws from {' and '.join(drawn)}. {self.keep}"
        bad = int((~np.isfinite(together.reshape(len(self.x), -1))).any(axis=1).sum())
        words = (
            f"{bad} of {len(self.x)} outputs have NaN or infinity. Bound the parameters, or see failures= and missing=."
        )
        self.tell("finite", bad == 0, words if bad else "all numbers are")

    def compare_orders(self) -> bool:
        """Whether there is anything else to compare."""
        every = self.every
        if not self.compare("a second call", every, self.run(every), self.keep):
            return False
        self.compare("in reverse order", every[::-1], self.run(every[::-1]), self.keep)
        alone = np.concatenate([self.run(every[i : i + 1]) for i in every])
        advice = "Rows of one call depend on each other; each is to be run by itself."
        self.compare("one row at a time", every, alone, advice)
        return True

    def change_seeds(self, seeds: NDArray[np.uint64]) -> None:
        """What outputs depend on."""
        others = self.run(self.every, seeds)
        noisy = not all(same(a, b) for a, b in zip(self.together, others, strict=True))
        self.tell("the seed", None, "outputs depend on it" if noisy else "outputs do not depend on it")
        changed = not all(same(self.together[0], y) for y in self.together[1:])
        none = "No output changes. Is the scale too small, or are they not read?"
        self.tell("the parameters", changed, "outputs change with them" if changed else none)

    def look_at_folder(self, folder: Path, before: list[str]) -> None:
        """Whether it left the working directory, or files there; goes back to it."""
        moved = Path.cwd() != folder
        left = sorted(set(os.listdir(folder)) - set(before))
        words = "as it was"
        if moved:
            words = f"It goes to {Path.cwd()}. Give programs their directory instead (cwd=)."
        elif left:
            words = f"It leaves {', '.join(left[:3])}: several runs at once may meet there. "
            words += "See bridge.Workers(own_directory=)."
        self.tell("the working directory", not (moved or left), words)
        os.chdir(folder)

    def compare_elsewhere(self, child: IsolatedSimulator | BridgeError) -> None:
        what = "in another process"
        if isinstance(child, BridgeError):
            self.tell(what, False, str(child))
            return
        try:
            # Begun with another row: what a function keeps of its first call is another there.
            rows = self.every[::-1]
            outputs = real_array(child(self.x[rows], self.seeds[rows]), "from there")
            self.compare(what, rows, outputs, self.keep)
        except BridgeError as error:
            self.tell(what, False, str(error))
        finally:
            child.close()
