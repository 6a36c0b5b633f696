"""A fit written down for programs while it runs: JSON lines, TensorBoard (`bridge.reporting.observers`)."""

from __future__ import annotations

import datetime
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from bridge.errors import InputError, SetupError
from bridge.simulator.space import ParameterSpace

if TYPE_CHECKING:
    from bridge.reporting.result import FitResult, FitStep


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _of_fit(entry: dict[str, Any]) -> dict[str, Any]:
    """What is the same however often the fit was interrupted."""
    return {k: v for k, v in entry.items() if k not in ("time", "num_cached")}


@final
class JSONLines:
    """One JSON object a step, written out at once: the file is the history of the fit, however often it was resumed.

    Keys: step, loss, scale, parameters (name -> value), standard_error (name -> value, or null), gradient_error,
    num_evaluations, num_failed, num_cached, num_surrogate, note, time (UTC, when it was written). Numbers that are not
    finite are null.

    A file of the same fit is continued: steps in it are not written again (whatever of them a resumed fit has found in
    its store), and a line that a kill cut short is completed. From the first step that differs on, the file is
    replaced: it then belongs to another fit.

    Args:
        path: the file; its directory is made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._known: list[tuple[int, dict[str, Any]]] = []  # of the file: where each line begins, and what it says

    def start(self, space: ParameterSpace, *, max_steps: int | None, max_runs: int | None, title: str) -> None:
        """Raises InputError where the file is something else, or cannot be written."""
        self._names = space.names
        self._at = 0
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            self._file = self._path.open("r+b")
        except OSError as error:
            raise InputError(f"Expected a file that can be written for the history, got: {error}.") from error
        content = self._file.read()
        self._known, end = _history(content)
        if content and not self._known and b"\n" in content:
            self._file.close()
            raise InputError(
                f"Expected the history of an earlier fit or a new file, got something else: {self._path}. "
                "Name another file."
            )
        self._file.truncate(end)

    def step(self, record: FitStep) -> None:
        errors = record.standard_error
        entry = {
            "step": record.step,
            "loss": _number(record.loss),
            "scale": _number(record.scale),
            "parameters": dict(zip(self._names, map(_number, record.parameters), strict=True)),
            "standard_error": None if errors is None else dict(zip(self._names, map(_number, errors), strict=True)),
            "gradient_error": _number(record.gradient_error),
            "num_evaluations": record.num_evaluations,
            "num_failed": record.num_failed,
            "num_cached": record.num_cached,
            "num_surrogate": record.num_surrogate,
            "note": record.note,
        }
        if self._at < len(self._known):
            begin, known = self._known[self._at]
            if _of_fit(known) == _of_fit(entry):
                self._at += 1
                return
            self._cut(begin)
        begin = self._file.seek(0, os.SEEK_END)
        entry["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._file.write(json.dumps(entry, allow_nan=False, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._known.append((begin, entry))
        self._at += 1

    def end(self, result: FitResult | None) -> None:
        # Of an interrupted fit the steps that lie ahead are still right: they are told again when it is resumed.
        if result is not None and result.stop_reason != "interrupted" and self._at < len(self._known):
            self._cut(self._known[self._at][0])
        self._file.close()

    def _cut(self, begin: int) -> None:
        self._file.truncate(begin)
        del self._known[self._at :]


def _history(content: bytes) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """The whole lines from step 0 on, with where each begins; and where the last of them ends."""
    known: list[tuple[int, dict[str, Any]]] = []
    begin = 0
    while (end := content.find(b"\n", begin)) >= 0:
        try:
            entry = json.loads(content[begin:end])
        except ValueError:
            break
        if not isinstance(entry, dict) or entry.get("step") != len(known):
            break
        known.append((begin, entry))
        begin = end + 1
    return known, begin


@final
class TensorBoard:
    """Scalars for TensorBoard: loss, scale, gradient_error, runs, failed, cached, surrogate, parameters/NAME and
    standard_error/NAME.

    A resumed fit takes the place of what the directory says of it.

    Args:
        directory: of the event files.

    Raises:
        SetupError: TensorBoard is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = os.fspath(directory)
        try:  # here, where every rank comes by, and before anything is paid for
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SetupError(
                "Expected TensorBoard for its scalars. Install it: pip install 'simulation-bridge[tensorboard]'."
            ) from error
        self._make = SummaryWriter

    def start(self, space: ParameterSpace, *, max_steps: int | None, max_runs: int | None, title: str) -> None:
        self._names = space.names
        # Whatever an earlier process has written from step 0 on is void: the whole history is told again.
        self._writer: Any = self._make(log_dir=self._directory, purge_step=0)

    def step(self, record: FitStep) -> None:
        scalars: dict[str, float | None] = {
            "loss": record.loss,
            "scale": record.scale,
            "gradient_error": record.gradient_error,
            "runs": record.num_evaluations,
            "failed": record.num_failed,
            "cached": record.num_cached,
            "surrogate": record.num_surrogate,
        }
        scalars |= {f"parameters/{n}": v for n, v in zip(self._names, record.parameters, strict=True)}
        if record.standard_error is not None:
            scalars |= {f"standard_error/{n}": v for n, v in zip(self._names, record.standard_error, strict=True)}
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(tag, value, record.step)
        if record.note:
            self._writer.add_text("notes", record.note, record.step)

    def end(self, result: FitResult | None) -> None:
        self._writer.close()
