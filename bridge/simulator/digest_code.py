"""What a walk sees of functions, classes and modules: their code, and what that code names."""

from __future__ import annotations

import builtins
import contextlib
import enum
import importlib
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Mapping
from pathlib import PurePath
from types import CodeType, FunctionType, ModuleType
from typing import Any

from bridge.simulator.bytecode import Facts, Import, facts_of, loaded_constants
from bridge.simulator.digest_walk import Walk, bypass
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
    in_c,
    is_generated,
    is_users,
    only_written,
)
from bridge.simulator.packages import owner_of


def see_function(walk: Walk, function: FunctionType) -> None:
    home = str(function.__globals__.get("__name__") or "")
    owner = owner_of(home)
    code = function.__code__
    facts = facts_of(code)
    if owner is not None:
        # Not the user's own; but what it closes over may be.
        walk.put("function", f"{home}.{function.__qualname__} {owner}")
    else:
        walk.put("function")
        walk.asked |= {said for said, words in SAID.items() if words & (facts.names | facts.texts)}
        see_said(walk, function)
        see_code(walk, code)
        for i, item in enumerate(function.__defaults__ or ()):
            walk.see_as(f"default {i}", item)
        for name, item in sorted((function.__kwdefaults__ or {}).items()):
            walk.put("default", name)
            walk.see_as(f"default {name!r}", item)
        own = {n for n in code.co_freevars if _content(function, n) is function}
        own |= {n for n in facts.globals if function.__globals__.get(n) is function}
        written = {a for (n, a), uses in facts.uses.attributes.items() if n in own and uses == {"write"}}
        dropped = {n for n, v in vars(function).items() if n in written and type(v) in COUNTED}
        walk.attributes({n: v for n, v in vars(function).items() if n not in dropped})
    if owner is None or "<locals>" in function.__qualname__ or function.__closure__:
        for name in code.co_freevars:
            see_variable(walk, "closure variable", name, _content(function, name), facts)
    if owner is None:
        see_globals(walk, function.__globals__, facts)


def see_said(walk: Walk, value: Any) -> None:
    """What is said about a function or a class: of no account, but where code looks at it."""
    if "name" in walk.told:
        walk.put("name", f"{value.__name__} {value.__qualname__}")
    if "documentation" in walk.told:
        walk.see(vars(value).get("__doc__") if isinstance(value, type) else value.__doc__)
    if "annotations" in walk.told:
        try:
            found = dict(getattr(value, "__annotations__", None) or {})
        except Exception:  # of names that are not there yet
            found = {}
        for name, annotation in found.items():
            walk.put("annotation", f"{name} {_as_text(annotation)}")


def see_variable(walk: Walk, kind: str, name: str, value: Any, facts: Facts) -> None:
    if facts.uses.only(name, "write") and type(value) in COUNTED:
        return  # counted, and not looked at
    if isinstance(value, PurePath) and only_written(name, facts):
        return
    walk.put("variable", name)
    with walk.inside(f"{'function' if isinstance(value, FunctionType) and kind[0] == 'g' else kind} {name!r}"):
        if isinstance(value, ModuleType):
            see_module(walk, value, None if name in facts.uses.escapes else facts, name)
        else:
            walk.see(value, ordered=not facts.uses.only(name, "lookup", "write"))


def see_globals(walk: Walk, names: Mapping[str, Any], facts: Facts) -> None:
    if hidden := facts.names & HIDDEN:
        raise walk.unseen(f"{min(hidden)}, by which code reaches what it does not name")
    for name in sorted(facts.globals):
        if name in ("__name__", "__file__"):
            continue
        if name in names:
            see_variable(walk, "global variable", name, names[name], facts)
        else:
            if id(getattr(builtins, name, None)) in BYPASSES:
                raise walk.unseen(bypass(getattr(builtins, name)))
            walk.put("builtin" if hasattr(builtins, name) else "no variable", name)
    for one in sorted(facts.imports):
        walk.put("import", f"{one.level} {one.module}")
        package = str(names.get("__package__") or "")
        with walk.inside(f"import {one.module!r}"), contextlib.suppress(ImportError, ValueError):
            full = importlib.util.resolve_name("." * one.level + one.module, package) if one.level else one.module
            see_import(walk, full, one, facts)


def see_import(walk: Walk, full: str, one: Import, facts: Facts) -> None:
    """What an import inside of a function takes, under the full name of its module."""
    owner = owner_of(full)
    if owner is not None:
        walk.put("module", owner)
        if full in sys.modules:
            see_taken(walk, sys.modules[full], facts, {v for _, v in one.bound}, one.names)
        return
    parts = full.split(".")
    upwards = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    modules = [imported(walk, name) for name in upwards[: 1 if one.names else None]]  # "import a.b" gives a
    for name in set(one.names) - {"*", *dir(modules[0])}:
        with contextlib.suppress(ModuleNotFoundError):
            imported(walk, f"{full}.{name}")
    for module in modules:
        if isinstance(module, ModuleType):
            whole = "*" in one.names or one.escapes("", facts.uses)
            see_module(walk, module, None if whole else facts)
        else:  # what the module has put in its own place
            walk.see(module)
    for name in one.names:
        value = vars(modules[0]).get(name) if isinstance(modules[0], ModuleType) else None
        if isinstance(value, ModuleType):
            walk.put("module", name)
            see_module(walk, value, None if one.escapes(name, facts.uses) else facts)


