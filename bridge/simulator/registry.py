"""Finds simulators by name: ours, those of other people's packages, and what a Python file of one's own has."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from bridge.checks import did_you_mean
from bridge.errors import InputError
from bridge.registry import SIMULATORS


def list_simulators() -> list[str]:
    """Names that `make` knows, sorted."""
    return sorted(SIMULATORS.names())


def find(name: str) -> Callable[..., Any]:
    """The class or factory behind `name`, or what `file.py:function` names.

    Raises:
        InputError: unknown name; the message lists the known ones.
        SetupError: the name is known but its module cannot be imported.
    """
    found: Callable[..., Any] = from_file(name) if is_file(name) else SIMULATORS.find(name)
    return found


def make(name: str, /, *args: Any, **options: Any) -> Any:
    """Makes the simulator called `name`, passing the other arguments to its class or factory.

    Raises:
        InputError: an unknown name, or arguments that the class or factory does not take.
    """
    factory = find(name)
    check_arguments(name, factory, args, options)
    return factory(*args, **options)


def check_arguments(name: str, factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raises InputError where a class or factory does not take these arguments, and says which it takes."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        known = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        said = str(error) if str(error).startswith("got ") else f"got: {error}"
        meant = next((words for word in options if word not in known and (words := did_you_mean(word, known))), "")
        raise InputError(f"Expected the arguments of {name!r}, {said}. Known: {', '.join(known)}.{meant}") from error


# --- files of one's own -------------------------------------------------------------------------------------------


def is_file(name: str) -> bool:
    """Whether a name is that of something in a Python file, `mysim.py:projectile`."""
    return name.partition(":")[0].endswith(".py")


def from_file(name: str, folder: Path | None = None) -> Any:
    """What `file.py:function` names; a relative path is taken from `folder`, or from where the command was started.

    Raises:
        InputError: there is no such file, it cannot be run, or has nothing of that name.
    """
    file, _, attribute = name.partition(":")
    path = (folder or Path()) / file
    if not path.is_file():
        raise InputError(f"Expected a Python file in {name!r}, got {str(path)!r}, which is not a file.")
    module = _load(path.resolve())
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    own = [key for key in public if getattr(vars(module)[key], "__module__", module.__name__) == module.__name__]
    if not attribute:
        raise InputError(f"Expected the function beside the file, {file}:function, got {name!r}. It has: {_list(own)}.")
    if attribute not in vars(module):
        raise InputError(f"Unknown {attribute!r} in {file}. It has: {_list(own)}.{did_you_mean(attribute, own)}")
    return vars(module)[attribute]


def _list(names: list[str]) -> str:
    return ", ".join(names) or "nothing that can be called"


def _load(path: Path) -> ModuleType:
    """A Python file as a module, once; modules beside it can be imported by it, as by a script."""
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    # Under its own name, so that other processes find it; unless that is another module's.
    found = None if path.stem in sys.modules else importlib.util.find_spec(path.stem)
    taken = path.stem in sys.modules or not path.stem.isidentifier()
    taken = taken or (found is not None and Path(found.origin or "").resolve() != path)
    name = f"_file_{path.stem}" if taken else path.stem
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        at = f" (line {lines[-1]})" if lines else ""  # a syntax error says it by itself
        raise InputError(
            f"Expected a Python file that runs, got {path}, which ends in {type(error).__name__}: {error}{at}."
        ) from error
    if taken:
        import cloudpickle

        cloudpickle.register_pickle_by_value(module)
    return module
