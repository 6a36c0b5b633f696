"""All that can be seen of a value, as a digest: the same in every process, another one where a call could tell.

It goes through closures, defaults, attributes, containers, arrays, the code of functions and of classes, and what that
code names in its modules, as far as these are the user's own; packages that are installed count by version. What a call
keeps for itself is left out: `functools.cached_property`, `lru_cache`, names that code writes and never reads. Where
something cannot be seen there is an error, never a digest that leaves it out.
"""

from __future__ import annotations

import builtins
import collections
import collections.abc
import contextlib
import copyreg
import ctypes
import enum
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from bridge.simulator.bytecode import Facts, Import, facts_of, loaded_constants
from bridge.simulator.file_contents import content_digest
from bridge.simulator.instances import (
    BYPASSES,
    COUNTED,
    ENUM,
    HIDDEN,
    NOISE,
    OF_MODULES,
    SAID,
    counters,
    extras_of,
    in_c,
    is_cached,
    is_generated,
    is_global_generator,
    is_python,
    is_users,
    only_written,
    settings,
    state_of,
    wrapped,
)
from bridge.simulator.packages import owner_of
from bridge.simulator.protocol import IdentityParts

# Things inside things; and how many of them an error names.
_DEEPEST, _LONGEST = 3000, 12
_MANY, _WORD = 64, 2**63
_LARGE = 1_000_000  # bytes of an array whose digest is kept
# What has its content somewhere else, though some of it may look as if it could be seen.
_WORDS: dict[type, str] = {
    io.IOBase: "an open file", socket.socket: "a socket", types.GeneratorType: "a generator", threading.local: "a "
    "thread's own variables", ctypes.CDLL: "a library loaded by ctypes", subprocess.Popen: "a running program",
    type(threading.Lock()): "a lock", type(threading.RLock()): "a lock",
}  # fmt: skip


class UnseenError(Exception):
    """Something in a value cannot be seen: where, and what it is."""


def digest_of(value: Any, name: str, kept: dict[int, tuple[Any, str]] | None = None) -> str:
    """32 hexadecimal digits of all that can be seen of a value.

    Args:
        name: of the value, for errors.
        kept: digests of large arrays by id, used again and added to; only for arrays that are not changed meanwhile.

    Raises:
        UnseenError: something in it cannot be seen.
    """
    walk, limit = _Walk([name], kept), sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 12 * _DEEPEST))  # one function names another, and that one the next
    try:
        walk.see_all(value)
        if walk.asked:  # of what has been gone through already, perhaps
            walk = _Walk([name], kept, frozenset(walk.asked))
            walk.see_all(value)
    finally:
        sys.setrecursionlimit(limit)
    return walk.out.hexdigest()


def given_identity(value: Any) -> str | None:
    """The text that something gives itself as its identity."""
    if inspect.getattr_static(value, "identity", None) is None:
        return None  # asked in this way, what makes up attributes does not make up this one
    return value.identity if isinstance(value.identity, str) else None


