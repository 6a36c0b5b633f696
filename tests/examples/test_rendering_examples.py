"""The examples of many objects and of a network: what they rest on, what they find, alike on any number of ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trimesh", reason="trimesh is optional (extra `render`)")
pytest.importorskip("numba", reason="numba is optional (extra `render`)")
pytest.importorskip("matplotlib", reason="matplotlib is optional (extra `report`)")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def ten() -> Any:
    import poses_of_ten_objects

    return poses_of_ten_objects


@pytest.fixture
def learning() -> Any:
    import pose_network

    return pose_network


def run(program: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Its command line, in this process."""
    monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, arguments)])
    program.main()


def test_a_heap_is_what_it_is_said_to_be(ten: Any) -> None:
    heap = ten.Heap(1000)
    assert heap.errors(heap.truth) == (pytest.approx(np.zeros(10), abs=1e-5), pytest.approx(np.zeros(10), abs=1e-12))
    angles, shares = heap.errors(heap.start)
    plain = np.array([s.axis is None and len(s.rotations) == 1 for s in heap.symmetries])
    assert plain.sum() == 4
    assert ((angles[plain] > 20) & (angles[plain] < 35)).all()
    assert (angles < 35).all()  # no more than that with symmetries
    assert ((shares > 0.15) & (shares < 0.3)).all()
    assert heap.visible.min() >= 0.5
    assert heap.visible.mean() <= 0.93  # some are hidden in part


def test_an_object_changes_its_own_part_of_the_image_alone(ten: Any) -> None:
    heap = ten.Heap(1001)
    rng = np.random.default_rng(0)
    for margin in (0.05, 0.3):
        near = heap.near(heap.start[1], margin)
        moves = np.zeros((30, 10, 6))
        for i, move in enumerate(moves):
            shift = rng.normal(size=3)
            move[i % 10] = [*rng.normal(size=3) * 60, *shift * (margin / np.linalg.norm(shift))]
        images, _ = heap.images(ten.rows_of(heap.start, np.concatenate([np.zeros((1, 10, 6)), moves])))
        changed = np.abs(ten.pooled(images[1:] - images[:1])).max(axis=1) > 0
        assert changed.any(axis=(1, 2)).mean() > 0.9
        for i, where in enumerate(changed):
            assert not (where & ~near[i % 10]).any()


def test_objects_of_one_colour_do_not_touch(ten: Any) -> None:
    rng = np.random.default_rng(1)
    for n in (1, 4, 10):
        near = rng.random((n, 9, 9)) < 0.08
        colours = ten.colouring(near)
        for a in range(n):
            for b in range(a):
                assert colours[a] != colours[b] or not (near[a] & near[b]).any()
        assert set(colours) == set(range(colours.max() + 1))


@pytest.mark.gl
def test_both_renderers_show_the_same_heap(ten: Any) -> None:
    first, second = (ten.Heap(1000, backend).target for backend in ("raster", "pyrender"))
    assert np.quantile(np.abs(first - second), 0.99) < 2 / 255


@pytest.mark.mpi
def test_ten_poses_are_found_within_the_budget_alike_on_one_rank_and_on_two(
    ten: Any, tmp_path: Path, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, shared, picture = tmp_path / "alone.json", tmp_path / "shared.json", tmp_path / "picture.png"
    arguments = ["--seeds", "1000:1001", "--budget", 800]
    run(ten, monkeypatch, *arguments, "--output", alone, "--picture", picture)
    (outcome,) = json.loads(alone.read_text())
    assert outcome["renders"] <= 800
    assert (np.array(outcome["angles_deg"]) < 5).sum() >= 7
    assert picture.stat().st_size > 10_000
    done = run_ranks(2, EXAMPLES / "poses_of_ten_objects.py", *arguments, "--output", shared, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "smoothing, 800 renders" in done.stdout
    assert shared.read_text() == alone.read_text()


def test_evolution_searches_keep_to_their_budget(ten: Any) -> None:
    pytest.importorskip("cma", reason="pycma is optional (extra `baselines`)")
    heap = ten.Heap(1000)
    before = heap.errors(heap.start)[1].mean()
    for name in ("cma", "cma-separable", "cma-local"):
        heap.renders = 0
        poses = ten.METHODS[name](heap, 0, 100)
        assert 75 < heap.renders <= 100
        assert heap.errors(poses)[1].mean() < before


@pytest.mark.mpi
def test_a_network_learns_through_the_renderer_alike_on_one_rank_and_on_two(
    learning: Any, tmp_path: Path, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, shared, picture = tmp_path / "alone.json", tmp_path / "shared.json", tmp_path / "picture.png"
    arguments = ["--seeds", "1000:1001", "--budget", 5760]
    run(learning, monkeypatch, *arguments, "--output", alone, "--picture", picture)
    (training,) = json.loads(alone.read_text())
    first, last = training["looks"][0], training["looks"][-1]
    assert last["renders"] == 5760
    assert last["mean_angle_deg"] < first["mean_angle_deg"] - 1
    assert last["distance"] < first["distance"] - 0.02
    assert picture.stat().st_size > 10_000
    done = run_ranks(2, EXAMPLES / "pose_network.py", *arguments, "--output", shared, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "smoothing, seed 1000" in done.stdout
    assert shared.read_text() == alone.read_text()


def test_other_trainings_run_within_the_same_budget(learning: Any) -> None:
    pytest.importorskip("cma", reason="pycma is optional (extra `baselines`)")
    camera = learning.Camera("raster")
    for method in ("evolution", "separable-cma", "supervised"):
        training = learning.train(method, camera, 1000, 600)
        assert 0 < training.looks[-1].renders <= 600
        assert not np.array_equal(training.before, training.after)
