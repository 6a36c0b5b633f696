"""What is kept of outputs, and where: the settings of `memory=`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from bridge.checks import Settings, is_number
from bridge.errors import InputError
from bridge.storage.store import Store


@final
@dataclass(frozen=True)
class Memory(metaclass=Settings):
    """What is kept of outputs, and where. No result depends on it.

    Attributes:
        keep_mb: outputs up to this size [MB], over all ranks, are kept for backward; larger ones are streamed into the
            Jacobian where that is smaller.
        rank_mb: outputs that a rank keeps beyond this [MB] are written to its local disk (TMPDIR); None for no limit.
        store: a `Store`: finished evaluations are kept on disk and found again.
    """

    keep_mb: float = 24.0
    rank_mb: float | None = None
    store: Store | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.keep_mb) and self.keep_mb >= 0):
            raise InputError(f"Expected keep_mb >= 0, got {self.keep_mb!r}.")
        if self.rank_mb is not None and not (is_number(self.rank_mb) and self.rank_mb > 0):
            raise InputError(f"Expected a positive rank_mb, got {self.rank_mb!r}.")
        if self.store is not None and not isinstance(self.store, Store):
            raise InputError(f"Expected a store, got {self.store!r}. Give store=bridge.Store({self.store!r}).")


def make_memory(given: Memory | Store | None) -> Memory:
    """The settings given; a store alone stands for itself with the others at their defaults.

    Raises:
        InputError: something else.
    """
    if given is None:
        return Memory()
    if isinstance(given, Store):
        return Memory(store=given)
    if not isinstance(given, Memory):
        raise InputError(f"Expected bridge.Memory(...) or a bridge.Store as memory, got {given!r}.")
    return given
