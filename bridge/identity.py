"""Which simulator it is: what finished evaluations are filed under.

A name is not enough, as two functions may both be called `simulate`. The identity has, besides, a digest of what can be
seen of the simulator: the code of a function and the constants that it closes over, the fields of a dataclass. It
cannot see everything (modules and programs that are called, attributes of other objects), so a change of those calls
for another directory, or for an attribute `identity` of the simulator's own.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.simulator import FunctionSimulator, Simulator, simulator_name

Array = NDArray[np.float64]


@runtime_checkable
class Forwarding(Protocol):
    """A simulator that lets another one do the work: what it evaluates are evaluations of the inner one."""

    @property
    def inner(self) -> Simulator: ...

    def forwarded(self, inputs: Array) -> Array:
        """(k, d) of this simulator -> (k, d') of the inner one."""
        ...


@runtime_checkable
class Identified(Protocol):
    """A simulator that says itself which one it is: the same text as long as its outputs stay the same."""

    @property
    def identity(self) -> str: ...


def innermost(simulator: Simulator, inputs: Array) -> tuple[Simulator, Array]:
    """The simulator that does the work, and its (k, d') inputs for those (k, d) of `simulator`."""
    while isinstance(simulator, Forwarding):
        inputs = simulator.forwarded(inputs)
        simulator = simulator.inner
    return simulator, inputs


def identity_of(simulator: Simulator) -> str:
    """Name and digest of the simulator that does the work; the same in every process."""
    while isinstance(simulator, Forwarding):
        simulator = simulator.inner
    if isinstance(simulator, Identified) and isinstance(simulator.identity, str):
        return simulator.identity
    seen = simulator.function if isinstance(simulator, FunctionSimulator) else simulator
    if isinstance(seen, Identified) and isinstance(seen.identity, str):
        return seen.identity
    digest = hashlib.blake2b(digest_size=6)
    _add(digest.update, seen, ())
    return f"{simulator_name(simulator)}-{digest.hexdigest()}"


def _add(update: Callable[[bytes], None], value: Any, above: tuple[int, ...]) -> None:
    """Adds what can be seen of a value to a digest; what refers to itself, and what may change, is passed over."""
    if id(value) in above:
        return
    inside = (*above, id(value))
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu").numpy()
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | PurePath | enum.Enum):
        update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        update(f"{array.dtype.str} {array.shape}".encode())
        if not array.dtype.hasobject:
            update(np.ascontiguousarray(array).tobytes())
    elif isinstance(value, CodeType):
        update(value.co_code)
        update(repr(value.co_names).encode())
        for constant in value.co_consts:
            _add(update, constant, inside)
    elif isinstance(value, tuple):
        update(f"tuple {len(value)}".encode())
        for item in value:
            _add(update, item, inside)
    elif isinstance(value, frozenset):
        for text in sorted(map(repr, value)):
            update(text.encode())
    elif isinstance(value, MethodType):
        _add(update, value.__func__, inside)
        _add(update, value.__self__, inside)
    elif isinstance(value, functools.partial):
        _add(update, (value.func, *value.args, *sorted(value.keywords.items())), inside)
    elif isinstance(value, FunctionType):
        _add_function(update, value, inside)
    elif is_dataclass(value) and not isinstance(value, type):
        update(type(value).__qualname__.encode())
        for item in fields(value):
            if item.compare:
                _add(update, (item.name, getattr(value, item.name)), inside)
    elif callable(value) and not isinstance(value, type) and _wrapped(value) is not None:
        _add(update, _wrapped(value), inside)
    else:
        kind = value if isinstance(value, type) else type(value)
        # Functions of C have a name and nothing else.
        name = getattr(value, "__name__", "") if callable(value) else ""
        update(f"{kind.__module__}.{kind.__qualname__} {name};".encode())


def _wrapped(value: Any) -> Any:
    """The function behind a decorator's object, as `functools.wraps` keeps it."""
    return getattr(value, "__wrapped__", None)


def _add_function(update: Callable[[bytes], None], function: FunctionType, above: tuple[int, ...]) -> None:
    update(function.__name__.encode())
    _add(update, function.__code__, above)
    _add(update, (function.__defaults__, *sorted((function.__kwdefaults__ or {}).items())), above)
    # A counter is no part of what a function computes.
    counted = {i.argval for i in dis.get_instructions(function.__code__) if i.opname == "STORE_DEREF"}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            if name not in counted:
                _add(update, (name, cell.cell_contents), above)
        except ValueError:  # not yet filled
            continue
