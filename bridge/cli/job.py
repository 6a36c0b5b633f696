"""A fit described by a TOML file: the simulator, the target, the start, and where the results go.

[simulator]                 # name = ..., and the arguments of its class or factory
name = "cryoet"             # or a function of your own: "mysim.py:projectile", in a file beside this one
[target]
file = "target.mrc"         # paths are relative to the TOML file
mask = "bad.mrc"            # optional: not 0 where a number of the target is no data
[start]                     # one value a parameter
defocus_um = 1.9
[fit]                       # arguments of bridge.fit; a table stands for an object
seed = 0
method = { name = "adam", steps = 100 }
stop = { runs = 2000 }
on = { name = "workers", number = 8, timeout_s = 60 }
[output]
directory = "results"       # relative to where the command is started
"""

from __future__ import annotations

import inspect
import json
import logging
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import real_array
from bridge.checks import did_you_mean, nearest, refuse_unknown
from bridge.dispatch import is_root
from bridge.errors import InputError, SetupError
from bridge.evaluation.failures import Drop, Penalty, Raise
from bridge.evaluation.memory import Memory
from bridge.evaluation.places import Isolated, Ranks, Workers
from bridge.fitting.comparison import LeastSquares
from bridge.fitting.fit import fit
from bridge.fitting.methods.base import METHODS
from bridge.fitting.problem import Starts
from bridge.fitting.stop import Stop
from bridge.reporting.figures import draw_fit
from bridge.reporting.observers import Watch
from bridge.reporting.result import FitResult
from bridge.simulator import registry
from bridge.simulator.function import as_simulator
from bridge.simulator.protocol import FileFormat, Simulator
from bridge.storage.files import write_json, write_whole
from bridge.storage.run import Run

_log = logging.getLogger("bridge")
_SECTIONS = ("simulator", "target", "start", "fit", "output")
_KEYS = {"target": ("file", "mask"), "output": ("directory", "title")}
# What [fit] may say: arguments of `bridge.fit`, and `starts`, how many there are to be.
_FIT = ("seed", "method", "variance", "misfit", "prior", "fixed", "tied", "stop", "failures", "on", "memory", "starts")
# A table with a name stands for one of these, any other one for the settings of what there is only one of.
_NAMED: Mapping[str, Mapping[str, Any]] = {
    "failures": {"raise": Raise, "drop": Drop, "penalty": Penalty},
    "on": {"ranks": Ranks, "process": Isolated, "workers": Workers},
}
_TABLES: Mapping[str, Any] = {"misfit": LeastSquares, "stop": Stop, "memory": Memory}


@dataclass(frozen=True)
class Job:
    """A checked job file; `run_job` carries it out.

    Attributes:
        starts: how many, None for the one that is given. said: [fit], as it stands there.
        settings: the arguments of `bridge.fit` that this comes to.
    """

    simulator: Simulator
    target_file: Path
    target: NDArray[Any]
    start: Mapping[str, float]
    starts: int | None
    said: Mapping[str, Any]
    settings: Mapping[str, Any]
    directory: Path
    title: str


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"Expected a job file (TOML), got {str(path)!r}, which is not a file.")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"Expected TOML in {path}, got: {error}.") from error
    missing = [s for s in ("simulator", "target", "start", "fit") if not isinstance(data.get(s), dict)]
    for section in data:
        if section not in _SECTIONS:
            raise InputError(
                f"Expected the sections {', '.join(_SECTIONS)} in {path}, got unknown [{section}]."
                f"{did_you_mean(section, _SECTIONS)}"
            )
    if missing:
        raise InputError(
            f"Expected the sections {', '.join(_SECTIONS)} in {path}, got none called {', '.join(missing)}."
        )
    for section, known in _KEYS.items():
        _refuse_unknown(data.get(section, {}), known, section, path)
    return data


def _refuse_unknown(table: Mapping[str, Any], known: Sequence[str], section: str, path: Path) -> None:
    for key in table:
        if key not in known:
            advice = _as_table(key, known) if section == "fit" else ""
            advice = advice or did_you_mean(key, known) or f" Known: {', '.join(known)}."
            raise InputError(f"Unknown setting {key!r} in [{section}] of {path}.{advice}")


