"""Dispatch: decides which rank evaluates which rows, and adds up over ranks in a fixed order."""

from __future__ import annotations

from bridge.dispatch.base import Dispatcher
from bridge.dispatch.serial import SerialDispatcher
from bridge.dispatch.soundness import describe_lost
from bridge.dispatch.tree import ONCE, Node, TreeSum, owner_map, transfers
from bridge.dispatch.world import get_dispatcher, is_root

__all__ = [
    "ONCE",
    "Dispatcher",
    "Node",
    "SerialDispatcher",
    "TreeSum",
    "describe_lost",
    "get_dispatcher",
    "is_root",
    "owner_map",
    "transfers",
]
