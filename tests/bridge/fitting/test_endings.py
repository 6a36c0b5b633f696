"""How a fit ends, in processes of its own: exit code, `status.json`, what is left, and the same command again."""

from __future__ import annotations

import json
import os
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest

ENTRY = Path(__file__).resolve().parents[3] / "bridge" / "__main__.py"

# A simulator that does something at its call number AT, once.
LAB = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
import bridge

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started the tests with &
X = np.linspace(0, 3, 25)
WHAT, AT = os.environ["WHAT"], int(os.environ.get("AT", "15"))
calls = 0


def happens():
    if WHAT in ("INT", "TERM", "USR1", "KILL"):
        os.kill(os.getpid(), getattr(signal, f"SIG{WHAT}"))
        if WHAT == "INT":
            time.sleep(300)  # a long call of the simulator: Ctrl-C is heard in the middle of it
    elif WHAT == "raise":
        raise RuntimeError("wind")
    elif WHAT == "input":
        raise bridge.errors.InputError("not here")
    elif WHAT == "exit":
        os._exit(9)


def decay(theta):
    global calls
    calls += 1
    if calls == AT:
        happens()
    return theta[0] * np.exp(-theta[1] * X) + theta[2]


decay.identity = "decay"  # what happens to it is no part of it


class Rows:
    # vectorised, and in a class: nothing wraps what it raises
    identity = "rows"
    space = bridge.ParameterSpace(tuple(bridge.Parameter(n, natural_scale=0.3) for n in ("a", "rate", "b")))
    output_shape = (25,)

    def __call__(self, inputs, seeds):
        return np.stack([decay(x) for x in inputs])


rows = Rows()
"""
SCRIPT = (
    LAB
    + """
