"""Which evaluation is the same: another one wherever a call could tell, the same one in every process."""

from __future__ import annotations

import ctypes
import decimal
import functools
import inspect
import json
import operator
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bridge
from adapters.external import ExternalSimulator, Profile
from adapters.template import TextTemplate
from bridge.errors import InputError
from bridge.simulator.function import as_simulator
from bridge.simulator.identity import identity_of
from bridge.simulator.registry import find
from bridge.simulator.space import Parameter, ParameterSpace
from bridge.storage.store import Store
from tests.lab import identities as lab
from tests.lab.fits import Killed

pytest.importorskip("gemmi", reason="the cryo-EM simulators need gemmi")
pytest.importorskip("trimesh", reason="the rendering adapters need trimesh")

THETA = torch.tensor([0.3], dtype=torch.float64)
ONE = np.ones(1)
REGISTERED = [point for point in bridge.list_simulators() if point in lab.arguments(Path())]


def identity(function: Any) -> str:
    return lab.identity(function)


# --- every argument of every simulator ----------------------------------------------------------------------------


def test_every_registered_simulator_is_in_the_table() -> None:
    """A new one needs two values of each of its arguments in `tests.lab.identities.arguments`."""
    from importlib import metadata

    ours = {point.name for point in metadata.entry_points(group="bridge.simulators")}
    assert ours == set(lab.arguments(Path()))


@pytest.mark.parametrize("name", sorted(lab.arguments(Path())))
def test_another_argument_is_another_simulator(name: str, tmp_path: Path) -> None:
    base, parts, others = lab.arguments(lab.files(tmp_path))[name]
    # A new argument needs a line in the table.
    assert {*parts, *others} == set(inspect.signature(find(name)).parameters)
    for argument, two in parts.items():
        first, second = (lab.made(name, base, argument, two, i) for i in (0, 1))
        assert first != second, argument
        assert first == lab.made(name, base, argument, two, 0), argument
    for argument, two in others.items():
        assert lab.made(name, base, argument, two, 0) == lab.made(name, base, argument, two, 1), argument


def test_what_a_simulator_keeps_of_its_work_is_no_part_of_it() -> None:
    image = {"shape": (16, 16), "parameters": ("defocus_um",)}
    for name, options in (
        ("cryoet", image | {"specimen": lab.HELIX}),
        ("cryoet-tilt-series", image | {"particles": [{"specimen": lab.HELIX}], "scheme": {"uniform": [-1, 1, 1]}}),
        ("raster", {"size": (8, 8)}),
    ):
        simulator = bridge.make(name, **options)
        before = identity_of(simulator)
        at = getattr(simulator, "reference", np.array([25.0, 15.0, 4.0, 20.0]))
        simulator(at[None], np.zeros(1, dtype=np.uint64))
        assert identity_of(simulator) == before


@pytest.mark.parametrize("name", ["one.pdb", "places.txt", "deck.txt", "program-one"])
def test_files_count_by_what_is_in_them(name: str, tmp_path: Path) -> None:
    def made(folder: Path) -> str:
        options = {"deck": folder / "deck.txt", "parameters": ("x_nm",), "binary": folder / "program-one"}
        return identity_of(bridge.make("tem-simulator", **options))

    here = made(lab.files(tmp_path / "a"))
    assert here == made(lab.files(tmp_path / "b"))  # wherever they are
    path = tmp_path / "b" / name
    path.write_text(
        path.read_text(encoding="utf-8")
        .replace("20.00", "21.00")
        .replace("10 40", "10 41")
        .replace("cs = 2", "cs = 1")
        .replace("echo", "echo "),
        encoding="utf-8",
    )
    assert here != made(tmp_path / "b")


# --- every kind of thing, in every kind of thing ------------------------------------------------------------------


def test_no_two_leaves_are_alike() -> None:
    identities = [identity(lab.closed(leaf)) for leaf in lab.LEAVES]
    for i, found in enumerate(identities):
        assert found not in identities[:i], repr(lab.LEAVES[i])
    assert identities == [identity(lab.closed(leaf)) for leaf in lab.LEAVES]


layers = st.lists(st.sampled_from(lab.CONTAINERS), max_size=4)
leaves = st.integers(0, len(lab.LEAVES) - 1)


@settings(max_examples=250)
@given(st.sampled_from(lab.FUNCTIONS), layers, leaves, leaves)
def test_a_call_that_can_see_another_thing_is_another_evaluation(function: Any, inside: Any, a: int, b: int) -> None:
    def made(leaf: int) -> str:
        content = lab.LEAVES[leaf]
        for layer in inside:
            content = layer(content)
        return identity(function(content))

    assert made(a) == made(a)
    assert (made(a) == made(b)) == (a == b)


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=3), st.integers(0, 9), min_size=2), st.randoms())
def test_order_counts_where_a_call_can_see_it(table: dict[str, int], random: Any) -> None:
    shuffled = list(table.items())
    random.shuffle(shuffled)
    other = dict(shuffled)

    def looking(d: Any) -> Any:
        return lambda x: x * d["a"] + d.get("b", 0) + ("c" in d)

    def going_through(d: Any) -> Any:
        return lambda x: [x * value for value in d.values()]

    def called(x: Any, /, **names: int) -> Any:
        return x, names

    assert identity(looking(table)) == identity(looking(other))
    assert identity(functools.partial(called, **table)) == identity(functools.partial(called, **other))
    same = list(table) == list(other)
    assert (identity(going_through(table)) == identity(going_through(other))) == same
    assert identity(lab.closed(set(table))) == identity(lab.closed(set(other)))


def test_things_that_hold_each_other_have_an_end() -> None:
    def ring(value: int) -> Any:
        first = lab.Plain([value])
        first.content.append(lab.Plain({"back": first}))
        return first

    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n != 0 and even(n - 1)

    assert identity(lab.closed(ring(1))) == identity(lab.closed(ring(1))) != identity(lab.closed(ring(2)))
    assert identity(even) == identity(even)
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    assert identity(lab.closed(deep)) == identity(lab.closed([deep[0]]))


