"""`bridge check`: whether a simulator keeps to what it is asked to, with exit status 0 or 3."""

from __future__ import annotations

import numpy as np
import pytest

import bridge
from bridge.cli.main import main
from bridge.testing import examine

SOURCE = """
import os
import numpy as np
import bridge

def projectile(p):
    return np.array([p[0] * np.cos(p[1]), p[0] * np.sin(p[1])])

def noisy(p):
    return p + np.random.normal(size=len(p))

calls = 0

def counting(p):
    global calls
    calls += 1
    return p * calls

def leaves(p):
    with open("out.txt", "w") as file:
        file.write("x")
    return 2 * p

def goes(p):
    os.chdir("/")
    return 2 * p

def constant(p):
    return np.ones(3)

KEPT = []

def first(p):
    KEPT or KEPT.append(p.copy())
    return p - KEPT[0]

def elsewhere(p):
    return p * os.getpid()

def writes(p):
    p[0] = 0
    return p

beside = bridge.as_simulator(lambda X: X - X.mean(axis=0), vectorized=True)
changed = bridge.as_simulator(writes, vectorized=True)
stochastic = bridge.as_simulator(lambda p, seed: p + np.random.default_rng(seed).normal(size=2), seeded=True)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mysim.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(name, capsys, *more):
    status = main(["check", name, *(more or ("--at", "1.5,0.2"))])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("name", ["projectile", "stochastic"])
def test_what_is_right_is_ok(here, capsys, name):
    status, out = check(f"mysim.py:{name}", capsys)
    assert status == 0, out
    assert "ok a second call: the same numbers" in out
    assert "ok in another process: the same numbers" in out
    assert ("outputs depend on it" in out) == (name == "stochastic")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("noisy", "NO a second call: 11 of 11 outputs are others. It draws from numpy's global generator"),
        ("counting", "NO a second call: 11 of 11 outputs are others. Keep nothing between calls"),
        ("leaves", "NO the working directory: It leaves out.txt"),
        ("goes", "NO the working directory: It goes to /"),
        ("constant", "NO the parameters: No output changes."),
        ("elsewhere", "NO in another process: 11 of 11 outputs are others."),
        ("first", "NO in another process: 11 of 11 outputs are others. Keep nothing between calls"),
        ("beside", "NO one row at a time: "),
        ("changed", "NO runs: It changed the parameters that it was given."),
    ],
)
def test_what_is_wrong_is_said(here, capsys, name, words):
    status, out = check(f"mysim.py:{name}", capsys)
    assert status == 3
    assert words in out


def test_job_files_and_names_are_taken(here, capsys):
    (here / "job.toml").write_text(
        '[simulator]\nname = "mysim.py:projectile"\n[target]\nfile = "target.npy"\n'
        "[start]\nspeed = 2.0\nangle = 0.5\n[fit]\nseed = 0\n"
    )
    np.save(here / "target.npy", np.ones(2))
    assert check("job.toml", capsys, "--seed", "1")[0] == 0
    assert check("raster", capsys, "--at", "1,2")[0] == 2  # it needs a mesh
    assert check("mysim.py:projectile", capsys, "--at", "1,x")[0] == 2
    assert check("mysim.py:projectile", capsys, "--seed", "1")[0] == 2  # where?


def test_examine_may_be_asked_from_a_script():
    found = {f.what: f for f in examine(bridge.as_simulator(lambda x: x**2), [1.0, 2.0], elsewhere=False)}
    assert all(f.good is not False for f in found.values())
    assert "in another process" not in found
