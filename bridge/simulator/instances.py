"""What instances and functions are made of, and what of that calls keep for themselves; for `digest`."""

from __future__ import annotations

import collections
import contextlib
import copyreg
import decimal
import enum
import gc
import importlib
import importlib.machinery
import importlib.util
import inspect
import pkgutil
import random
import runpy
import struct
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from types import FunctionType
from typing import Any

import numpy as np
import torch

from bridge.simulator.bytecode import Facts, facts_of
from bridge.simulator.packages import owner_of

_POINTER = struct.calcsize("P")
_WRITES = frozenset({"write_text", "write_bytes", "mkdir", "touch", "unlink", "rmdir"})
COUNTED = (
    int,
    float,
    complex,
    list,
    dict,
    set,
    collections.deque,
    collections.Counter,
    collections.defaultdict,
    np.ndarray,
    np.float64,
    np.int64,
    type(None),
)


def in_c(kind: type) -> bool:
    """Whether a class says of itself that it is a part of Python because it is, not because it was made by `exec`."""
    return not any(isinstance(value, FunctionType) for value in vars(kind).values()) and "__dict__" not in vars(kind)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of a class: what says nothing about what its instances do.
NOISE = _words(
    "__module__ __doc__ __dict__ __weakref__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__qualname__ __firstlineno__ __static_attributes__ __slotnames__ __slots__ __orig_bases__ __parameters__ "
    "__abstractmethods__ _abc_impl __dataclass_params__ __dataclass_fields__ __match_args__ __attrs_attrs__ "
    "__attrs_props__ _is_protocol _is_runtime_protocol __protocol_attrs__ __non_callable_proto_members__ "
    "__classcell__ __classdictcell__ __subclasshook__ __hash__ __reduce_cython__ __setstate_cython__"
)
_MADE = _words(
    "__init__ __new__ __repr__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __setattr__ __delattr__ __replace__ "
    "__getstate__ __setstate__ __getnewargs__ __attrs_init__ _dataclass_getstate _dataclass_setstate"
)
ENUM = _words("_member_names_ _member_map_ _value2member_map_ _unhashable_values_ _hashable_values_")


# What modules have of their own.
OF_MODULES = _words(
    "__name__ __doc__ __package__ __loader__ __spec__ __path__ __file__ __cached__ __builtins__ __annotations__ "
    "__annotate__ __conditional_annotations__ __warningregistry__"
)
# What gives code things that it does not name: itself, by id, and what to call it.
BYPASSES: dict[int, str] = {
    id(value): name
    for name, value in {
        "eval": eval,
        "exec": exec,
        "globals": globals,
        "__import__": __import__,
        "sys.modules": sys.modules,
        "sys._getframe": sys._getframe,
        "inspect.currentframe": inspect.currentframe,
        "inspect.stack": inspect.stack,
        "gc.get_objects": gc.get_objects,
        "gc.get_referrers": gc.get_referrers,
        "gc.get_referents": gc.get_referents,
        "importlib.import_module": importlib.import_module,
        "importlib.__import__": importlib.__import__,
        "importlib.reload": importlib.reload,
        "importlib.util": importlib.util,
        "importlib.machinery": importlib.machinery,
        "runpy": runpy,
        "runpy.run_path": runpy.run_path,
        "runpy.run_module": runpy.run_module,
        "inspect.getmodule": inspect.getmodule,
        "pkgutil.resolve_name": pkgutil.resolve_name,
    }.items()
}
# Names of attributes that do the same.
HIDDEN = _words("__globals__ __builtins__ __subclasses__ f_globals f_locals f_builtins f_back")
# What is said about functions and classes, and the names by which code looks at it.
SAID = {
    "name": _words("__name__ __qualname__"),
    "documentation": _words("__doc__ getdoc"),
    "annotations": _words(
        "__annotations__ __annotate__ __dataclass_fields__ fields signature get_annotations get_type_hints "
        "getfullargspec"
    ),
}
_OF_ARRAYS = {
    np.ma.MaskedArray: _words("_mask _fill_value _hardmask _sharedmask _isfield _baseclass _basedict"),
    np.memmap: _words("_mmap offset mode filename"),
}


def extras_of(value: Any) -> dict[str, Any]:
    """The attributes that somebody has given to an array, a tensor or a member of an enumeration."""
    kind = type(value)
    if kind.__module__.partition(".")[0] == "trimesh":
        return {}  # what its arrays keep of what was computed of them
    extras = dict(getattr(value, "__dict__", {}))
    for name in copyreg._slotnames(kind):  # type: ignore[attr-defined]
        with contextlib.suppress(AttributeError):
            extras[name] = getattr(value, name)
    if isinstance(value, enum.Enum):
        return {n: v for n, v in extras.items() if not (n.startswith("_") and n.endswith("_"))}
    dropped = frozenset().union(*(names for base, names in _OF_ARRAYS.items() if isinstance(value, base)))
    if isinstance(value, np.ma.MaskedArray) and not extras.get("_optinfo"):
        dropped |= {"_optinfo"}
    if isinstance(value, PurePath):
        dropped |= {*PurePath.__slots__, *Path.__slots__}  # of the path itself, by which it is seen
    return {n: v for n, v in extras.items() if n not in dropped and n not in ("__doc__", "lock")}


