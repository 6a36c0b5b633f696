"""A fit for people who run the simulator themselves: they ask for points, and tell what came of them."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bridge.arrays import Array, real_array
from bridge.errors import BridgeError, EvaluationError, InputError
from bridge.evaluation.failures import Failures, make_failures
from bridge.fitting.comparison import Comparison
from bridge.fitting.driver import FitDriver
from bridge.fitting.fingerprint import fingerprint
from bridge.fitting.fit import Prepared, make_method, prepare
from bridge.fitting.methods.base import Method, MethodRun, begin
from bridge.fitting.prior import PriorOf
from bridge.fitting.problem import Start
from bridge.fitting.stop import Stop
from bridge.reporting.observers import make_observers
from bridge.reporting.result import FitResult, FitStep
from bridge.simulator.function import FunctionSimulator
from bridge.simulator.repeatability import Watch
from bridge.simulator.space import ParameterSpace
from bridge.storage import checkpoint

_Key = tuple[bytes, int]


@final
class FitSession:
    """A fit whose simulator runs elsewhere: on a cluster, in a laboratory, in another program.

        session = bridge.FitSession(space, target, start, seed=0)
        while not session.done:
            points = session.ask()
            session.tell(points, [run_on_my_cluster(p) for p in points])
        result = session.result

    The result is bitwise that of `bridge.fit` with the same simulator, as a function of one vector, by every method.

    Args:
        space: names, units, bounds and natural scales of the parameters; None where `start` is a vector.
        target, start, seed, method, variance, misfit, prior, fixed, tied, stop, failures: as in `bridge.fit`; seconds
            are those since the session was made. Where runs may fail ("drop"), those that do are told as None.
        takes_seeds: whether the simulator has noise of its own: `seeds` says with which seed each point is to be run.

    Attributes:
        space: of all parameters, with the natural scales that are used.

    Raises:
        InputError: as in `bridge.fit`; or there are several ranks, which all would have to ask and tell.
    """

    def __init__(
        self,
        space: ParameterSpace | None,
        target: ArrayLike | torch.Tensor,
        start: Start,
        *,
        seed: int | None = None,
        method: str | Method = "auto",
        variance: float | ArrayLike | None = None,
        misfit: Comparison | Callable[..., Any] | None = None,
        prior: PriorOf | None = None,
        fixed: Sequence[str] = (),
        tied: Mapping[str, str] | None = None,
        stop: Stop | int | None = None,
        failures: str | Failures = "raise",
        takes_seeds: bool = False,
    ) -> None:
        if space is not None and not isinstance(space, ParameterSpace):
            raise InputError(f"Expected a bridge.ParameterSpace, or None with a start that is a vector, got {space!r}.")
        begun = time.monotonic()
        tolerated = make_failures(failures)
        self._drops = tolerated.rule != "raise"
        self._told = _Told(takes_seeds)
        chooses = make_method(method)
        prepared = prepare(
            self._told.simulator(space),
            target,
            start,
            chooses,
            seed=seed,
            variance=variance,
            misfit=misfit,
            prior=prior,
            fixed=fixed,
            tied=tied,
            stop=stop,
            failures=tolerated,
        )
        work = begin(prepared.method, prepared.task)
        if work.smoothed[0].dispatcher.size > 1:
            raise InputError("Expected one process, got several ranks. Ask and tell in one; or use bridge.fit.")
        self._prepared, self.space = prepared, prepared.task.problem.space
        self._told.stand_in = prepared.task.problem.misfit.target.numpy()
        self._driver = _driver(prepared, work, chooses, begun)
        self._before = checkpoint.packed(self._driver.to_dict())
        self._go_on()

    @property
    def done(self) -> bool:
        """Whether there is a result, and nothing more to run."""
        return self._driver.result is not None

    @property
    def result(self) -> FitResult:
        """What `bridge.fit` returns.

        Raises:
            InputError: the session is not done.
        """
        if self._driver.result is None:
            raise InputError(f"Expected a session that is done, got one with {len(self._told.wanted)} points to run.")
        return self._driver.result

    @property
    def history(self) -> tuple[FitStep, ...]:
        """The steps so far."""
        return tuple(self._driver.history)

    def ask(self) -> Array:
        """The points to run next, all of which can run at the same time: the same until they are told.

        Returns:
            (k, d) in the parameters' units and in the order of `space.names`, as functions for `bridge.fit` take them;
            `space.mapping(point)` has the names.

        Raises:
            InputError: the session is done.
        """
        self._refuse_done()
        if not self._told.wanted:  # what was told could not be used, and is tried again
            self._go_on()
        return np.stack([point for point, _ in self._told.wanted.values()])

    @property
    def seeds(self) -> NDArray[np.uint64]:
        """(k,) the simulator's seed at each of the points of `ask`."""
        return np.array([seed for _, seed in self._told.wanted.values()], dtype=np.uint64)

    def tell(self, points: ArrayLike, outputs: Sequence[Any] | NDArray[Any], seeds: ArrayLike | None = None) -> None:
        """Takes outputs of points that were asked for, in any order, all at once or some of them.

        Args:
            points: (k, d), exactly as `ask` gave them.
            outputs: (k, *shape), or a list; of a run that failed None (with failures="drop"), or NaN.
            seeds: (k,) with which they ran; needed where one point was asked for with several seeds, out of order.

        Raises:
            InputError: other points, or outputs of another number or shape; nothing is taken then.
            EvaluationError: the fit cannot go on with them, as of `bridge.fit`.
        """
        self._refuse_done()
        rows = np.asarray(points, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.space.dimension:
            raise InputError(f"Expected points of shape (k, {self.space.dimension}), as ask() gives, got {rows.shape}.")
        given = list(outputs) if isinstance(outputs, Iterable) else [outputs]
        if len(given) != len(rows):
            raise InputError(f"Expected an output for each of {len(rows)} points, got {len(given)}.")
        ran_with = None if seeds is None else [int(seed) for seed in np.asarray(seeds).reshape(-1)]
        if ran_with is not None and len(ran_with) != len(rows):
            raise InputError(f"Expected a seed for each of {len(rows)} points, got {len(ran_with)}.")
        found: dict[_Key, Array | None] = {}
        for i, (row, output) in enumerate(zip(rows, given, strict=True)):
            key = self._told.key_of(row, None if ran_with is None else ran_with[i], found)
            if key is None:
                raise InputError(
                    f"Expected points that ask() has given and that are not told yet, got {row.tolist()}"
                    f"{'' if ran_with is None else f' with seed {ran_with[i]}'}. Tell them unchanged, each once."
                )
            found[key] = self._checked(output, row)
        self._told.take(found)
        if not self._told.wanted:
            self._go_on()

    def _checked(self, output: Any, row: Array) -> Array | None:
        if output is None:
            if not self._drops:
                raise InputError(
                    f"Expected an output at {row.tolist()}, got None. Where runs may fail, make the session with "
                    "failures='drop'."
                )
            return None
        array = real_array(output, f"as the output at {row.tolist()}", InputError)
        shape = self._told.stand_in.shape
        if array.shape != shape:
            raise InputError(f"Expected outputs of shape {shape}, as the target has, got {array.shape}.")
        return np.array(array)

    def _refuse_done(self) -> None:
        if self.done:
            raise InputError("Expected a session that is not done, got one with a result: session.result.")

    def _go_on(self) -> None:
        """Goes on with what has been told, until runs are wanted or there is a result."""
        driver, told = self._driver, self._told
        while not self.done:
            if not driver.is_waiting:
                self._before = checkpoint.packed(driver.to_dict())
            request = driver.ask()
            if request is None:
                return
            answer: Any = None
            try:
                answer = driver.evaluated(request)
            except BridgeError:
                if not told.wanted:
                    raise
            if told.wanted:  # and the answer, or the error, is made of stand-ins
                return
            driver.tell(answer)
            if not driver.is_ending:  # the end can be gone through again
                told.outputs.clear()

    # -- kept ---------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All that the session is, with what has been told of the open points: numbers, texts, arrays, lists of these.

        Raises:
            InputError: of a loss or another function that was given not all can be seen.
        """
        told = self._told.outputs
        return {
            "settings": self._settings(),
            "fit": checkpoint.unpacked(*self._before),
            "points": [np.frombuffer(row) for row, _ in told],
            "seeds": [seed for _, seed in told],
            "outputs": list(told.values()),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what `to_dict` has given of a session with the same settings.

        Raises:
            InputError: one with other settings.
        """
        then, now = saved["settings"], self._settings()
        if differ := sorted(key for key in {*then, *now} if then.get(key) != now.get(key)):
            listing = "; ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in differ)
            raise InputError(f"Expected a session with the settings of the one that was kept, got others: {listing}.")
        self._driver.restore(saved["fit"])
        self._told.wanted.clear()
        told = zip(saved["points"], saved["seeds"], saved["outputs"], strict=True)
        self._told.outputs = {(np.asarray(row).tobytes(), int(seed)): output for row, seed, output in told}
        self._go_on()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the session to a file, whole or not at all, without a pickle.

        Raises:
            InputError: no path. OSError: the file cannot be written.
        """
        _check_path(path)
        checkpoint.write(Path(path), len(self._driver.history), checkpoint.packed(self.to_dict()))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a file that `save` has written, of a session with the same settings.

        Raises:
            InputError: no such file, or of one with other settings.
        """
        _check_path(path)
        try:
            _, state = checkpoint.read(Path(path))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"Expected a file that FitSession.save has written, got {path}: {error}.") from error
        self.restore(checkpoint.unpacked(*state))

    def _settings(self) -> dict[str, Any]:
        settings = fingerprint(self._prepared.task, self._prepared.method, self._driver.work)
        plain: dict[str, Any] = json.loads(json.dumps(settings, sort_keys=True, default=str))
        return plain