def imported(walk: Walk, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise
    except Exception as error:
        raise walk.unseen(f"a module that cannot be imported ({type(error).__name__}: {error})") from error


def see_module(walk: Walk, module: ModuleType, facts: Facts | None, variable: str = "") -> None:
    """A module: its version, or what the code at hand takes from it, or all that is in it.

    Args:
        facts: of the code that takes something from it; None where it is handed on, to what may take anything.
        variable: that holds it in that code.
    """
    if id(module) in BYPASSES:
        raise walk.unseen(bypass(module))
    owner = owner_of(module.__name__)
    if owner is not None:
        walk.put("module", f"{module.__name__} {owner}")
        if facts is not None:
            see_taken(walk, module, facts, {variable}, ())
        return
    # The same module again, with what the same code takes: of modules that name each other there is an end.
    if taken_before(walk, module, facts):
        return
    path = str(getattr(module, "__file__", None) or "")
    if path.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
        walk.put("file", content_digest(path))
    found = vars(module)
    for name in sorted(found.keys() - OF_MODULES if facts is None else found.keys() & {*facts.names, "__getattr__"}):
        value = found[name]
        walk.put("variable", name)
        with walk.inside(f"{'function' if isinstance(value, FunctionType) else 'variable'} {name!r}"):
            if isinstance(value, ModuleType):
                see_module(walk, value, None if facts is None or name in facts.uses.escapes else facts)
            else:
                walk.see(value)


def taken_before(walk: Walk, module: ModuleType, facts: Facts | None, noted: bool = True) -> bool:
    """Whether this module has been seen already with these facts; `noted` puts its number."""
    key = id(module), id(facts)
    before = key in walk.modules
    if not before:
        walk.modules[key] = len(walk.modules)
        walk.alive.append((module, facts))
    if noted:
        walk.put("module", str(walk.modules[key]))
    return before


def see_taken(walk: Walk, module: ModuleType, facts: Facts, variables: set[str], names: tuple[str, ...]) -> None:
    """What code takes from a package that is installed, where that is not what has been installed."""
    found = vars(module)
    for name in sorted(facts.names & found.keys()):
        value = found[name]
        named = name in names or any((variable, name) in facts.uses.attributes for variable in variables)
        if named and id(value) in BYPASSES:
            raise walk.unseen(bypass(value))
        if isinstance(value, ModuleType):
            if value.__name__.startswith(f"{module.__name__}.") and not taken_before(walk, value, facts, False):
                see_taken(walk, value, facts, set(), ())
        elif is_users(value):
            walk.put("replaced", name)
            walk.see_as(f"variable {name!r}", value)
        elif named and type(value) in (bool, int, float, complex):
            walk.put("variable", name)
            walk.see(value)


def see_code(walk: Walk, code: CodeType) -> None:
    """Not where it stands, what it is called, nor its comments."""
    walk.put("code", code.co_code)
    shape = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    walk.put("names", repr((shape, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)))
    for constant in loaded_constants(code):
        walk.see(constant)


def see_class(walk: Walk, kind: type) -> None:
    module = str(kind.__module__)
    owner = owner_of(module)
    if owner is not None and (module != "builtins" or getattr(builtins, kind.__name__, None) is kind or in_c(kind)):
        walk.put("class", f"{module}.{kind.__qualname__} {owner}")
        return
    if walk.again(kind):
        return
    walk.put("class", kind.__qualname__)
    with walk.inside(f"class {kind.__qualname__}"):
        see_said(walk, kind)
        for base in (*kind.__bases__, type(kind)):
            see_class(walk, base)
        noise = NOISE | counters(kind, vars(kind))
        if issubclass(kind, enum.Enum):
            noise |= ENUM | kind.__members__.keys()
            for name, member in kind.__members__.items():
                walk.put("member", name)
                with walk.inside(f"member {name!r}"):
                    walk.see(member._value_)
                    walk.extras(member)
        for name in sorted(vars(kind).keys() - noise):
            value = vars(kind)[name]
            if isinstance(value, types.MemberDescriptorType) or is_generated(kind, name, value):
                continue
            walk.put("attribute", name)
            walk.see_as(f"{'method' if isinstance(value, FunctionType) else 'attribute'} {name!r}", value)
        for name, field in sorted(getattr(kind, "__dataclass_fields__", {}).items()):
            walk.put("field", name)
            with walk.inside(f"field {name!r}"):
                if field.metadata:
                    walk.see(field.metadata)
                if "annotations" in walk.told:
                    flags = field.init, field.repr, field.hash, field.compare, field.kw_only
                    walk.put("annotation", f"{_as_text(field.type)} {flags}")
                for part in (field.default, field.default_factory):
                    walk.put("none") if "MISSING" in type(part).__name__ else walk.see(part)


def see_own_kind(walk: Walk, value: Any, met: bool = False) -> None:
    """The class, and what else it has put into this object, of something whose class the user has derived."""
    if owner_of(type(value).__module__) is None:
        see_class(walk, type(value))
        walk.extras(value, met)


def _as_text(annotation: Any) -> str:
    """An annotation, the same in every process."""
    if isinstance(annotation, type):
        return f"{annotation.__module__}.{annotation.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(annotation))


def _content(function: FunctionType, name: str) -> Any:
    """What a closure variable holds; a text where it is not yet filled."""
    assert function.__closure__ is not None
    try:
        return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
    except ValueError:
        return "not filled"
