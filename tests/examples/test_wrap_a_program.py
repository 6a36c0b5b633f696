"""The example that wraps a command-line program does what it says, and is as short as the README says."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "wrap_a_program.py"
pytestmark = pytest.mark.skipif(shutil.which("awk") is None, reason="no awk")


def test_the_wrapped_program_is_the_formula() -> None:
    simulator = runpy.run_path(str(SCRIPT))["simulator"]
    decay, rate = 0.7, 3.3
    t = 0.1 * np.arange(40)
    exact = 1000 + 500 * np.exp(-decay * t) * np.sin(rate * t)
    counts = simulator(np.array([[decay, rate]]), np.zeros(1, np.uint64))[0]
    assert (counts == np.round(counts)).all()
    assert ((exact - counts > -1e-6) & (exact - counts < 1 + 1e-6)).all()


def test_it_recovers_what_the_target_was_made_of(tmp_path: Path, run_alone: Any) -> None:
    done = run_alone(SCRIPT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"recovered: \{'decay': ([\d.]+), 'rate': ([\d.]+)\}\n", done.stdout)
    assert found is not None, done.stdout
    assert abs(float(found[1]) - 0.4) < 0.02
    assert abs(float(found[2]) - 5.0) < 0.02
    assert list(tmp_path.iterdir()) == []


def test_it_is_short() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    docstring = ast.parse(text).body[0].end_lineno
    assert docstring is not None
    assert len(text.splitlines()) - docstring < 40
