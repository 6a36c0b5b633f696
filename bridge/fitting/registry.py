"""Classes found by name: ours, a script's own, and those of other people's packages."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any, Generic, TypeVar, final

from bridge.checks import did_you_mean
from bridge.errors import InputError, SetupError

Kind = TypeVar("Kind")
Member = TypeVar("Member", bound=type[Any])


@final
class Registry(Generic[Kind]):
    """Name -> class, in the order in which they were registered.

    Args:
        what: what they are, in words. group: of entry points, by which packages announce theirs.
        or_else: what may be given in place of a known name, in words.
    """

    def __init__(self, what: str, group: str, or_else: str = "") -> None:
        self.what, self.group, self.or_else = what, group, or_else
        self._registered: dict[str, type[Kind]] = {}

    def register(self, name: str) -> Callable[[Member], Member]:
        """Decorator: makes a class known by a name.

        Raises:
            InputError: the name is taken by another class.
        """

        def decorate(member: Member) -> Member:
            taken = self._registered.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (member.__module__, member.__qualname__):
                raise InputError(
                    f"Expected a new name of a {self.what}, got {name!r}, which {taken.__module__}."
                    f"{taken.__qualname__} has. Choose another name."
                )
            self._registered[name] = member
            return member

        return decorate

    def names(self) -> list[str]:
        """All names that are known; those of packages last, and sorted."""
        return list(dict.fromkeys([*self._registered, *sorted(self._points())]))

    def find(self, name: Any) -> type[Kind]:
        """The class of a name.

        Raises:
            InputError: an unknown name. SetupError: a package announces it and cannot be imported.
        """
        if isinstance(name, str) and name in self._registered:
            return self._registered[name]
        point = self._points().get(name) if isinstance(name, str) else None
        if point is None:
            known = self.names()
            raise InputError(
                f"Unknown {self.what} {name!r}. Known: {', '.join(known)}{self.or_else}."
                f"{did_you_mean(str(name), known)}"
            )
        try:
            found: type[Kind] = point.load()
        except (ImportError, AttributeError) as error:
            raise SetupError(
                f"Expected a {self.what} that can be imported as {name!r}, from {point.value}, got: {error}. Install "
                "what is missing."
            ) from error
        self._registered.setdefault(name, found)
        return found

    def all(self) -> dict[str, type[Kind]]:
        """Every class, by its name."""
        return {name: self.find(name) for name in self.names()}

    def _points(self) -> dict[str, metadata.EntryPoint]:
        return {point.name: point for point in metadata.entry_points(group=self.group)}
