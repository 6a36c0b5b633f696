"""What is found by name: ours, a script's own, and that of other people's packages; one registry a kind.

A script registers its own by `@bridge.register("name")`; a package announces its own through an entry-point group, such
as `bridge.distributions`. Nothing is imported before it is asked for, and no package is looked at for a known name.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from importlib import metadata
from typing import Any, ClassVar, Generic, TypeVar, final

from bridge.checks import did_you_mean
from bridge.errors import InputError, SetupError
from bridge.own_packages import DISTRIBUTION, check_not_hidden

Kind = TypeVar("Kind")
Member = TypeVar("Member", bound=Callable[..., Any])


@final
class Registry(Generic[Kind]):
    """Name -> class, or a function that makes one of the kind, in the order in which they were registered.

    Args:
        what: one of them is, in words. group: of entry points, by which packages announce theirs.
        kind: the base class that all have in common; None where there is none.
        called: what a name is called in errors. plural: what the known ones are called there.
        or_else, hint: what else may be given, at the end of the list of names and of the error. if_none: the list where
            there are no names.
        reserved: words that mean something else where a name may stand.
    """

    _all: ClassVar[list[Registry[Any]]] = []

    def __init__(
        self,
        what: str,
        group: str,
        kind: type[Kind] | None = None,
        *,
        called: str = "",
        plural: str = "",
        or_else: str = "",
        hint: str = "",
        if_none: str = "none",
        reserved: tuple[str, ...] = (),
    ) -> None:
        self.what, self.group, self.kind = what, group, kind
        self._called, self._plural = called or what, f" {plural}" if plural else ""
        self._or_else, self._hint, self._if_none, self._reserved = or_else, hint, if_none, reserved
        self._registered: dict[str, Callable[..., Kind]] = {}
        Registry._all.append(self)

    def register(self, name: str) -> Callable[[Member], Member]:
        """Decorator: makes a class known by a name, which becomes its `name` where it has none of its own.

        Raises:
            InputError: the name is taken by another class, or is none, or the class is of another kind.
        """
        _check_name(name)

        def decorate(member: Member) -> Member:
            if not callable(member):
                raise InputError(
                    f"Expected a class or a function that makes one as the {self.what} {name!r}, got {member!r}. "
                    "Register its class."
                )
            if self.kind is not None and isinstance(member, type) and not issubclass(member, self.kind):
                raise InputError(
                    f"Expected a subclass of {self.kind.__name__} as the {self.what} {name!r}, got {_home(member)}."
                )
            if name in self._reserved:
                raise InputError(
                    f"Expected a name for the {self.what} that means nothing else, got {name!r}. Choose another name."
                )
            taken = self._registered.get(name)
            if taken is not None and not _is_again(taken, member):
                raise InputError(
                    f"Expected a new name of a {self.what}, got {name!r}, which {_home(taken)} has. Choose another "
                    "name."
                )
            self._registered[name] = member
            own = vars(member).get("name") if isinstance(member, type) else None
            if isinstance(member, type) and self._has_names() and own in (None, member.__name__):
                member.name = name  # type: ignore[attr-defined]  # its kind declares it
            return member

        return decorate

    def _has_names(self) -> bool:
        """Whether the kind says that its members have a `name`."""
        return "name" in getattr(self.kind, "__annotations__", {})

    def names(self) -> list[str]:
        """All names that are known; those of packages last, and sorted."""
        return list(dict.fromkeys([*self._registered, *sorted(self._announced())]))

    def find(self, name: Any) -> Any:
        """The class of a name.

        Raises:
            InputError: an unknown name; the message lists the known ones, and says which is meant.
            SetupError: a package announces it and cannot be imported, or several packages do.
        """
        if isinstance(name, str) and name in self._registered:
            return self._registered[name]
        points = self._announced().get(name, []) if isinstance(name, str) else []
        if not points:
            raise self.unknown(name)
        if len(points) > 1:
            owners = ", ".join(sorted(_owner(point) for point in points))
            raise SetupError(
                f"Expected one package with the {self.what} {name!r}, got {owners}. Uninstall all but one."
            )
        return self.register(name)(self._loaded(points[0]))

    def make(self, given: str | Kind) -> Kind:
        """What is given, or what a name stands for, with its defaults.

        Raises:
            InputError: an unknown name, or something of another kind. SetupError: see `find`.
        """
        assert self.kind is not None
        if isinstance(given, self.kind):
            return given
        if not isinstance(given, str):
            hint = f" Give an instance, {given.__name__}(...)." if isinstance(given, type) else ""
            got = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
            raise InputError(f"Expected a name of a {self.what}, or a {self.kind.__name__}, got {got}.{hint}")
        factory = self.find(given)
        try:
            made = factory()
        except TypeError as error:
            raise InputError(
                f"Expected a {self.what} with defaults for all its settings behind the name {given!r}, got "
                f"{_home(factory)}: {error}. Give an instance in place of the name."
            ) from error
        if not isinstance(made, self.kind):
            raise SetupError(
                f"Expected a {self.kind.__name__} behind the {self.what} {given!r}, got one of {_home(type(made))}."
            )
        return made

    def unknown(self, name: Any) -> InputError:
        """The error of a name that is not known."""
        known = self.names()
        listed = (", ".join(known) or self._if_none) + self._or_else
        return InputError(
            f"Unknown {self._called} {name!r}. Known{self._plural}: {listed.removeprefix(', ')}."
            f"{did_you_mean(str(name), known)}{self._hint}"
        )

    def all(self) -> dict[str, Any]:
        """Every class that can be imported, by its name; of others, who asks for one is told (`find`)."""
        found = {}
        for name in self.names():
            with suppress(SetupError, InputError):
                found[name] = self.find(name)
        return found

    def _announced(self) -> dict[str, list[metadata.EntryPoint]]:
        """The entry points of each name; one, unless packages quarrel about it."""
        found: dict[str, list[metadata.EntryPoint]] = {}
        for point in metadata.entry_points(group=self.group):
            others = found.setdefault(point.name, [])
            if all((_owner(point), point.value) != (_owner(other), other.value) for other in others):
                others.append(point)
        return found

    def _loaded(self, point: metadata.EntryPoint) -> Any:
        package, owner = point.module.partition(".")[0], _owner(point)
        if owner == DISTRIBUTION:
            check_not_hidden(package)
        try:
            return point.load()
        except Exception as error:  # whatever a module does when it is imported
            owners = sorted({other for other in metadata.packages_distributions().get(package, []) if other != owner})
            clash = f" The import name {package!r} is also installed by {', '.join(owners)}." if owners else ""
            raise SetupError(
                f"{self.what.capitalize()} {point.name!r} of {owner} ({point.value}) cannot be imported: "
                f"{error}.{clash} Install what is missing, or use a separate environment."
            ) from error


# There is no class that all simulators are derived from: any class or factory can make one.
SIMULATORS: Registry[Any] = Registry(
    "simulator",
    "bridge.simulators",
    plural="simulators",
    hint=" One of your own is named by its file: mysim.py:function.",
    if_none="none (is the package installed? `pip install -e .`)",
)

# Defined here since its kind is nobody's of ours: a script's own executor need not import anything that has a registry.
EXECUTORS: Registry[Executor] = Registry(
    "executor",
    "bridge.executors",
    Executor,
    called="on=",
    or_else=", process",
    hint=" A number of workers is given as one, on=8; an executor itself, or by its name.",
    if_none="",
    reserved=("process",),
)


def register(name: str) -> Callable[[Member], Member]:
    """Decorator: makes what one has written known by a name, as ours is.

    What it is follows from what it is derived from: a `Distribution`, a `PointSet`, a `Covariate`, a `Method`, a
    `RobustLoss`, an `Observer`, a `concurrent.futures.Executor`. A class or factory that is derived from none of these
    is a simulator, for `bridge.make(name, ...)`.

    Raises:
        InputError: the name is taken by another one of this kind.
    """

    _check_name(name)

    def decorate(member: Member) -> Member:
        bases = member.__mro__ if isinstance(member, type) else ()
        registry = next((known for known in Registry._all if known.kind in bases), SIMULATORS)
        if registry is SIMULATORS and all(hasattr(member, told) for told in ("start", "step", "end")):
            raise InputError(
                f"Expected an observer with a name to be derived from bridge.Observer, got {_home(member)}. Write "
                f"class {getattr(member, '__name__', 'Mine')}(bridge.Observer)."
            )
        return registry.register(name)(member)

    return decorate


def _check_name(name: Any) -> None:
    if not (isinstance(name, str) and name.strip() == name != ""):
        raise InputError(f'Expected a name in quotation marks, register("name"), got {name!r}.')
    if ":" in name:
        raise InputError(
            f"Expected a name without a colon, which stands before an argument or a function, got {name!r}."
        )


def _is_again(taken: Any, member: Any) -> bool:
    """Whether it is the same one, perhaps from a cell or a module that was run again."""
    same = _home(taken) == _home(member) and "<lambda>" not in _home(taken)
    return taken is member or (same and type(taken) is type(member) and hasattr(taken, "__qualname__"))


def _home(member: Any) -> str:
    return f"{getattr(member, '__module__', '')}.{getattr(member, '__qualname__', repr(member))}"


def _owner(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "its distribution"
