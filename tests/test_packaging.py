"""What is installed is what is in git: the wheel, its entry points, its imports, and who may import whom."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Sequence
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bridge", "simulators", "adapters")


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command and returns what it printed; fails with all that it said."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_isolated(program: str, *arguments: str | Path, cwd: Path) -> str:
    """Runs a program without the current directory, PYTHONPATH or the user's packages in sight."""
    return run(sys.executable, "-I", "-c", textwrap.dedent(program), *arguments, cwd=cwd)


def tracked_files(*under: str) -> list[str]:
    names = run("git", "ls-files", "-z", "--", *under, cwd=ROOT).split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def pip(*arguments: str | Path, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tracked files: the checkout's own `build/` may hold files of yesterday."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("the wheel is compared with the files in git, and this is no git checkout")
    directory = tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        copy = directory / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy)
    pip(
        "wheel",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        directory / "dist",
        directory / "source",
        cwd=directory,
    )
    (built,) = (directory / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the wheel alone was installed."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-index", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def differences(found: Sequence[str], expected: Sequence[str]) -> dict[str, list[str]]:
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    return {"missing": missing, "surplus": surplus}


def test_wheel_holds_the_three_packages_as_they_stand_in_git(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        contents = [name for name in archive.namelist() if ".dist-info/" not in name]
    # Whatever is missing needs an `__init__.py` in its folder, or a line under package-data in pyproject.toml.
    assert differences(contents, tracked_files(*PACKAGES)) == {"missing": [], "surplus": []}
    assert "bridge/py.typed" in contents
    assert any(name.startswith("adapters/render/shaders/") for name in contents)


def test_wheel_announces_its_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        announced = ConfigParser(delimiters="=")
        announced.optionxform = str  # names keep their case
        announced.read_string(archive.read(name).decode())
    assert announced["console_scripts"]["bridge"] == "bridge.cli.main:main"
    assert "cryoet" in announced["bridge.simulators"]


def test_installed_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    program = """
        import sys
        from importlib import import_module, metadata
        from pathlib import Path

        target = Path(sys.argv[1]).resolve()
        sys.path.insert(0, str(target))
        for name in sys.argv[2:]:
            found = Path(import_module(name).__file__).resolve()
            assert found.is_relative_to(target), f"{name} was imported from {found}, not from {target}"
        (distribution,) = metadata.distributions(name="simulation-bridge", path=[str(target)])
        for point in distribution.entry_points:
            assert callable(point.load()), point
            print(point.group, point.name)
    """
    loaded = run_isolated(program, installed, *PACKAGES, cwd=tmp_path).splitlines()
    assert {"console_scripts bridge", "bridge.simulators cryoet"} <= set(loaded)


@pytest.mark.parametrize(
    "module", ["bridge", "bridge.errors", "bridge.simulator.protocol", "bridge.simulator.registry", "simulators"]
)
def test_import_is_light(module: str, tmp_path: Path) -> None:
    """Adapters on a login node need no torch, and MPI is not started before it is needed."""
    program = """
        import sys
        from importlib import import_module

        import_module(sys.argv[1])
        print(*sorted({"torch", "mpi4py", "matplotlib"} & sys.modules.keys()))
    """
    assert run_isolated(program, module, cwd=tmp_path).split() == []


def test_imports_run_one_way() -> None:
    command = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    said = run(sys.executable, "-c", command, "--no-cache", cwd=ROOT)
    assert ", 0 broken." in said
