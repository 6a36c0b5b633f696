"""The job scripts in examples/slurm, really run: the batch system's commands are stubs, bash and the runs are not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import bridge

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "slurm"
SLURM = ("srun.sh", "mpirun.sh", "array.sh")
JOBS = (*SLURM, "pbs.sh", "lsf.sh", "loop.sh")
LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "PMI2_", "OMPI_", "HYDI_", "MPI_LOCAL", "SLURM_", "PBS_", "LSB_")

# What the batch systems set for a job, as far as the scripts look at it.
JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "2",
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_ARRAY_JOB_ID": "70",
    "SLURM_ARRAY_TASK_ID": "3",
    "PBS_JOBID": "77.server",
    "LSB_JOBID": "77",
    "LSB_DJOB_NUMPROC": "2",
}

# Launchers: options up to the command, which $STUB_LAUNCH starts on real ranks, or as one process if it is empty.
LAUNCHER = """#!/bin/bash
while [[ "$1" == -* ]]; do [ "$1" = -n ] && shift; shift; done
unset ${!SLURM_*} ${!PBS_*} ${!LSB_*}  # the real launcher would look for that batch system
echo $$ >"$STUB/launcher.pid"
exec $STUB_LAUNCH "$@"
"""
RECORDER = """#!/bin/bash
echo "$(basename "$0") $*" >>"$STUB/requests"
"""
# The doctor takes seconds, and so does the import of torch: scripts are run with them only where that is the point.
PYTHON = f"""#!/bin/bash
if [ "$1 $2 $3" = "-m bridge doctor" ] && [ -z "$STUB_REAL" ]; then
    echo doctor >>"$STUB/doctor"
    exit "${{STUB_DOCTOR:-0}}"
fi
[ "$1 $2 $3" = "-m bridge run" ] && [ -z "$STUB_REAL" ] && shift 3
exec {sys.executable} "$@"
"""

# In place of a run: "state exit_code step exit" for each start in turn; "-" leaves the status as it is.
PROGRAM = """
import json, os, pathlib, signal, sys, time
run = pathlib.Path(os.environ["RUN"])
plan = pathlib.Path("plan").read_text().splitlines()
pathlib.Path("plan").write_text("".join(line + "\\n" for line in plan[1:]))
state, said, step, code = plan[0].split()

def tell(state, said):
    status = {"state": state, "exit_code": said, "step": int(step), "message": "what went wrong", "ranks": 1,
              "host": "a", "pid": os.getpid(), "time": time.strftime("%FT%T"), "settings": {}}
    (run / "status.json").write_text(json.dumps(status))

if code == "wait":
    def stop(*_):
        tell("stopped", 75)
        sys.exit(75)
    signal.signal(signal.SIGUSR1, stop)
    tell("running", None)
    time.sleep(20)
if state != "-":
    tell(state, None if said == "-" else int(said))
if code == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(code))
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


class Site:
    """A directory with a job script in it, and a batch system of stubs."""

    def __init__(self, folder: Path, program: str = PROGRAM) -> None:
        self.folder = folder
        self.stubs = folder / "stubs"
        self.stubs.mkdir(parents=True)
        for name in (*JOBS, "outcome.sh"):
            shutil.copy(SCRIPTS / name, folder)
        (folder / "fit.py").write_text(program, encoding="utf-8")
        (folder / "nodes").write_text("a\nb\n")
        for name in ("srun", "mpirun"):
            executable(self.stubs / name, LAUNCHER)
        for name in ("scontrol", "qsub"):
            executable(self.stubs / name, RECORDER)
        executable(self.stubs / "python", PYTHON)

    def plan(self, *starts: str) -> None:
        (self.folder / "plan").write_text("".join(f"{start}\n" for start in starts))

    def run(
        self,
        script: str,
        meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None,
        timeout: float = 240,
        **env: str,
    ) -> tuple[int, str]:
        """Runs a job script as the batch system would; (exit code, what it printed)."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
        environment |= JOB | {
            "PATH": f"{self.stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "STUB": str(self.stubs),
            "PBS_O_WORKDIR": str(self.folder),
            "PBS_NODEFILE": str(self.folder / "nodes"),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            **env,
        }
        # Into a file: a rank that outlives the script would hold a pipe open.
        log = self.folder / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", script],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            with ended(process):
                if meanwhile is not None:
                    meanwhile(process)
                process.wait(timeout)
        return process.returncode, log.read_text(errors="replace")

    def requests(self) -> list[str]:
        """What the batch system was asked for, since the last time."""
        path = self.stubs / "requests"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def launcher(self) -> int:
        return int((self.stubs / "launcher.pid").read_text())


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends the process and its descendants, however the block is left."""
    try:
        yield
    finally:
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def until(condition: Callable[[], bool], limit_s: float = 240) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def again(script: str) -> list[str]:
    """What a script asks for to be started again; LSF looks at the exit code."""
    if script == "pbs.sh":
        return ["qsub -W depend=afterany:77.server -v RUN=runs/fit,SCRIPT=fit.py pbs.sh"]
    return ["scontrol requeue 77"] if script in SLURM else []


