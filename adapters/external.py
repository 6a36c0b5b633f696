"""Any program with a command line as a simulator.

A `Template` knows what the program's files mean, a `Profile` how this machine runs it, and `ExternalSimulator` puts the
two together: one fresh directory, one process group and one scrubbed environment a run.
"""

from __future__ import annotations

import errno
import itertools
import numbers
import operator
import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from adapters.paths import is_of_system, with_files
from adapters.process import Outcome, run_process
from adapters.template import STDERR, STDOUT, Row, Template
from bridge.arrays import real_array
from bridge.environment import child_environment, keep_directory, marked, own_directory
from bridge.errors import BridgeError, EvaluationError, EvaluationTimeoutError, InputError, OutputError, SetupError
from bridge.simulator.space import ParameterSpace

_TAIL_LINES = 20
_WORD = re.compile(r"\w[\w.+-]*")  # that may be a program's name
# Directories of failed runs that stay: a fit in which many fail would fill the disk.
_MOST_KEPT = 20


@final
@dataclass(frozen=True)
class Profile:
    """How this machine runs a program.

    Args:
        argv: the program and its fixed arguments, one a string; never one string with spaces. A program without a slash
            is looked up on the child's PATH; a relative path with one is taken from the current directory, now.
        env: further variables for the program; they win over all others.
        timeout_s: limit of one run [s]; None for none.
        threads: what OMP_NUM_THREADS and the like tell the program; None leaves the variables as they are.
        keep: whose run directories stay: of "failed" runs, "all" or "none". All others go with the run, or with this
            process if it is killed.
        keep_at_most: so many directories stay in the scratch directory, those of earlier jobs among them: the newest.
            None for 20 of failed runs, and for no limit with keep="all".
        scratch: where run directories are made, created where missing; by default the system's temporary directory,
            which is local to the node on most clusters.
        keep_slurm: leave SLURM_* in the program's environment, as a program started through `srun` needs.
        kill_grace_s: time between the polite signal and the final one [s].
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    threads: int | None = 1
    keep: Literal["failed", "all", "none"] = "failed"
    scratch: Path | None = None
    keep_slurm: bool = False
    kill_grace_s: float = 2.0
    keep_at_most: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.argv, str | bytes):
            raise InputError(
                f"Expected argv as a list of strings, got the single string {self.argv!r}. Write "
                f"{tuple(shlex.split(os.fsdecode(self.argv)))!r}: then spaces and quotes mean nothing."
            )
        try:
            argv = tuple(os.fspath(part) if isinstance(part, os.PathLike) else part for part in self.argv)
        except TypeError:
            argv = ()
        if not argv or not all(isinstance(part, str) for part in argv) or not argv[0]:
            raise InputError(f"Expected argv as a program and its arguments, all strings, got {self.argv!r}.")
        if os.sep in argv[0]:
            argv = (os.path.abspath(argv[0]), *argv[1:])
        object.__setattr__(self, "argv", argv)
        env = dict(self.env) if isinstance(self.env, Mapping) else self.env
        if not isinstance(env, dict) or not all(
            isinstance(k, str) and isinstance(v, str) and k and "=" not in k for k, v in env.items()
        ):
            raise InputError(f"Expected env as a mapping of names to strings, got {env!r}. Write numbers as strings.")
        object.__setattr__(self, "env", env)
        if self.timeout_s is not None and not (_is_real(self.timeout_s) and self.timeout_s > 0):
            raise InputError(f"Expected timeout_s as a number > 0 or None, got {self.timeout_s!r}.")
        if self.threads is not None and not (_is_whole(self.threads) and self.threads >= 1):
            raise InputError(f"Expected threads as a whole number of at least 1 or None, got {self.threads!r}.")
        if self.keep not in ("failed", "all", "none"):
            raise InputError(f"Unknown keep={self.keep!r}. Known: failed, all, none.")
        if self.keep_at_most is not None and not (_is_whole(self.keep_at_most) and self.keep_at_most >= 1):
            raise InputError(f"Expected a keep_at_most of 1 or more, or None, got {self.keep_at_most!r}.")
        if not (_is_real(self.kill_grace_s) and self.kill_grace_s >= 0):
            raise InputError(f"Expected a kill_grace_s of 0 or more, got {self.kill_grace_s!r}.")
        if self.scratch is not None and not isinstance(self.scratch, str | os.PathLike):
            raise InputError(f"Expected scratch as a path or None, got {self.scratch!r}.")
        if self.scratch is not None:
            object.__setattr__(self, "scratch", Path(os.path.abspath(self.scratch)))

    @property
    def identity_parts(self) -> dict[str, Any]:
        """What outputs can depend on: the program itself, its arguments and variables, and the files these name."""
        env: dict[str, Any] = {}
        for name, text in self.env.items():
            # A list of folders begins with one's own, and goes on with what is there for every program.
            env[f"variable {name}"] = with_files(text, but=os.environ.get(name, "").split(os.pathsep))
        program = Path(self.executable())
        argv = self.argv[1:]
        parts = {"name": program.name, "program": program, "argv": tuple(map(with_files, argv)), **env}
        started = tuple(self._started(argv))
        return parts | {"started": started} if started else parts

    def _started(self, argv: Iterable[str]) -> Iterator[Path]:
        """The programs that arguments name for a launcher or a shell to find, as `mpirun -n 4 engine` does."""
        search = self.environment().get("PATH", os.defpath)
        for word in itertools.chain.from_iterable(map(str.split, argv)):
            if _WORD.fullmatch(word) and (found := shutil.which(word, path=search)) and not is_of_system(found):
                yield Path(found)

    def environment(self) -> dict[str, str]:
        """The program's environment: this process's without the launcher's variables, threads, `env`."""
        return child_environment(self.threads, self.keep_slurm) | dict(self.env)

    def executable(self) -> str:
        """Full path of the program.

        Raises:
            SetupError: there is none, or it may not be executed.
        """
        search = self.environment().get("PATH", os.defpath)
        found = shutil.which(self.argv[0], path=search)
        if found is None:
            where = "no executable file is there" if os.sep in self.argv[0] else f"none on PATH={search}"
            raise SetupError(
                f"Expected the program {self.argv[0]!r} on {platform.node()}, got nothing: {where}. Install it, "
                "load its module, or give its full path in Profile.argv."
            )
        return found


