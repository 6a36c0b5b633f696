"""What a piece of compiled code can see: the globals that it names, and what it does with each.

A name that is only ever written, like a counter or a list of calls, has no part in what a function returns. One that is
only looked into by key has no part in it by its order.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

# Methods that change a container, and tell nothing where their result is thrown away.
_WRITERS = frozenset({"append", "appendleft", "add", "extend", "insert", "update"})
_NO_EFFECT = frozenset(
    {"RESUME", "NOP", "CACHE", "EXTENDED_ARG", "COPY_FREE_VARS", "MAKE_CELL", "KW_NAMES", "PRECALL", "NOT_TAKEN"}
)
_POPS = {
    "COMPARE_OP": 2,
    "UNARY_NEGATIVE": 1,
    "UNARY_NOT": 1,
    "UNARY_INVERT": 1,
    "TO_BOOL": 1,
    "BINARY_SLICE": 3,
    "FORMAT_SIMPLE": 1,
    "CONVERT_VALUE": 1,
    "FORMAT_WITH_SPEC": 2,
    "GET_ITER": 1,
}
_BUILDS = {"BUILD_TUPLE": 1, "BUILD_LIST": 1, "BUILD_SET": 1, "BUILD_STRING": 1, "BUILD_SLICE": 1, "BUILD_MAP": 2}
# Attributes through which all others can be had.
_ALL_OF_IT = frozenset({"__dict__", "__getattribute__", "__getattr__", "__dir__"})
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_DEREF = ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")


@dataclass
class Uses:
    """What is done with names, and with attributes of names: sets of "read", "write", "lookup" and "attribute".

    `escapes` are the names, and last parts of dotted ones, whose value is handed on, returned, stored or the like, so
    that something else may be done with it out of sight.
    """

    names: dict[str, set[str]] = field(default_factory=dict)
    attributes: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    escapes: set[str] = field(default_factory=set)

    def only(self, name: str, *allowed: str) -> bool:
        """Whether nothing else is done with a name than these."""
        return self.names.get(name, {"read"}) <= set(allowed)

    def add(self, other: Uses) -> None:
        for name, uses in other.names.items():
            self.names.setdefault(name, set()).update(uses)
        for key, uses in other.attributes.items():
            self.attributes.setdefault(key, set()).update(uses)
        self.escapes |= other.escapes


@dataclass(frozen=True, order=True)
class Import:
    """An import inside of code: the module, how many dots are before it, what is taken from it, and variables for it.

    Attributes:
        bound: (what, variable) for each; what is "" for the module itself.
    """

    module: str
    level: int
    names: tuple[str, ...] = ()
    bound: tuple[tuple[str, str], ...] = ()

    def escapes(self, what: str, uses: Uses) -> bool:
        """Whether a variable that holds it is handed on."""
        return any(source == what and variable in uses.escapes for source, variable in self.bound)


@dataclass(frozen=True)
class Facts:
    """Of a piece of code and all that is nested in it.

    Attributes:
        globals: names that it looks up in its module. names: all names of globals, attributes and imports.
        imports: what it imports. texts: constants.
        uses: of globals, closure variables, and the first argument.
    """

    globals: frozenset[str]
    names: frozenset[str]
    imports: frozenset[Import]
    texts: frozenset[str]
    uses: Uses


@functools.lru_cache(maxsize=4096)
def facts_of(code: CodeType) -> Facts:
    imports = set(_imports(code))
    names, found, uses = set(code.co_names), set(), _uses(code, {v for one in imports for _, v in one.bound})
    texts = {constant for constant in code.co_consts if isinstance(constant, str)}
    for instruction in dis.get_instructions(code):
        if instruction.opname in (*_GLOBAL, "STORE_GLOBAL", "DELETE_GLOBAL"):
            found.add(str(instruction.argval))
        if instruction.opname == "STORE_GLOBAL":
            uses.escapes.add(str(instruction.argval))  # for other code to use
    for inner in nested(code):
        facts = facts_of(inner)
        found |= facts.globals
        names |= facts.names
        imports |= facts.imports
        texts |= facts.texts
        own = {*inner.co_varnames[:1]} - set(inner.co_freevars)
        uses.add(
            Uses(
                {n: set(u) for n, u in facts.uses.names.items() if n not in own},
                {key: set(u) for key, u in facts.uses.attributes.items() if key[0] not in own},
                facts.uses.escapes - own,
            )
        )
    return Facts(frozenset(found), frozenset(names), frozenset(imports), frozenset(texts), uses)


def _imports(code: CodeType) -> Iterator[Import]:
    """The imports of a piece of code itself."""
    before: list[Any] = []
    current, what, bound = None, None, list[tuple[str, str]]()
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name in ("LOAD_CONST", "LOAD_SMALL_INT"):
            before.append(value)
        elif name == "IMPORT_NAME":
            if current is not None:
                yield replace(current, bound=tuple(bound))
            # The level and the list of names are the two constants before.
            level = next((v for v in before[-2:] if isinstance(v, int)), 0)
            names = next((v for v in before[-2:] if isinstance(v, tuple)), ())
            current, what, bound = Import(str(value), level, names), "", []
        elif name == "IMPORT_FROM" and current is not None:
            what = str(value) if current.names else ""  # "import a.b as c" takes b from a
        elif name.startswith("STORE_") and what is not None:
            bound.append((what, value[0] if isinstance(value, tuple) else str(value)))
            what = None
        elif name not in ("SWAP", "POP_TOP", "EXTENDED_ARG", "CACHE"):
            what = None
    if current is not None:
        yield replace(current, bound=tuple(bound))


def nested(code: CodeType) -> Iterator[CodeType]:
    """The code of functions, comprehensions and classes that it makes."""
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))


@functools.lru_cache(maxsize=4096)
def loaded_constants(code: CodeType) -> tuple[Any, ...]:
    """The constants that it uses: not its docstring."""
    indices = {i.arg for i in dis.get_instructions(code) if i.opcode in dis.hasconst and i.arg is not None}
    return tuple(None if isinstance(c, str) and i not in indices else c for i, c in enumerate(code.co_consts))


# -- what is done with names: the stack, run in thought -----------------------------------------------------------

# What lies on the stack: nothing of interest, or ("name", n), ("attribute", place, a), ("method", place, m),
# ("item", place), ("changed", place): a place with something added to what it held.
_Place = Any


def _uses(code: CodeType, imported: set[str]) -> Uses:
    walk = _Stack(code, imported)
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _NO_EFFECT]
    for instruction, after in zip(instructions, [*instructions[1:], None], strict=True):
        if instruction.is_jump_target:
            walk.forget()
        walk.step(instruction, after)
    walk.forget()
    return walk.uses


class _Stack:
    def __init__(self, code: CodeType, imported: set[str]) -> None:
        self.uses, self.stack = Uses(), list[_Place]()
        # The variables that are followed: the first argument, and what holds an imported module.
        first = set(code.co_varnames[:1] if code.co_argcount else ()) - {*code.co_cellvars, *code.co_freevars}
        self._followed = first | imported

    def step(self, instruction: dis.Instruction, after: dis.Instruction | None) -> None:
        name, value, arg = instruction.opname, instruction.argval, instruction.arg or 0
        if name in _GLOBAL or name in _DEREF:
            effect = dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
            self.stack += [None] * (effect - 1)
            self.stack.append(("name", value))
        elif name.startswith("LOAD_FAST"):
            for local in value if isinstance(value, tuple) else (value,):
                self._load_local(local)
        elif name in ("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_CLOSURE", "PUSH_NULL", "LOAD_COMMON_CONSTANT"):
            self.stack.append(None)
        elif name == "COPY":
            self.stack.append(self.stack[-arg] if len(self.stack) >= arg else None)
        elif name == "SWAP" and len(self.stack) >= arg:
            self.stack[-1], self.stack[-arg] = self.stack[-arg], self.stack[-1]
        elif name == "POP_TOP":
            self.pop()
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            self._load_attribute(instruction, str(value))
        elif name == "BINARY_SUBSCR" or (name == "BINARY_OP" and instruction.argrepr == "[]"):
            self.read(self.pop())
            container = self.pop()
            self.stack.append(None if container is None else ("item", container))
        elif name == "BINARY_OP":
            self.read(self.pop())
            left = self.pop()
            self.stack.append(None if left is None else ("changed", left))
        elif name == "CONTAINS_OP":
            self.note(self.pop(), "lookup")
            self.read(self.pop())
            self.stack.append(None)
        elif name in ("STORE_GLOBAL", "STORE_DEREF"):
            self._store(("name", value))
        elif name == "STORE_ATTR":
            base = self.pop()
            self._attribute_of(base)
            self._store(("attribute", base, str(value)))
        elif name == "STORE_SUBSCR":
            self.read(self.pop())
            self._store(("item", self.pop()))
        elif name in ("STORE_FAST", "STORE_FAST_STORE_FAST", "STORE_FAST_LOAD_FAST"):
            self.read(self.pop())
            if name == "STORE_FAST_STORE_FAST":
                self.read(self.pop())
            elif name == "STORE_FAST_LOAD_FAST":
                self._load_local(value[1])
        elif name == "IS_OP" or name.startswith("POP_JUMP"):
            # Whether it is None is asked of it, or whether it is true: it goes nowhere.
            for _ in range(2 if name == "IS_OP" else 1):
                self.note(self.pop(), "read")
            if name == "IS_OP":
                self.stack.append(None)
            else:
                self.forget()
        elif name == "CALL":
            self._call(arg, after)
        elif name in _POPS or name in _BUILDS:
            for _ in range(_POPS[name] if name in _POPS else arg * _BUILDS[name]):
                self.read(self.pop())
            self.stack.append(None)
        else:
            self.forget()
            effect = dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
            self.stack = self.stack[:effect] if effect < 0 else [*self.stack, *[None] * effect]

    def pop(self) -> _Place:
        return self.stack.pop() if self.stack else None

    def forget(self) -> None:
        """What becomes of what is on the stack is not followed any further: it counts as read."""
        for place in self.stack:
            self.read(place)
        self.stack = [None] * len(self.stack)

    def read(self, place: _Place) -> None:
        if place is not None and place[0] in ("name", "attribute"):
            self.uses.escapes.add(place[-1])
        self.note(place, "read")

    def _load_local(self, name: str) -> None:
        self.stack.append(("name", name) if name in self._followed else None)

    def note(self, place: _Place, use: str) -> None:
        if place is None:
            return
        kind, inner = place[0], place[1]
        if kind == "name":
            self.uses.names.setdefault(inner, set()).add(use)
        elif kind == "attribute" and inner is not None and inner[0] == "name":
            self.uses.attributes.setdefault((inner[1], place[2]), set()).add(use)
        elif kind == "item":
            self.note(inner, "write" if use == "write" else "lookup" if use in ("read", "lookup") else use)
        else:
            self.note(inner, "read")

    def _attribute_of(self, base: _Place, name: str = "") -> None:
        if name in _ALL_OF_IT:
            self.read(base)
        self.note(base, "attribute" if base is not None and base[0] == "name" else "read")

    def _load_attribute(self, instruction: dis.Instruction, name: str) -> None:
        base = self.pop()
        method = instruction.opname == "LOAD_METHOD" or (
            dis.stack_effect(instruction.opcode, instruction.arg, jump=False) == 1
        )
        if method and base is not None and (name in _WRITERS or name == "get"):
            self.stack += [("method", base, name), None]
            return
        self._attribute_of(base, name)
        self.stack.append(None if base is None else ("attribute", base, name))
        if method:
            self.stack.append(None)

    def _store(self, place: _Place) -> None:
        value = self.pop()
        if value != ("changed", place):
            self.read(value)
        # A name that is written is not thereby read; nor is a container into which something is put.
        if place[1] is not None:
            self.note(place, "write")

    def _call(self, arguments: int, after: dis.Instruction | None) -> None:
        for _ in range(arguments):
            self.read(self.pop())
        result = None
        for place in (self.pop(), self.pop()):
            if place is not None and place[0] == "method":
                thrown = after is not None and after.opname == "POP_TOP" and not after.is_jump_target
                base, method = place[1], place[2]
                if method == "get":
                    result = ("item", base)
                else:
                    self.note(base, "write" if thrown else "read")
                if base[0] == "attribute":
                    self._attribute_of(base[1])
            else:
                self.read(place)
        self.stack.append(result)
