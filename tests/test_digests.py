"""`tools/digests.py`: results are the same in each way of evaluating them, and a number that has changed is noticed."""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
FEW = "smooth/(kept|streamed)$|fit/auto coarse$|study/some"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module("digests")
    for name in ("digests", "digest_cases", "digest_boxes"):
        sys.modules.pop(name, None)


@pytest.mark.mpi
def test_a_few_cases_agree_in_one_process_a_pool_and_on_two_ranks(tool: Any, tmp_path: Path) -> None:
    out = tmp_path / "digests.json"
    command = [sys.executable, str(TOOLS / "digests.py"), "--only", FEW, "--ranks", "2", "--out", str(out)]
    done = run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert set(found) == {"smooth/kept", "smooth/streamed", "fit/auto coarse", "study/some"}
    # One process and two ranks; a pool and a driver besides, where the case is for them.
    ways = {line.rsplit(None, 5)[0].strip(): int(line.split()[-2]) for line in done.stdout.splitlines()}
    assert ways == {"smooth/kept": 5, "smooth/streamed": 5, "fit/auto coarse": 3, "study/some": 4}
    assert {"value", "jacobian", "vjp", "jvp", "backward"} < set(found["smooth/streamed"]["numbers"])
    assert {"parameters", "covariance", "history"} < set(found["fit/auto coarse"]["numbers"])


def test_a_changed_bit_or_word_is_noticed(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    parts = importlib.import_module("digest_cases").Parts

    def found(number: float, word: str) -> dict[str, Any]:
        out = parts()
        out.number("value", np.array([1.0, number, math.nan]))
        out.say("warning", word)
        return {"a case": {"numbers": out.numbers, "words": out.words}}

    before = found(2.0, "careful")
    assert tool.compare(found(2.0, "careful"), before)
    assert not tool.compare(found(np.nextafter(2.0, 3.0), "careful"), before)
    assert "a case: value (3.0 -> 3.0000000000000004)" in capsys.readouterr().out
    assert not tool.compare(found(2.0, "beware"), before)
    assert "a case: only words of warning" in capsys.readouterr().out
    assert not tool.compare({}, before)
    assert not tool.compare(before, {})
    said = capsys.readouterr().out
    assert "gone    a case" in said
    assert "new     a case" in said


def test_a_rank_that_differs_is_noticed(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    case = {"a case": {"numbers": {"value": ["00", 1.0], "vjp": ["11", 1.0]}, "words": {}}}
    other = copy.deepcopy(case)
    other["a case"]["numbers"]["vjp"] = ["12", 1.0]
    assert tool.show({"serial": case, "2 ranks": copy.deepcopy(case)})
    assert not tool.show({"serial": case, "2 ranks": case, "2 ranks (rank 1)": other})
    assert "differs over ways in numbers, 2 ranks (rank 1): vjp" in capsys.readouterr().out
    assert not tool.show({"serial": case, "2 ranks": {"a case": {"error": "ValueError: no"}}})
    assert "failed, 2 ranks: ValueError: no" in capsys.readouterr().out


def test_dtype_and_shape_count_and_the_bits_of_nan_do_not(tool: Any) -> None:
    parts = importlib.import_module("digest_cases").Parts()
    other_nan = np.array([0x7FF8000000000001], dtype=np.uint64).view(np.float64)
    values = {"a": np.zeros(2), "b": np.zeros(2, dtype=np.float32), "c": np.zeros((2, 1)), "d": -np.zeros(2)}
    for name, value in {**values, "nan": np.array([np.nan]), "other nan": other_nan}.items():
        parts.number(name, value)
    digests = {name: digest for name, (digest, _) in parts.numbers.items()}
    assert len({digests[name] for name in values}) == 4
    assert digests["nan"] == digests["other nan"]
