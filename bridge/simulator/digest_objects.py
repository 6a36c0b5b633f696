"""What a walk sees of objects: their class, and their attributes or what pickle would make of them."""

from __future__ import annotations

import collections
import collections.abc
import copyreg
import ctypes
import functools
import io
import socket
import subprocess
import sys
import threading
import types
import warnings
from types import MethodType, ModuleType
from typing import Any

import numpy as np

from bridge.simulator.digest_code import see_class
from bridge.simulator.digest_values import see_array, see_set
from bridge.simulator.digest_walk import Walk, with_article
from bridge.simulator.file_contents import content_digest
from bridge.simulator.instances import (
    counters,
    is_cached,
    is_global_generator,
    is_python,
    state_of,
)
from bridge.simulator.packages import owner_of
from bridge.simulator.protocol import IdentityParts

# What has its content somewhere else, though some of it may look as if it could be seen.
_WORDS: dict[type, str] = {
    io.IOBase: "an open file",
    socket.socket: "a socket",
    types.GeneratorType: "a generator",
    threading.local: "a thread's own variables",
    ctypes.CDLL: "a library loaded by ctypes",
    subprocess.Popen: "a running program",
    type(threading.Lock()): "a lock",
    type(threading.RLock()): "a lock",
}


def see_builtin(walk: Walk, value: Any) -> None:
    owner = value.__self__
    walk.put("builtin", value.__qualname__)
    if owner is None or isinstance(owner, ModuleType):
        see_home(walk, str(getattr(value, "__module__", None) or getattr(owner, "__name__", "")))
    elif not is_global_generator(owner):
        walk.see_as("object", owner)


def see_home(walk: Walk, module: str) -> None:
    """Where something in C comes from: its package's version, or the file of the user's own."""
    path = getattr(sys.modules.get(module), "__file__", None)
    walk.put("module", f"{module} {owner_of(module) or (content_digest(path) if path else '')}")


def see_instance(walk: Walk, value: Any) -> None:
    kind = type(value)
    module = kind.__module__
    if any(value is stream for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)):
        walk.put("stream")  # what is said there does not come back
        return
    for base, words in _WORDS.items():
        if isinstance(value, base) and not isinstance(value, io.StringIO | io.BytesIO):
            raise walk.unseen(words)
    own = owner_of(module) is None
    if isinstance(value, collections.abc.Iterator) and not (own and is_python(kind)):
        raise walk.unseen(f"{with_article(kind.__name__)}, which calls use up")
    walk.put("instance")
    if hasattr(kind, "identity_parts") and isinstance(value, IdentityParts):
        see_class(walk, kind)
        walk.attributes(value.identity_parts)
        return
    if module.partition(".")[0] == "trimesh" and see_trimesh(walk, value):
        return
    see_class(walk, kind)
    if isinstance(value, set | frozenset):
        see_set(walk, value)
        walk.attributes(getattr(value, "__dict__", {}))
        return
    state = state_of(value)
    if state is None:
        see_reduced(walk, value, kind)
        return
    dropped = {n for n in state if is_cached(kind, n)} | (counters(kind, state) if own else set())
    walk.attributes({n: v for n, v in state.items() if n not in dropped})


def see_reduced(walk: Walk, value: Any, kind: type) -> None:
    """By what pickle would make of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reduce = copyreg.dispatch_table.get(kind)
            parts = value.__reduce_ex__(4) if reduce is None else reduce(value)
    except Exception as error:
        raise walk.unseen(f"{with_article(kind.__name__)} ({kind.__module__}), whose content is hidden") from error
    if isinstance(parts, str):
        walk.put("global", parts)
        see_home(walk, str(getattr(value, "__module__", None) or kind.__module__))
        return
    walk.alive.append(parts)
    function, arguments, state, items, pairs, setter = (*parts, None, None, None, None)[:6]
    walk.put("reduced", getattr(function, "__qualname__", ""))
    if isinstance(function, functools.partial | MethodType) or getattr(function, "__closure__", None):
        walk.see_as("function", function)  # which holds something
    skip = 1 if arguments and arguments[0] is kind else 0
    for i, item in enumerate(arguments[skip:]):
        walk.see_as(f"part {i}", item)
    for part in state if isinstance(state, tuple) else (state,):
        if isinstance(part, dict) and all(isinstance(key, str) for key in part):
            walk.attributes({n: v for n, v in part.items() if not is_cached(kind, n)})
        else:
            walk.see_as("state", part)
    if setter is not None:
        walk.see_as("function", setter)
    for i, item in enumerate(items or ()):
        walk.see_as(f"item {i}", item)
    for key, item in pairs or ():
        with walk.inside(f"key {key!r}"):
            walk.see(key)
            walk.see(item)


def see_trimesh(walk: Walk, value: Any) -> bool:
    """Meshes without what they keep of what they have computed; whether this was one."""
    name = type(value).__name__
    walk.put("trimesh", f"{name} {owner_of('trimesh')}")
    if name == "Cache":
        return True
    if name == "SceneGraph":
        for node in sorted(value.nodes_geometry, key=str):
            matrix, geometry = value[node]
            walk.put("node", f"{node} {geometry}")
            see_array(walk, matrix)
        return True
    if name == "Trimesh":
        for array in (value.vertices, value.faces, value.vertex_normals):
            see_array(walk, array)
        walk.see_as("attribute 'visual'", value.visual)
        for part in ("vertex_attributes", "face_attributes", "units", "metadata"):
            walk.see_as(f"attribute {part!r}", getattr(value, part))
        return True
    if name == "ColorVisuals":
        walk.put("colours", str(value.kind))
        if value.kind:
            see_array(walk, getattr(value, f"{value.kind}_colors"))
        return True
    if name == "TextureVisuals":
        walk.attributes({n: v for n, v in vars(value).items() if n not in ("mesh", "_cache")})
        return True
    if name == "DataStore":
        walk.attributes({n: np.asarray(v) for n, v in value.data.items()})
        return True
    return False
