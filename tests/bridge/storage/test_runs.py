"""Runs that are interrupted in every way go on, on any number of ranks, to bitwise the same end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bridge
from bridge.errors import InputError, SetupError, StoppedError

ROOT = Path(__file__).resolve().parents[3]


# --- state --------------------------------------------------------------------------------------------------------

leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5)
arrays = st.sampled_from(
    [torch.randn(3), torch.arange(4), np.float64(0.1), np.ones((2, 0)), torch.tensor(True), np.uint64([2**63])]
)
states = st.recursive(
    leaves | arrays,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(states)
def test_any_state_comes_back_as_it_was(tmp_path_factory, state):
    directory = tmp_path_factory.mktemp("state")
    with bridge.Run(directory) as run:
        assert (run.step, run.state) == (0, None)
        run.checkpoint(3, state)
    with bridge.Run(directory) as again:
        assert again.step == 3
        assert same(state, again.state)


def test_nothing_in_a_run_directory_is_a_pickle(tmp_path):
    theta = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.Adam([theta])
    theta.sum().backward()
    optimiser.step()
    with bridge.Run(tmp_path, every_s=0) as run:
        smoothed = bridge.smooth(np.sin, seed=0, num_samples=4, memory=run.store)
        run.store.above_s = 0.0
        smoothed(theta)
        run.checkpoint(1, {"theta": theta, "optimiser": optimiser.state_dict()})
        smoothed(theta, step=1)
        files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]
        assert {p.suffix for p in files} == {".json", ".npz", ".journal"}
        for path in files:
            assert b"\x80\x04" not in path.read_bytes()[:64]
    with np.load(next(tmp_path.glob("checkpoint-*.npz")), allow_pickle=False) as content:
        assert all(content[name].dtype != object for name in content.files)
    with bridge.Run(tmp_path) as again:
        optimiser.load_state_dict(again.state["optimiser"])
        assert torch.equal(again.state["theta"], theta.detach())
    with bridge.Run(tmp_path) as refuses, pytest.raises(InputError, match="numbers, strings, arrays"):
        refuses.checkpoint(9, {"theta": object()})


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    with bridge.Run(tmp_path, every_s=0) as run:
        for step in (1, 2, 3):
            run.checkpoint(step, {"x": torch.full((100,), float(step))})
    kept = sorted(tmp_path.glob("checkpoint-*.npz"))
    assert len(kept) == 2
    for damage in (lambda b: b[: len(b) // 2], lambda b: b[:400] + bytes([b[400] ^ 1]) + b[401:], lambda b: b""):
        whole = kept[1].read_bytes()
        kept[1].write_bytes(damage(whole))
        with bridge.Run(tmp_path) as run:
            assert run.step == 2
            assert float(run.state["x"][0]) == 2.0
        kept[1].write_bytes(whole)
    for path in kept:
        path.write_bytes(b"PK")
    with pytest.raises(SetupError, match="damaged ones only"):
        bridge.Run(tmp_path).begin()


def test_a_run_is_nothing_yet_before_its_block(tmp_path):
    run = bridge.Run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for name in ("step", "state", "store"):
        with pytest.raises(InputError, match=rf"`with bridge\.Run\(\.\.\.\) as run:` before run\.{name}"):
            getattr(run, name)
    with run:
        assert (run.step, run.state) == (0, None)


def test_a_run_is_resumed_under_its_own_settings_and_never_lost_by_accident(tmp_path):
    def fails():
        with bridge.Run(tmp_path, settings={"seed": 0, "lr": 0.1}, every_s=0) as run:
            run.checkpoint(1, 1.0)
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fails()
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 1, 1)
    assert "power cut" in status["message"]
    with pytest.raises(InputError, match=r"lr was 0.1, is 0.2"):
        bridge.Run(tmp_path, settings={"seed": 0, "lr": 0.2}).begin()
    with pytest.raises(InputError, match="unfinished run"):
        bridge.Run(tmp_path, settings={"seed": 0, "lr": 0.1}, resume=False).begin()
    with bridge.Run(tmp_path, settings={"lr": 0.1, "seed": 0}) as run:
        assert run.step == 1
        with pytest.raises(InputError, match="running in it"):
            bridge.Run(tmp_path, settings={"lr": 0.1, "seed": 0}).begin()
        with pytest.raises(InputError, match=r"has not begun, got that in .* which is in use"):
            run.begin()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
    with bridge.Run(tmp_path, resume=False) as run:
        assert run.step == 0
    with pytest.raises(InputError, match="Unknown signals"):
        bridge.Run(tmp_path / "b", signals=("HELLO",))


def test_a_signal_writes_the_state_and_ends_with_75(tmp_path):
    def told():
        with bridge.Run(tmp_path, every_s=1e9, signals=("USR2",)) as run:
            run.checkpoint(1, "one")
            os.kill(os.getpid(), signal.SIGUSR2)
            run.checkpoint(2, "two")
            pytest.fail("went on")

    with pytest.raises(SystemExit) as caught:
        told()
    assert caught.value.code == 75
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, 2)
    with bridge.Run(tmp_path) as run:
        assert (run.step, run.state) == (2, "two")
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_a_signal_ends_an_evaluation_after_the_run_in_progress(tmp_path):
    calls = []

    def f(x):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return x

    def stopped():
        with bridge.Run(tmp_path, journal_above_s=0) as run:
            run.checkpoint(4, None)
            bridge.smooth(f, seed=0, num_samples=8, memory=run.store)(torch.zeros(1))

    with pytest.raises(SystemExit) as caught:
        stopped()
    assert isinstance(caught.value.__cause__, StoppedError)
    assert len(calls) == 3
    with bridge.Run(tmp_path, journal_above_s=0) as run:
        assert run.step == 4
        bridge.smooth(f, seed=0, num_samples=8, memory=run.store)(torch.zeros(1))
    assert len(calls) == 8


def test_the_end_of_the_allocation_is_seen_coming(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 4))
    with pytest.raises(SystemExit) as caught, bridge.Run(tmp_path) as run:
        run.checkpoint(1, None)
    assert caught.value.code == 75
    assert "end of the allocation" in json.loads((tmp_path / "status.json").read_text())["message"]
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 4000))
    with bridge.Run(tmp_path) as run:
        run.checkpoint(2, None)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    with bridge.Run(tmp_path, every_s=0) as run:
        run.checkpoint(1, "whole")
        real = np.savez

        def full(path, **arrays):
            real(path, **arrays)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
        run.checkpoint(2, "lost")
        monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.glob("*")) != []
    assert not list(tmp_path.glob(".checkpoint*"))
    with bridge.Run(tmp_path) as again:
        assert again.state == "lost"  # written at the end, when there was room again