# --- the text -------------------------------------------------------------------------------------------------------

SBATCH = {
    "job-name": r"\w+",
    "nodes": r"\d+",
    "ntasks": r"\d+",
    "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d\d:\d\d:\d\d",
    "output": r"[\w%.-]+",
    "open-mode": "append",
    "requeue": None,
    "signal": r"(B:)?USR1@\d+",
    "array": r"\d+-\d+%\d+",
}


@pytest.mark.parametrize("name", [*JOBS, "outcome.sh"])
def test_bash_reads_every_script(name):
    done = subprocess.run(["bash", "-n", SCRIPTS / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(SCRIPTS / name, os.X_OK) == (name in JOBS)


@pytest.mark.parametrize("name", SLURM)
def test_slurm_knows_the_options(name):
    lines = (SCRIPTS / name).read_text().splitlines()
    options = {}
    for line in lines:
        if match := re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line):
            option, value = match.groups()
            assert option in SBATCH, line
            assert option not in options, line
            pattern = SBATCH[option]
            assert value is None if pattern is None else re.fullmatch(pattern, value), line
            options[option] = value
        else:
            assert not line.startswith("#SBATCH"), line
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "Slurm stops reading at the first command"
    assert {"requeue", "open-mode", "signal", "time"} <= set(options)
    # To the tasks, which srun started; or to the shell, which hands it on: it has to be waiting for that.
    assert options["signal"].startswith("B:") == ("& pid=$!" in "\n".join(lines))


def test_pbs_and_lsf_options_are_of_known_form():
    pbs = re.findall(r"^#PBS (.*)$", (SCRIPTS / "pbs.sh").read_text(), flags=re.M)
    assert all(re.fullmatch(r"-N \w+|-l (select|walltime)=\S+|-j oe|-r n", line) for line in pbs)
    lsf = re.findall(r"^#BSUB (.*)$", (SCRIPTS / "lsf.sh").read_text(), flags=re.M)
    known = r'-J \w+|-n \d+|-R "span\[ptile=\d+\]"|-W \d+:\d\d|-o \S+|-r|-Q "75"|-wa USR1|-wt \d+'
    assert all(re.fullmatch(known, line) for line in lsf)
    assert (len(pbs), len(lsf)) == (5, 9)


def test_the_status_that_is_faked_here_is_that_of_a_run(tmp_path):
    with bridge.Run(tmp_path / "real") as run:
        run.checkpoint(2, None)
    site = Site(tmp_path / "site")
    site.plan("done 0 2 0")
    site.run("srun.sh")
    real, fake = (
        json.loads(p.read_text()) for p in (tmp_path / "real/status.json", tmp_path / "site/runs/fit/status.json")
    )
    assert real.keys() == fake.keys()
    assert all(real[k] == fake[k] for k in ("state", "exit_code", "step"))


# --- what they make of what a run does -------------------------------------------------------------------------------


def where(script: str) -> str:
    return "runs/fit-3" if script == "array.sh" else "runs/fit"


@pytest.mark.parametrize("script", JOBS)
def test_a_run_that_is_done_is_not_started_again(tmp_path, script):
    site = Site(tmp_path)
    site.plan("done 0 8 0", "done 0 9 0")
    code, said = site.run(script)
    assert (code, site.requests()) == (0, []), said
    assert f"{where(script)}: done" in said
    assert (site.stubs / "doctor").read_text() == "doctor\n"
    assert len((tmp_path / where(script) / "starts").read_text().splitlines()) == 1


@pytest.mark.parametrize("script", JOBS)
def test_a_run_that_stopped_goes_on(tmp_path, script):
    site = Site(tmp_path)
    # 1 in place of 75, as Open MPI makes of a SIGTERM; then a plain 75; then the end.
    site.plan("stopped 75 4 1", "stopped 75 4 75", "done 0 8 0")
    if script == "loop.sh":
        code, said = site.run(script)
        assert (code, said.count("again (exit"), said.count("done (exit")) == (0, 2, 1), said
        return
    for _ in range(2):
        code, said = site.run(script)
        assert (code, site.requests()) == (75, again(script)), said
    code, said = site.run(script)
    assert (code, site.requests()) == (0, []), said


@pytest.mark.parametrize(
    ("script", "start", "expected"),
    [
        *((script, "failed 3 2 3", 3) for script in JOBS),  # too many failed evaluations
        ("mpirun.sh", "failed 3 2 9", 3),  # the same, as some launchers put it
        ("srun.sh", "- - 0 2", 2),  # never got as far as the run
        ("srun.sh", "running - 0 kill", 137),  # killed before it had got anywhere
        ("srun.sh", "running - 0 0", 1),  # the same, as MPICH puts it after a SIGTERM
        ("srun.sh", "done 0 8 1", 1),  # the script failed after its run
    ],
)
def test_a_run_that_failed_is_not_started_again(tmp_path, script, start, expected):
    site = Site(tmp_path)
    site.plan(start, "done 0 8 0")
    code, said = site.run(script)
    assert (code, site.requests()) == (expected, []), said
    assert "failed (exit code" in said
    assert ("what went wrong" in said) == (start[0] != "-"), "the reason is in the log"


@pytest.mark.parametrize("script", ["srun.sh", "lsf.sh", "loop.sh"])
def test_a_run_that_was_killed_goes_on_if_it_had_got_further(tmp_path, script):
    site = Site(tmp_path)
    site.plan("running - 5 kill", "running - 5 kill", "done 0 8 0")
    code, said = site.run(script)
    if script == "loop.sh":
        assert (code, said.count("again (exit"), said.count("failed (exit")) == (137, 1, 1), said
        return
    assert (code, site.requests()) == (75, again(script)), said
    code, said = site.run(script)
    assert (code, site.requests()) == (137, []), said  # no further than before: it would never end


def test_an_old_status_is_not_taken_for_that_of_this_start(tmp_path):
    site = Site(tmp_path)
    site.plan("stopped 75 4 75", "- - 0 1")
    assert site.run("srun.sh")[0] == 75
    assert site.requests() == again("srun.sh")
    code, said = site.run("srun.sh")
    assert (code, site.requests()) == (1, []), said


@pytest.mark.parametrize("script", ["mpirun.sh", "lsf.sh"])
def test_a_job_does_not_come_back_for_ever(tmp_path, script):
    site = Site(tmp_path)
    site.plan(*["stopped 75 4 75"] * 3)
    codes = [site.run(script, MAX_STARTS="3")[0] for _ in range(3)]
    assert codes == [75, 75, 1 if script == "lsf.sh" else 75]
    assert len(site.requests()) == (0 if script == "lsf.sh" else 2)
    assert "which is the limit (MAX_STARTS)" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("script", JOBS)
def test_nothing_is_started_where_the_doctor_finds_no_working_set_up(tmp_path, script):
    site = Site(tmp_path)
    site.plan("done 0 8 0")
    code, _ = site.run(script, STUB_DOCTOR="2")
    assert (code, site.requests()) == (2, [])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["mpirun.sh", "lsf.sh", "loop.sh"])
