"""All that can be seen of a value, as a digest: the same in every process, another one where a call could tell.

It goes through closures, defaults, attributes, containers, arrays, the code of functions and of classes, and what that
code names in its modules, as far as these are the user's own; packages that are installed count by version. What a call
keeps for itself is left out: `functools.cached_property`, `lru_cache`, names that code writes and never reads. Where
something cannot be seen there is an error, never a digest that leaves it out.
"""

from __future__ import annotations

import enum
import functools
import struct
import sys
import types
import weakref
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, final

import numpy as np
import torch

from bridge.simulator.digest_code import see_class, see_code, see_function, see_module, see_own_kind
from bridge.simulator.digest_objects import see_builtin, see_instance
from bridge.simulator.digest_values import see_array, see_dict, see_file, see_items, see_set, see_tensor, see_text
from bridge.simulator.digest_walk import DEEPEST, Walk, bypass, given_identity
from bridge.simulator.instances import (
    BYPASSES,
    is_global_generator,
    settings,
    wrapped,
)
from bridge.simulator.packages import owner_of


def digest_of(value: Any, name: str, kept: dict[int, tuple[Any, str]] | None = None) -> str:
    """32 hexadecimal digits of all that can be seen of a value.

    Args:
        name: of the value, for errors.
        kept: digests of large arrays by id, used again and added to; only for arrays that are not changed meanwhile.

    Raises:
        UnseenError: something in it cannot be seen.
    """
    walk, limit = _Walk([name], kept), sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 12 * DEEPEST))  # one function names another, and that one the next
    try:
        _see_all(walk, value)
        if walk.asked:  # of what has been gone through already, perhaps
            walk = _Walk([name], kept, frozenset(walk.asked))
            _see_all(walk, value)
    finally:
        sys.setrecursionlimit(limit)
    return walk.out.hexdigest()


def _see_all(walk: Walk, value: Any) -> None:
    """Adds a value, and the settings of this process under which numbers come out otherwise."""
    for setting in settings():
        walk.put("setting", setting)
    walk.see(value)


@final
class _Walk(Walk):
    def see(self, value: Any, ordered: bool = True) -> None:
        kind = type(value)
        if len(self.path) > DEEPEST:
            raise self.unseen("nested too deeply")
        if value is None or value is Ellipsis or value is NotImplemented:
            self.put("constant", str(value))
        elif kind in (bool, int):
            self.put(kind.__name__, hex(value))
        elif kind is float:
            self.put("float", struct.pack("<d", value))
        elif kind is complex:
            self.put("complex", struct.pack("<dd", value.real, value.imag))
        elif kind is str:
            see_text(self, value)
        elif kind in (bytes, bytearray, memoryview):
            self.put(kind.__name__, bytes(value))
        elif kind in (tuple, list):
            see_items(self, value)
        elif kind in (set, frozenset):
            see_set(self, value)
        elif kind in (dict, types.MappingProxyType):
            see_dict(self, value, ordered)
        elif isinstance(value, np.ndarray | np.generic):
            see_array(self, value)
        elif isinstance(value, torch.Tensor):
            see_tensor(self, value)
        elif isinstance(value, PurePath):
            see_file(self, value)
            see_own_kind(self, value)
        elif isinstance(value, CodeType):
            see_code(self, value)
        else:
            _see_object(self, value)


def _see_object(walk: Walk, value: Any) -> None:
    if id(value) in BYPASSES:
        raise walk.unseen(bypass(value))
    if callable(value) and (text := given_identity(value)) is not None:
        walk.put("identity", text)
    elif is_global_generator(value):
        walk.put("global generator")  # frozen distributions of scipy have it as an attribute
    elif isinstance(value, enum.Enum):
        walk.put("enum", str(value.name))
        walk.see(value._value_)
        walk.extras(value)
        see_class(walk, type(value))
    elif isinstance(value, type):
        see_class(walk, value)
    elif isinstance(value, ModuleType):
        see_module(walk, value, None)
    elif isinstance(value, np.dtype | torch.dtype | torch.device | torch.Size):
        walk.put("kind", repr(value))
    elif isinstance(value, np.ufunc):
        if "(vectorized)" in value.__name__:
            raise walk.unseen("a function made by numpy.frompyfunc, whose content is hidden")
        walk.put("ufunc", f"{value.__name__} {owner_of('numpy')}")
    elif isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
        see_builtin(walk, value)
    elif isinstance(value, types.WrapperDescriptorType | types.MethodDescriptorType | types.GetSetDescriptorType):
        walk.put("descriptor", f"{value.__objclass__.__qualname__}.{value.__name__}")
    elif not walk.again(value):
        _see_compound(walk, value)


def _see_compound(walk: Walk, value: Any) -> None:
    if isinstance(value, FunctionType):
        see_function(walk, value)
    elif isinstance(value, MethodType):
        walk.put("method")
        walk.see_as("function", value.__func__)
        if not is_global_generator(value.__self__):
            walk.see_as("object", value.__self__)
    elif isinstance(value, functools.partial):
        walk.put("partial")
        see_class(walk, type(value))
        walk.see_as("function", value.func)
        for i, item in enumerate(value.args):
            walk.see_as(f"partial argument {i}", item)
        for name in sorted(value.keywords):
            walk.put("keyword", name)
            walk.see_as(f"partial argument {name!r}", value.keywords[name])
        walk.attributes(vars(value))
    elif isinstance(value, staticmethod | classmethod):
        walk.put(type(value).__name__)
        walk.see(value.__func__)
        see_own_kind(walk, value, met=True)
    elif isinstance(value, property):
        walk.put("property")
        for part in (value.fget, value.fset, value.fdel):
            walk.see(part)
        see_own_kind(walk, value, met=True)
    elif isinstance(value, functools.cached_property):
        walk.put("cached property")
        walk.see(value.func)
        see_own_kind(walk, value, met=True)
    elif isinstance(value, np.vectorize):
        walk.put("vectorize", f"{value.otypes} {value.signature} {sorted(map(str, value.excluded))}")
        walk.see(value.pyfunc)
        see_own_kind(walk, value, met=True)
    elif isinstance(value, weakref.WeakKeyDictionary | weakref.WeakValueDictionary):
        walk.put("weak")
        see_class(walk, type(value))
        see_dict(walk, dict(value), True)
    elif isinstance(value, weakref.WeakSet):
        walk.put("weak")
        see_class(walk, type(value))
        see_set(walk, set(value))
    elif isinstance(value, weakref.ReferenceType):
        walk.put("weak")
        walk.see(value())
    elif isinstance(value, torch.Generator):
        walk.put("generator")
        see_tensor(walk, value.get_state())
    elif (python := wrapped(value)) is not None:
        walk.put("wrapped")
        walk.see(getattr(value, "targetoptions", None))
        walk.see(python)
    else:
        see_instance(walk, value)
