"""Our three packages stand beside each other; a folder of the user's with the name of one may hide it."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path

from bridge.errors import SetupError

DISTRIBUTION = "simulation-bridge"
PACKAGES = ("bridge", "adapters", "simulators")
_HOME = Path(__file__).resolve().parents[1]


@cache
def check_not_hidden(package: str) -> None:
    """Raises SetupError where Python finds another package of that name before ours, and names it by its path."""
    ours = _HOME / package
    if package not in PACKAGES or not ours.is_dir():
        return
    loaded = sys.modules.get(package)
    spec = importlib.util.find_spec(package) if loaded is None else loaded.__spec__
    if spec is None:  # not to be found at all: the import says so
        return
    places = [Path(place).resolve() for place in spec.submodule_search_locations or [spec.origin or ""]]
    if ours not in places:
        raise SetupError(
            f"Expected our package {package!r} in {ours}, got {places[0]}, which hides it: Python looks in the "
            "folder of the script first, or in the current one. Rename yours, or start from another folder."
        )
