"""Whose code it is: Python's, that of a package that is installed and has a version, or the user's own."""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

_HERE = Path(__file__).resolve().parents[2]  # where `bridge` is
# Packages of this project whose simulators count by their text: it may change without a new version.
_OURS = ("simulators", "adapters")
_TEXT = (".py", ".vert", ".frag")


@functools.cache
def owner_of(module: str) -> str | None:
    """Package and version that a module belongs to; None for the user's own."""
    top = module.partition(".")[0]
    if not module or top in ("__main__", "__mp_main__"):
        return None
    path = _path(top)
    if path is None:
        loaded = sys.modules.get(top)
        in_c = top in sys.builtin_module_names or (top in sys.stdlib_module_names and loaded is not None)
        return f"python {platform.python_version()}" if in_c or top == "builtins" else None
    if path.parent == _HERE and top == "bridge":
        return f"bridge {_version('simulation-bridge', top)}"
    if path.parent == _HERE and top in _OURS:
        return f"{top} {_text(path)}"
    if {"site-packages", "dist-packages"} & set(path.parts):
        return f"{top} {_version(top, top)}"
    library = Path(sysconfig.get_paths()["stdlib"]).resolve()
    if top in sys.stdlib_module_names and (library in path.parents or "lib-dynload" in path.parts):
        return f"python {platform.python_version()}"
    return None


def _path(top: str) -> Path | None:
    """The folder of a package, or the file of a module."""
    import importlib.util

    loaded = sys.modules.get(top)
    try:
        spec = getattr(loaded, "__spec__", None) or importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        spec = None
    folders = list(getattr(loaded, "__path__", None) or getattr(spec, "submodule_search_locations", None) or ())
    if folders:
        return Path(folders[0]).resolve()
    origin = getattr(loaded, "__file__", None) or getattr(spec, "origin", None)
    if origin == "frozen":
        origin = getattr(getattr(spec, "loader_state", None), "filename", None) or origin
    return None if origin in (None, "built-in", "frozen") else Path(str(origin)).resolve()


def _version(distribution: str, top: str) -> str:
    version = getattr(sys.modules.get(top), "__version__", None)
    if isinstance(version, str):
        return version
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        owners = metadata.packages_distributions().get(top, [])
        return " ".join(f"{owner} {metadata.version(owner)}" for owner in sorted(set(owners)))


def _text(folder: Path) -> str:
    state = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TEXT and "__pycache__" not in path.parts:
            state.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\0".encode())
            state.update(path.read_bytes())
    return state.hexdigest()
