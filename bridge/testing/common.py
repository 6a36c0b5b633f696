"""What contracts have in common: identities, copies in other processes, fits that are killed and resumed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import cloudpickle
import numpy as np

from bridge.errors import InputError
from bridge.fitting.fit import fit
from bridge.fitting.methods.first_order import Adam
from bridge.reporting.result import FitResult
from bridge.simulator.identity import identity_of_function
from bridge.storage.run import Run

_KILLED_AFTER = 1
_TRUTH, _START = (0.5, 0.3), (0.2, 0.6)


class _Killed(BaseException):
    pass


class Contract:
    """What is promised of whatever can be given to a fit.

    Attributes:
        made: what is tested.
        others: of the same kind with other settings, so that their identities must be others.
        ranks: numbers of ranks on which a fit with it is resumed; each takes some seconds, and an MPI launcher.
    """

    made: ClassVar[Any]
    others: ClassVar[tuple[Any, ...]] = ()
    ranks: ClassVar[tuple[int, ...]] = ()

    def fit_settings(self, made: Any) -> dict[str, Any]:
        """With which arguments of `bridge.fit` one of the kind is used. Here: none, so that no fit is run."""
        return {}

    def test_its_identity_says_what_it_is(self) -> None:
        copy = cloudpickle.loads(cloudpickle.dumps(self.made))
        names = [identity_of_function(one, "made") for one in (self.made, *self.others)]
        assert identity_of_function(copy, "made") == names[0], "a copy by cloudpickle has another identity"
        assert len(set(names)) == len(names), f"other settings have the same identity: {names}"

    def test_a_fit_with_it_is_killed_and_resumed(self, tmp_path: Path) -> None:
        settings = self.fit_settings(self.made)
        if not settings:
            return
        whole = _fitted(settings)
        _kill(settings, tmp_path / "run")
        resumed = _fitted(settings, tmp_path / "run")
        assert resumed.history == whole.history
        assert resumed.parameters.tobytes() == whole.parameters.tobytes()
        for other in self.others:
            with refused("the run goes on under other settings"):
                _fitted(self.fit_settings(other), tmp_path / "run")

    def test_a_fit_with_it_goes_on_on_other_ranks(self, tmp_path: Path) -> None:
        settings = self.fit_settings(self.made)
        if not (settings and self.ranks):
            return
        whole = _fitted(settings).parameters.tobytes().hex()
        given, program = tmp_path / "settings.pickle", tmp_path / "program.py"
        given.write_bytes(cloudpickle.dumps(settings))
        program.write_text(_PROGRAM.format(path=[path for path in sys.path if path]), encoding="utf-8")
        for number in self.ranks:
            directory = tmp_path / f"on {number}"
            _kill(settings, directory)
            said = self.launch(number, program, given, directory)
            assert f"parameters {whole}" in said, f"other parameters on {number} ranks"

    def launch(self, number: int, program: Path, *arguments: Path) -> str:
        """What a program prints on so many ranks; overridden where ranks are started in another way than by mpiexec."""
        launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
        if launcher is None:
            skip("no mpiexec beside this Python or on PATH")
        # A launcher's traces would make them ranks of the job that we are in.
        strange = ("PMI_", "PMIX_", "PMI2_", "OMPI_", "HYDI_", "MPI_LOCAL", "SLURM_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
        command = [str(launcher), "-n", str(number), sys.executable, *map(str, (program, *arguments))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout


def simulate(theta: Any) -> Any:
    """A small simulator, of two parameters."""
    return np.array([np.exp(-theta[0]), theta[0] * theta[1], np.sin(theta[1])])


def short_descent(**settings: Any) -> Adam:
    """A method that uses what is smoothed, with these settings."""
    return Adam(**{"steps": 3, "num_samples": 8, **settings})


def _fitted(settings: Mapping[str, Any], run: Path | Run | None = None, watch: Any = "off") -> FitResult:
    given: dict[str, Any] = {"method": short_descent(), **settings}
    return fit(simulate, simulate(np.array(_TRUTH)), _START, seed=0, run=run, watch=watch, **given)


def _kill(settings: Mapping[str, Any], directory: Path) -> None:
    def die(record: Any) -> None:
        if record.step == _KILLED_AFTER:
            raise _Killed

    try:
        _fitted(settings, Run(directory, every_s=0.0), die)
    except _Killed:
        return
    raise AssertionError("The fit was over before it was killed.")


_PROGRAM = """
import sys

sys.path[:0] = {path!r}  # ranks find what this process found

import cloudpickle
import bridge
from bridge.testing.common import resume

with open(sys.argv[1], "rb") as file:
    settings = cloudpickle.load(file)
said = resume(settings, sys.argv[2])
if bridge.is_root():
    print("parameters", said)
"""


def resume(settings: Mapping[str, Any], directory: str) -> str:
    """The parameters of a fit that goes on, as text. Collective."""
    return _fitted(settings, Path(directory)).parameters.tobytes().hex()


class refused:  # noqa: N801  (as pytest.raises)
    """A context that has to end in an `InputError`; else an AssertionError says what was accepted."""

    def __init__(self, accepted: str) -> None:
        self.accepted = accepted

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> bool:
        if kind is None:
            raise AssertionError(f"Expected an InputError, got none: {self.accepted}.")
        return issubclass(kind, InputError)


def skip(why: str) -> None:
    """Leaves a test out, under pytest, which is needed only here."""
    import pytest

    pytest.skip(why)