def _as_table(word: str, known: Sequence[str]) -> str:
    """ " Give stop = { runs = ... }.", where a word means a setting of an object, or nothing."""
    homes = {f.name: f"{key} = {{ {f.name} = ... }}" for key, kind in _TABLES.items() for f in fields(kind)}
    for key, kinds in {"method": METHODS.all(), **_NAMED}.items():
        for name, kind in kinds.items():
            for f in fields(kind):
                homes.setdefault(f.name, f'{key} = {{ name = "{name}", {f.name} = ... }}')
    homes["workers"] = homes["number"]
    meant = nearest(word, [*known, *homes])
    return f" Give {homes[meant]}." if meant in homes and meant not in known else ""


def make_simulator(
    name: str, options: Mapping[str, Any] | None = None, *, folder: Path | None = None, names: Sequence[str] = ()
) -> Any:
    """Makes a simulator by its registered name, or of `file.py:function`.

    What a file's name stands for is a simulator, a class or factory of one, or a function f(theta). The latter takes
    the options of `bridge.as_simulator`.

    Args:
        options: arguments of the class or factory. folder: where a relative file is.
        names: of the parameters, where a function says nothing of them.

    Raises:
        InputError: nothing of that name, arguments that it does not take, or what it makes is no simulator.
    """
    given = dict(options or {})
    if not registry.is_file(name):
        return registry.make(name, **given)
    found = registry.from_file(name, folder)
    if isinstance(found, Simulator) and not inspect.isclass(found):
        if given:
            raise InputError(f"Expected no arguments for {name!r}, which is a simulator already, got {sorted(given)}.")
        return found
    if not callable(found):
        raise InputError(f"Expected a function or a simulator as {name!r}, got {type(found).__name__}.")
    if inspect.isclass(found) or _makes_one(found, given):
        registry.check_arguments(name, found, (), given)
        found, given = found(**given), {}
        if isinstance(found, Simulator):
            return found
    known = [key for key in inspect.signature(as_simulator).parameters if key not in ("function", "structure")]
    refuse_unknown(f"{name!r}", given, known)
    if names and "names" not in given:
        given["names"] = list(names)
    return as_simulator(found, **given)


def _makes_one(function: Any, options: Mapping[str, Any]) -> bool:
    """Whether a function can be called with the options alone: then it makes a simulator, and is none."""
    try:
        inspect.signature(function).bind(**options)
    except (TypeError, ValueError):
        return False
    return True


def load_simulator(path: str | Path) -> Any:
    """Makes the simulator of a job file.

    Raises:
        InputError: the file is missing, malformed, or names no simulator.
    """
    path = Path(path)
    data = _load(path)
    options = {key: _resolve(value, path.parent) for key, value in data["simulator"].items()}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(
            f"Expected name = ... in [simulator] of {path}. Known: {', '.join(registry.list_simulators())}. One of "
            'your own is named by its file: name = "mysim.py:function".'
        )
    try:
        return make_simulator(name, options, folder=path.parent, names=list(data["start"]))
    except InputError as error:
        raise InputError(f"In [simulator] of {path}: {error}") from error


def load_job(path: str | Path, directory: str | Path | None = None) -> Job:
    """Reads and checks a job file, and makes its simulator. Nothing is evaluated.

    Raises:
        InputError: the file or what it names is missing, malformed, or has unknown keys.
    """
    path = Path(path)
    data = _load(path)
    settings = _settings(data["fit"], path)
    simulator = load_simulator(path)
    if simulator.space is None:
        raise InputError(f"Expected a simulator with named parameters in {path}, got one without any.")
    target_file = path.parent / str(data["target"].get("file", ""))
    output = data.get("output", {})
    return Job(
        simulator=simulator,
        target_file=target_file,
        target=_read_target(simulator, target_file, data["target"].get("mask"), path.parent),
        start=data["start"],
        starts=settings.pop("starts", None),
        said=data["fit"],
        settings=settings,
        directory=Path(directory or output.get("directory", "results")),
        title=str(output.get("title", path.stem)),
    )


