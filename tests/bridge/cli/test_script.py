"""`python -m bridge run script.py`: one rank's failure ends the job on all, wherever in the script it happens."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ENTRY = Path(__file__).resolve().parents[3] / "bridge" / "__main__.py"

FIT = """
import sys
import numpy as np, torch, bridge
smoothed = bridge.smooth(lambda x: np.sin(x), seed=0, num_samples=16)
value = smoothed(torch.zeros(2))
if bridge.is_root():
    print(sys.argv[1:], __name__, value.tolist())
"""


def write(folder, text):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def test_a_script_runs_as_it_does_by_itself(tmp_path):
    path = write(tmp_path, FIT)
    plain, run = (
        subprocess.run([sys.executable, *words, path, "-a", "--b=1"], capture_output=True, text=True, timeout=120)
        for words in ([], ["-m", "bridge", "run"])
    )
    assert run.returncode == 0
    assert run.stdout == plain.stdout
    assert "['-a', '--b=1'] __main__" in run.stdout


def test_exit_codes_and_errors_of_one_process(tmp_path, run_alone):
    def run(text):
        return run_alone(ENTRY, "run", write(tmp_path, text))

    assert run("import sys; sys.exit(5)").returncode == 5
    told = run("import sys; sys.exit('no input')")
    assert (told.returncode, told.stderr.strip()) == (1, "no input")
    failed = run("1 / 0")
    assert failed.returncode == 1
    assert "ZeroDivisionError" in failed.stderr
    missing = run_alone(ENTRY, "run", tmp_path / "nowhere.py")
    assert missing.returncode == 2
    assert "no file" in missing.stderr


@pytest.mark.mpi
def test_ranks_run_a_script_and_its_neighbours(tmp_path, run_ranks):
    (tmp_path / "helper.py").write_text("name = 'neighbour'\n")
    path = write(tmp_path, "import helper\n" + FIT + "if bridge.is_root():\n    print(helper.name)\n")
    result = run_ranks(2, ENTRY, "run", path, "x")
    assert result.returncode == 0, result.stderr
    assert "['x'] __main__" in result.stdout
    assert "neighbour" in result.stdout


@pytest.mark.mpi
@pytest.mark.every_mpi
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("if int(__import__('os').environ['RANK_OF_TEST']) == 1: raise ValueError('no such file')", "no such file"),
        ("if rank == 1: raise ValueError('too cold')", "too cold"),
        ("if rank == 1: sys.exit(3)", "end of the script"),
        ("if rank == 1: sys.exit()", "end of the script"),
    ],
    ids=["before bridge", "raises", "exits", "ends early"],
)
def test_one_rank_that_leaves_ends_all(tmp_path, run_ranks, text, said):
    """Rank 1 leaves before its first call into bridge, while rank 0 waits for it there."""
    rank = "from mpi4py import MPI; import os, sys; rank = MPI.COMM_WORLD.Get_rank()"
    head = f"{rank}; os.environ['RANK_OF_TEST'] = str(rank)"
    result = run_ranks(2, ENTRY, "run", write(tmp_path, f"{head}\n{text}\n{FIT}"), timeout=60)
    assert result.returncode != 0
    assert said in result.stderr
    assert "rank 1" in result.stderr or "ranks [1]" in result.stderr
    assert "__main__ [" not in result.stdout
