"""The pose example: it finds poses, keeps to its budget, goes on where it ended, and does not mind how many ranks."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trimesh", reason="trimesh is optional (extra `render`)")
pytest.importorskip("numba", reason="numba is optional (extra `render`)")
Image = pytest.importorskip("PIL.Image", reason="Pillow is optional (extra `render`)")
pytest.importorskip("matplotlib", reason="matplotlib is optional (extra `report`)")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pose_of_a_teapot.py"
SEEDS = ["--seeds", "1000:1002", "--budget", "1000"]


@pytest.fixture(scope="module")
def example() -> Any:
    return importlib.import_module(EXAMPLE.stem)


def outcomes(path: Path) -> list[dict[str, Any]]:
    """Of a journal, without the time taken."""
    return [{k: v for k, v in json.loads(line).items() if k != "cpu_s"} for line in path.read_text().splitlines()]


@pytest.mark.mpi
def test_poses_are_found_within_the_budget_alike_on_one_rank_and_on_two(
    example: Any, tmp_path: Path, run_ranks: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone.jsonl"
    picture, animation = tmp_path / "picture.png", tmp_path / "way.gif"
    pictures = ["--picture", str(picture), "--animation", str(animation)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *SEEDS, "--output", str(alone), *pictures])
    example.main()
    assert "success 1.0000" in capsys.readouterr().out
    found = outcomes(alone)
    assert [(o["seed"], o["bin"]) for o in found] == [(1000, 1), (1001, 2)]
    for one in found:
        assert one["renders"] <= 1000
        assert one["error"] < 5
        assert one["loss"] < example.ARRIVED
        assert one["iou"] > 0.98
    assert picture.stat().st_size > 1000
    with Image.open(animation) as frames:
        assert frames.n_frames > example.STEPS
    for share in ("seeds", "perturbations"):
        shared = tmp_path / f"{share}.jsonl"
        ranks = run_ranks(2, EXAMPLE, *SEEDS, "--share", share, "--output", shared, timeout=240)
        assert ranks.returncode == 0, ranks.stderr
        assert outcomes(shared) == found
    assert not list(tmp_path.glob("*.jsonl.*")), "parts of ranks were left"


def test_a_task_starts_as_far_off_as_its_bin_says_and_counts_its_renders(example: Any) -> None:
    for seed in (1000, 1001, 1002):
        task = example.Task(seed)
        low, high = example.BINS[seed % 3]
        assert low <= np.hypot(*task.start[1:3]) < high
        assert task.losses(task.truth[None]) == 0
        assert task.losses(task.start[None]) > example.NEAR
        assert (task.renders, task.made) == (2, 2)
        example.smoothing(task, seed, 300)
        assert task.made == task.renders <= 300


def test_a_search_that_arrives_early_is_the_same_with_a_larger_budget(example: Any) -> None:
    small, large = (example.solve("smoothing", 1002, budget) for budget in (1000, 16000))
    assert small.renders < 300
    assert replace(large, budget=1000, cpu_s=0.0) == replace(small, cpu_s=0.0)


def test_a_run_that_was_stopped_goes_on_where_it_was(example: Any, tmp_path: Path) -> None:
    journal, solved = tmp_path / "journal.jsonl", []
    whole = example.Outcome("smoothing", 1000, 5, 2, 100, 0.1, 0.1, 0.0, 1.0, 0.5, [0.0, 0.0, 0.0, 1.0])

    def solver(seed: int, comm: Any) -> Any:
        solved.append(seed)
        if seed == 7 and len(solved) == 2:
            raise KeyboardInterrupt
        return replace(whole, seed=seed)

    with pytest.raises(KeyboardInterrupt):
        example.solve_all(range(6, 9), solver, journal, "seeds")
    with (tmp_path / "journal.jsonl.1").open("w") as part:  # another rank's, killed while it wrote
        part.write(json.dumps(vars(replace(whole, seed=8))) + '\n{"method": "smoo')
    found = example.solve_all(range(6, 9), solver, journal, "seeds")
    assert solved == [6, 7, 7]
    assert found == [replace(whole, seed=seed) for seed in (6, 7, 8)]
    assert [one["seed"] for one in outcomes(journal)] == [6, 7, 8]
    assert list(tmp_path.iterdir()) == [journal]
