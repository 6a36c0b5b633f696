"""Observers of a fit: what a terminal shows, what files say, and that nobody who looks on can do harm."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import bridge
from bridge.errors import InputError, SetupError
from bridge.reporting.lines import Lines, Pace
from bridge.reporting.live import LiveView
from bridge.reporting.observers import Observers, make_observers
from bridge.reporting.recorders import JSONLines, TensorBoard
from bridge.reporting.result import FitStep
from bridge.reporting.text import format_duration, format_value, gauge, sparkline
from bridge.simulator.space import Parameter, ParameterSpace

SPACE = ParameterSpace((Parameter("defocus_um", "um", 0.5, 4.0), Parameter("[red]\x1b[2Jx", "angstrom")))
STEP = FitStep(0, 0.5, 1.0, (1.7, 3.0), 64)


def steps(n, first=0):
    return [FitStep(i, 2.0 / (i + 1), 1.0, (1.7 + i, 3.0), 64 * (i + 1)) for i in range(first, n)]


def simulator(theta):
    return np.array([theta[0], theta[1] ** 2, theta[0] * theta[1]])


def fit(observers, steps=6, **settings):
    """A small fit, told to the observers as `fit` tells them."""
    settings = {"seed": 0, "method": bridge.GaussNewton(steps=steps, num_samples=8, scale=0.2)} | settings
    with observers:
        observers.start(ParameterSpace.unnamed(2), max_steps=steps, max_runs=None, title="small")
        result = bridge.fit(simulator, simulator([1.0, 2.0]), [0.8, 1.7], watch=observers.step, **settings)
        observers.end(result)
    return result


# --- the terminal ---------------------------------------------------------------------------------------------


def screen(records, width=100, height=24, title="a title", result=None, space=SPACE, encoding="utf-8", **limits):
    """The last frame of a live view, as text; the clock gains a second a step."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
    time = iter(range(10**6))
    now = [0.0]
    console = Console(file=file, force_terminal=True, width=width, height=height, color_system=None, _environ={})
    observer = LiveView(console, refresh_per_second=0, clock=lambda: now[0])
    observer.start(space, **({"max_steps": 10, "max_runs": None} | limits), title=title)
    for record in records:
        now[0] = float(next(time) + 1)
        observer.step(record)
    observer.end(result)
    text = file.buffer.getvalue().decode(encoding)
    return text[text.rindex(title[: width - 1]) :], text


def test_the_live_view_says_what_there_is_to_know():
    records = steps(5)
    records[4] = replace(
        records[4], standard_error=(0.0075, math.nan), gradient_error=0.25, num_failed=3, note="trust region halved"
    )
    frame, everything = screen(records, max_runs=10_000)
    for words in (
        "step 5 of 10",
        "at most 5.0 s left",
        "loss 0.4",
        "gradient ±25 %",
        "320 of 10,000 runs",
        "64 runs/s",
        "3 failed",
        "defocus_um",
        "5.7000",
        "± 0.0075",
        "um",
        "trust region halved",
        "ended early",
    ):
        assert words in (frame if words != "at most 5.0 s left" else everything), (words, frame)
    assert "[red]?[2Jx" in frame  # neither markup nor an escape sequence
    assert "\x1b[2Jx" not in everything
    assert everything.count("\x1b[?25l") == everything.count("\x1b[?25h") == 1  # the cursor is back


@pytest.mark.parametrize(("width", "height"), [(200, 60), (80, 24), (40, 12), (20, 6), (8, 4)])
def test_the_view_fits_the_terminal(width, height):
    space = ParameterSpace(tuple(Parameter(f"parameter_{i}", "angstrom", -1.0, 1.0) for i in range(100)))
    records = [replace(r, parameters=(0.5,) * 100, standard_error=(0.01,) * 100) for r in steps(3)]
    frame, _ = screen(records, width, height, title="FIT", space=space)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).replace("\r", "").rstrip("\n").split("\n")
    assert max(map(len, lines)) <= width
    if height >= 12:
        assert len(lines) < height
        assert f"{100 - sum('parameter' in line for line in lines)} more" in frame


def test_an_ascii_terminal_gets_ascii():
    frame, everything = screen([replace(STEP, standard_error=(0.1, 0.1), gradient_error=0.5)], encoding="ascii")
    assert everything.isascii()
    assert "+- 0.1" in frame


def test_a_dumb_terminal_and_a_pipe_get_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    fit(Observers([LiveView()]))
    said = sys.stderr.getvalue()
    assert "\x1b" not in said
    assert said.count("\n") == 7  # six steps and the end
    assert "step    5/6" in said
    assert "fit stopped at the largest number of steps" in said


def test_nothing_is_said_where_there_is_no_terminal(monkeypatch, capfd):
    fit(make_observers())
    fit(make_observers("off"))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    fit(make_observers())