# --- code ---------------------------------------------------------------------------------------------------------

MODULE = """
    GAIN = {gain}
    TABLE = {{"a": [1, {entry}]}}

    class Engine:
        factor = {factor}

        def __init__(self, n):
            self.n = n

        def run(self, x):
            return x * self.n * self.factor {term}

    def helper(x):
        return inner(x) * GAIN

    def inner(x):
        return x + TABLE["a"][1]
"""
SCRIPTS = (
    "import {m}\ndef f(x): return {m}.helper(x) + {m}.Engine(2).run(x)",
    "from {m} import helper, Engine\ndef f(x): return helper(x) + Engine(2).run(x)",
    "def f(x):\n    from {m} import helper, Engine\n    return helper(x) + Engine(2).run(x)",
    "import {m}\nengine = {m}.Engine(2)\nclass F:\n  def __call__(self, x): return {m}.helper(engine.run(x))\nf = F()",
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_code_of_ones_own_counts_with_all_that_it_names(script: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    base = {"gain": 1, "entry": 2, "factor": 3, "term": ""}
    changes: list[dict[str, Any]] = [{}, {"gain": 4}, {"entry": 4}, {"factor": 4}, {"term": "+ 1"}, {"term": "# word"}]
    found = []
    for i, change in enumerate(changes):
        text = textwrap.dedent(MODULE.format(**{**base, **change}))
        (tmp_path / f"users_own_{abs(hash(script))}_{i}.py").write_text(text, encoding="utf-8")
        names: dict[str, Any] = {"__name__": "__main__"}
        # The module's name in the script is the same for all.
        name = f"users_own_{abs(hash(script))}_{i}"
        monkeypatch.setitem(sys.modules, "users_own", __import__(name))
        exec(script.format(m="users_own"), names)
        found.append(identity(names["f"]))
    assert len(set(found)) == len(changes) - 1
    assert found[-1] == found[0]  # a comment


def test_where_code_stands_and_what_is_said_about_it_do_not_count() -> None:
    def made(text: str) -> str:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(text, names)
        return identity(names["f"])

    first = made("def f(x):\n    return x + 1")
    assert first == made("\n\n# A comment\ndef f(x):\n\n    # another\n    return x + 1")
    assert first == made('def f(x):\n    """What it does."""\n    return x + 1')
    assert first == made("def f(x: float) -> float:\n    return (x + 1)")
    assert len({first, made("def f(x):\n    return x + 2"), made("def f(x):\n    return x - 1")}) == 3


def test_a_simulator_by_rows_is_not_the_one_by_arrays() -> None:
    ways: list[dict[str, bool]] = [{}, {"vectorized": True}, {"seeded": True}, {"vectorized": True, "seeded": True}]
    assert len({identity_of(as_simulator(lab.plain, **way)) for way in ways}) == 4
    bounded = as_simulator(lab.plain, bounds=[(0, 1)], natural_scale=[2.0])
    assert identity_of(bounded) == identity(lab.plain)  # parameters lie where they lie


# --- counters, and what else calls change -------------------------------------------------------------------------

COUNTERS = """
    n = m = 0
    calls, log, table, seen = [], [], {}, set()
    def f(x):
        global n, m
        n += 1
        m = m + 1
        calls.append((1, x))
        table["n"] = table.get("n", 0) + 1
        seen.add(float(x[0]))
        f.count += 1
        return 2 * x
    f.count = 0
    class F:
        space = output_shape = None
        def __init__(self):
            self.n, self.log, self.table = 0, [], {"n": 0}
        def __call__(self, inputs, seeds):
            self.n += 1
            self.log.append(inputs)
            self.table["n"] += 1
            self.note()
            return 2 * inputs
        def note(self):
            self.n += 1
        def report(self):
            return self.n
    def made():
        n, total, log = 0, 0.0, []
        def g(x):
            nonlocal n, total
            n += 1
            total = total + x.sum()
            log.append(x)
            return 2 * x
        return g
    g = made()
"""


def test_what_is_counted_and_not_looked_at_is_no_part_of_a_simulator() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(textwrap.dedent(COUNTERS), names)
    for function in (names["f"], names["g"], names["F"]()):
        before = identity(function)
        for _ in range(2):
            function(ONE[None], np.zeros(1)) if isinstance(function, names["F"]) else function(ONE)
        assert identity(function) == before


def stateful() -> Any:
    """A memory that calls fill, and look at; and a setting that is written as well as read."""
    memory: dict[float, Any] = {}
    setting = {"gain": 2.0}

    def f(x: Any) -> Any:
        setting["x"] = float(x[0])
        if float(x[0]) not in memory:
            f.runs += 1  # type: ignore[attr-defined]
            memory[float(x[0])] = setting["gain"] * x
        return memory[float(x[0])]

    f.runs, f.setting = 0, setting  # type: ignore[attr-defined]
    return f


def test_a_generator_that_all_of_a_process_uses_is_no_part_of_a_simulator() -> None:
    """Distributions of scipy have it as an attribute, whatever is asked of them."""
    law = scipy.stats.t(5)
    before = identity_of(as_simulator(lambda t: law.cdf(t)))
    law.rvs()
    assert identity_of(as_simulator(lambda t: law.cdf(t))) == before
    law = scipy.stats.t(6)
    assert identity_of(as_simulator(lambda t: law.cdf(t))) != before
    own = np.random.RandomState(0)
    before = identity_of(as_simulator(lambda t: t * own.normal()))
    own.normal()
    assert identity_of(as_simulator(lambda t: t * own.normal())) != before


def test_what_is_changed_by_hand_between_two_calls_counts(tmp_path: Path) -> None:
    class Sim:
        space, output_shape = None, (1,)

        def __init__(self) -> None:
            self.gain = 1.0

        def __call__(self, inputs: Any, seeds: Any) -> Any:
            return self.gain * inputs

    simulator = Sim()
    smoothed = bridge.smooth(simulator, seed=0, num_samples=8, memory=Store(tmp_path, above_s=0))
    first = smoothed.estimate(THETA)
    simulator.gain = 10.0
    second = smoothed.estimate(THETA)
    assert (first.num_cached, second.num_cached) == (0, 0)
    torch.testing.assert_close(second.value, 10 * first.value)
    simulator.gain = 1.0
    assert smoothed.estimate(THETA).num_cached == 8


def test_what_calls_change_leaves_a_simulator_the_one_it_was(tmp_path: Path) -> None:
    def run(f: Any) -> int:
        return bridge.smooth(f, seed=0, num_samples=8, memory=Store(tmp_path, above_s=0)).estimate(THETA).num_cached

    f = stateful()
    assert [run(f), run(f), run(stateful())] == [0, 8, 8]
    f.setting["gain"] = 3.0  # by hand, not by a call
    assert run(f) == 0
    smoothed = bridge.smooth(stateful(), seed=0, num_samples=8, memory=Store(tmp_path, above_s=0))
    assert [smoothed.estimate(THETA, step).num_cached for step in (1, 1, 2, 2)] == [0, 8, 0, 8]


def test_a_fit_goes_on_though_its_simulator_has_counted(tmp_path: Path) -> None:
    f = stateful()

    def die(_: Any) -> None:
        raise Killed

    def fitted(f: Any, run: bridge.Run | None, watch: Any = "off") -> bridge.FitResult:
        return bridge.fit(f, [3.0], [0.5], seed=0, variance=1e-4, stop=12, run=run, watch=watch)

    def run() -> bridge.Run:
        return bridge.Run(tmp_path / "run", every_s=0.0)

    with pytest.raises(Killed):
        fitted(f, run(), die)
    result = fitted(f, run())
    alone = fitted(stateful(), None)
    assert result.history == alone.history
    f.setting["gain"] = 4.0
    with pytest.raises(InputError, match="identity was 'f-"):
        fitted(f, run())


# --- what cannot be seen ------------------------------------------------------------------------------------------


UNSEEN: list[tuple[Any, str]] = [
    (lambda: Path(os.devnull).open(encoding="utf-8"), "an open file"),  # noqa: SIM115
    (socket.socket, "a socket"),
    (lambda: (i for i in range(3)), "a generator"),
    (lambda: iter([1]), "a list_iterator"),
    (lambda: map(abs, [1]), "a map"),
    (threading.Lock, "a lock"),
    (threading.RLock, "a lock"),
    (threading.Event, "a lock"),
    (threading.local, "a thread's own variables"),
    (lambda: ctypes.CDLL(None), "a library loaded by ctypes"),
    (lambda: ctypes.CDLL(None).abs, "a _FuncPtr"),
    (lambda: ctypes.pointer(ctypes.c_int(1)), "a LP_c_int"),
    (lambda: sqlite3.connect(":memory:"), "a Connection"),
    (lambda: np.frompyfunc(abs, 1, 1), "numpy.frompyfunc"),
]


@pytest.mark.parametrize(("make", "words"), UNSEEN)
def test_what_cannot_be_seen_is_named_where_it_is_and_needs_an_identity(make: Any, words: str, tmp_path: Path) -> None:
    thing = make()

    def f(x: Any) -> Any:
        return x if thing is None else 2 * x

    def deep(x: Any) -> Any:
        return x if box.content["key"][1] is None else 2 * x

    box = lab.Plain({"key": [0, thing]})
    where = rf"item 1 of key 'key' of attribute 'content' of closure variable 'box' of deep: .*{words}"
    for function, path in ((f, f"closure variable 'thing' of f: .*{words}"), (deep, where)):
        with pytest.raises(InputError, match=path + ".*identity="):
            bridge.smooth(function, seed=0, memory=Store(tmp_path / "store"))
    reused = bridge.Kriging(reuse=Store(tmp_path / "store"))
    for asked in ({"run": tmp_path / "run"}, {"method": reused}):
        with pytest.raises(InputError, match=f"closure variable 'thing' of f: .*{words}"):
            bridge.fit(f, [1.0], [0.0], seed=0, **asked)
    assert not (tmp_path / "run").exists()
    bridge.smooth(f, seed=0)(THETA)  # nothing is filed
    named = bridge.as_simulator(f, identity="engine 2")
    assert identity_of(named) == "engine 2"
    found = [
        bridge.smooth(named, seed=0, num_samples=4, memory=Store(tmp_path / "s", above_s=0)).estimate(THETA).num_cached
        for _ in range(2)
    ]
    assert found == [0, 4]
    if hasattr(thing, "close"):
        thing.close()


def test_an_identity_is_a_text_or_an_attribute() -> None:
    for wrong in ("", 3, ["a"]):
        with pytest.raises(InputError, match="identity as a text"):
            bridge.as_simulator(lab.plain, identity=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="describes itself"):
        bridge.as_simulator(bridge.make("raster", size=(8, 8)), identity="a")
    simulator = bridge.make("raster", size=(8, 8))
    simulator.identity = "my teapot"
    assert identity_of(simulator) == "my teapot"
    # A function that says which one it is, inside another.
    inner = lab.closed(threading.Lock())
    inner.identity = "one"
    first = identity(lab.closed(inner))
    inner.identity = "two"
    assert first != identity(lab.closed(inner))


# --- programs -----------------------------------------------------------------------------------------------------


def program(folder: Path, **changes: Any) -> ExternalSimulator:
    given = {
        "inputs": {"a.txt": "x = {a}\n", "b.txt": "y\n"},
        "output": "out.txt",
        "arguments": ("--seed={seed}",),
        "stdin": None,
        "read": None,
        "argv": ("engine", "-v", f"--table={folder / 'table'}"),
        "env": {"MODE": "1"},
        "timeout_s": None,
        "threads": 1,
        "keep": "failed",
        "scratch": None,
        "output_shape": (1,),
        "names": ("a", "b"),
        "kind": "continuous",
        "upper": 1.0,
        "identity": None,
    } | changes
    template = TextTemplate(
        inputs=given["inputs"],
        output=given["output"],
        arguments=given["arguments"],
        stdin=given["stdin"],
        read=given["read"],
    )
    profile = Profile(
        given["argv"],
        {"PATH": f"{folder}:{os.defpath}", **given["env"]},
        given["timeout_s"],
        given["threads"],
        given["keep"],
        given["scratch"],
    )
    space = ParameterSpace(tuple(Parameter(n, upper=given["upper"], kind=given["kind"]) for n in given["names"]))
    return ExternalSimulator(template, profile, space, given["output_shape"], given["identity"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "engine").write_text("#!/bin/sh\necho 1\n", encoding="utf-8")
    (tmp_path / "bin" / "engine").chmod(0o755)
    (tmp_path / "bin" / "table").write_text("1 2 3\n", encoding="utf-8")
    return tmp_path / "bin"


@pytest.mark.filterwarnings("ignore:TextTemplate has no placeholder")  # of constant outputs
def test_a_program_is_its_content_what_it_is_told_and_what_it_reads(folder: Path) -> None:
    base = identity_of(program(folder, env={"MODE": "1", "PATH": f"{folder}:/bin"}))
    changes: list[dict[str, Any]] = [
        {"inputs": {"a.txt": "x = {a:.3f}\n", "b.txt": "y\n"}},
        {"inputs": {"a.txt": "x = {a}\n"}},
        {"output": "stdout.txt"},
        {"arguments": ()},
        {"stdin": "a.txt"},
        {"read": lab.plain},
        {"read": lab.closed},
        {"argv": ("engine", "-q")},
        {"argv": ("sh", "-v", f"--table={folder / 'table'}")},
        {"env": {"MODE": "2", "PATH": f"{folder}:/bin"}},
        {"env": {"MODE": "1", "PATH": f"{folder}:/usr"}},
        {"output_shape": None},
        {"names": ("b", "a")},
        {"kind": "integer"},
        {"identity": "engine 2"},
    ]
    common = {"env": {"MODE": "1", "PATH": f"{folder}:/bin"}}
    found = [identity_of(program(folder, **{**common, **change})) for change in changes]
    assert len({base, *found}) == len(changes) + 1
    same: list[dict[str, Any]] = [
        {"inputs": {"b.txt": "y\n", "a.txt": "x = {a}\n"}},
        {"timeout_s": 3.0},
        {"threads": 2},
        {"keep": "all"},
        {"scratch": folder / "scratch"},
        {"upper": 2.0},
        {"env": {"PATH": f"{folder}:/bin", "MODE": "1"}},
    ]
    assert {identity_of(program(folder, **{**common, **change})) for change in same} == {base}
    for name in ("engine", "table"):
        (folder / name).write_text((folder / name).read_text(encoding="utf-8") + "\n", encoding="utf-8")
        changed = identity_of(program(folder, **common))
        assert changed != base
        base = changed


def test_an_edited_deck_does_not_find_the_old_results(folder: Path, tmp_path: Path) -> None:
    def run(deck: str) -> Any:
        template = TextTemplate(inputs={"in.sh": deck}, output="stdout.txt")
        simulator = ExternalSimulator(template, Profile(("sh", "in.sh")), ParameterSpace((Parameter("a"),)), ())
        store = Store(tmp_path / "store", above_s=0)
        return bridge.smooth(simulator, seed=0, num_samples=4, scale=0.01, memory=store).estimate(THETA)

    assert run("echo {a}\n").num_cached == 0
    edited = run("echo 10{a:.3f}\n")
    assert edited.num_cached == 0
    assert float(edited.value) == pytest.approx(100.3, abs=0.2)
    assert run("echo {a}\n").num_cached == 4


def test_another_mesh_is_another_simulator(tmp_path: Path) -> None:
    import trimesh

    theta = torch.tensor([25.0, 15.0, 4.0], dtype=torch.float64)

    def run(mesh: Any, store: Store | None) -> Any:
        simulator = bridge.make("raster", mesh=mesh, size=(16, 16), lens=20.0)
        return bridge.smooth(simulator, seed=0, num_samples=4, scale=0.1, memory=store).estimate(theta)

    run(trimesh.creation.box(), Store(tmp_path, above_s=0))
    ball = trimesh.creation.icosphere(2)
    stored, true = run(ball, Store(tmp_path, above_s=0)), run(ball, None)
    assert stored.num_cached == 0
    assert torch.equal(stored.value, true.value)
    assert run(trimesh.creation.box(), Store(tmp_path, above_s=0)).num_cached == 4


def test_meshes_count_by_what_is_drawn_not_by_what_they_have_computed() -> None:
    import trimesh

    def box(**changes: Any) -> Any:
        mesh = trimesh.creation.box(**changes)
        return mesh

    plain = identity(lab.closed(box()))
    used = box()
    assert used.is_watertight  # and much else is kept
    assert used.vertex_normals.shape == (8, 3)
    assert identity(lab.closed(used)) == plain
    used.visual.face_colors[0] = [255, 0, 0, 255]
    coloured = identity(lab.closed(used))
    scenes = [trimesh.Scene() for _ in range(2)]
    for scene, size in zip(scenes, (1.0, 2.0), strict=True):
        scene.add_geometry(box(), transform=np.diag([size, size, size, 1.0]))
    found = {plain, coloured, identity(lab.closed(box(extents=(1, 1, 2)))), *map(identity, map(lab.closed, scenes))}
    assert len(found) == 5


# --- files and folders --------------------------------------------------------------------------------------------


def test_a_text_is_a_text_but_for_programs_and_what_is_temporary(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    found = []
    for i in range(2):
        folder = tmp_path / "tmp" / str(i)  # another one in each process
        folder.mkdir()
        program, table = tmp_path / str(i), tmp_path / f"table{i}"
        for path in (program, table, folder / "a"):
            path.write_text("1", encoding="utf-8")
        program.chmod(0o755)
        found.append([identity(lab.closed(str(path))) for path in (folder, program, table)])
    assert found[0][0] == found[1][0]
    assert found[0][2] != found[1][2]
    (tmp_path / "0").write_text("2", encoding="utf-8")
    (tmp_path / "table0").write_text("2", encoding="utf-8")
    assert identity(lab.closed(str(tmp_path / "0"))) != found[0][1]
    assert identity(lab.closed(str(tmp_path / "table0"))) == found[0][2]


def test_a_path_stands_for_what_is_there(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "table.txt").write_text("1", encoding="utf-8")
    file, place = tmp_path / "a" / "inner" / "table.txt", tmp_path / "b" / "inner" / "table.txt"
    of = [lambda path: identity(lab.closed(path)), lambda path: identity(lab.default({"path": [path]}))]
    for seen in of:
        before, folder_before = seen(file), seen(tmp_path / "a")
        assert (before, folder_before) == (seen(place), seen(tmp_path / "b"))
        assert seen(str(file)) == before  # in the folder for temporary files
        file.write_text(file.read_text(encoding="utf-8") + "2", encoding="utf-8")
        assert seen(file) != before
        assert seen(tmp_path / "a") != folder_before
        place.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
        place.with_name("more").write_text("", encoding="utf-8")
        assert seen(tmp_path / "a") != seen(tmp_path / "b")
        place.with_name("more").unlink()
    assert identity(lab.closed(tmp_path / "nowhere")) != identity(lab.closed(tmp_path / "a"))


def test_a_path_that_code_only_writes_to_is_no_part_of_it(tmp_path: Path) -> None:
    def writing(path: Path) -> Any:
        def f(x: Any) -> Any:
            with path.open("ab") as file:
                file.write(b"x")
            return x

        return f

    def reading(path: Path) -> Any:
        def f(x: Any) -> Any:
            return x * float(path.read_text())

        return f

    file = tmp_path / "calls"
    for made, same in ((writing, True), (reading, False)):
        file.write_text("1", encoding="utf-8")
        before = identity(made(file))
        file.write_text("2", encoding="utf-8")
        assert (identity(made(file)) == before) == same


def test_a_folder_that_is_too_large_or_shut_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("bridge.simulator.file_contents._MOST_FILES", 2)
    for i in range(3):
        (tmp_path / str(i)).touch()
    with pytest.raises(InputError, match=r"closure variable 'c' of <lambda>: .*more than 2 files"):
        identity(lab.closed(tmp_path))


# --- what a fit is ------------------------------------------------------------------------------------------------


def test_another_loss_or_map_is_another_fit(tmp_path: Path) -> None:
    def f(x: Any) -> Any:
        return np.array([x[0], x[0] ** 2])

    def loss(power: float) -> Any:
        return lambda y, t: ((y - t).abs() ** power).sum()

    def doubled(by: list[float]) -> Any:
        return lambda x: x * by[0]

    def optimiser(rate: float) -> Any:
        return lambda parameters: torch.optim.SGD(parameters, lr=rate)

    def least(**settings: Any) -> dict[str, Any]:
        return {"method": bridge.GaussNewton(**few), "misfit": bridge.LeastSquares(**settings)}

    few = {"steps": 2, "num_samples": 4}
    own = bridge.TrustRegion(rounds=2, round_size=4)
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"method": own, "misfit": loss(2.0)}, {"method": own, "misfit": loss(3.0)}),
        (least(whiten=doubled([2.0])), least(whiten=doubled([3.0]))),
        (
            {"method": bridge.GaussNewton(blur=[doubled([2.0])], **few)},
            {"method": bridge.GaussNewton(blur=[doubled([3.0])], **few)},
        ),
        (
            {"method": bridge.Torch(optimiser=optimiser(0.1), **few)},
            {"method": bridge.Torch(optimiser=optimiser(0.2), **few)},
        ),
        (least(variance=1.0, robust="huber"), least(variance=1.0, robust="cauchy")),
    ]
    for number, (first, second) in enumerate(pairs):
        run = tmp_path / str(number)
        done = bridge.fit(f, [1.0, 1.0], [0.5], seed=0, run=run, **first)
        again = bridge.fit(f, [1.0, 1.0], [0.5], seed=0, run=run, **first)
        assert again.history == done.history
        with pytest.raises(InputError, match="Expected the settings of the run"):
            bridge.fit(f, [1.0, 1.0], [0.5], seed=0, run=run, **second)
    lock = threading.Lock()
    with pytest.raises(InputError, match=r"Expected loss= of which all can be seen.*closure variable 'lock'"):
        bridge.fit(f, [1.0, 1.0], [0.5], seed=0, misfit=lambda y, t: y.sum() * (lock is lock), run=tmp_path / "l")
    assert not (tmp_path / "l").exists()


# --- another process ----------------------------------------------------------------------------------------------


def test_identities_are_the_same_in_a_process_with_other_hashes_and_folders(tmp_path: Path) -> None:
    here = lab.everything(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    done = subprocess.run(
        [sys.executable, lab.__file__, str(tmp_path / "there")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)
    assert {name: value for name, value in there.items() if here[name] != value} == {}
    assert len(here) == len(there) > 350


def test_functions_that_have_travelled_by_value_are_the_same() -> None:
    names: dict[str, Any] = {"__name__": "__main__", "np": np, "Enum": lab.enum.Enum, "dc": lab.dataclasses}
    text = """
        class Kind(Enum):
            A = 1
        @dc.dataclass
        class Settings:
            gain: float = 2.0
            more: list = dc.field(default_factory=list, compare=False)
            def scaled(self, x): return x * self.gain
        class Slots:
            __slots__ = ("a", "b")
            def __init__(self): self.a, self.b = 1, [2]
        words = {"one", "two", "three"}
        def helper(x): return np.sin(x) if "one" in words else inner(x)
        def inner(x): return helper(x)
        def f(x, s=Settings(more=[1]), *, t=Slots(), k=Kind.A): return helper(x) * s.gain
        class F:
            def __init__(self): self.settings, self.kind = Settings(3.0), Kind.A
            def __call__(self, x): return self.settings.scaled(helper(x))
        g = F()
    """
    exec(textwrap.dedent(text), names)
    for function in (names["f"], names["g"], names["helper"]):
        sent = cloudpickle.dumps(function)
        assert identity(cloudpickle.loads(sent)) == identity(function)
        program = "import pickle, sys; from bridge.simulator.identity import *; "
        program += "from bridge.simulator.function import as_simulator; "
        program += "print(identity_of(as_simulator(pickle.load(sys.stdin.buffer))))"
        if function is names["g"]:
            done = subprocess.run([sys.executable, "-c", program], input=sent, capture_output=True, check=False)
            assert done.stdout.decode().strip() == identity(function), done.stderr.decode()


# --- modules, wherever they go ------------------------------------------------------------------------------------

HOLDERS = {
    "from pk import a, inside": "def f(t):\n    from pk import a\n    return a.g(t)",
    "under another name": "def f(t):\n    from pk import a as b\n    return b.g(t)",
    "the long name": "def f(t):\n    import pk.a\n    return pk.a.g(t)",
    "the long name under another": "def f(t):\n    import pk.a as q\n    return q.g(t)",
    "a relative one, in what is called": "import pk.c\ndef f(t): return pk.c.h(t)",
    "what its package has itself": "def f(t):\n    import pk.a\n    return pk.own(t)",
    "handed on": "from pk import a\ndef k(m, t): return m.g(t)\ndef f(t): return k(a, t)",
    "imported, handed on": "def k(m, t): return m.g(t)\ndef f(t):\n    from pk import a as b\n    return k(b, t)",
    "handed on with its package": "import pk.a\ndef k(m, t): return m.g(t)\ndef f(t): return k(pk.a, t)",
    "its package handed on": "import pk.a\ndef k(m, t): return m.a.g(t)\ndef f(t): return k(pk, t)",
    "from a closure": "import pk.a\ndef k(m, t): return m.g(t)\ndef mk(m): return lambda t: k(m, t)\nf = mk(pk.a)",
    "returned": "from pk import a\ndef sel(): return a\ndef f(t): return sel().g(t)",
    "renamed": "from pk import a\ndef f(t):\n    h = a\n    return h.g(t)",
    "one of two": "from pk import a\ndef f(t):\n    h = a if t[0] else np\n    return h.g(t)",
    "gone through": "from pk import a\ndef f(t): return [m.g(t) for m in (a,)]",
    "by getattr": "from pk import a\ndef f(t): return getattr(a, 'g')(t)",
    "in a table": "from pk import a\nT = {'m': a}\ndef f(t): return T['m'].g(t)",
    "of a nested function": "def f(t):\n    from pk import a\n    def k(x): return j(a, x)\n    return k(t)\n"
    "def j(m, x): return m.g(x)",
    "what two functions take": "import pk.a\ndef one(t): return pk.a.other(t)\ndef f(t): return one(t) + pk.a.g(t)",
    "what the module names": "from pk import a\ndef k(m, t): return m.deep(t)\ndef f(t): return k(a, t)",
    "a variable that is not a function": "from pk import a\ndef k(m, t): return m.N * t\ndef f(t): return k(a, t)",
    "its dictionary": "from pk import a\ndef f(t): return a.__dict__['g'](t)",
    "as a global variable": "def f(t):\n    global m\n    from pk import a as m\n    return h(t)\n"
    "def h(t): return m.g(t)",
    "in its own place": "def f(t):\n    from pk import d\n    return d.g(t)",
    "its long name, handed on": "def k(m, t): return m.g(t)\ndef f(t):\n    import pk.a\n    return k(pk.a, t)",
    "what it makes up": "from pk import a\ndef f(t): return a.made_up * t",
}


@pytest.mark.parametrize("script", HOLDERS.values(), ids=HOLDERS)
def test_a_module_of_ones_own_counts_wherever_it_goes(script: str, tmp_path: Path, monkeypatch: Any) -> None:
    found = []
    for i, value in enumerate((2, 3, 2)):
        folder = tmp_path / str(i)
        (folder / "pk").mkdir(parents=True)
        for name, text in {
            "__init__": f"def own(x): return {value} * x",
            "a": f"from . import b\nN = {value}\ndef g(x): return N * x\ndef other(x): return x\n"
            "def deep(x): return b.g(x)\ndef __getattr__(name): return N",
            "d": f"import sys\nclass D:\n    def g(self, x): return {value} * x\nsys.modules[__name__] = D()",
            "b": f"def g(x): return {value} * x",
            "c": f"def h(x):\n    from . import a\n    # {i}\n    return a.g(x)",
        }.items():
            (folder / "pk" / f"{name}.py").write_text(text, encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            for name in [n for n in sys.modules if n.partition(".")[0] == "pk"]:
                patch.delitem(sys.modules, name)
            names: dict[str, Any] = {"__name__": "__main__", "np": np}
            exec(script, names)
            found.append(identity(names["f"]))
            for name in [n for n in sys.modules if n.partition(".")[0] == "pk"]:
                del sys.modules[name]
    assert found[0] == found[2] != found[1]


def test_what_code_takes_of_a_module_is_all_that_counts_of_it() -> None:
    def made(text: str, **content: Any) -> str:
        names: dict[str, Any] = {"__name__": "__main__", "own": types.ModuleType("own")}
        vars(names["own"]).update(content)
        exec(text, names)
        return identity(names["f"])

    for text in (
        "def f(x): return own.a * x",
        "def f(x): return own.a * x if own is not None else x",
        "def f(x):\n    if own: return own.a * x",
    ):
        assert made(text, a=1, lock=threading.Lock()) == made(text, a=1) != made(text, a=2)
    with pytest.raises(InputError, match=r"variable 'lock' of .*: .*a lock"):
        made("def f(x): return str(own)", lock=threading.Lock())


# --- ways round what code names -----------------------------------------------------------------------------------

BYPASSES = {
    "globals": "def f(x): return x * globals()['K']",
    "eval": "def f(x): return x * eval('K')",
    "eval of a variable": "e = eval\ndef f(x): return x * e('K')",
    "exec": "def f(x):\n    d = {}\n    exec('k = 1', d)\n    return x * d['k']",
    "sys.modules": "import sys\ndef f(x): return x * sys.modules[__name__].K",
    "sys.modules.get": "import sys as s\ndef f(x): return x * s.modules.get('__main__').K",
    "sys.modules inside": "def f(x):\n    import sys\n    return x * sys.modules['__main__'].K",
    "sys.modules from": "from sys import modules\ndef f(x): return x * modules['__main__'].K",
    "importlib.import_module": "import importlib\ndef f(x): return x * importlib.import_module('__main__').K",
    "import_module": "def f(x):\n    from importlib import import_module\n    return x * import_module('m').K",
    "__import__": "def f(x): return x * __import__('__main__').K",
    "importlib.util": "import importlib.util\ndef f(x): return importlib.util.spec_from_file_location('m', 'm.py')",
    "runpy": "import runpy\ndef f(x): return x * runpy.run_path('m.py')['K']",
    "sys._getframe": "import sys\ndef f(x): return x * sys._getframe().f_globals['K']",
    "__globals__": "def f(x): return x * f.__globals__['K']",
    "__subclasses__": "class A: pass\ndef f(x): return x * len(A.__subclasses__())",
}


@pytest.mark.parametrize("script", BYPASSES.values(), ids=BYPASSES)
def test_code_that_reaches_what_it_does_not_name_is_refused(script: str) -> None:
    names: dict[str, Any] = {"__name__": "__main__", "K": 2}
    exec(script, names)
    with pytest.raises(InputError, match=r"by which code reaches what it does not name.*identity="):
        identity(names["f"])
    assert identity_of(as_simulator(names["f"], identity="one")) == "one"


def test_ordinary_code_is_not_refused() -> None:
    names: dict[str, Any] = {"__name__": "__main__", "torch": torch, "np": np}
    exec(
        textwrap.dedent("""
        import sys, importlib, importlib.metadata, inspect
        net = torch.nn.Sequential(torch.nn.Linear(1, 1))
        class Table:
            def eval(self, x): return x
            def exec(self, globals=None): return globals
        def exec_plan(x, vars=None): return x
        def f(x, locals=3):
            net.eval()
            print(len(list(net.modules())), file=sys.stderr)
            words = dict(a=1, **vars(Table()))
            importlib.metadata.version("numpy"), inspect.signature(exec_plan)
            return Table().eval(exec_plan(x)) + words["a"] + len("{x}".format(**{"x": locals}))
        """),
        names,
    )
    identity(names["f"])


def test_what_somebody_has_put_into_a_package_counts(monkeypatch: Any) -> None:
    def of(text: str, **put: Any) -> str:
        names: dict[str, Any] = {"__name__": "__main__", "np": np}
        exec(text, names)
        with monkeypatch.context() as patch:
            for name, value in put.items():
                patch.setattr(np.linalg if name == "norm" else np, name, value, raising=False)
            return identity(names["f"])

    for text, name in (("def f(x): return np.sin(x)", "sin"), ("def f(x): return np.linalg.norm(x)", "norm")):
        assert len({of(text), of(text, **{name: lab.closed(1)}), of(text, **{name: lab.closed(2)})}) == 3
        assert of(text) == of(text)
    gain = "def f(x): return np.gain * x"
    assert of(gain, gain=2.0) != of(gain, gain=3.0)


def test_settings_of_a_process_that_change_numbers_count(monkeypatch: Any) -> None:
    before = identity(lab.plain)
    torch.set_default_dtype(torch.float64)
    try:
        double = identity(lab.plain)
    finally:
        torch.set_default_dtype(torch.float32)
    with decimal.localcontext() as context:
        context.prec = 5
        short = identity(lab.plain)
    assert len({before, double, short}) == 3
    assert identity(lab.plain) == before


def test_what_is_said_about_code_counts_where_code_looks_at_it() -> None:
    def of(text: str) -> str:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(text, names)
        return identity(names["f"])

    record = "import dataclasses\n@dataclasses.dataclass\nclass A:\n    k: HERE = 2\n"
    for text, one, two in (
        ("def f(x):\n    'HERE'\n    return x * len(f.__doc__)", "a", "ab"),
        ("class A:\n    'HERE'\ndef f(x): return x * len(A.__doc__)", "a", "ab"),
        ("def gHERE(): pass\ng = gHERE\ndef f(x): return x * len(g.__name__)", "1", "22"),
        ("def g(a: HERE): pass\ndef f(x): return x * (g.__annotations__['a'] is int)", "int", "float"),
        ("class A:\n    a: HERE\ndef f(x): return x * (A.__annotations__['a'] is int)", "int", "float"),
        (record + "def f(x): return [x for q in dataclasses.fields(A) if q.type is int]", "int", "float"),
    ):
        first, second = text.replace("HERE", one), text.replace("HERE", two)
        assert of(first) == of(first) != of(second), text
    silent = record + "def f(x): return A().k * x"
    assert of(silent.replace("HERE", "int")) == of(silent.replace("HERE", "float"))
    scaled = (
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    k: int = dataclasses.field(metadata={'s': HERE})\n"
    )
    scaled += "def f(x): return [x * q.metadata['s'] for q in dataclasses.fields(A)]"
    assert of(scaled.replace("HERE", "1")) != of(scaled.replace("HERE", "2"))


# --- what hangs on arrays, tensors and the like -------------------------------------------------------------------


class Quantity(np.ndarray):
    unit: Any = None


class SlottedQuantity(np.ndarray):
    __slots__ = ("unit",)


class OwnNumber(np.float64):
    unit: Any


class OwnPath(type(Path())):  # type: ignore[misc]
    unit: Any


class OwnProperty(property):
    unit: Any


class OwnTensor(torch.Tensor):
    unit: Any


class Unit(lab.enum.Enum):
    ONE = 1
    unit: Any


class Answering:
    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return functools.partial(Answering, self.content), ()


def _with_unit(thing: Any, unit: Any) -> Any:
    thing.unit = unit
    return thing


def _member(unit: Any) -> Any:
    return _with_unit(lab.enum.Enum("Local", {"ONE": 1})["ONE"], unit)


def _weak(value: Any) -> Any:
    key = lab.Plain(1)
    return key, weakref.WeakKeyDictionary({key: value})


HANGING: dict[str, Any] = {
    "array": lambda u: _with_unit(np.zeros(2).view(Quantity), u),
    "number": lambda u: _with_unit(OwnNumber(1.0), u),
    "path": lambda u: _with_unit(OwnPath("nowhere"), u),
    "property": lambda u: type("A", (), {"p": _with_unit(OwnProperty(abs), u)}),
    "array with slots": lambda u: _with_unit(np.zeros(2).view(SlottedQuantity), u),
    "array with metadata": lambda u: np.zeros(2, np.dtype("f8", metadata={"unit": u})),
    "masked array": lambda u: _with_unit(np.ma.array([1, 2], mask=[0, 1]), u),
    "tensor": lambda u: _with_unit(torch.zeros(2), u),
    "sparse tensor": lambda u: _with_unit(torch.eye(2).to_sparse(), u),
    "parameter": lambda u: _with_unit(torch.nn.Parameter(torch.zeros(2)), u),
    "tensor of one's own": lambda u: _with_unit(torch.zeros(2).as_subclass(OwnTensor), u),
    "member": _member,
    "class of a member": lambda u: type(_member(u)),
    "methodcaller": lambda u: operator.methodcaller("a", x=u),
    "reduced by a partial": Answering,
    "weak": _weak,
}


@pytest.mark.parametrize("make", HANGING.values(), ids=HANGING)
def test_what_hangs_on_arrays_tensors_and_members_counts(make: Any) -> None:
    found = [identity(lab.closed(make(unit))) for unit in (1, 1000, 1)]
    assert found[0] == found[2] != found[1]


# --- paths in texts, and behind links -----------------------------------------------------------------------------


def test_what_is_behind_a_link_in_a_folder_counts(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for path in (folder / "inner", other):
        path.mkdir(parents=True)
    (other / "k.txt").write_text("1", encoding="utf-8")
    (folder / "link").symlink_to(other)
    (folder / "inner" / "up").symlink_to(folder)  # without an end
    (folder / "none").symlink_to(tmp_path / "nowhere")
    before = identity(lab.closed(folder))
    assert identity(lab.closed(folder)) == before
    (other / "k.txt").write_text("2", encoding="utf-8")
    after = identity(lab.closed(folder))
    assert after != before
    (folder / "empty").mkdir()
    assert identity(lab.closed(folder)) != after


WHERE: dict[str, Any] = {
    "template: a path": {"arguments": ("{k}",)},
    "template: an option": {"arguments": ("--x={k}",)},
    "template: one letter": {"arguments": ("-I{k}", "{{a}}")},
    "template: a list": {"arguments": ("a,{k}:b",)},
    "input": {"inputs": {"in.txt": "mass = {{a}}\ntable = '{k}'\n"}},
    "input: a comment": {"inputs": {"in.txt": "x {{a}} # see {k};\n"}},
    "profile: a path": {"argv": ("{k}",)},
    "profile: one letter": {"argv": ("-f{k}",)},
    "profile: a script": {"argv": ("-c", "cat {k} > out && echo $1")},
    "profile: a folder": {"argv": ("-I{d}",)},
    "variable": {"env": {"K": "{k}"}},
    "variable: a list": {"env": {"K": "{d}:/usr/lib"}},
    "variable: programs": {"env": {"PATH": "{d}:/usr/bin:/bin"}},
    "a launcher's program": {"argv": ("-n", "4", "engine"), "env": {"PATH": "{d}:/usr/bin:/bin"}},
}


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.filterwarnings("ignore:TextTemplate has no placeholder")  # of constant outputs
def test_files_that_texts_name_by_absolute_paths_count(where: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in ("k.txt", "engine"):
        (folder / name).write_text("1", encoding="utf-8")
        (folder / name).chmod(0o755)

    def filled(text: str) -> str:
        return text.replace("{k}", str(folder / "k.txt")).replace("{d}", str(folder)).replace("{{a}}", "{a}")

    def made() -> str:
        inputs = {name: filled(text) for name, text in where.get("inputs", {}).items()}
        template = TextTemplate(output="o", inputs=inputs, arguments=tuple(map(filled, where.get("arguments", ()))))
        env = {name: filled(text) for name, text in where.get("env", {}).items()}
        profile = Profile(("sh", *map(filled, where.get("argv", ()))), env=env)
        return identity_of(ExternalSimulator(template, profile, ParameterSpace((Parameter("a"),)), ()))

    before = made()
    assert made() == before
    for name in ("k.txt", "engine"):
        (folder / name).write_text("2", encoding="utf-8")
    assert made() != before


def test_a_program_in_a_line_for_a_shell_counts(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    program = tmp_path / "engine"
    program.write_text("#!/bin/sh\necho 1\n", encoding="utf-8")
    program.chmod(0o755)
    before = identity(lab.closed(f"nice {program} 1.5"))
    program.write_text("#!/bin/sh\necho 2\n", encoding="utf-8")
    assert identity(lab.closed(f"nice {program} 1.5")) != before
