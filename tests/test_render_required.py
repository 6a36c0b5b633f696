"""Where OpenGL is expected and missing, tests that need it fail and say why; elsewhere they are skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDS_OPENGL = "import pytest\n\n@pytest.mark.gl\ndef test_with_opengl():\n    pass\n"


@pytest.mark.skipif(sys.platform != "linux", reason="hides libraries by means of the Linux loader")
@pytest.mark.parametrize(("required", "status", "outcome"), [("1", 1, "error"), ("0", 0, "skipped")])
def test_missing_opengl_fails_where_it_is_required(required: str, status: int, outcome: str, tmp_path: Path) -> None:
    hidden = tmp_path / "libraries"
    hidden.mkdir()
    for name in ("libEGL.so.1", "libGL.so.1", "libOSMesa.so.8"):
        (hidden / name).write_bytes(b"not a library")  # found first, and refused
    (tmp_path / "test_small.py").write_text(NEEDS_OPENGL, encoding="utf-8")
    environment = os.environ | {
        "BRIDGE_REQUIRE_GL": required,
        "LD_LIBRARY_PATH": str(hidden),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"),
            *("-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, tmp_path / "test_small.py"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == status, done.stdout + done.stderr
    # The loader's own words say why.
    assert f"no OpenGL: {hidden}/libEGL.so.1: " in done.stdout
    assert f"1 {outcome}" in done.stdout
    assert ("BRIDGE_REQUIRE_GL is set" in done.stdout) == (required == "1")