def _check_path(path: Any) -> None:
    if not isinstance(path, str | os.PathLike) or Path(path).name == "":
        raise InputError(f"Expected the file of a session as a path, got {path!r}.")


def _driver(prepared: Prepared, work: MethodRun, chooses: Method, begun: float) -> FitDriver:
    return FitDriver(
        prepared.task.problem,
        prepared.method,
        prepared.reason,
        work,
        begin=begun,
        observers=make_observers("off", root=True),
        announced=prepared.method.name != chooses.name,
        max_seconds=prepared.task.stop.seconds,
    )


@final
class _Told:
    """Outputs that have been told, which a simulator looks up; what it does not find is wanted.

    Attributes:
        outputs: by point and seed; None where a run failed. wanted: what was looked for in vain.
        stand_in: what the simulator gives for it, so that all of a dispatch is looked for.
    """

    def __init__(self, takes_seeds: bool) -> None:
        self.takes_seeds, self.stand_in = takes_seeds, np.zeros(())
        self.outputs: dict[_Key, Array | None] = {}
        self.wanted: dict[_Key, tuple[Array, int]] = {}

    def simulator(self, space: ParameterSpace | None) -> FunctionSimulator:
        def run_elsewhere(point: Array, seed: int = 0) -> Array:
            return self._look_up(point, seed)

        return FunctionSimulator(
            run_elsewhere, space, seeded=self.takes_seeds, identity="run elsewhere", watch=Watch(done=True)
        )

    def _look_up(self, point: Array, seed: int) -> Array:
        point = point + 0.0  # no -0
        key = (point.tobytes(), seed)
        if key not in self.outputs:
            self.wanted[key] = point, seed
            return self.stand_in
        output = self.outputs[key]
        if output is None:
            raise EvaluationError(f"The run at {point.tolist()} was told to have failed.")
        return output

    def key_of(self, row: Array, seed: int | None, but: Mapping[_Key, Any]) -> _Key | None:
        """The first that is wanted there; None where there is none."""
        data = (row + 0.0).tobytes()
        if seed is not None and self.takes_seeds:
            return (data, seed) if (data, seed) in self.wanted and (data, seed) not in but else None
        if not self.takes_seeds:
            return (data, 0) if (data, 0) in self.wanted and (data, 0) not in but else None
        return next((key for key in self.wanted if key[0] == data and key not in but), None)

    def take(self, found: Mapping[_Key, Array | None]) -> None:
        self.outputs |= found
        for key in found:
            del self.wanted[key]
