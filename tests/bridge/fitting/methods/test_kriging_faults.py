"""Fits by a model of all runs, killed at any moment, go on to bitwise the same end.

An *event* is a place where a fit may be killed: within a run of the simulator, halfway through a record or a
checkpoint, before and after a file is moved into its place, before and after the model has thought. A child kills
itself by SIGKILL at the n-th of them; the next one goes on.
"""

from __future__ import annotations

import random

import pytest

from tests.lab.ended_ranks import until_the_run_is_free

SCRIPT = """
import hashlib, json, os, random, shutil, signal, sys
from pathlib import Path
import numpy as np
import torch
import bridge
from bridge.fitting.methods.kriging_search import KrigingSearch
from bridge.simulator.identity import identity_of

PAID = Path(os.environ["PAID"])
count = due = 0

def event(last_act=None):
    global count
    count += 1
    if count == due:
        if last_act is not None:
            last_act()
        os.kill(os.getpid(), signal.SIGKILL)

def f(x):
    with PAID.open("ab") as paid:
        paid.write(b"x")
    event()
    return np.array([np.sin(5 * x[0]), x[1], x[0] * x[1]])

f.identity = "f"  # whenever it is to die

write, replace, savez, told = os.write, os.replace, np.savez, KrigingSearch.tell

def half_written(descriptor, data):
    event(lambda: write(descriptor, data[: len(data) // 2]))
    return write(descriptor, data)

def half_saved(file, **content):
    savez(file, **content)
    file.flush()
    number = file.fileno()
    event(lambda: os.ftruncate(number, os.fstat(number).st_size // 2))

def moved(*paths):
    event()
    replace(*paths)
    event()

def thought(self, *arguments):
    event()
    told(self, *arguments)
    event()

def arm(at):
    global count, due
    count, due = 0, at
    os.write, os.replace, np.savez, KrigingSearch.tell = half_written, moved, half_saved, thought

def fit(directory, every_s=10.0, reuse=()):
    # No parameters explain this target: a minimum is found, and left for another place, three times.
    simulator = bridge.as_simulator(f, bounds=[(-1, 1), (-1, 1)], natural_scale=[0.2, 0.2])
    result = bridge.fit(
        simulator, [2.0, 0.3, 0.5], [0.0, 0.1], seed=0, variance=0.01, stop=bridge.Stop(runs=34),
        method=bridge.Kriging(round_size=4, restarts=3, reuse=reuse), run=bridge.Run(directory, every_s=every_s),
    )
    digest = hashlib.sha256(json.dumps([[h.parameters, h.loss, h.note] for h in result.history]).encode())
    digest.update(result.parameters.tobytes() + result.covariance.tobytes() + result.output.tobytes())
    restarts = sum("restart" in h.note for h in result.history)
    return f"{digest.hexdigest()} {result.num_evaluations} {result.num_reused} {restarts}"

def forked(directory, at, **settings):
    # What a child prints, or None where it was killed.
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        arm(at)
        said = fit(directory, **settings)
        write(into, said.encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert status == (0 if said else signal.SIGKILL), status
    return said or None

def chain(folder, seed, **settings):
    expected = forked(folder / "whole", 0, **settings)
    PAID.unlink()
    draw, kills = random.Random(seed), 0
    while True:
        said = forked(folder / "killed", draw.randrange(1, 60 if settings["every_s"] == 0 else 100), **settings)
        if said is not None:
            break
        kills += 1
        if "reuse" in settings and (folder / "killed" / "checkpoint-000000000.npz").exists():
            # What the earlier run has become since does not matter any more.
            shutil.copytree(folder / "whole" / "evaluations", settings["reuse"], dirs_exist_ok=True)
    assert said == expected, (said, expected)
    runs = int(said.split()[1])
    assert runs <= PAID.stat().st_size <= runs + kills, (runs, PAID.stat().st_size, kills)
    print(said, kills, flush=True)

if __name__ == "__main__":
    mode, folder, *numbers = sys.argv[1:]
    folder = Path(folder)
    if mode == "forks":
        first, last = map(int, numbers)
        fit(folder / "warm")  # here, once, and not in every child
        store = bridge.Store(folder / "store", above_s=0.0)
        for i in range(12):
            theta = np.array([[0.4 * np.cos(i), 0.4 * np.sin(i)]])
            key = store.key(identity_of(bridge.as_simulator(f)), theta, np.zeros(1, dtype=np.uint64))
            store.put(key, torch.as_tensor(f(theta[0]))[None], 1.0)
        for seed in range(first, last):
            chain(folder / f"plain{seed}", seed, every_s=[0.0, 10.0][seed % 2])
            shutil.copytree(folder / "store", folder / f"store{seed}")
            chain(folder / f"reuse{seed}", seed, every_s=[10.0, 0.0][seed % 2], reuse=folder / f"store{seed}")
    else:
        rank, at = map(int, numbers)
        if rank >= 0:
            from mpi4py import MPI
            if MPI.COMM_WORLD.Get_rank() == rank:
                arm(at)
        said = fit(folder / "run", every_s=0.0)
        if bridge.is_root():
            print(said)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(run_alone):
    def run(script, mode, *numbers):
        paid = {"PAID": str(script.parent / "paid")}
        done = run_alone(script, mode, script.parent, *numbers, timeout=300, env=paid)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def checked(printed, chains):
    lines = [line.split() for line in printed.splitlines()]
    assert len(lines) == 2 * chains
    for i, (_, runs, reused, restarts, kills) in enumerate(lines):
        assert (int(runs), int(reused)) == (33, 12 * (i % 2))
        assert int(restarts) > 0
        assert int(kills) > 0
    assert sum(int(line[-1]) for line in lines) > 2 * chains
    assert len({line[0] for line in lines}) == 2
    return lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory, alone):
    """What a fit prints that nothing stops; on the way there, two fits have been killed again and again."""
    path = tmp_path_factory.mktemp("forks") / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    (plain, _) = checked(alone(path, "forks", 0, 1), 1)
    return " ".join(plain[:-1]) + "\n"


def test_killed_again_and_again_in_one_process(whole):
    """With restarts; with and without earlier runs used again; with a checkpoint a round, and almost none."""
    assert whole


@pytest.mark.slow
def test_killed_at_many_more_moments(script, alone):
    checked(alone(script, "forks", 1, 25), 24)


@pytest.mark.mpi
@pytest.mark.every_mpi
@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_one_rank_of_several_is_killed(script, run_ranks, alone, whole, kills):
    """Each time on another number of ranks, another of which dies; the launcher ends the others."""
    paid = script.parent / "paid"
    draw, most = random.Random(kills), 0
    for i in range(kills):
        ranks = 3 - i % 2
        # The first early enough to be sure of a kill.
        numbers = ((i + 1) % ranks, draw.randrange(8, 40) if i else 10)
        done = run_ranks(ranks, script, "ranks", script.parent, *numbers, env={"PAID": str(paid)})
        until_the_run_is_free(script.parent / "run")
        if done.stdout == whole:  # it was done before
            break
        assert done.returncode != 0, done.stdout
        assert whole.split()[0] not in done.stdout
        most += ranks
    assert most > 0
    assert alone(script, "ranks", -1, 0) == whole
    assert 33 <= paid.stat().st_size <= 33 + most
