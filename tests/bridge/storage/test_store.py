"""Evaluations on disk: found again, torn or damaged records skipped, a full disk survived; never a bit changed."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bridge
from bridge.errors import SetupError
from bridge.storage.store import Store

SEEDS = np.arange(3, dtype=np.uint64)
ZERO = torch.zeros(2, dtype=torch.float64)


def key(i):
    return Store.key("f", np.full((1, 2), float(i)), SEEDS[:1])


def filled(directory, count=5, shape=(2, 3, 4)):
    store = Store(directory)
    for i in range(count):
        store.put(key(i), torch.full(shape, float(i), dtype=torch.float32), 1.0)
    return store


def test_what_was_put_is_found_by_another_process(tmp_path):
    filled(tmp_path)
    again = Store(tmp_path)
    assert len(again) == 5
    for i in range(5):
        outputs = again.get(key(i))
        assert outputs.dtype == torch.float32
        assert torch.equal(outputs, torch.full((2, 3, 4), float(i)))
    assert again.get(key(9)) is None
    assert (again.hits, again.misses, again.damaged) == (5, 1, 0)
    wide = torch.randn(1, 7, dtype=torch.float64)
    again.put(key(7), wide, 1.0)
    assert torch.equal(Store(tmp_path).get(key(7)), wide)
    assert len(list(tmp_path.glob("*.journal"))) == 2  # one a process


def test_the_key_is_all_that_was_evaluated():
    x = np.ones((1, 2))
    keys = {Store.key("f", x, SEEDS[:1]), Store.key("g", x, SEEDS[:1]), Store.key("f", x, SEEDS[1:2])}
    keys |= {Store.key("f", np.nextafter(x, 2), SEEDS[:1]), Store.key("f", np.ones((2, 1)), SEEDS[:1])}
    assert len(keys) == 5


@given(st.data())
def test_a_record_cut_anywhere_is_ignored_and_the_others_are_there(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("cut")
    filled(directory)
    (path,) = directory.glob("*.journal")
    whole = path.read_bytes()
    size = len(whole) // 5
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    store = Store(directory)
    assert [store.get(key(i)) is not None for i in range(5)] == [i < cut // size for i in range(5)]
    assert store.damaged == cut % size


@given(st.data())
def test_a_damaged_byte_costs_one_record(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("flip")
    filled(directory)
    (path,) = directory.glob("*.journal")
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(whole))
    store = Store(directory)
    found = [store.get(key(i)) for i in range(5)]
    hit = at // (len(whole) // 5)
    assert [f is not None for f in found] == [i != hit for i in range(5)]
    for i, outputs in enumerate(found):
        assert outputs is None or torch.equal(outputs, torch.full((2, 3, 4), float(i)))


def test_cheap_runs_are_not_written_and_cleared_ones_are_gone(tmp_path):
    store = Store(tmp_path, above_s=0.1)
    store.put(key(0), torch.zeros(1, 2), 0.01)
    assert list(tmp_path.iterdir()) == []
    store.put(key(0), torch.zeros(1, 2), 0.2)
    assert len(list(tmp_path.iterdir())) == 1
    store.clear()
    assert list(tmp_path.iterdir()) == []
    assert store.get(key(0)) is None
    store.put(key(0), torch.ones(1, 2), 0.2)
    assert torch.equal(Store(tmp_path).get(key(0)), torch.ones(1, 2))


def test_evaluations_of_later_steps_outlive_a_clearing(tmp_path):
    """A run that was killed after its last checkpoint has left those of several steps: each is of use until its own."""
    left = Store(tmp_path)
    for step in range(3):
        left.advance(step)
        left.put(key(step), torch.full((1, 2), float(step)), 1.0)
    store = Store(tmp_path)
    for step in range(3):
        store.advance(step)
        store.put(key(10 + step), torch.full((1, 2), 10.0 + step), 1.0)
        store.clear(step + 1)
        there = [i for i in range(3) if store.get(key(i)) is not None]
        assert there == list(range(step + 1, 3))
        assert store.get(key(10 + step)) is None
        assert len(list(tmp_path.glob("*.journal"))) == (1 if there else 0)
    store.put(key(5), torch.zeros(1, 2), 1.0)
    assert len(Store(tmp_path)) == 1


def test_a_full_disk_costs_the_journal_not_the_run(tmp_path, monkeypatch, caplog):
    store = Store(tmp_path, above_s=0.0)
    settings = {"seed": 0, "num_samples": 8, "on": bridge.Ranks(leaf_size=1)}
    real, room = os.write, [300]

    def write(descriptor, data):
        if len(data) > room[0]:
            room[0], part = 0, data[: room[0]]
            if not len(part):
                raise OSError(28, "No space left on device")
            return real(descriptor, part)
        room[0] -= len(data)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with caplog.at_level(logging.WARNING, logger="bridge"):
        value = bridge.smooth(np.sin, memory=store, **settings)(ZERO)
    assert torch.equal(value, bridge.smooth(np.sin, **settings)(ZERO))
    assert sum("No space left" in record.getMessage() for record in caplog.records) == 1
    again = Store(tmp_path)
    assert 0 < len(again) < 8
    assert again.damaged == 0  # what was half written has been taken back


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("failures", ["raise", "drop"])
def test_found_evaluations_change_cost_never_results(tmp_path, vectorized, failures):
    calls = []
    A = np.random.default_rng(0).normal(size=(2, 50))

    def f(x):
        calls.append(x)
        return np.tanh(x @ A)

    sim = bridge.as_simulator(f, vectorized=vectorized, repeatable=True)
    settings = {"seed": 0, "num_samples": 100, "failures": failures}

    def results(store):
        e = bridge.smooth(sim, memory=store, **settings).estimate(ZERO)
        return e.value, e.jacobian()

    plain = results(None)
    cost = len(calls)
    calls.clear()
    first = results(Store(tmp_path, above_s=0.0))
    assert len(calls) == cost
    calls.clear()
    store = Store(tmp_path, above_s=0.0)
    second = results(store)
    assert calls == []
    assert store.misses == 0
    for a, b, c in zip(plain, first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="can be written"):
        Store(tmp_path / "file" / "evaluations")
