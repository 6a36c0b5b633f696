"""`make setup`: an interpreter that was asked for is taken, or the set-up says why not and stops."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def set_up(folder, **variables):
    """Runs the script in a copy of the checkout that has nothing else, so that it can install nothing."""
    (folder / "tools").mkdir(exist_ok=True)
    for name in ("tools/setup.sh", "tools/opengl.py", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, folder / name)
    environment = {**os.environ, "VENV": str(folder / ".venv"), **{k: str(v) for k, v in variables.items()}}
    command = ["bash", str(folder / "tools" / "setup.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def interpreter(path, version):
    path.write_text(f"#!/bin/sh\necho {version}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("ready", [False, True], ids=["from nothing", "with an environment"])
def test_an_interpreter_that_cannot_run_is_an_error(tmp_path, ready):
    if ready:  # one of another interpreter, which was done before
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        interpreter(tmp_path / ".venv" / "bin" / "python", "3.11")
    for python in ("/nonexistent", tmp_path, interpreter(tmp_path / "of no version", "")):
        done = set_up(tmp_path, PYTHON=python)
        assert done.returncode == 1
        assert f"PYTHON={python} cannot be run. Name an interpreter of Python 3.11 or later" in done.stderr
    assert (tmp_path / ".venv").exists() == ready


def test_an_interpreter_that_is_too_old_is_an_error(tmp_path):
    done = set_up(tmp_path, PYTHON=interpreter(tmp_path / "old", "3.9"))
    assert done.returncode == 1
    assert "is Python 3.9; 3.11 or later is needed" in done.stderr
