"""What is long and what goes round in circles is listed here, with a reason, and the lists only shrink.

A test fails where something new is over a limit, where something listed has grown, and where something listed is over
it no longer: then its line goes. `python tools/longest.py` prints what there is.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

_KERNEL = "one compiled loop over pixels: numba inlines it, and its parts share twenty arrays"

# File:function -> its lines of code, at most, and why.
FUNCTIONS = {
    "adapters/render/raster_kernels.py:_shade": (92, _KERNEL),
    "adapters/render/raster_kernels.py:render": (94, _KERNEL),
    "bridge/simulator/bytecode.py:_Stack.step": (63, "one case an instruction of Python's machine"),
}

_ROOMS = "several rooms in one, to be parted"
_ONE = "one subject, read from top to bottom"

# File -> its lines, at most, and why.
FILES = {
    "adapters/render/cameras.py": (514, _ONE),
    "adapters/render/pyrender_compat.py": (464, "what one version of pyrender gets wrong, each with its remedy"),
    "adapters/render/raster_kernels.py": (539, "compiled loops, and their arguments, one a line"),
    "bridge/dispatch/mpi.py": (575, "the only file that may import mpi4py"),
    "bridge/fitting/methods/kriging_search.py": (520, _ROOMS),
    "bridge/planning/cost_model.py": (460, _ONE),
    "simulators/cryoet/formats/structure.py": (546, "PDB and mmCIF files, and all that is odd in them"),
    "simulators/cryoet/simulator.py": (469, _ONE),
    "simulators/cryoet/specimen/potential.py": (527, _ONE),
    "simulators/cryoet/temsim/potential.py": (455, "a table of published coefficients, and what is made of it"),
    "simulators/cryoet/tilt/series.py": (513, _ONE),
}

# Door -> how many named arguments it takes, at most, and why; the limits are in tools/longest.py.
SIGNATURES: dict[str, tuple[int, str]] = {}

# Files that import each other, by imports in functions or for type checkers alone, and why.
CIRCLES: dict[tuple[str, ...], str] = {}


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("longest")
    sys.path.remove(str(ROOT / "tools"))
    sys.modules.pop("longest", None)


def compare(found: Mapping[str, int], listed: Mapping[str, tuple[int, str]]) -> None:
    new = {name: length for name, length in found.items() if name not in listed}
    grown = {name: found[name] for name, (most, _) in listed.items() if found.get(name, 0) > most}
    gone = sorted(set(listed) - set(found))
    assert not new, f"Over the limit, and not listed: cut it into steps, or say why not. {new}"
    assert not grown, f"Longer than listed: {grown}"
    assert not gone, f"Listed, and over the limit no longer: take it off the list. {gone}"
    assert all(reason for _, reason in listed.values())


def test_functions_are_short(tool):
    compare(tool.over(tool.functions(), tool.FUNCTION), FUNCTIONS)


def test_files_are_short(tool):
    compare(tool.over(tool.files(), tool.FILE), FILES)


def test_signatures_are_narrow(tool):
    assert set(tool.SIGNATURES) <= set(tool.signatures())
    compare(tool.too_wide(), SIGNATURES)


def test_no_files_import_each_other(tool):
    found = set(tool.circles())
    assert not found - set(CIRCLES), "Files that import each other: move what both need to a third."
    assert not set(CIRCLES) - found, "Listed, and a circle no longer: take it off the list."
    assert all(CIRCLES.values())


def test_circles_are_found(tool):
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a", "e"}}
    assert tool.circles(graph) == [("a", "b", "c"), ("e",)]


def test_imports_in_functions_and_for_type_checkers_count(tool):
    imports = tool.imports()
    assert "bridge/cli/job.py" in imports["bridge/cli/main.py"]  # in a function, and under TYPE_CHECKING
    assert "adapters/render/raster_kernels.py" in imports["adapters/render/raster.py"]  # from a package
    assert "bridge/errors.py" in imports["simulators/paths.py"]


def test_lines_of_code_leave_out_docstrings_comments_and_empty_lines(tool, monkeypatch):
    text = 'def f(a, *, b):\n    """Says\n    more."""\n\n    # why\n    x = """a\n    b"""\n    return x\n'
    source = tool.Source(ROOT / "bridge" / "some.py", text, ast.parse(text))
    monkeypatch.setattr(tool, "sources", lambda: (source,))
    assert tool.functions() == {"bridge/some.py:f": 4}
    assert tool.signatures() == {"bridge/some.py:f": 2}
    assert tool.files() == {"bridge/some.py": 8}


def test_each_room_has_its_line():
    said = (ROOT / "bridge" / "__init__.py").read_text(encoding="utf-8")
    listed = set(re.findall(r"`bridge\.(\w+)`", said.split("The rooms behind them")[1]))
    rooms = {path.parent.name for path in (ROOT / "bridge").glob("*/__init__.py")} | {"studies", "testing"}
    assert listed == rooms
    for package in ("bridge", "adapters", "simulators"):
        for path in (ROOT / package).rglob("__init__.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} says nothing"