def test_a_signal_to_the_script_reaches_the_run(tmp_path, script):
    site = Site(tmp_path)
    site.plan("running - 1 wait", "done 0 8 0")
    status = tmp_path / "runs" / "fit" / "status.json"

    def signals(process):
        until(status.exists)
        os.kill(process.pid, signal.SIGTERM if script == "loop.sh" else signal.SIGUSR1)

    code, said = site.run(script, signals)
    # The loop, too, ends: it was asked to.
    assert (code, site.requests()) == (75, again(script)), said
    assert json.loads(status.read_text())["state"] == "stopped"


def test_pbs_jobs_are_stopped_before_the_walltime(tmp_path):
    site = Site(tmp_path)
    site.plan("running - 1 wait")
    code, said = site.run("pbs.sh", STOP_AFTER="0.5s")
    assert (code, site.requests()) == (75, again("pbs.sh")), said


# --- real runs -------------------------------------------------------------------------------------------------------

FIT = """
import hashlib, os, time
import numpy as np
import bridge

grid = np.linspace(-1, 1, 24)

def f(x):
    with open(os.environ["PAID"], "a") as paid:
        paid.write("x")
    if "BROKEN" in os.environ:
        raise RuntimeError("no licence for the solver")
    time.sleep(0.01)
    return np.floor(50 * np.exp(-((grid[:, None] - x[0]) ** 2 + (grid - x[1]) ** 2) / 0.1))

simulator = bridge.as_simulator(f, bounds=[(-1, 1), (-1, 1)], natural_scale=[0.1, 0.1])
target = np.floor(50 * np.exp(-((grid[:, None] - 0.3) ** 2 + (grid + 0.2) ** 2) / 0.1))
method = bridge.Adam(steps=5, num_samples=16)
result = bridge.fit(simulator, target, [0.0, 0.1], seed=0, method=method, run=os.environ["RUN"])
digest = hashlib.sha256(repr(result.history[-1].parameters).encode())
digest.update(result.parameters.tobytes() + result.standard_error.tobytes() + result.output.tobytes())
digest = digest.hexdigest()
if bridge.is_root():
    print("digest", digest)
"""


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    """Of the fit that nobody interrupts, in one process."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "fit.py").write_text(FIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUN", str(folder / "run"))
        patch.setenv("PAID", str(folder / "paid"))
        return runpy.run_path(str(folder / "fit.py"))["digest"]


@pytest.mark.mpi
@pytest.mark.parametrize("script", ["srun.sh", pytest.param("mpirun.sh", marks=pytest.mark.slow)])
def test_a_job_that_is_told_to_stop_is_requeued_and_ends_with_the_same_bits(tmp_path, digest, script):
    site = Site(tmp_path, FIT)
    paid = tmp_path / "paid"
    launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or "mpiexec"
    env = {"STUB_REAL": "1", "STUB_LAUNCH": f"{launcher} -n 2", "PAID": str(paid)}
    executable(site.stubs / "python", PYTHON.replace('[ -z "$STUB_REAL" ]', "true", 1))  # but no real doctor

    def warns(process):
        until(lambda: paid.exists() and paid.stat().st_size > 40)
        # To the tasks where srun has started them; with B: to the script.
        os.kill(site.launcher() if script == "srun.sh" else process.pid, signal.SIGUSR1)

    code, said = site.run(script, warns, **env)
    assert (code, site.requests()) == (75, ["scontrol requeue 77"]), said
    status = json.loads((tmp_path / "runs" / "fit" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["ranks"]) == ("stopped", 75, 2)
    code, said = site.run(script, **env)
    assert (code, site.requests()) == (0, []), said
    assert f"digest {digest}\n" in said


def test_a_job_with_a_broken_simulator_says_why_and_is_not_requeued(tmp_path):
    site = Site(tmp_path, FIT)
    # One process, and the real doctor.
    code, said = site.run("srun.sh", STUB_REAL="1", PAID=str(tmp_path / "paid"), BROKEN="1")
    assert (code, site.requests()) == (3, []), said
    assert said.index("torch ") < said.index("no licence for the solver")
    assert "runs/fit: failed (exit code 3" in said


# --- several hosts ---------------------------------------------------------------------------------------------------

ON_HOSTS = """
import socket
from bridge.dispatch import get_dispatcher
all_ranks = get_dispatcher()
said = all_ranks.each(f"{socket.gethostname()} {all_ranks.local_rank} {all_ranks.local_size}")
if all_ranks.rank == 0:
    print("ranks", sorted(said))