kind = {"adam": bridge.Adam, "gauss-newton": bridge.GaussNewton}.get(os.environ.get("METHOD"))
result = bridge.fit(
    rows, 2.0 * np.exp(-1.2 * X) + 0.5, [1.6, 0.9, 0.7], seed=0,
    method="auto" if kind is None else kind(steps=6, num_samples=8), run=bridge.Run("run", every_s=0),
)
print(result.stop_reason, calls, np.isfinite(result.output).all(), len(result.warnings))
print(*[float(x).hex() for x in result.parameters])
"""
)
JOB = """
[simulator]
name = "lab.py:rows"
[target]
file = "target.npy"
[start]
a = 1.6
rate = 0.9
b = 0.7
[fit]
seed = 0
[output]
directory = "out"
"""


def prepared(folder, simulator="rows"):
    x = np.linspace(0, 3, 25)
    np.save(folder / "target.npy", 2.0 * np.exp(-1.2 * x) + 0.5)
    (folder / "lab.py").write_text(LAB, encoding="utf-8")
    (folder / "script.py").write_text(SCRIPT.replace("fit(rows", f"fit({simulator}"), encoding="utf-8")
    (folder / "job.toml").write_text(JOB.replace(":rows", f":{simulator}"), encoding="utf-8")
    return folder


@pytest.fixture
def job(tmp_path):
    return prepared(tmp_path)


def command_of(how, folder):
    script = folder / "script.py"
    return {"script": [script], "run": [ENTRY, "run", script], "fit": [ENTRY, "fit", "job.toml"]}[how]


def status_of(folder):
    return json.loads((folder / "status.json").read_text(encoding="utf-8"))


# What happens, whether by a script, `bridge run` or `bridge fit`, and how the process ends, as a shell sees it.
ENDS = [
    ("nothing", 0, "done"),
    ("TERM", 75, "stopped"),
    ("USR1", 75, "stopped"),
    ("raise", 3, "failed"),
    ("input", 2, "failed"),
    ("KILL", 137, "running"),
    ("exit", 9, "running"),
]


def parameters_of(how, folder, done):
    """Every bit of them."""
    if how == "fit":
        return json.loads((folder / "out" / "parameters.json").read_text(encoding="utf-8"))["parameters"]
    return done.stdout.splitlines()[1]


@pytest.fixture(scope="module")
def undisturbed(run_alone, tmp_path_factory):
    """What comes out where nothing happens: `undisturbed(how, simulator)`."""
    known = {}

    def make(how, simulator):
        if (how, simulator) not in known:
            folder = prepared(tmp_path_factory.mktemp("undisturbed"), simulator)
            done = run_alone(*command_of(how, folder), env={"WHAT": "nothing"}, cwd=folder)
            known[how, simulator] = parameters_of(how, folder, done)
        return known[how, simulator]

    return make


@pytest.mark.parametrize(
    ("how", "what", "code", "state"),
    [
        *(("script", *end) for end in ENDS),
        *(("run", *end) for end in ENDS if end[0] in ("TERM", "raise", "KILL")),
        *(("fit", *end) for end in ENDS if end[0] in ("TERM", "raise", "KILL")),
    ],
)
def test_the_status_has_the_exit_code_and_the_same_command_goes_on(
    tmp_path, run_alone, undisturbed, how, what, code, state
):
    simulator = "decay" if what == "raise" else "rows"  # what a function raises is a failed evaluation
    job = prepared(tmp_path, simulator)
    folder = job / "out" / "run" if how == "fit" else job / "run"
    first = run_alone(*command_of(how, job), env={"WHAT": what}, cwd=job)
    assert (first.returncode if first.returncode >= 0 else 128 - first.returncode) == code, first.stderr
    status = status_of(folder)
    assert status["state"] == state
    assert status["exit_code"] == (None if state == "running" else code)
    if state == "running":  # it could not say more: this tells that there is no such process
        with pytest.raises(ProcessLookupError):
            os.kill(status["pid"], 0)
    if code:
        assert not list((job / "out").glob("*.*")), "half of a result"
    again = run_alone(*command_of(how, job), env={"WHAT": "nothing"}, cwd=job)
    assert again.returncode == 0, again.stderr
    assert ("ended without a word" in again.stderr) == (state == "running")
    assert (status_of(folder)["state"], status_of(folder)["exit_code"]) == ("done", 0)
    assert parameters_of(how, job, again) == undisturbed("script" if how == "run" else how, simulator)


def test_a_finished_fit_is_shown_again_and_not_run(job, run_alone):
    """`bridge fit`: its table, all of its files, the way to run it anew; another setting is refused."""
    command = [ENTRY, "fit", "job.toml"]
    first = run_alone(*command, env={"WHAT": "nothing"}, cwd=job)
    (job / "out" / "parameters.json").rename(job / "before.json")
    again = run_alone(*command, env={"WHAT": "exit", "AT": "1"}, cwd=job)  # a run would end the process
    assert again.returncode == 0, again.stderr
    table, rest = again.stdout.split("This fit was finished before; nothing was run again. --fresh")
    assert table == first.stdout
    assert rest
    assert (job / "out" / "parameters.json").read_bytes() == (job / "before.json").read_bytes()
    fresh = run_alone(*command, "--fresh", env={"WHAT": "exit", "AT": "1"}, cwd=job)
    assert fresh.returncode == 9
    (job / "job.toml").write_text(JOB.replace("seed = 0", "seed = 1"), encoding="utf-8")
    other = run_alone(*command, env={"WHAT": "nothing"}, cwd=job)
    assert other.returncode == 2
    assert "seed was 0, is 1" in other.stderr
    assert "--fresh" in other.stderr


@pytest.mark.parametrize("method", ["", "gauss-newton"])
def test_a_finished_fit_gives_its_result_again(tmp_path, run_alone, method):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    first = run_alone(script, env={"WHAT": "nothing", "METHOD": method}, cwd=tmp_path).stdout.splitlines()
    again = run_alone(script, env={"WHAT": "exit", "AT": "1", "METHOD": method}, cwd=tmp_path).stdout.splitlines()
    assert again[1] == first[1]
    assert again[0].split()[:2] == [first[0].split()[0], "0"]


@pytest.mark.parametrize(
    ("how", "method"), [("script", ""), ("script", "gauss-newton"), ("script", "adam"), ("fit", ""), ("fit", "adam")]
)
def test_ctrl_c_ends_a_fit_with_the_best_so_far(job, run_alone, how, method):
    """In the middle of a call of the simulator that would take minutes."""
    command = command_of(how, job)
    if method and how == "fit":
        settings = f'method = {{ name = "{method}", steps = 6, num_samples = 8 }}\nseed = 0'
        (job / "job.toml").write_text(JOB.replace("seed = 0", settings), encoding="utf-8")
    done = run_alone(*command, env={"WHAT": "INT", "METHOD": method}, cwd=job)
    assert "interrupted; the fit ends with the best so far" in done.stderr
    assert "Traceback" not in done.stderr
    status = status_of(job / "run" if how == "script" else job / "out" / "run")
    assert status["state"] == "stopped"
    assert status["exit_code"] == done.returncode == (0 if how == "script" else 75)
    assert status["step"] >= 1
    if how == "script":
        # Kriging has run all that its end needs; a descent would run more, and says that it did not.
        reason, calls, finite, warnings = done.stdout.split()[:4]
        assert (reason, calls, finite) == ("interrupted", "15", str(not method))
        assert method == "" or int(warnings) >= 1
    else:
        assert "The fit was interrupted: the same command goes on." in done.stdout
        assert (job / "out" / "parameters.json").exists() == (not method)
    again = run_alone(*command, env={"WHAT": "nothing", "METHOD": method}, cwd=job)
    assert again.returncode == 0, again.stderr


def test_ctrl_c_before_the_first_step(job, run_alone):
    done = run_alone(ENTRY, "fit", "job.toml", env={"WHAT": "INT", "AT": "1"}, cwd=job)
    assert (done.returncode, status_of(job / "out" / "run")["exit_code"]) == (75, 75)
    assert sorted(p.name for p in (job / "out").iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("settings", "work"),
    [
        ('on="process"', "time.sleep(300)"),
        ("on=2", "time.sleep(300)"),
        ("on=2, failures=bridge.Raise(retries=3)", "time.sleep(300)"),
        ("", "subprocess.run(['sleep', '300'])"),
    ],
)
def test_ctrl_c_does_not_wait_for_other_processes(tmp_path, run_alone, settings, work):
    """Neither for children that are at work nor for programs that the simulator has started."""
    program = f"""
        import os, signal, subprocess, sys, threading, time
        from pathlib import Path
        import numpy as np
        import bridge

        signal.signal(signal.SIGINT, signal.default_int_handler)

        def f(theta):
            Path("begun", str(os.getpid())).touch()
            {work}
            return theta

        def interrupt():
            while not any(Path("begun").iterdir()):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        if __name__ == "__main__":
            Path("begun").mkdir()
            threading.Thread(target=interrupt, daemon=True).start()
            result = bridge.fit(f, [1.0, 2.0], [0.0, 0.0], seed=0{", " + settings if settings else ""})
            print(result.stop_reason, result.parameters)
    """
    done = run_alone(textwrap.dedent(program), cwd=tmp_path, timeout=100)
    assert done.stdout.split()[0] == "interrupted", done.stderr
    assert done.returncode == 0
    for path in (tmp_path / "begun").iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


THINKING = (
    LAB
    + """