class _Walk:
    """
    Args:
        told: what counts of what is said about functions and classes, see `bridge.simulator.instances.SAID`; `asked` is
            what the code that was seen looks at.
    """

    def __init__(
        self, path: list[str], kept: dict[int, tuple[Any, str]] | None, told: frozenset[str] = frozenset()
    ) -> None:
        self.out = hashlib.blake2b(digest_size=16)
        self.asked = set[str]()
        self._path, self._kept, self._told = path, kept, told
        # What has an identity of its own is gone through once; the number is that of its first appearance.
        self._numbers: dict[tuple[int, bool], int] = {}
        self._modules: dict[tuple[int, int], int] = {}
        self._alive: list[Any] = []  # no other object may take the place, and the id, of one that has been seen

    def see_all(self, value: Any) -> None:
        """Adds a value, and the settings of this process under which numbers come out otherwise."""
        for setting in settings():
            self.put("setting", setting)
        self.see(value)

    def put(self, tag: str, data: bytes | str = b"") -> None:
        data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        self.out.update(f"{tag}:{len(data)}:".encode())
        self.out.update(data)

    @contextlib.contextmanager
    def inside(self, where: str) -> Iterator[None]:
        self._path.append(where)
        yield
        self._path.pop()

    def see_as(self, where: str, value: Any) -> None:
        with self.inside(where):
            self.see(value)

    def unseen(self, what: str) -> UnseenError:
        path = self._path if len(self._path) <= _LONGEST else [*self._path[:2], "...", *self._path[3 - _LONGEST :]]
        return UnseenError(f"{' of '.join(reversed(path))}: {what}")

    def apart(self, value: Any) -> bytes:
        """The digest of a value by itself, to bring what has no order into one."""
        walk = _Walk(self._path, self._kept, self._told)
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
        self._alive.append(value)
        return False

    # -- values ---------------------------------------------------------------------------------------------------

    def see(self, value: Any, ordered: bool = True) -> None:
        """Adds a value.

        Args:
            ordered: whether the order of a dictionary can make a difference.
        """
        kind = type(value)
        if len(self._path) > _DEEPEST:
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
            self._text(value)
        elif kind in (bytes, bytearray, memoryview):
            self.put(kind.__name__, bytes(value))
        elif kind in (tuple, list):
            self._items(value)
        elif kind in (set, frozenset):
            self._set(value)
        elif kind in (dict, types.MappingProxyType):
            self._dict(value, ordered)
        elif isinstance(value, np.ndarray | np.generic):
            self._array(value)
        elif isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, PurePath):
            self._file(value)
            self._of_own_kind(value)
        elif isinstance(value, CodeType):
            self._code(value)
        else:
            self._object(value)

    def _text(self, value: str) -> None:
        """A text; where it names a program, or something in the folder for temporary files, what is there."""
        if value.startswith(tempfile.gettempdir() + os.sep) and "\0" not in value and len(value) < 4096:
            self._file(PurePath(value))
            return
        if "/" in value[:4096] and len(value) < 4096 and "\0" not in value:
            with contextlib.suppress(OSError, ValueError):
                if os.path.isfile(value) and os.access(value, os.X_OK):
                    self.put("program", f"{os.path.basename(value)} {content_digest(value)}")
                    return
            words = value.split()[:_MANY]
            for word in words if len(words) > 1 else ():  # of a line for a shell
                with contextlib.suppress(OSError, ValueError):
                    if os.path.isabs(word) and os.path.isfile(word) and os.access(word, os.X_OK):
                        self.put("program", content_digest(word))
        self.put("str", value)

    def _items(self, value: Any) -> None:
        if isinstance(value, list) and self.again(value):
            return
        self.put(type(value).__name__, str(len(value)))
        if len(value) >= _MANY and all(type(item) is float for item in value):
            self.put("floats", np.array(value).tobytes())  # all at once, as there may be millions
            return
        if len(value) >= _MANY and all(type(item) is int and -_WORD <= item < _WORD for item in value):
            self.put("ints", np.array(value, dtype=np.int64).tobytes())
            return
        for i, item in enumerate(value):
            self.see_as(f"item {i}", item)

    def _set(self, value: Any) -> None:
        self.put(type(value).__name__, str(len(value)))
        for digest in sorted(self.apart(item) for item in value):
            self.out.update(digest)

    def _dict(self, value: Mapping[Any, Any], ordered: bool) -> None:
        if value is sys.modules:
            raise self.unseen(_bypass(value))
        if self.again(value, ordered):
            return
        self.put("dict" if ordered else "table", str(len(value)))
        keys = list(value)
        if not ordered:
            texts = all(type(key) is str for key in keys)
            keys = sorted(keys) if texts else sorted(keys, key=self.apart)
        for key in keys:
            with self.inside(f"key {key!r}" if isinstance(key, str | int | float) else f"a {type(key).__name__} key"):
                self.see(key)
                self.see(value[key])

    def _array(self, value: Any) -> None:
        array = np.asarray(value)
        self.put(type(value).__name__, f"{array.dtype.str} {array.shape}")
        if array.dtype.metadata:
            self._attributes(array.dtype.metadata)
        if isinstance(value, np.generic):
            self._of_own_kind(value)
        elif type(value) not in (np.ndarray, np.memmap):
            self._class(type(value))
            if isinstance(value, np.ma.MaskedArray):
                self._array(np.ma.getmaskarray(value))
                self.see((value.fill_value, value.hardmask))
                array = np.ma.getdata(value)
            self._extras(value)
        self._numbers_of(np.asarray(array), value)

    def _numbers_of(self, array: np.ndarray[Any, Any], owner: Any) -> None:
        """Adds the numbers of an array, the owner's or a view of it."""
        if array.dtype.names is not None:
            # Field by field: what lies between them is anything.
            for name in array.dtype.names:
                self.put("field", f"{name} {array.dtype.fields[name][0].str}")
                self._numbers_of(np.asarray(array[name]), None)
        elif array.dtype.hasobject:
            for i, item in enumerate(array.reshape(-1).tolist()):
                self.see_as(f"item {i}", item)
        elif array.nbytes < _LARGE:
            self.out.update(_bytes(array))
        else:
            known = None if self._kept is None or owner is None else self._kept.get(id(owner))
            if known is None:
                known = owner, hashlib.blake2b(_bytes(array), digest_size=16).hexdigest()
                if self._kept is not None and owner is not None:
                    self._kept[id(owner)] = known
            self.put("large", known[1])

    def _tensor(self, value: torch.Tensor) -> None:
        self.put("tensor", f"{value.dtype} {tuple(value.shape)} {value.layout}")
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            self._class(type(value))
        self._extras(value)
        try:
            self._elements(value)
        except UnseenError:
            raise
        except Exception as error:  # of a subclass that has its numbers elsewhere
            raise self.unseen(f"{_article(type(value).__name__)} whose numbers cannot be read ({error})") from error

    def _elements(self, value: torch.Tensor) -> None:
        plain = value.detach()
        if plain.layout == torch.sparse_coo:
            plain = plain.coalesce()
            self._tensor(plain.indices())
            self._tensor(plain.values())
            return
        if plain.layout != torch.strided or plain.is_quantized or plain.device.type == "meta":
            raise self.unseen(f"a tensor with layout {value.layout} on {value.device}")
        plain = plain.resolve_conj().resolve_neg().to("cpu").contiguous().reshape(-1)
        self._numbers_of(plain.view(torch.uint8).numpy() if plain.numel() else np.empty(0, np.uint8), value)

    def _extras(self, value: Any, met: bool = False) -> None:
        """The attributes of an array, a tensor, a member of an enumeration and the like, besides what it is made of.

        Args:
            met: whether it is known to be met for the first time.
        """
        if extras := extras_of(value):
            self.put("extras")
            if met or not self.again(value):
                self._attributes(extras)

    def _of_own_kind(self, value: Any, met: bool = False) -> None:
        """The class, and what else it has put into this object, of something whose class the user has derived."""
        if owner_of(type(value).__module__) is None:
            self._class(type(value))
            self._extras(value, met)

    def _file(self, value: PurePath) -> None:
        """A path stands for what is there; its name is none of it. Where nothing is, its last part stands for it."""
        path = os.path.expanduser(value)
        if not os.path.exists(path):
            self.put("no file", value.name)
            return
        try:
            self.put("file", content_digest(path))
        except OSError as error:
            raise self.unseen(f"{str(value)!r}, which cannot be read ({error})") from error

    # -- objects --------------------------------------------------------------------------------------------------

    def _object(self, value: Any) -> None:
        if id(value) in BYPASSES:
            raise self.unseen(_bypass(value))
        if callable(value) and (text := given_identity(value)) is not None:
            self.put("identity", text)
        elif isinstance(value, enum.Enum):
            self.put("enum", str(value.name))
            self.see(value._value_)
            self._extras(value)
            self._class(type(value))
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, ModuleType):
            self._module(value, None)
        elif isinstance(value, np.dtype | torch.dtype | torch.device | torch.Size):
            self.put("kind", repr(value))
        elif isinstance(value, np.ufunc):
            if "(vectorized)" in value.__name__:
                raise self.unseen("a function made by numpy.frompyfunc, whose content is hidden")
            self.put("ufunc", f"{value.__name__} {owner_of('numpy')}")
        elif isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            self._builtin(value)
        elif isinstance(value, types.WrapperDescriptorType | types.MethodDescriptorType | types.GetSetDescriptorType):
            self.put("descriptor", f"{value.__objclass__.__qualname__}.{value.__name__}")
        elif not self.again(value):
            self._compound(value)

    def _compound(self, value: Any) -> None:
        if isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self.put("method")
            self.see_as("function", value.__func__)
            if not is_global_generator(value.__self__):
                self.see_as("object", value.__self__)
        elif isinstance(value, functools.partial):
            self.put("partial")
            self._class(type(value))
            self.see_as("function", value.func)
            for i, item in enumerate(value.args):
                self.see_as(f"partial argument {i}", item)
            for name in sorted(value.keywords):
                self.put("keyword", name)
                self.see_as(f"partial argument {name!r}", value.keywords[name])
            self._attributes(vars(value))
        elif isinstance(value, staticmethod | classmethod):
            self.put(type(value).__name__)
            self.see(value.__func__)
            self._of_own_kind(value, met=True)
        elif isinstance(value, property):
            self.put("property")
            for part in (value.fget, value.fset, value.fdel):
                self.see(part)
            self._of_own_kind(value, met=True)
        elif isinstance(value, functools.cached_property):
            self.put("cached property")
            self.see(value.func)
            self._of_own_kind(value, met=True)
        elif isinstance(value, np.vectorize):
            self.put("vectorize", f"{value.otypes} {value.signature} {sorted(map(str, value.excluded))}")
            self.see(value.pyfunc)
            self._of_own_kind(value, met=True)
        elif isinstance(value, weakref.WeakKeyDictionary | weakref.WeakValueDictionary):
            self.put("weak")
            self._class(type(value))
            self._dict(dict(value), True)
        elif isinstance(value, weakref.WeakSet):
            self.put("weak")
            self._class(type(value))
            self._set(set(value))
        elif isinstance(value, weakref.ReferenceType):
            self.put("weak")
            self.see(value())
        elif isinstance(value, torch.Generator):
            self.put("generator")
            self._tensor(value.get_state())
        elif (python := wrapped(value)) is not None:
            self.put("wrapped")
            self.see(getattr(value, "targetoptions", None))
            self.see(python)
        else:
            self._instance(value)

    def _builtin(self, value: Any) -> None:
        owner = value.__self__
        self.put("builtin", value.__qualname__)
        if owner is None or isinstance(owner, ModuleType):
            self._home(str(getattr(value, "__module__", None) or getattr(owner, "__name__", "")))
        elif not is_global_generator(owner):
            self.see_as("object", owner)

    def _home(self, module: str) -> None:
        """Where something in C comes from: its package's version, or the file of the user's own."""
        path = getattr(sys.modules.get(module), "__file__", None)
        self.put("module", f"{module} {owner_of(module) or (content_digest(path) if path else '')}")

    def _instance(self, value: Any) -> None:
        kind = type(value)
        module = kind.__module__
        if any(value is stream for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)):
            self.put("stream")  # what is said there does not come back
            return
        for base, words in _WORDS.items():
            if isinstance(value, base) and not isinstance(value, io.StringIO | io.BytesIO):
                raise self.unseen(words)
        own = owner_of(module) is None
        if isinstance(value, collections.abc.Iterator) and not (own and is_python(kind)):
            raise self.unseen(f"{_article(kind.__name__)}, which calls use up")
        self.put("instance")
        if hasattr(kind, "identity_parts") and isinstance(value, IdentityParts):
            self._class(kind)
            self._attributes(value.identity_parts)
            return
        if module.partition(".")[0] == "trimesh" and self._trimesh(value):
            return
        self._class(kind)
        if isinstance(value, set | frozenset):
            self._set(value)
            self._attributes(getattr(value, "__dict__", {}))
            return
        state = state_of(value)
        if state is None:
            self._reduced(value, kind)
            return
        dropped = {n for n in state if is_cached(kind, n)} | (counters(kind, state) if own else set())
        self._attributes({n: v for n, v in state.items() if n not in dropped})

    def _reduced(self, value: Any, kind: type) -> None:
        """By what pickle would make of it."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reduce = copyreg.dispatch_table.get(kind)
                parts = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:
            raise self.unseen(f"{_article(kind.__name__)} ({kind.__module__}), whose content is hidden") from error
        if isinstance(parts, str):
            self.put("global", parts)
            self._home(str(getattr(value, "__module__", None) or kind.__module__))
            return
        self._alive.append(parts)
        function, arguments, state, items, pairs, setter = (*parts, None, None, None, None)[:6]
        self.put("reduced", getattr(function, "__qualname__", ""))
        if isinstance(function, functools.partial | MethodType) or getattr(function, "__closure__", None):
            self.see_as("function", function)  # which holds something
        skip = 1 if arguments and arguments[0] is kind else 0
        for i, item in enumerate(arguments[skip:]):
            self.see_as(f"part {i}", item)
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict) and all(isinstance(key, str) for key in part):
                self._attributes({n: v for n, v in part.items() if not is_cached(kind, n)})
            else:
                self.see_as("state", part)
        if setter is not None:
            self.see_as("function", setter)
        for i, item in enumerate(items or ()):
            self.see_as(f"item {i}", item)
        for key, item in pairs or ():
            with self.inside(f"key {key!r}"):
                self.see(key)
                self.see(item)

    def _attributes(self, attributes: Any) -> None:
        if not isinstance(attributes, Mapping):
            self.see(attributes)
            return
        for name in sorted(attributes, key=str):
            self.put("attribute", str(name))
            self.see_as(f"attribute {str(name)!r}", attributes[name])

    def _trimesh(self, value: Any) -> bool:
        """Meshes without what they keep of what they have computed; whether this was one."""
        name = type(value).__name__
        self.put("trimesh", f"{name} {owner_of('trimesh')}")
        if name == "Cache":
            return True
        if name == "SceneGraph":
            for node in sorted(value.nodes_geometry, key=str):
                matrix, geometry = value[node]
                self.put("node", f"{node} {geometry}")
                self._array(matrix)
            return True
        if name == "Trimesh":
            for array in (value.vertices, value.faces, value.vertex_normals):
                self._array(array)
            self.see_as("attribute 'visual'", value.visual)
            for part in ("vertex_attributes", "face_attributes", "units", "metadata"):
                self.see_as(f"attribute {part!r}", getattr(value, part))
            return True
        if name == "ColorVisuals":
            self.put("colours", str(value.kind))
            if value.kind:
                self._array(getattr(value, f"{value.kind}_colors"))
            return True
        if name == "TextureVisuals":
            self._attributes({n: v for n, v in vars(value).items() if n not in ("mesh", "_cache")})
            return True
        if name == "DataStore":
            self._attributes({n: np.asarray(v) for n, v in value.data.items()})
            return True
        return False

    # -- code -----------------------------------------------------------------------------------------------------

    def _function(self, function: FunctionType) -> None:
        home = str(function.__globals__.get("__name__") or "")
        owner = owner_of(home)
        code = function.__code__
        facts = facts_of(code)
        if owner is not None:
            # Not the user's own; but what it closes over may be.
            self.put("function", f"{home}.{function.__qualname__} {owner}")
        else:
            self.put("function")
            self.asked |= {said for said, words in SAID.items() if words & (facts.names | facts.texts)}
            self._said(function)
            self._code(code)
            for i, item in enumerate(function.__defaults__ or ()):
                self.see_as(f"default {i}", item)
            for name, item in sorted((function.__kwdefaults__ or {}).items()):
                self.put("default", name)
                self.see_as(f"default {name!r}", item)
            own = {n for n in code.co_freevars if _content(function, n) is function}
            own |= {n for n in facts.globals if function.__globals__.get(n) is function}
            written = {a for (n, a), uses in facts.uses.attributes.items() if n in own and uses == {"write"}}
            dropped = {n for n, v in vars(function).items() if n in written and type(v) in COUNTED}
            self._attributes({n: v for n, v in vars(function).items() if n not in dropped})
        if owner is None or "<locals>" in function.__qualname__ or function.__closure__:
            for name in code.co_freevars:
                self._variable("closure variable", name, _content(function, name), facts)
        if owner is None:
            self._globals(function.__globals__, facts)

    def _said(self, value: Any) -> None:
        """What is said about a function or a class: of no account, but where code looks at it."""
        if "name" in self._told:
            self.put("name", f"{value.__name__} {value.__qualname__}")
        if "documentation" in self._told:
            self.see(vars(value).get("__doc__") if isinstance(value, type) else value.__doc__)
        if "annotations" in self._told:
            try:
                found = dict(getattr(value, "__annotations__", None) or {})
            except Exception:  # of names that are not there yet
                found = {}
            for name, annotation in found.items():
                self.put("annotation", f"{name} {_told(annotation)}")

    def _variable(self, kind: str, name: str, value: Any, facts: Facts) -> None:
        if facts.uses.only(name, "write") and type(value) in COUNTED:
            return  # counted, and not looked at
        if isinstance(value, PurePath) and only_written(name, facts):
            return
        self.put("variable", name)
        with self.inside(f"{'function' if isinstance(value, FunctionType) and kind[0] == 'g' else kind} {name!r}"):
            if isinstance(value, ModuleType):
                self._module(value, None if name in facts.uses.escapes else facts, name)
            else:
                self.see(value, ordered=not facts.uses.only(name, "lookup", "write"))

    def _globals(self, names: Mapping[str, Any], facts: Facts) -> None:
        if hidden := facts.names & HIDDEN:
            raise self.unseen(f"{min(hidden)}, by which code reaches what it does not name")
        for name in sorted(facts.globals):
            if name in ("__name__", "__file__"):
                continue
            if name in names:
                self._variable("global variable", name, names[name], facts)
            else:
                if id(getattr(builtins, name, None)) in BYPASSES:
                    raise self.unseen(_bypass(getattr(builtins, name)))
                self.put("builtin" if hasattr(builtins, name) else "no variable", name)
        for one in sorted(facts.imports):
            self.put("import", f"{one.level} {one.module}")
            package = str(names.get("__package__") or "")
            with self.inside(f"import {one.module!r}"), contextlib.suppress(ImportError, ValueError):
                full = importlib.util.resolve_name("." * one.level + one.module, package) if one.level else one.module
                self._import(full, one, facts)

    def _import(self, full: str, one: Import, facts: Facts) -> None:
        """What an import inside of a function takes, under the full name of its module."""
        owner = owner_of(full)
        if owner is not None:
            self.put("module", owner)
            if full in sys.modules:
                self._taken(sys.modules[full], facts, {v for _, v in one.bound}, one.names)
            return
        parts = full.split(".")
        upwards = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
        modules = [self._imported(name) for name in upwards[: 1 if one.names else None]]  # "import a.b" gives a
        for name in set(one.names) - {"*", *dir(modules[0])}:
            with contextlib.suppress(ModuleNotFoundError):
                self._imported(f"{full}.{name}")
        for module in modules:
            if isinstance(module, ModuleType):
                whole = "*" in one.names or one.escapes("", facts.uses)
                self._module(module, None if whole else facts)
            else:  # what the module has put in its own place
                self.see(module)
        for name in one.names:
            value = vars(modules[0]).get(name) if isinstance(modules[0], ModuleType) else None
            if isinstance(value, ModuleType):
                self.put("module", name)
                self._module(value, None if one.escapes(name, facts.uses) else facts)

    def _imported(self, name: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except ImportError:
            raise
        except Exception as error:
            raise self.unseen(f"a module that cannot be imported ({type(error).__name__}: {error})") from error

    def _module(self, module: ModuleType, facts: Facts | None, variable: str = "") -> None:
        """A module: its version, or what the code at hand takes from it, or all that is in it.

        Args:
            facts: of the code that takes something from it; None where it is handed on, to what may take anything.
            variable: that holds it in that code.
        """
        if id(module) in BYPASSES:
            raise self.unseen(_bypass(module))
        owner = owner_of(module.__name__)
        if owner is not None:
            self.put("module", f"{module.__name__} {owner}")
            if facts is not None:
                self._taken(module, facts, {variable}, ())
            return
        # The same module again, with what the same code takes: of modules that name each other there is an end.
        if self._taken_before(module, facts):
            return
        path = str(getattr(module, "__file__", None) or "")
        if path.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
            self.put("file", content_digest(path))
        found = vars(module)
        for name in sorted(
            found.keys() - OF_MODULES if facts is None else found.keys() & {*facts.names, "__getattr__"}
        ):
            value = found[name]
            self.put("variable", name)
            with self.inside(f"{'function' if isinstance(value, FunctionType) else 'variable'} {name!r}"):
                if isinstance(value, ModuleType):
                    self._module(value, None if facts is None or name in facts.uses.escapes else facts)
                else:
                    self.see(value)

    def _taken_before(self, module: ModuleType, facts: Facts | None, noted: bool = True) -> bool:
        """Whether this module has been seen already with these facts; `noted` puts its number."""
        key = id(module), id(facts)
        before = key in self._modules
        if not before:
            self._modules[key] = len(self._modules)
            self._alive.append((module, facts))
        if noted:
            self.put("module", str(self._modules[key]))
        return before

    def _taken(self, module: ModuleType, facts: Facts, variables: set[str], names: tuple[str, ...]) -> None:
        """What code takes from a package that is installed, where that is not what has been installed."""
        found = vars(module)
        for name in sorted(facts.names & found.keys()):
            value = found[name]
            named = name in names or any((variable, name) in facts.uses.attributes for variable in variables)
            if named and id(value) in BYPASSES:
                raise self.unseen(_bypass(value))
            if isinstance(value, ModuleType):
                if value.__name__.startswith(f"{module.__name__}.") and not self._taken_before(value, facts, False):
                    self._taken(value, facts, set(), ())
            elif is_users(value):
                self.put("replaced", name)
                self.see_as(f"variable {name!r}", value)
            elif named and type(value) in (bool, int, float, complex):
                self.put("variable", name)
                self.see(value)

    def _code(self, code: CodeType) -> None:
        """Not where it stands, what it is called, nor its comments."""
        self.put("code", code.co_code)
        shape = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        self.put("names", repr((shape, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)))
        for constant in loaded_constants(code):
            self.see(constant)

    def _class(self, kind: type) -> None:
        module = str(kind.__module__)
        owner = owner_of(module)
        if owner is not None and (module != "builtins" or getattr(builtins, kind.__name__, None) is kind or in_c(kind)):
            self.put("class", f"{module}.{kind.__qualname__} {owner}")
            return
        if self.again(kind):
            return
        self.put("class", kind.__qualname__)
        with self.inside(f"class {kind.__qualname__}"):
            self._said(kind)
            for base in (*kind.__bases__, type(kind)):
                self._class(base)
            noise = NOISE | counters(kind, vars(kind))
            if issubclass(kind, enum.Enum):
                noise |= ENUM | kind.__members__.keys()
                for name, member in kind.__members__.items():
                    self.put("member", name)
                    with self.inside(f"member {name!r}"):
                        self.see(member._value_)
                        self._extras(member)
            for name in sorted(vars(kind).keys() - noise):
                value = vars(kind)[name]
                if isinstance(value, types.MemberDescriptorType) or is_generated(kind, name, value):
                    continue
                self.put("attribute", name)
                self.see_as(f"{'method' if isinstance(value, FunctionType) else 'attribute'} {name!r}", value)
            for name, field in sorted(getattr(kind, "__dataclass_fields__", {}).items()):
                self.put("field", name)
                with self.inside(f"field {name!r}"):
                    if field.metadata:
                        self.see(field.metadata)
                    if "annotations" in self._told:
                        flags = field.init, field.repr, field.hash, field.compare, field.kw_only
                        self.put("annotation", f"{_told(field.type)} {flags}")
                    for part in (field.default, field.default_factory):
                        self.put("none") if "MISSING" in type(part).__name__ else self.see(part)


def _bytes(array: np.ndarray[Any, Any]) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""


def _bypass(value: Any) -> str:
    return f"{BYPASSES[id(value)]}, by which code reaches what it does not name"


def _told(annotation: Any) -> str:
    """An annotation, the same in every process."""
    if isinstance(annotation, type):
        return f"{annotation.__module__}.{annotation.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(annotation))


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _content(function: FunctionType, name: str) -> Any:
    """What a closure variable holds; a text where it is not yet filled."""
    assert function.__closure__ is not None
    try:
        return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
    except ValueError:
        return "not filled"