@final
@dataclass(frozen=True)
class ExternalSimulator:
    """A program as a `bridge.Simulator`: one run a row, one after another.

    Each run has a fresh directory (its working directory) and a process group of its own, whose members are all ended
    when the run is over: at exit, at the time limit, and when the run is interrupted. Processes that left the group
    (`setsid`) go on until this process ends. However it ends, nothing that it has started goes on, and the directories
    of unfinished runs are removed. This process's environment and working directory never change.

    Args:
        template: what the program's files mean.
        profile: how to run it here.
        space: its parameters.
        output_shape: shape of one output; None to take what the first row of a call gives.
        identity: a text under which evaluations are filed, where the template, or the program, has something that
            cannot be seen; change it whenever outputs do. By default they are filed under the content of the program,
            its arguments, its variables, the files that these name by absolute paths, and the template.
    """

    template: Template
    profile: Profile
    space: ParameterSpace
    output_shape: tuple[int, ...] | None
    identity: str | None = None

    @property
    def identity_parts(self) -> dict[str, Any]:
        """What outputs depend on: not on bounds and scales, of which the program is told nothing."""
        columns = tuple((p.name, p.kind == "integer") for p in self.space.parameters)
        shape = self.output_shape
        return {"template": self.template, "profile": self.profile, "columns": columns, "output_shape": shape}

    def __post_init__(self) -> None:
        if self.output_shape is not None:
            try:
                shape = tuple(operator.index(n) for n in self.output_shape)
            except TypeError:
                shape = (-1,)
            if any(n < 0 for n in shape):
                raise InputError(
                    f"Expected output_shape as a tuple of whole numbers, got {self.output_shape!r}. One number is (), "
                    "five are (5,); None takes what the first run gives."
                )
            object.__setattr__(self, "output_shape", shape)
        self.template.check(self.space)

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Runs the program k times.

        Args:
            inputs: (k, d) parameters.
            seeds: (k,), one a run.

        Returns:
            (k, *output_shape) float64.

        Raises:
            SetupError: the program or the scratch directory is missing; nothing has been run.
            EvaluationError: a run failed or gave non-finite numbers; EvaluationTimeoutError: it took too long;
                OutputError: its output is missing, unreadable or of another shape. The rows after it are not run.
        """
        inputs = np.asarray(inputs, dtype=np.float64)
        if inputs.ndim != 2 or inputs.shape[1] != self.space.dimension or len(inputs) != len(seeds):
            raise InputError(
                f"Expected inputs of shape (k, {self.space.dimension}) and k seeds, got {inputs.shape} and "
                f"{len(seeds)}."
            )
        executable = self.profile.executable()
        shape = self.output_shape
        outputs = []
        for x, seed in zip(inputs, seeds, strict=True):
            outputs.append(self._run(executable, self._row(x, int(seed)), shape))
            shape = outputs[0].shape
        return np.stack(outputs) if outputs else np.empty((0, *(shape or ())))

    def _row(self, vector: NDArray[np.float64], seed: int) -> Row:
        values = {
            p.name: round(float(v)) if p.kind == "integer" else float(v)
            for p, v in zip(self.space.parameters, vector, strict=True)
        }
        return Row(values, vector.copy(), seed)

    def _run(self, executable: str, row: Row, shape: tuple[int, ...] | None) -> NDArray[np.float64]:
        directory = self._fresh_directory()
        outcome: Outcome | None = None
        kept: Path | None = None
        try:
            self.template.write_input(directory, row)
            command = (executable, *self.profile.argv[1:], *self.template.command_arguments(row))
            standard_input = self.template.standard_input(row)
            try:
                outcome = run_process(
                    command,
                    directory=directory,
                    environment=marked(self.profile.environment()),
                    standard_input=None if standard_input is None else directory / standard_input,
                    standard_output=directory / STDOUT,
                    standard_error=directory / STDERR,
                    timeout_s=self.profile.timeout_s,
                    kill_grace_s=self.profile.kill_grace_s,
                )
            except OSError as error:
                if error.filename != executable:
                    raise
                raise SetupError(_why_not_started(Path(executable), error)) from error
            if outcome.timed_out:
                raise EvaluationTimeoutError(
                    f"Expected an end within {self.profile.timeout_s:g} s, got none: the run was killed. Raise "
                    "Profile.timeout_s, or bound the parameters."
                )
            if outcome.status != 0:
                raise EvaluationError(f"Expected exit status 0, got {outcome.describe()}.")
            return self._read(directory, shape)
        except BridgeError as error:
            kept = self._keep(directory, failed=True)
            raise type(error)(self._report(str(error), row, kept, directory, outcome)) from error.__cause__
        except Exception as error:
            kept = self._keep(directory, failed=True)
            said = (
                f"Expected {type(self.template).__name__} to write the input and start the program, got "
                f"{type(error).__name__}: {error}."
            )
            raise EvaluationError(self._report(said, row, kept, directory, outcome)) from error
        finally:
            if kept is None and self._keep(directory, failed=False) is None:
                shutil.rmtree(directory, ignore_errors=True)

    def _keep(self, directory: Path, *, failed: bool) -> Path | None:
        """Where a run's directory stays; None where the profile does not keep it."""
        profile = self.profile
        if not (profile.keep == "all" or (failed and profile.keep == "failed")):
            return None
        most = profile.keep_at_most or (None if profile.keep == "all" else _MOST_KEPT)
        return keep_directory(directory, self._stem, most)

    @property
    def _stem(self) -> str:
        return Path(self.profile.argv[0]).stem

    def _fresh_directory(self) -> Path:
        try:
            return own_directory(self._stem, self.profile.scratch, stays=self.profile.keep == "all")
        except OSError as error:
            raise SetupError(
                f"Expected a writable scratch directory on {platform.node()}, got {error}. Set Profile.scratch "
                "or TMPDIR."
            ) from error

    def _read(self, directory: Path, shape: tuple[int, ...] | None) -> NDArray[np.float64]:
        reader = f"{type(self.template).__name__}.read_output"
        if not directory.is_dir():
            raise OutputError(
                "Expected the run's directory with its output, got none: the program, which ended with status 0, has "
                "removed its own directory, or something it started has. Have it remove files by their names."
            )
        try:
            given = self.template.read_output(directory)
            if given is None or isinstance(given, Mapping | set | np.ma.MaskedArray):
                given = real_array(given, f"from {reader}")
            output = np.asarray(given)
            if np.iscomplexobj(output):
                raise TypeError("complex numbers; return real and imaginary parts as real numbers")
            output = np.array(output, dtype=np.float64, order="C")  # `ascontiguousarray` makes a vector of a scalar
        except EvaluationError:  # of which OutputError is one
            raise
        except FileNotFoundError as error:
            there = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
            raise OutputError(
                f"Expected the output file {error.filename or error!s}, got {there}. The program ended with status 0 "
                "without writing it."
            ) from error
        except Exception as error:
            raise OutputError(
                f"Expected an output that {reader} can read, got {type(error).__name__}: {error}. Is the file whole?"
            ) from error
        if shape is not None and output.shape != shape:
            hint = " If the program gives one number, declare output_shape=()." if output.shape == () else ""
            raise OutputError(f"Expected an output of shape {shape}, got {output.shape}.{hint}")
        bad = int(np.count_nonzero(~np.isfinite(output)))
        if bad:
            raise EvaluationError(f"Expected finite numbers, got {bad} of {output.size} that are NaN or infinite.")
        return output

    def _report(self, said: str, row: Row, kept: Path | None, directory: Path, outcome: Outcome | None) -> str:
        """The message of a failed run: what, where, with which parameters, and what the program said last."""
        values = ", ".join(
            f"{p.name} = {row.values[p.name]!r}{' ' + p.unit if p.unit else ''}" for p in self.space.parameters
        )
        place = directory if kept is None else kept
        gone = " (removed: Profile.keep)" if kept is None else "" if kept.exists() else " (which is gone)"
        lines = [
            said,
            f"  program: {shlex.join(outcome.command) if outcome else self.profile.argv[0]}",
            f"  parameters: {values}; seed {row.seed}",
            f"  status: {outcome.describe() if outcome else 'not started'}, on {platform.node()}",
            f"  directory: {place}{gone}",
        ]
        for name in (STDOUT, STDERR, *self.template.log_files()):
            tail = [line.replace(str(directory), str(kept or directory)) for line in _tail((kept or directory) / name)]
            if tail:
                lines += [f"  last lines of {name}:", *(f"    {line}" for line in tail)]
        return "\n".join(lines)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _why_not_started(program: Path, error: OSError) -> str:
    """What hinders a file that is there and executable from being started; the kernel names the file alone."""
    said = f"Expected the program {str(program)!r} to start on {platform.node()}, got "
    first = b""
    with suppress(OSError), program.open("rb") as file:
        first = file.read(256).split(b"\n")[0]
    if first.startswith(b"#!") and error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ELOOP):
        interpreter = (first[2:].decode(errors="replace").lstrip(" \t").split(" ") or [""])[0]
        lines = " Its lines end as on Windows: convert them (dos2unix)." if interpreter.endswith("\r") else ""
        return (
            f"{said}{error.strerror}: the interpreter that its first line names, {interpreter!r}, is not there or may "
            f"not be executed.{lines} Correct the line, or name the interpreter: Profile(('sh', {str(program)!r}))."
        )
    if error.errno == errno.ENOEXEC:
        return (
            f"{said}{error.strerror}: it has no first line such as #!/bin/sh, or is made for another kind of machine. "
            f"Add the line, or name the interpreter: Profile(('sh', {str(program)!r}))."
        )
    return f"{said}{error.strerror}. Start it by hand on that machine to see why."


def _tail(path: Path, number: int = _TAIL_LINES, limit: int = 16_384) -> list[str]:
    """The last lines of a file, however long it or they are."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - limit))
            return [line[-500:] for line in file.read().decode(errors="replace").splitlines()[-number:]]
    except OSError:
        return []
