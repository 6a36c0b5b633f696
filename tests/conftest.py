"""What every test may count on: MPI ranks under a time limit, reproducible property tests, and skips with reasons.

The header of each run says what was found on this machine. Two variables turn a skip into a failure, for machines
that ought to have the thing: BRIDGE_REQUIRE_MPI=1 and BRIDGE_REQUIRE_GL=1.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import hypothesis
import psutil
import pytest

from tests.lab.forking_server import ask, exit_status, wait_for

ROOT = Path(__file__).resolve().parent.parent
FORKING_SERVER = ROOT / "tests" / "lab" / "forking_server.py"

# No example database: tests write nowhere but into tmp_path. Derandomised, so that a failure is everybody's failure.
hypothesis.settings.register_profile(
    "bridge",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("bridge")


# --- what this machine has: each function returns (found, description or reason) ----------------------------------


def _output_of(*command: str | Path, environment: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """Runs a short command; whether it succeeded, and the last line of what it said."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **(environment or {})}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return done.returncode == 0, said[-1].strip("\0 ") if said else f"exit status {done.returncode}"


@dataclass(frozen=True)
class Mpi:
    """An MPI that ranks can be started with: `name`, its launcher, and what its ranks need in their environment."""

    name: str
    launcher: str
    environment: Mapping[str, str]


def _beside(prefix: Path) -> Mpi:
    """An MPI of the wheels that set-up puts into a directory of its own: two in one environment would overwrite
    each other's launchers. The mpi4py wheel takes the library that it is told to."""
    libraries = [prefix / "lib" / name for name in ("libmpi.so.40", "libmpi.so.12")]
    library = next((str(path) for path in libraries if path.exists()), "")
    return Mpi(prefix.name, str(prefix / "bin" / "mpiexec"), {"MPI4PY_LIBMPI": library})


@functools.cache
def _mpis() -> Mapping[str, Mpi]:
    """The MPI of this environment, first, and those in directories of its folder `mpi`."""
    # The launcher beside this interpreter, else the one on PATH: two MPIs in one machine are not rare.
    launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    found = [] if launcher is None else [Mpi("environment's", launcher, {})]
    found += [_beside(path.parent.parent) for path in sorted(Path(sys.prefix).glob("mpi/*/bin/mpiexec"))]
    return {mpi.name: mpi for mpi in found}


@functools.cache
def _mpi(name: str | None = None) -> tuple[bool, str]:
    if not _mpis():
        return False, "no mpiexec beside this Python or on PATH"
    mpi = _mpis()[name or next(iter(_mpis()))]
    # In a process of its own: importing MPI here would make pytest itself a rank.
    program = (
        "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
        "print(MPI.Get_library_version().splitlines()[0].strip(chr(0)), '/ mpi4py', mpi4py.__version__)"
    )
    found, said = _output_of(sys.executable, "-c", program, environment=mpi.environment)
    if not found:
        return False, f"mpi4py does not work: {said}"
    return True, f"{' '.join(said.split())}, launcher {mpi.launcher}"


@functools.cache
def _opengl() -> tuple[bool, str]:
    return _output_of(sys.executable, ROOT / "tools" / "opengl.py")


@functools.cache
def _gpu() -> tuple[bool, str]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver warns; the answer is no all the same
        if torch.version.cuda is None:
            return False, f"torch {torch.__version__} is built without CUDA"
        if not torch.cuda.is_available():
            return False, f"torch {torch.__version__} finds no CUDA device"
        return True, f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


@functools.cache
def _torch_ctf() -> tuple[bool, str]:
    try:
        return True, metadata.version("torch-ctf")
    except metadata.PackageNotFoundError:
        return False, "not installed (the optional dependencies `test` bring it)"


def pytest_report_header() -> list[str]:
    others = {f"MPI ({name})": _mpi(name) for name in list(_mpis())[1:]}
    found = {"MPI": _mpi(), **others, "OpenGL": _opengl(), "GPU": _gpu(), "torch-ctf": _torch_ctf()}
    return [f"{name}: {said if has else f'none ({said})'}" for name, (has, said) in found.items()]


