"""A simulator is to give the same numbers for the same parameters and seed; a function that does not is noticed.

Noise that does not come from the seed makes every promise void: results then depend on the number of ranks and on what
ran before, and cannot be resumed. So the first row of a plain function is run once more, after others have been run.
Functions of which a run takes longer than a second are not run twice, nor are those of fits that count every run
(`bridge.Stop(runs=...)`, `run=`), of studies, or of what has a store: there a counter, a file or a generator of its own
is not seen. Of these it is seen whether they draw from a global generator, and one that does is run once more for that,
where a run takes less than a second. `bridge check` looks closer.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import real_array
from bridge.errors import BridgeError

Outputs = NDArray[Any]
# Runs that take longer are not repeated for the sake of a warning.
_CHEAP_S = 1.0
# Sums of other threads, or of a GPU, need not have the same last digits.
_SAME = 1e-9


class NotRepeatableWarning(UserWarning):
    """A function has given other numbers for the same parameters.

    Attributes:
        outputs: of the call in which that was seen; they are what it gave.
    """

    outputs: Any = None


@final
class Watch:
    """Looks at the first calls of a function, once in a process.

    Attributes:
        done: whether there is nothing more to look at. frugal: whether nothing is run again, since runs are counted,
            but of a function that draws from a global generator.
    """

    def __init__(self, done: bool = False, frugal: bool = False) -> None:
        self.done, self.frugal = done, frugal
        self._first: tuple[NDArray[np.float64], NDArray[np.uint64], Outputs] | None = None
        self._drawn: set[str] = set()
        self._waits = False  # for a call of several rows, to see whether they depend on each other

    def __reduce__(self) -> tuple[type[Watch], tuple[bool, bool]]:
        return Watch, (self.done, self.frugal)

    def over(
        self,
        name: str,
        call: Callable[[NDArray[np.float64], NDArray[np.uint64]], Any],
        inputs: NDArray[np.float64],
        seeds: NDArray[np.uint64],
        *,
        seeded: bool,
        vectorized: bool,
    ) -> Any:
        """The outputs of a call; warns where the first row gives others once other rows have been run."""
        if self._waits and len(inputs) == 1:
            return call(inputs, seeds)
        before, begin = generators(), time.perf_counter()
        outputs = call(inputs.copy(), seeds.copy())
        seconds, after = time.perf_counter() - begin, generators()
        self._drawn |= {source for source, state in before.items() if source in after and after[source] != state}
        dear = seconds > _CHEAP_S * len(inputs)
        if dear or (self.frugal and not self._drawn):
            self.done = True
            if self._drawn and not seeded:
                drawn = f"Simulator {name!r} draws from {' and '.join(sorted(self._drawn))}."
                # Numbers may be thrown away, or the generator be seeded by each call: that is not known.
                self._warn(f"{drawn} If its outputs depend on that, results", seeded, outputs)
            return outputs
        try:
            known = real_array(outputs, f"from simulator {name!r}").copy()  # it may hand out the same memory every time
            first = inputs[:1].copy(), seeds[:1].copy(), known[0].copy()  # a loss may write to it
        except (BridgeError, IndexError):
            return outputs  # what is no output is told elsewhere
        alone = len(inputs) == 1
        if alone and self._first is None and not self.frugal:
            self._first = first
            return known
        if vectorized and not alone:
            # Its rows might also depend on each other: the first one twice, without the others.
            first = np.repeat(inputs[:1], 2, axis=0), np.repeat(seeds[:1], 2), known[0].copy()
        said = _repeated(call, *(first if self._first is None or (vectorized and not alone) else self._first))
        _restore(after)
        self._waits = alone and vectorized
        self.done = bool(said) or self.frugal or not self._waits
        if said:
            source = f", and draws from {' and '.join(sorted(self._drawn))}" if self._drawn else ""
            said = f"Simulator {name!r} {said} when its first row is run again{source}. Results then"
            self._warn(said, seeded, known)
        return known

    @staticmethod
    def _warn(said: str, seeded: bool, outputs: Any) -> None:
        advice = (
            "Draw from the seed that it is given alone, numpy.random.default_rng(seed), and keep nothing between calls."
            if seeded
            else "If it is random, take the seed: def f(theta, seed) draws from numpy.random.default_rng(seed), and "
            "bridge.as_simulator(f, seeded=True) says so. If it keeps something between calls, begin each call anew."
        )
        warning = NotRepeatableWarning(
            f"{said} depend on ranks and on what ran before, and cannot be resumed. {advice}"
        )
        warning.outputs = outputs
        warnings.warn(warning, stacklevel=2)


def _repeated(
    call: Callable[[NDArray[np.float64], NDArray[np.uint64]], Any],
    row: NDArray[np.float64],
    seed: NDArray[np.uint64],
    first: Outputs,
) -> str:
    """What is wrong with the output of one row when it is run again; "" where nothing is."""
    try:
        again = real_array(call(row, seed), "when run again")[0]
    except Exception as error:
        return f"raises {type(error).__name__} ({error})"
    return "" if same(first, again) else "gives other numbers"


def same(one: Outputs, other: Outputs, within: float = _SAME) -> bool:
    """Whether outputs agree but for their last digits, NaN with NaN."""
    if one.shape != other.shape:
        return False
    if np.array_equal(one, other, equal_nan=one.dtype.kind == "f" and other.dtype.kind == "f"):
        return True
    a, b = one.astype(np.float64), other.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return False
    good = np.isfinite(a)
    if one.dtype == np.float32 or other.dtype == np.float32:
        within = max(within, 1e-5)
    size = float(np.abs(a[good]).max(initial=0.0))
    return bool(np.array_equal(a[~good], b[~good], equal_nan=True) and (np.abs(a - b)[good] <= within * size).all())


def generators() -> dict[str, Any]:
    """The states of the generators that everything in a process shares."""
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - its state is what is looked at
    kind, keys, *rest = state
    states: dict[str, Any] = {
        "Python's global generator, random": random.getstate(),
        "numpy's global generator, numpy.random": (kind, keys.tobytes(), *rest),
    }
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_rng_state"):
        states["torch's global generator"] = torch.get_rng_state().numpy().tobytes()
    return states


def _restore(states: dict[str, Any]) -> None:
    """What was run once more must not change what the caller draws next."""
    for source, state in states.items():
        if source.startswith("Python"):
            random.setstate(state)
        elif source.startswith("numpy"):
            kind, keys, *rest = state
            np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))  # noqa: NPY002
        else:
            torch = sys.modules["torch"]
            torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
