"""Nothing that a process starts outlives it, however it ends; and what the dead have left is removed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import bridge
from adapters.external import ExternalSimulator, Profile
from adapters.template import TextTemplate
from bridge import children
from bridge.errors import EvaluationError
from bridge.simulator.space import Parameter, ParameterSpace

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc"),
    # Programs of constant outputs stand for any.
    pytest.mark.filterwarnings("ignore:TextTemplate has no placeholder"),
]

# The program has a child, and that one a session of its own; both leave their numbers.
SCRIPT = """
import sys
from pathlib import Path
from adapters.external import ExternalSimulator, Profile
from adapters.template import TextTemplate
from bridge.simulator.space import Parameter, ParameterSpace
import bridge

folder = Path(sys.argv[1])
deck = "echo $$ > %s/program; sleep 300 & echo $! > %s/child; setsid sleep 300 & sleep 0.2; {what} echo {x}; wait"
deck = (deck % (folder, folder)).replace("{what}", "echo $! > %s/far;" % folder)
template = TextTemplate(inputs={"run.sh": deck}, output="stdout.txt")
space = ParameterSpace((Parameter("x", "", 0, 9),))
s = ExternalSimulator(template, Profile(("sh", "run.sh"), scratch=folder / "scratch"), space, ())
bridge.fit(s, 1.0, [5.0], seed=0, stop=20, on=eval(sys.argv[2]))
"""


def alive(pid):
    return children._start(pid) is not None


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


def numbers(folder):
    found = []
    for name in ("program", "child", "far"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int((folder / name).read_text()))
    return found


@pytest.mark.parametrize(
    ("sent", "how", "launcher"),
    [
        (signal.SIGTERM, "None", []),
        (signal.SIGKILL, "None", []),
        (signal.SIGKILL, "2", []),
        (signal.SIGTERM, "'process'", []),
        (signal.SIGTERM, "None", ["-m", "bridge", "run"]),
        (signal.SIGKILL, "2", ["-m", "bridge", "run"]),
    ],
)
def test_a_program_ends_with_the_process_that_has_started_it(tmp_path, sent, how, launcher):
    (tmp_path / "script.py").write_text(SCRIPT)
    job = subprocess.Popen(
        [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path), how],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(numbers(tmp_path)) == 3)
        assert any(map(alive, numbers(tmp_path)))
        job.send_signal(sent)
        job.wait(60)
        wait_for(lambda: not any(map(alive, numbers(tmp_path))))
        wait_for(lambda: not list((tmp_path / "scratch").iterdir()))
    finally:
        for pid in numbers(tmp_path):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        job.kill()
        job.wait()


def ended_process():
    process = subprocess.Popen(["true"])
    name = children._name(process.pid)
    process.wait()
    return name


def test_the_next_job_removes_what_the_dead_have_left_and_nothing_else(tmp_path):
    dead, ours = ended_process(), children._name(os.getpid())
    elsewhere = dead.rpartition("-")[0] + "-000000"
    for name in (
        f"bridge-code-{dead}-aaaaaaaa",  # goes
        f"bridge-my-own-code-{dead}-aaaaaaab",  # goes
        f"bridge-code-{ours}-aaaaaaac",
        f"bridge-code-{elsewhere}-aaaaaaad",  # another machine's: nobody here can tell whether it lives
        "bridge-code-kept-aaaaaaae",
        f"bridge-code-{dead}-notes",
        "data",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    made = children.own_directory("code", tmp_path)
    assert made.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir() if path != made) == sorted(
        [
            f"bridge-code-{ours}-aaaaaaac",
            f"bridge-code-{elsewhere}-aaaaaaad",
            "bridge-code-kept-aaaaaaae",
            f"bridge-code-{dead}-notes",
            "data",
        ]
    )


def failing(tmp_path, **profile):
    template = TextTemplate(inputs={"run.sh": "echo no convergence >&2; exit 3"}, output="stdout.txt")
    space = ParameterSpace((Parameter("x", "", 0, 9),))
    return ExternalSimulator(template, Profile(("sh", "run.sh"), scratch=tmp_path, **profile), space, ())


def test_only_the_newest_directories_of_failed_runs_stay(tmp_path):
    simulator = failing(tmp_path, keep_at_most=3)
    said = []
    for i in range(7):
        with pytest.raises(EvaluationError) as error:
            simulator(np.array([[float(i)]]), np.zeros(1, dtype=np.uint64))
        (line,) = [line for line in str(error.value).splitlines() if line.startswith("  directory: ")]
        said.append(Path(line.removeprefix("  directory: ")))
        os.utime(said[-1], (i, i))
        assert (said[-1] / "stderr.txt").read_text() == "no convergence\n"
    assert sorted(tmp_path.iterdir()) == sorted(said[-3:])


def test_twenty_directories_stay_where_nothing_is_said_and_the_log_has_a_line_a_round(tmp_path, caplog):
    simulator = failing(tmp_path)
    smoothed = bridge.smooth(simulator, seed=0, num_samples=30, scale=0.1, failures=bridge.Drop(at_least=0.0))
    with caplog.at_level(logging.WARNING, logger="bridge"), pytest.raises(bridge.BridgeError):
        smoothed.estimate([5.0])
    assert len(list(tmp_path.iterdir())) == 20
    assert len(caplog.records) <= 1


def test_a_round_in_which_many_runs_fail_is_one_line_of_the_log(tmp_path, caplog):
    template = TextTemplate(
        inputs={"run.sh": "echo {x}; echo first >&2; echo second >&2; test $(echo {x} | cut -c1) = 5"},
        output="stdout.txt",
    )
    space = ParameterSpace((Parameter("x", "", 0, 9),))
    simulator = ExternalSimulator(template, Profile(("sh", "run.sh"), scratch=tmp_path), space, ())
    smoothed = bridge.smooth(simulator, seed=0, num_samples=24, scale=0.3, failures=bridge.Drop(at_least=0.0))
    with caplog.at_level(logging.WARNING, logger="bridge"):
        estimate = smoothed.estimate([5.0])
    assert 0 < estimate.num_failed < 24
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert f"{estimate.num_failed} of 24 evaluations failed" in record.getMessage()
    assert "directory: " in record.getMessage()