from bridge.fitting.methods.kriging_search import KrigingSearch
told = KrigingSearch.tell

def interrupted(self, *arguments):
    for _ in range(int(os.environ["TIMES"])):
        os.kill(os.getpid(), signal.SIGINT)
    result = told(self, *arguments)
    print("thought to the end")
    return result

KrigingSearch.tell = interrupted
try:
    result = bridge.fit(rows, 2.0 * np.exp(-1.2 * X) + 0.5, [1.6, 0.9, 0.7], seed=0, run="run")
    print(result.stop_reason, len(result.history), np.isfinite(result.parameters).all())
finally:
    print("calls", calls)
"""
)


def test_ctrl_c_while_kriging_thinks_comes_after_the_thought(tmp_path, run_alone):
    done = run_alone(THINKING, env={"WHAT": "nothing", "TIMES": "1"}, cwd=tmp_path)
    assert done.stdout.splitlines() == ["thought to the end", "interrupted 1 True", "calls 6"]
    assert status_of(tmp_path / "run")["step"] == 1


def test_a_second_ctrl_c_ends_the_program_at_once(tmp_path, run_alone):
    done = run_alone(THINKING, env={"WHAT": "nothing", "TIMES": "2"}, cwd=tmp_path)
    assert done.stdout.splitlines() == ["calls 6"]
    assert done.returncode in (-signal.SIGINT, 130)
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("stopped", 130)


def test_ctrl_c_while_the_last_words_are_written_comes_after_them(tmp_path, run_alone):
    program = (
        LAB
        + """
import bridge.storage.run
write = bridge.storage.run.write_json

def interrupted(path, data):
    if data["state"] == "done" and data["exit_code"] == 0:
        os.kill(os.getpid(), signal.SIGINT)
    return write(path, data)

bridge.storage.run.write_json = interrupted
with bridge.Run("run") as run:
    run.checkpoint(1, 1.0)
"""
    )
    done = run_alone(program, env={"WHAT": "nothing"}, cwd=tmp_path)
    assert done.returncode in (-signal.SIGINT, 130)
    assert (status_of(tmp_path / "run")["state"], status_of(tmp_path / "run")["exit_code"]) == ("done", 130)


@pytest.mark.parametrize(
    ("leaving", "state", "code"),
    [
        ("raise KeyboardInterrupt", "stopped", 130),
        ("sys.exit(5)", "failed", 5),
        ("sys.exit('no input')", "failed", 1),
        ("sys.exit()", "stopped", 0),
        ("raise ValueError('x')", "failed", 1),
        ("raise bridge.errors.CollectiveError('x')", "failed", 70),
        ("raise bridge.errors.SetupError('x')", "failed", 2),
    ],
)
@pytest.mark.parametrize("how", ["script", "run"])
def test_a_loop_of_ones_own_ends_by_the_code_that_it_says(tmp_path, run_alone, leaving, state, code, how):
    script = tmp_path / "script.py"
    text = f"import sys, bridge\nwith bridge.Run('run') as run:\n    run.checkpoint(1, 1.0)\n    {leaving}\n"
    script.write_text(text, encoding="utf-8")
    done = run_alone(*([script] if how == "script" else [ENTRY, "run", script]), cwd=tmp_path)
    assert (done.returncode if done.returncode >= 0 else 128 - done.returncode) == code, done.stderr
    assert (status_of(tmp_path / "run")["state"], status_of(tmp_path / "run")["exit_code"]) == (state, code)


def test_somebody_elses_handler_of_ctrl_c_is_left_alone(tmp_path, run_alone):
    program = (
        LAB
        + """
heard = []
signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
def f(theta):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return np.array(theta)
result = bridge.fit(f, [1.0, 2.0], [0.0, 0.0], seed=0)
print(result.stop_reason, len(heard))
"""
    )
    done = run_alone(program, env={"WHAT": "nothing"}, cwd=tmp_path)
    assert done.stdout.split() == ["converged", "1"], done.stderr