"""


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("delay_s", ["", "0.0005"])
def test_a_fit_on_two_hosts_has_the_bits_of_one_process(tmp_path, digest, delay_s):
    """Hosts are network namespaces of this machine: other names, and TCP in place of shared memory."""
    launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec") or "mpiexec"
    said = subprocess.run([launcher, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    if "HYDRA" not in said:
        pytest.skip(f"tools/hosts.sh needs Hydra's mpiexec (MPICH), not {launcher}")
    script, log = tmp_path / "fit.py", tmp_path / "log"
    script.write_text(ON_HOSTS + FIT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    environment |= {"MPIEXEC": launcher, "DELAY_S": delay_s}
    environment |= {"RUN": str(tmp_path / "run"), "PAID": str(tmp_path / "paid")}
    hosts = SCRIPTS.parents[1] / "tools" / "hosts.sh"
    with log.open("wb") as out:
        process = subprocess.Popen(
            # By TERM, it takes its hosts away.
            ["timeout", "-k", "5", "80", "bash", hosts, "2", "4", sys.executable, script],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with ended(process):
            process.wait(90)
    said = log.read_text(errors="replace")
    if process.returncode == 77:
        pytest.skip(said.strip())
    assert process.returncode == 0, said
    assert "ranks ['host1 0 2', 'host1 1 2', 'host2 0 2', 'host2 1 2']" in said
    assert f"digest {digest}\n" in said
