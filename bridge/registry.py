"""Finds simulators by name: ours, and those of other people's packages.

A package announces its simulators through the entry-point group `bridge.simulators`; a script registers its own with
the decorator. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any, TypeVar

from bridge.errors import InputError, SetupError

GROUP = "bridge.simulators"

Factory = TypeVar("Factory", bound=Callable[..., Any])
_registered: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator: makes a class or factory available as `bridge.make(name, ...)`.

    Raises:
        InputError: the name is taken by another factory.
    """

    def decorate(factory: Factory) -> Factory:
        taken = _registered.get(name)
        if taken is not None and taken is not factory:
            raise InputError(
                f"Expected a new simulator name, got {name!r}, which {taken.__module__}.{taken.__qualname__} has. "
                "Choose another name."
            )
        _registered[name] = factory
        return factory

    return decorate


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


def list_simulators() -> list[str]:
    """Names that `make` knows, sorted."""
    return sorted({*_registered, *_entry_points()})


def find(name: str) -> Callable[..., Any]:
    """The class or factory behind `name`.

    Raises:
        InputError: unknown name; the message lists the known ones.
        SetupError: the name is known but its module cannot be imported.
    """
    if name in _registered:
        return _registered[name]
    point = _entry_points().get(name)
    if point is None:
        known = ", ".join(list_simulators()) or "none (is the package installed? `pip install -e .`)"
        raise InputError(f"Unknown simulator {name!r}. Known simulators: {known}.")
    try:
        factory: Callable[..., Any] = point.load()
    except (ImportError, AttributeError) as error:
        package = point.value.partition(":")[0].partition(".")[0]
        ours = point.dist.name if point.dist is not None else "its distribution"
        owners = sorted({owner for owner in metadata.packages_distributions().get(package, []) if owner != ours})
        clash = f" The import name {package!r} is also installed by {', '.join(owners)}." if owners else ""
        raise SetupError(
            f"Simulator {name!r} of {ours} ({point.value}) cannot be imported: {error}.{clash} Install what is "
            "missing, or use a separate environment."
        ) from error
    return factory


def make(name: str, /, *args: Any, **options: Any) -> Any:
    """Makes the simulator called `name`, passing the other arguments to its class or factory."""
    return find(name)(*args, **options)
