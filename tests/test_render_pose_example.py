"""The pose example: it finds poses, keeps to its budget, and gives the same answer on any number of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trimesh", reason="trimesh is optional (extra `render`)")
pytest.importorskip("numba", reason="numba is optional (extra `render`)")

pytest.importorskip("matplotlib", reason="matplotlib is optional (extra `report`)")

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "pose_of_a_teapot.py"


@pytest.mark.mpi
def test_poses_are_found_within_the_budget_alike_on_one_rank_and_on_two(tmp_path: Path, run_ranks: Any) -> None:
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    picture = tmp_path / "picture.png"
    arguments = ["--seeds", "1000:1002", "--budget", "1000"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments, "--output", str(alone), "--picture", str(picture)],
        capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(alone.read_text())
    assert [o["bin"] for o in outcomes] == [1, 2]
    for outcome in outcomes:
        assert outcome["renders"] <= 1000
        assert outcome["error"] < 5
        assert outcome["iou"] > 0.9
    assert "success 1.000" in done.stdout
    assert picture.stat().st_size > 1000
    ranks = run_ranks(2, EXAMPLE, *arguments, "--output", shared, timeout=240)
    assert ranks.returncode == 0, ranks.stderr
    assert json.loads(shared.read_text()) == outcomes
