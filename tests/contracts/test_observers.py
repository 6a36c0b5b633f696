"""Every observer of ours keeps the contract, and observers that break it are told."""

from __future__ import annotations

import io
import json
import sys
import types

import pytest
from rich.console import Console

import bridge
from bridge.errors import InputError
from bridge.reporting.lines import Lines
from bridge.reporting.observers import OBSERVERS, view
from bridge.testing import ObserverContract
from tests.contracts.failing import failing


class TestLines(ObserverContract):
    def make(self, folder):
        return Lines(io.StringIO())


class TestLiveView(ObserverContract):
    def make(self, folder):
        return bridge.LiveView(Console(file=io.StringIO(), force_terminal=True, width=80, height=24))


class TestJSONLines(ObserverContract):
    def make(self, folder):
        return bridge.JSONLines(folder / "steps.jsonl")

    def told(self, observer, folder):
        lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in ("time", "num_cached")} for line in lines]


class TestTensorBoard(ObserverContract):
    @pytest.fixture(autouse=True)
    def writer(self, monkeypatch):
        """In place of the package, which need not be there."""

        class Writer:
            def __init__(self, log_dir, purge_step):
                self.told = {}

            def add_scalar(self, tag, value, step):
                self.told[tag, step] = value

            def add_text(self, tag, text, step):
                self.told[tag, step] = text

            def close(self): ...

        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))

    def make(self, folder):
        return bridge.TensorBoard(folder / "tb")


class Notes(bridge.Observer):
    """An observer of one's own."""

    def __init__(self):
        self.losses = None

    def start(self, space, *, max_steps, max_runs, title):
        self.losses = []

    def step(self, record):
        self.losses.append(record.loss)

    def end(self, result): ...


class TestNotes(ObserverContract):
    def make(self, folder):
        return Notes()

    def told(self, observer, folder):
        return observer.losses


class Failing(Notes):
    def step(self, record):
        raise RuntimeError("no space left")


class Hasty(Notes):
    def end(self, result):
        print(result.loss)  # which is None where the fit has failed


class Whole(Notes):
    def step(self, record):
        self.losses.append(int(record.loss))


class Forgetful(Notes):
    """What it is told in another process it appends to a file, once more."""

    def __init__(self, file):
        self.file = file

    def start(self, space, *, max_steps, max_runs, title): ...

    def step(self, record):
        with self.file.open("a") as file:
            print(record.step, file=file)


class OnlySteps:
    def step(self, record): ...


class _Notes(ObserverContract):
    def make(self, folder):
        return self.made(folder / "notes.txt") if self.made is Forgetful else self.made()

    def told(self, observer, folder):
        return (folder / "notes.txt").read_text() if self.made is Forgetful else None


@pytest.mark.parametrize(
    ("broken", "tests"),
    [
        (Failing, {"it_is_told_of_a_fit_and_changes_nothing"}),
        (Hasty, {"it_survives_a_fit_that_fails"}),
        (Whole, {"numbers_that_are_not_finite_and_odd_names_do_no_harm"}),
        (Forgetful, {"a_resumed_fit_tells_it_the_history_again"}),
        (OnlySteps, {"it_is_an_observer"}),
    ],
)
def test_what_is_broken_is_told(broken, tests, tmp_path):
    assert tests <= failing(_Notes, tmp_path, made=broken)


def test_an_observer_is_watched_by_its_name():
    bridge.register("test-notes")(Notes)
    try:
        (observer,) = view("test-notes")
        assert isinstance(observer, Notes)
        with pytest.raises(InputError, match=r"Known: auto, lines, off, .*test-notes.*Did you mean 'test-notes'"):
            view("test-note")
        with pytest.raises(InputError, match=r"derived from bridge\.Observer, got .*Bare\. Write class Bare\("):

            @bridge.register("test-bare")
            class Bare:
                start = step = end = None

    finally:
        del OBSERVERS._registered["test-notes"]
    with pytest.raises(
        InputError, match=r"Unknown watch='test-notes'\. Known: auto, lines, off, \w+, \w+.*or observers"
    ):
        view("test-notes")