def _settings(table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of `bridge.fit` that [fit] stands for."""
    _refuse_unknown(table, _FIT, "fit", path)
    made = dict(table)
    try:
        if isinstance(given := table.get("method"), dict):
            if "name" not in given:
                raise InputError(f"Expected name = one of {', '.join(METHODS.all())} in method, got none.")
            made["method"] = _made("method", METHODS.find(given["name"]), given)
        for key, kinds in _NAMED.items():
            if isinstance(given := table.get(key), dict):
                name = str(given.get("name"))
                if name not in kinds:
                    raise InputError(f"Expected name = one of {', '.join(kinds)} in {key}, got {name!r}.")
                made[key] = _made(key, kinds[name], given)
        for key, kind in _TABLES.items():
            if isinstance(given := table.get(key), dict):
                if isinstance(given.get("mask"), str):
                    raise InputError(f"Expected the file of a mask in [target]: mask = {json.dumps(given['mask'])}.")
                made[key] = _made(key, kind, given)
    except InputError as error:
        raise InputError(f"In [fit] of {path}: {error}") from error
    return made


def _made(key: str, kind: Any, table: Mapping[str, Any]) -> Any:
    settings = {name: value for name, value in table.items() if name != "name"}
    registry.check_arguments(key, kind, (), settings)
    return kind(**settings)


def _resolve(value: Any, folder: Path) -> Any:
    """Makes file names relative to the job file: strings under the key `file` (in tables) that exist beside it."""
    if isinstance(value, dict):
        return {
            k: str(folder / v) if k == "file" and isinstance(v, str) else _resolve(v, folder) for k, v in value.items()
        }
    return value


def _read_target(simulator: Simulator, file: Path, mask: Any, folder: Path) -> NDArray[Any]:
    """The target, a masked array where the job names a mask: a file of its shape, not 0 where a number is no data."""
    target = read_output(simulator, file)
    if mask is None:
        return target
    bad = np.asarray(read_output(simulator, folder / str(mask))) != 0
    if bad.shape != target.shape:
        raise InputError(f"Expected a mask of the target's shape {target.shape} in {mask!r}, got {bad.shape}.")
    return np.ma.masked_array(target, np.ma.getmaskarray(target) | bad)


def read_output(simulator: Simulator, path: Path) -> NDArray[Any]:
    """An output from disk: in the simulator's own format, or .npy."""
    if not path.is_file():
        raise InputError(f"Expected a target file, got {str(path)!r}, which is not a file.")
    if path.suffix == ".npy":
        try:
            return np.asarray(np.load(path, allow_pickle=False))
        except ValueError as error:
            raise InputError(f"Expected an array in {path}, got: {error}.") from error
    if isinstance(simulator, FileFormat):
        return simulator.read_output(str(path))
    raise InputError(f"Expected a .npy file for simulator {type(simulator).__name__}, got {path.name!r}.")


def write_output(simulator: Simulator, stem: Path, output: NDArray[Any]) -> Path:
    """An output to disk, in the simulator's own format if it has one, else .npy."""
    if isinstance(simulator, FileFormat):
        form = simulator
        return write_whole(stem.with_suffix(form.output_suffix), lambda p: form.write_output(str(p), output))
    array = real_array(output, "as an output", InputError)  # masked numbers are NaN
    return write_whole(stem.with_suffix(".npy"), lambda p: np.save(p, array, allow_pickle=False))


def is_finished(job: Job) -> bool:
    """Whether the fit of a job has nothing left to run."""
    try:
        status = json.loads((job.directory / "run" / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(status, dict) and status.get("state") == "done"


def run_job(
    job: Job, watch: Watch = "auto", resume: bool = True, overwrite: bool = False
) -> tuple[FitResult, list[Path]]:
    """Fits and writes parameters.json, history.json, the fitted output and fit.png, and, so that it can be resumed, the
    run (`bridge.Run`) in run/. Collective under MPI; rank 0 prints and writes.

    Args:
        watch: as in `bridge.fit`. resume, overwrite: as in `bridge.Run`.

    Returns:
        the result, and the files: none on other ranks, and none where the fit was interrupted before its end is known.
    """
    result = fit(
        job.simulator,
        job.target,
        job.start if job.starts is None else Starts(job.starts, job.start),
        watch=watch,
        run=Run(job.directory / "run", title=job.title, resume=resume, overwrite=overwrite),
        **job.settings,
    )
    known = result.stop_reason != "interrupted" or bool(np.isfinite(result.output).any())
    return result, write_results(job, result) if known and is_root() else []


def write_results(job: Job, result: FitResult) -> list[Path]:
    folder = job.directory
    history = [
        {
            "step": h.step,
            "loss": h.loss,
            "scale": h.scale,
            "parameters": list(h.parameters),
            "runs": h.num_evaluations,
        }
        for h in result.history
    ]
    written = [
        write_json(folder / "parameters.json", {"target": job.target_file.name, **result.to_dict()}),
        write_json(folder / "history.json", history),
        write_output(job.simulator, folder / "fit", result.output),
    ]
    try:
        written.append(draw_fit(result, job.target, folder / "fit.png", job.title))
    except SetupError as error:  # a fit that is done must not fail by its picture
        _log.warning("No picture of the fit. %s", error)
    return written
