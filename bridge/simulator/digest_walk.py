"""What a walk through a value has at hand: the digest, where it is, and what it has seen."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from bridge.simulator.instances import (
    BYPASSES,
    extras_of,
)

# Things inside things; and how many of them an error names.
DEEPEST, _LONGEST = 3000, 12


class UnseenError(Exception):
    """Something in a value cannot be seen: where, and what it is."""


def given_identity(value: Any) -> str | None:
    """The text that something gives itself as its identity."""
    if inspect.getattr_static(value, "identity", None) is None:
        return None  # asked in this way, what makes up attributes does not make up this one
    return value.identity if isinstance(value.identity, str) else None


class Walk(ABC):
    """A walk through a value, which adds to a digest all that can be seen of it.

    Args:
        path: where it is, in words, for errors. kept: see `digest_of`.
        told: what counts of what is said about functions and classes, see `bridge.simulator.instances.SAID`; `asked` is
            what the code that was seen looks at.
    """

    def __init__(
        self, path: list[str], kept: dict[int, tuple[Any, str]] | None, told: frozenset[str] = frozenset()
    ) -> None:
        self.out = hashlib.blake2b(digest_size=16)
        self.asked = set[str]()
        self.path, self.kept, self.told = path, kept, told
        # What has an identity of its own is gone through once; the number is that of its first appearance.
        self._numbers: dict[tuple[int, bool], int] = {}
        self.modules: dict[tuple[int, int], int] = {}
        self.alive: list[Any] = []  # no other object may take the place, and the id, of one that has been seen

    @abstractmethod
    def see(self, value: Any, ordered: bool = True) -> None:
        """Adds a value.

        Args:
            ordered: whether the order of a dictionary can make a difference.
        """

    def put(self, tag: str, data: bytes | str = b"") -> None:
        data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        self.out.update(f"{tag}:{len(data)}:".encode())
        self.out.update(data)

    @contextlib.contextmanager
    def inside(self, where: str) -> Iterator[None]:
        self.path.append(where)
        yield
        self.path.pop()

    def see_as(self, where: str, value: Any) -> None:
        with self.inside(where):
            self.see(value)

    def unseen(self, what: str) -> UnseenError:
        path = self.path if len(self.path) <= _LONGEST else [*self.path[:2], "...", *self.path[3 - _LONGEST :]]
        return UnseenError(f"{' of '.join(reversed(path))}: {what}")

    def apart(self, value: Any) -> bytes:
        """The digest of a value by itself, to bring what has no order into one."""
        walk = type(self)(self.path, self.kept, self.told)
        walk.see(value)
        self.asked |= walk.asked
        return walk.out.digest()

    def again(self, value: Any, ordered: bool = True) -> bool:
        """Whether this very object has been seen already; its number stands for it."""
        key = id(value), ordered
        if key in self._numbers:
            self.put("again", str(self._numbers[key]))
            return True
        self._numbers[key] = len(self._numbers)
        self.alive.append(value)
        return False

    def attributes(self, attributes: Any) -> None:
        if not isinstance(attributes, Mapping):
            self.see(attributes)
            return
        for name in sorted(attributes, key=str):
            self.put("attribute", str(name))
            self.see_as(f"attribute {str(name)!r}", attributes[name])

    def extras(self, value: Any, met: bool = False) -> None:
        """The attributes of an array, a tensor, a member of an enumeration and the like, besides what it is made of.

        Args:
            met: whether it is known to be met for the first time.
        """
        if extras := extras_of(value):
            self.put("extras")
            if met or not self.again(value):
                self.attributes(extras)


def bypass(value: Any) -> str:
    return f"{BYPASSES[id(value)]}, by which code reaches what it does not name"


def with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