def settings() -> list[str]:
    """Settings of this process, as far as they are not the usual ones."""
    found = []
    if torch.get_default_dtype() != torch.float32:
        found.append(str(torch.get_default_dtype()))
    context = decimal.getcontext()
    if (context.prec, context.rounding) != (28, decimal.ROUND_HALF_EVEN):
        found.append(f"decimal {context.prec} {context.rounding}")
    return found


def is_users(value: Any) -> bool:
    """Whether a function, a class or an object is the user's own, though an installed module has it now."""
    if isinstance(value, FunctionType):
        home = value.__globals__.get("__name__")
    else:
        home = getattr(value if isinstance(value, type) else type(value), "__module__", None)
    return isinstance(home, str) and home in sys.modules and owner_of(home) is None


def wrapped(value: Any) -> Any:
    """The function behind one that somebody else's package has compiled, cached or wrapped, if it is such a one."""
    kind = type(value)
    if not callable(value) or owner_of(kind.__module__) is None:
        return None  # its attributes can be seen
    found = None if inspect.getattr_static(value, "py_func", None) is None else value.py_func
    return getattr(value, "__wrapped__", None) if found is None and not is_python(kind) else found


def is_global_generator(value: Any) -> bool:
    """Whether it is one of the generators that all of a process uses: these are no part of any function."""
    return value is random._inst or value is np.random.mtrand._rand


def is_python(kind: type) -> bool:
    """Whether all that an instance has is in attributes: it is no larger than these need."""
    slots = 0
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        slots += len([names] if isinstance(names, str) else [*names])
    pointers = slots + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    return kind.__itemsize__ == 0 and kind.__basicsize__ <= object.__basicsize__ + _POINTER * pointers


def state_of(value: Any) -> Mapping[str, Any] | None:
    """An instance's attributes, as far as they would travel; None where that is not all of it."""
    kind = type(value)
    if not is_python(kind) or isinstance(value, BaseException):
        return None
    custom = any("__reduce_ex__" in vars(base) or "__reduce__" in vars(base) for base in kind.__mro__[:-1])
    if custom and owner_of(kind.__module__) is not None:
        return None
    try:
        state = value.__getstate__()
    except Exception:
        return None
    if isinstance(state, tuple) and len(state) == 2 and all(isinstance(s, dict | None) for s in state):
        state = {**(state[0] or {}), **(state[1] or {})}  # of __dict__, and of __slots__
    if state is None:
        return {}
    return state if isinstance(state, dict) and all(isinstance(n, str) for n in state) else {"state": state}


def only_written(name: str, facts: Facts) -> bool:
    """Whether code does nothing with a path but write there."""
    methods = {method for (base, method) in facts.uses.attributes if base == name}
    modes = {text.strip("bt+") for text in facts.texts}
    writing = _WRITES | ({"open"} if modes & {"w", "a", "x"} and "r" not in modes else set())
    return facts.uses.only(name, "attribute") and bool(methods) and methods <= writing


def is_cached(kind: type, name: str) -> bool:
    """Whether an attribute is one that is computed when it is asked for, and kept."""
    found = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    return type(found).__name__ == "cached_property"


def is_generated(kind: type, name: str, value: Any) -> bool:
    """A method that dataclasses, attrs or named tuples have written: its text follows from the fields."""
    function = getattr(value, "__func__", value)
    made = any(f"__{word}__" in vars(kind) for word in ("dataclass_fields", "attrs_attrs")) or hasattr(kind, "_fields")
    return (
        made
        and name in _MADE
        and isinstance(function, FunctionType)
        and function.__code__.co_filename.startswith(("<string>", "<attrs generated"))
    )


def counters(kind: type, attributes: Mapping[str, Any]) -> set[str]:
    """Attributes that count: what `__call__`, and what it calls of its class, adds to and never looks at."""
    counted = {name for name, value in attributes.items() if type(value) in COUNTED}
    if not counted or "__call__" not in dir(kind):
        return set()
    waiting, done = ["__call__"], set()
    uses: dict[str, set[str]] = {}
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        found = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
        for part in (
            found,
            getattr(found, "__func__", None),
            getattr(found, "fget", None),
            getattr(found, "func", None),
        ):
            if not isinstance(part, FunctionType):
                continue
            facts = facts_of(part.__code__)
            waiting += facts.names
            first = part.__code__.co_varnames[0] if part.__code__.co_argcount else ""
            if not facts.uses.only(first, "attribute") and first in facts.uses.names:
                return set()  # the object itself goes somewhere
            for (base, attribute), what in facts.uses.attributes.items():
                # Of whatever object: it may be this one under another name.
                uses.setdefault(attribute, set()).update(what if base == first else {"read"})
    return {name for name in counted if uses.get(name) == {"write"}}