PROGRAM = """
import sys, time
from bridge.reporting.result import FitStep  # not bridge.fitting.fit, which takes torch along
from bridge.reporting.observers import make_observers
from bridge.simulator.space import ParameterSpace
with make_observers("auto") as observers:
    observers.start(ParameterSpace.unnamed(1), max_steps=10, max_runs=None, title="in a terminal")
    for i in range(5):
        observers.step(FitStep(i, 1.0, 1.0, (float(i),), i))
        print("to stdout", i)
    raise KeyboardInterrupt
"""


def test_a_real_terminal_with_stdout_in_a_pipe_and_ctrl_c(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    main, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=child, stdout=subprocess.PIPE, stderr=child, env=environment
    )
    os.close(child)
    shown = b""
    while True:
        try:
            data = os.read(main, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not data:
            break
        shown += data
    assert process.stdout is not None
    assert process.stdout.read().splitlines() == [b"to stdout %d" % i for i in range(5)]
    process.stdout.close()
    process.wait()
    os.close(main)
    text = shown.decode()
    assert "in a terminal" in text
    assert "step 5 of 10" in text
    assert "ended early" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
    assert "\x1b[3" not in text  # NO_COLOR
    assert "KeyboardInterrupt" in text


def test_a_reader_that_has_gone_does_not_end_the_fit():
    file = io.StringIO()
    observers = Observers([Lines(file)])
    observers.start(SPACE, max_steps=3, max_runs=None, title="")
    file.close()
    for record in steps(3):
        observers.step(record)
    observers.end(None)


def test_who_fails_is_left_out_and_the_others_go_on(caplog):
    class Bad:
        def start(self, space, *, max_steps, max_runs, title): ...
        def step(self, record):
            raise RuntimeError("bad luck")

        def end(self, result): ...

    file = io.StringIO()
    result = fit(Observers([Bad(), Lines(file)]))
    assert len(result.history) == 6
    assert file.getvalue().count("\n") == 7
    assert [r.message for r in caplog.records] == ["Bad failed and is left out; the fit goes on."]
    assert "bad luck" in caplog.text


def test_choices_are_checked_on_every_rank_alike():
    for root in (True, False):
        with pytest.raises(InputError, match="auto, lines, off"):
            make_observers("fancy", root=root)
        with pytest.raises(InputError, match="start, step and end"):
            make_observers([print], root=root)
        with pytest.raises(InputError, match="or a list of these, got False"):
            make_observers(False, root=root)


# --- numbers --------------------------------------------------------------------------------------------------


def test_numbers_as_people_write_them():
    assert format_value(1.60123, 0.0075) == "1.6012"
    assert format_value(12345.678, 230.0) == "12346"
    assert format_value(0.1, 0.0996) == "0.10"
    assert format_value(1.23456789e-9, 1e-12) == "1.2346e-09"
    assert format_value(2.0) == "2"
    assert [format_duration(s) for s in (0, 9.96, 59.6, 200, 7500, 97200, math.inf)] == [
        "0.0 s",
        "10 s",
        "1 min",
        "3 min 20 s",
        "2 h 5 min",
        "1 d 3 h",
        "?",
    ]
    assert gauge(0.0, Parameter("x", "", 0.0, 1.0), 5) == "●───┤"
    assert gauge(0.5, Parameter("x", "", 0.0, 1.0), 5) == "├─●─┤"
    assert gauge(0.5, Parameter("x"), 5) == ""
    assert sparkline([0, 7, 1, 6], 8) == "▁█▂▇"
    assert sparkline([1, math.nan, 100], 3, "01") == "0 1"


@given(st.lists(st.floats(), max_size=50), st.integers(0, 60))
def test_sparklines_of_anything(values, width):
    text = sparkline(values, width)
    assert len(text) in (0, min(width, len(values)))


@given(st.floats(-1e300, 1e300), st.floats(1e-300, 1e300))
def test_a_value_is_rounded_below_a_tenth_of_its_error(value, error):
    assert abs(float(format_value(value, error)) - value) <= max(0.051 * error, 1e-14 * abs(value))


def test_pace_forgets_what_is_told_again():
    pace = Pace(0.0, 100, None)
    for record in steps(50):
        pace.add(record, 0.01)  # a resumed fit's history
    assert pace.runs_per_s is None
    assert pace.left_s(1.0) is None
    for record in steps(60, 50):
        pace.add(record, 0.01 + 2.0 * (record.step - 49))
    assert pace.runs_per_s == pytest.approx(32.0)
    assert pace.left_s(20.01) == pytest.approx(80.0)
    assert pace.left_s(30.01) == pytest.approx(70.0)
    pace = Pace(0.0, 100, 1000)  # the nearer limit counts
    for record in steps(10):
        pace.add(record, 1.0 + record.step)
    assert pace.left_s(10.0) == pytest.approx((1000 - 640) / 64)


# --- files ----------------------------------------------------------------------------------------------------


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_json_lines_are_the_history_and_nothing_is_infinite(tmp_path):
    path = tmp_path / "new" / "steps.jsonl"
    result = fit(Observers([JSONLines(path)]))
    lines = read(path)
    assert [x["step"] for x in lines] == list(range(6))
    for line, record in zip(lines, result.history, strict=True):
        assert line["loss"] == record.loss
        assert line["parameters"] == dict(zip(("p0", "p1"), record.parameters, strict=True))
        assert line["num_evaluations"] == record.num_evaluations
    observers = Observers([JSONLines(tmp_path / "b.jsonl")])
    observers.start(SPACE, max_steps=None, max_runs=None, title="")
    observers.step(replace(STEP, loss=math.nan, standard_error=(math.inf, 1.0), gradient_error=math.inf))
    (line,) = read(tmp_path / "b.jsonl")  # on disk before the end
    assert (line["loss"], line["gradient_error"]) == (None, None)
    assert line["standard_error"] == {"defocus_um": None, "[red]\x1b[2Jx": 1.0}
    observers.end(None)


@pytest.mark.parametrize("cut", [0, 1, 40, 300])
def test_a_resumed_fit_writes_each_step_once(tmp_path, cut):
    """Stopped by an interrupt after three steps, its last line torn by `cut` bytes."""
    path, whole = tmp_path / "steps.jsonl", tmp_path / "whole.jsonl"
    fit(Observers([JSONLines(whole)]))

    class Interrupt:
        def start(self, space, *, max_steps, max_runs, title): ...
        def step(self, record):
            if record.step == 2:
                raise KeyboardInterrupt

        def end(self, result): ...

    fit(Observers([JSONLines(path), Interrupt()]), run=bridge.Run(tmp_path / "run", every_s=0))
    assert len(read(path)) == 3
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    result = fit(Observers([JSONLines(path)]), run=tmp_path / "run")
    assert len(result.history) == 6
    without_time = [[{k: v for k, v in x.items() if k != "time"} for x in read(p)] for p in (path, whole)]
    assert without_time[0] == without_time[1]


def test_another_fit_takes_the_file_over_from_where_it_differs(tmp_path):
    path = tmp_path / "steps.jsonl"
    fit(Observers([JSONLines(path)]), seed=1)
    result = fit(Observers([JSONLines(path)]), seed=2, steps=4)
    assert [x["loss"] for x in read(path)] == [h.loss for h in result.history]
    # The same beginning, but shorter.
    observers = Observers([JSONLines(path)])
    observers.start(ParameterSpace.unnamed(2), max_steps=2, max_runs=None, title="")
    for record in result.history[:2]:
        observers.step(record)
    observers.end(result)
    assert len(read(path)) == 2


def test_a_file_of_somebody_else_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\nnothing today\n", encoding="utf-8")
    with pytest.raises(InputError, match="Name another file"):
        fit(Observers([JSONLines(path)]))
    assert path.read_text(encoding="utf-8") == "dear diary\nnothing today\n"
    with pytest.raises(InputError, match="can be written"):
        fit(Observers([JSONLines(path / "below")]))


def test_tensorboard_is_optional(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SetupError, match=r"pip install 'simulation-bridge\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_tensorboard_is_told_every_scalar_of_every_step(monkeypatch, tmp_path):
    told, opened = {}, []

    class Writer:
        def __init__(self, log_dir, purge_step):
            opened.append((log_dir, purge_step))

        def add_scalar(self, tag, value, step):
            told[tag, step] = value

        def add_text(self, tag, text, step):
            told[tag, step] = text

        def close(self):
            opened.append("closed")

    fake = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    result = fit(Observers([TensorBoard(tmp_path / "tb")]))
    assert opened == [(str(tmp_path / "tb"), 0), "closed"]
    for record in result.history:
        assert told["loss", record.step] == record.loss
        assert told["parameters/p1", record.step] == record.parameters[1]
        assert told["runs", record.step] == record.num_evaluations


@pytest.mark.mpi
def test_rank_0_alone_speaks(run_ranks, tmp_path):
    script = f"""
        import bridge, numpy as np
        from bridge.reporting.lines import Lines
        from bridge.reporting.observers import make_observers
        from bridge.reporting.recorders import JSONLines
        from bridge.simulator.space import ParameterSpace
        mine = [Lines(), JSONLines({str(tmp_path / "steps.jsonl")!r})]
        with make_observers(mine, root=bridge.is_root()) as observers:
            observers.start(ParameterSpace.unnamed(2), max_steps=3, max_runs=None, title="")
            method = bridge.Kriging(rounds=3)
            result = bridge.fit(lambda t: t, [1.0, 2.0], [0.0, 0.0], seed=0, method=method, watch=observers.step)
            observers.end(result)
    """
    done = run_ranks(2, script)
    assert done.returncode == 0, done.stderr
    assert sum("step " in line for line in done.stderr.splitlines()) == 3
    assert [x["step"] for x in read(tmp_path / "steps.jsonl")] == [0, 1, 2]