def _required(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def _need(what: str, found: tuple[bool, str], variable: str | None = None) -> None:
    """Skips with the reason, or fails with it where the environment says that `what` must be there."""
    has, reason = found
    if has:
        return
    if variable is not None and _required(variable):
        pytest.fail(f"{variable} is set, but there is no {what}: {reason}", pytrace=False)
    pytest.skip(f"no {what}: {reason}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        _need("GPU", _gpu())
    if item.get_closest_marker("gl") is not None:
        _need("OpenGL", _opengl(), "BRIDGE_REQUIRE_GL")
    if item.get_closest_marker("mpi") is not None:
        _need("MPI", _mpi(), "BRIDGE_REQUIRE_MPI")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for torch and numpy, as the bridge sets it; two are slower where all cores are busy."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


# --- one process ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def forking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The socket of a server that forks processes which have torch imported already."""
    # Not in tmp_path: a socket's name may have a hundred characters at most.
    with tempfile.TemporaryDirectory(prefix="fork-") as directory:
        path = f"{directory}/socket"
        server = subprocess.Popen([sys.executable, str(FORKING_SERVER), path], stdin=subprocess.PIPE)
        assert server.stdin is not None
        wait_for(path)
        yield path
        server.stdin.close()
        server.wait(30)


@pytest.fixture(scope="session")
def run_alone(
    forking_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_alone(script, *args, timeout=120, env=None, cwd=None)`: runs a Python script, a Path or a program's text, in
    a process forked from one that has torch imported already, and returns what came out; `env` is added to this
    process's environment.
    """

    def run(
        script: Path | str,
        *args: object,
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        directory = tmp_path_factory.mktemp("alone-")
        path = script
        if not isinstance(path, Path):
            path = directory / "script.py"
            path.write_text(textwrap.dedent(str(script)), encoding="utf-8")
        arguments = [str(argument) for argument in args]
        out, err = directory / "stdout.txt", directory / "stderr.txt"
        with open(os.devnull) as nothing, out.open("wb") as stdout, err.open("wb") as stderr:
            files = {0: nothing.fileno(), 1: stdout.fileno(), 2: stderr.fileno()}
            environment = {**os.environ, **(env or {})}
            begun = ask(forking_server, str(path.resolve()), arguments, environment, str(cwd or directory), files)
        with begun:
            begun.settimeout(timeout)
            try:
                status = exit_status(begun)
            except TimeoutError:
                status = None
        said, complained = (file.read_text(encoding="utf-8", errors="replace") for file in (out, err))
        if status is None:
            pytest.fail(f"{path} did not end within {timeout} s.\n--- stdout ---\n{said}\n--- stderr ---\n{complained}")
        return subprocess.CompletedProcess([str(path), *arguments], status, said, complained)

    return run


# --- ranks ----------------------------------------------------------------------------------------------------

# A launcher's traces: with them a rank would believe that it belongs to the job that pytest itself was started in.
_LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "PMI2_", "OMPI_", "HYDI_", "MPI_LOCAL", "SLURM_")

# Open MPI refuses root, and more ranks than cores, unless told so; other launchers ignore these.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_osc": "^ucx",  # which complains of each window where there is no such network
}


@contextlib.contextmanager
def _own_group(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends the process and all its descendants when the block is left, however that happens."""
    family: list[psutil.Process] = []
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            # Some launchers put ranks into sessions of their own, where a signal to our group does not reach them.
            family = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked `every_mpi` run with each MPI that is there; those with others than the environment's are slow."""
    if metafunc.definition.get_closest_marker("every_mpi") is not None:
        first, *others = list(_mpis()) or [None]
        names = [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]
        metafunc.parametrize("mpi", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """The MPI to test with: the environment's own, unless the test is marked `every_mpi`."""
    name = getattr(request, "param", None)
    _need("MPI", _mpi(name), "BRIDGE_REQUIRE_MPI")
    return _mpis()[name or next(iter(_mpis()))]


@pytest.fixture(scope="session")
def run_ranks(
    mpi: Mpi, forking_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_ranks(n, script, *args, timeout=120, env=None, kill_when=None, kill_with=SIGKILL, fresh=False)`: runs a
    Python script on n ranks and returns what came out.

    `script` is a Path, or a string ending in `.py` without line breaks, or else the program's text. It runs in a
    fresh directory; `env` is added to this process's environment. The ranks have a process group of their own, which
    is killed when the launcher ends or `timeout` seconds have passed; the latter fails the test, with the output so
    far. A non-zero exit status does not: look at `returncode`. Once `kill_when()` is true, everything is killed with
    SIGKILL, the launcher first (the exit status is then -9), or the launcher is sent another signal.

    The launcher's own processes stand in for the ranks, which are forks of one that has torch imported already; unless
    they are to be `fresh`.
    """

    def run(
        n: int,
        script: Path | str,
        *args: object,
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        kill_when: Callable[[], bool] | None = None,
        kill_with: signal.Signals = signal.SIGKILL,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        directory = tmp_path_factory.mktemp(f"ranks{n}-")
        if isinstance(script, str) and ("\n" in script or not script.endswith(".py")):
            path = directory / "script.py"
            path.write_text(textwrap.dedent(script), encoding="utf-8")
        else:
            path = Path(script).resolve()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_VARIABLES)}
        # A killed launcher of Open MPI leaves a directory behind, named after its process; the next process with that
        # number refuses to start ("listener thread failed to start"). So each launcher has a place of its own.
        sessions = tempfile.mkdtemp(prefix="mpi-")
        environment = {
            **inherited,
            **_OPEN_MPI,
            "PRTE_MCA_prte_tmpdir_base": sessions,
            **mpi.environment,
            **(env or {}),
        }
        fresh = fresh or sys.platform != "linux"
        # -I and -S: a process that stands in needs nothing that is installed.
        python = [sys.executable] if fresh else [sys.executable, "-IS", str(FORKING_SERVER), forking_server]
        command = [mpi.launcher, "-n", str(n), *python, str(path), *map(str, args)]
        # Into files, not pipes: a rank that outlives the launcher would hold a pipe open, and us with it.
        out, err = directory / "stdout.txt", directory / "stderr.txt"
        expired = False
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=directory,
                env=environment,
                start_new_session=True,
            )
            with _own_group(process):
                deadline = time.monotonic() + timeout
                while process.poll() is None and not expired:
                    if kill_when is not None and kill_when():
                        if kill_with == signal.SIGKILL:
                            break
                        process.send_signal(kill_with)
                        kill_when = None
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.01)
                    expired = time.monotonic() > deadline
        shutil.rmtree(sessions, ignore_errors=True)
        said, complained = (file.read_text(encoding="utf-8", errors="replace") for file in (out, err))
        if expired:
            pytest.fail(
                f"{n} ranks of {path} did not end within {timeout} s and were killed.\n"
                f"--- stdout ---\n{said}\n--- stderr ---\n{complained}"
            )
        return subprocess.CompletedProcess(command, process.returncode, said, complained)

    return run
