"""The public names of bridge: which there are, and each imported when it is first used.

`bridge/__init__.pyi` is the list, so that type checkers and Python have the same one. A library that does this,
lazy_loader, takes names from below one package alone; ours are of three.
"""

from __future__ import annotations

import ast
import pkgutil
import sys
from functools import cache
from importlib import import_module
from typing import Any

from bridge.checks import did_you_mean
from bridge.own_packages import check_not_hidden

PACKAGE = "bridge"


@cache
def _table() -> dict[str, str]:
    """Public name -> the module that it is imported from."""
    stub = pkgutil.get_data(PACKAGE, "__init__.pyi")
    assert stub is not None
    return {
        alias.name: str(statement.module)
        for statement in ast.parse(stub).body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def public_names() -> list[str]:
    """All of them, sorted."""
    return sorted([*_table(), "__version__"])


def public(name: str) -> Any:
    """What `bridge.NAME` is.

    Raises:
        AttributeError: there is none of that name; the message says which is meant. `from bridge import NAME` raises
            ImportError.
        SetupError: a folder of the user's hides the package that it is in.
    """
    if name.startswith("__"):  # Python asks for such by itself
        raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
    module = _table().get(name)
    if module is None:
        meant = did_you_mean(name, _table()) or " dir(bridge) lists the public names."
        # An AttributeError ends in an ImportError of Python's own, which does not say what is meant before 3.12.
        if sys._getframe(2).f_globals.get("__name__") == "importlib._bootstrap":
            raise ImportError(f"cannot import name {name!r} from {PACKAGE!r}.{meant}", name=PACKAGE)
        # With a name and no object, or Python would add what it thinks is meant.
        raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}.{meant}", name=name)
    if module == PACKAGE:
        return import_module(f"{module}.{name}")
    check_not_hidden(module.partition(".")[0])
    found = import_module(module)
    return getattr(found, name) if hasattr(found, name) else import_module(f"{module}.{name}")
