"""Everything that people write comes from `bridge`: each name is there, is told when misspelt, and cannot be hidden."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import bridge

ROOT = Path(__file__).resolve().parents[2]
STUB = (ROOT / "bridge" / "__init__.pyi").read_text(encoding="utf-8")
OURS = ("bridge", "adapters", "simulators")


def python(program: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs a program as `python script.py` in a folder."""
    (folder / "script.py").write_text(textwrap.dedent(program), encoding="utf-8")
    command = [sys.executable, *options, "script.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def loaded_by(program: str, folder: Path) -> set[str]:
    done = python(f"{program}\nimport sys\nprint(*sys.modules)", folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("name", sorted(set(dir(bridge))))
def test_each_public_name_is_what_its_module_has(name):
    assert getattr(bridge, name) is not None


def test_dir_star_and_the_stub_have_the_same_names():
    stubbed = {
        alias.asname for node in ast.parse(STUB).body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {*dir(bridge)} == {*bridge.__all__} == stubbed | {"__version__"}
    everything: dict[str, object] = {}
    exec("from bridge import *", everything)
    assert stubbed <= set(everything)


def test_import_bridge_is_light(tmp_path):
    # Neither torch nor what takes long besides, and no room of ours.
    loaded = loaded_by("import bridge", tmp_path)
    assert not loaded & {"torch", "numpy", "scipy", "mpi4py", "inspect"}
    assert {name for name in loaded if name.startswith(tuple(f"{ours}." for ours in OURS))} == set()


@pytest.mark.parametrize(
    "name", ["InputError", "ParameterSpace", "ExternalSimulator", "RasterSimulator", "AbTEM", "Kind"]
)
def test_a_name_loads_what_it_needs_and_no_torch(name, tmp_path):
    assert not loaded_by(f"import bridge; bridge.{name}", tmp_path) & {"torch", "mpi4py", "matplotlib", "numba"}


def test_help_shows_the_public_names(tmp_path):
    done = python("import bridge; help(bridge)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "class CryoET" in done.stdout
    assert "bridge.simulator" in done.stdout


@pytest.mark.parametrize(
    ("program", "error"),
    [("import bridge; bridge.smoth", "AttributeError"), ("from bridge import smoth", "ImportError")],
)
def test_a_misspelt_name_is_told_once_what_is_meant(program, error, tmp_path):
    said = python(program, tmp_path).stderr
    assert re.search(rf"^{error}: .*'smoth'.*Did you mean 'smooth'\?$", said, re.MULTILINE)
    assert said.count("Did you mean") == 1


def test_a_name_that_is_like_none_says_where_they_are_listed():
    with pytest.raises(AttributeError, match=r"dir\(bridge\) lists"):
        bridge.qqqzzz  # noqa: B018
    assert not hasattr(bridge, "qqqzzz")


def hiding(folder: Path, package: str, kind: str) -> Path:
    """Something of the user's that has the name of a package of ours, beside the script."""
    if kind == "file":
        (folder / f"{package}.py").touch()
        return folder / f"{package}.py"
    (folder / package).mkdir()
    if kind == "package":
        (folder / package / "__init__.py").touch()
    return folder / package


@pytest.mark.parametrize("kind", ["file", "package", "folder"])
@pytest.mark.parametrize(
    ("package", "program"),
    [
        ("adapters", "import bridge; bridge.ExternalSimulator"),
        ("adapters", "from bridge import ExternalSimulator"),
        ("adapters", "import bridge; bridge.make('raster')"),
        ("adapters", "import adapters; import bridge; bridge.pose_metrics"),
        ("simulators", "import bridge; bridge.CryoET"),
        ("simulators", "import bridge; bridge.make('cryoet')"),
    ],
)
def test_a_folder_or_file_that_hides_a_package_of_ours_is_named(package, program, kind, tmp_path):
    theirs = hiding(tmp_path.resolve(), package, kind)
    done = python(program, tmp_path)
    if kind == "folder" and done.returncode == 0:
        return  # a folder without __init__.py hides an editable installation of ours alone
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("bridge.errors.SetupError")]
    assert f"Expected our package {package!r} in {ROOT / package}, got {theirs}" in said
    assert "Rename yours, or start from another folder." in said


@pytest.mark.parametrize("kind", ["file", "package"])
@pytest.mark.parametrize("program", ["import adapters", "from simulators.cryoet import CryoET"])
def test_a_folder_or_file_that_hides_bridge_is_named(program, kind, tmp_path):
    theirs = hiding(tmp_path.resolve(), "bridge", kind)
    said = python(program, tmp_path).stderr
    # The second where an editable installation finds a file of ours behind theirs.
    expected = rf"^(ImportError|\S+SetupError): Expected our package 'bridge' \w+ .*, got {re.escape(str(theirs))}"
    assert re.search(expected, said, re.MULTILINE)
    assert "Rename yours, or start from another folder." in said
    # Where nothing of ours is reached, Python says at least which file it took.
    assert str(theirs) in python("from bridge import smooth", tmp_path).stderr


READ = sorted([*ROOT.glob("examples/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"])


@pytest.mark.parametrize("file", READ, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_people_read_imports_from_bridge_alone(file):
    deeper = re.findall(
        r"^ *(?:from|import) +((?:bridge\.|adapters|simulators)[\w.]*)", file.read_text(encoding="utf-8"), re.M
    )
    assert deeper == []
