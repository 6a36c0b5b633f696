#!/usr/bin/env python3
"""Prints what is long: functions, files, signatures, docstrings' sentences aside; and circles of imports between files.

    python tools/longest.py              all that is over the limits
    python tools/longest.py --number 20  the longest of each kind besides, whether over the limits or not

tests/test_structure.py holds the lists of what may be over them. Lines of code are those that are neither empty, nor a
comment, nor part of a docstring; a file's are all its lines.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bridge", "adapters", "simulators")
FUNCTION, FILE = 60, 450
# Named arguments of a door, `self` aside.
SIGNATURES = {"bridge/fitting/fit.py:fit": 16, "bridge/smoothing/smooth.py:smooth": 14}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A Python file of ours, read once."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def module(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> tuple[Source, ...]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    return tuple(Source(path, text, ast.parse(text)) for path, text in zip(paths, texts, strict=True))


def files() -> dict[str, int]:
    """File -> its lines."""
    return {source.name: source.text.count("\n") for source in sources()}


def _code_lines(text: str) -> set[int]:
    """The numbers of lines on which something stands that is no comment."""
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            found.update(range(token.start[0], token.end[0] + 1))
    return found


def _docstring_lines(node: ast.AST) -> set[int]:
    found: set[int] = set()
    for inner in ast.walk(node):
        if (
            isinstance(inner, Function | ast.ClassDef | ast.Module)
            and ast.get_docstring(inner, clean=False) is not None
        ):
            found.update(range(inner.body[0].lineno, (inner.body[0].end_lineno or 0) + 1))
    return found


def _named(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """Functions, methods and functions within functions, by their qualified names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield f"{prefix}{child.name}", child
            yield from _named(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _named(child, f"{prefix}{child.name}.")
        else:
            yield from _named(child, prefix)


def functions() -> dict[str, int]:
    """File:function -> its lines of code, decorators and signature included, functions within it as well."""
    found = {}
    for source in sources():
        code = _code_lines(source.text) - _docstring_lines(source.tree)
        for name, node in _named(source.tree, f"{source.name}:"):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[name] = len(code & set(range(first, (node.end_lineno or first) + 1)))
    return found


def signatures() -> dict[str, int]:
    """File:function -> how many named arguments it takes, `self` and `cls` aside."""
    found = {}
    for source in sources():
        for name, node in _named(source.tree, f"{source.name}:"):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found[name] = len([argument for argument in named if argument.arg not in ("self", "cls")])
    return found


def imports() -> dict[str, set[str]]:
    """File -> the files of ours that it imports, in functions and for type checkers alone included."""
    by_module = {source.module: source.name for source in sources()}
    found: dict[str, set[str]] = {source.name: set() for source in sources()}
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                wanted = [module] * any(f"{module}.{alias.name}" not in by_module for alias in node.names)
                wanted += [f"{module}.{alias.name}" for alias in node.names]
            else:
                continue
            found[source.name] |= {by_module[name] for name in wanted if name in by_module} - {source.name}
    return found


def circles(graph: Mapping[str, set[str]] | None = None) -> list[tuple[str, ...]]:
    """Files that import each other, round some corners: each set of them sorted, the sets sorted."""
    graph = imports() if graph is None else graph
    reached = {name: _reach(graph, name) for name in graph}
    sets = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]}
    return sorted(sets)


def _reach(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """What can be reached from a file by one import or more."""
    found: set[str] = set()
    todo = list(graph[start])
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += graph[name]
    return found


def over(lengths: Mapping[str, int], limit: int) -> dict[str, int]:
    """Those over a limit, the longest first."""
    return dict(sorted(((k, v) for k, v in lengths.items() if v > limit), key=lambda item: (-item[1], item[0])))


def too_wide() -> dict[str, int]:
    """Doors that take more named arguments than they may."""
    counted = signatures()
    return {name: counted[name] for name, limit in SIGNATURES.items() if name in counted and counted[name] > limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=0, metavar="N", help="the N longest of each kind besides")
    number = parser.parse_args().number
    for what, lengths, limit in (
        (f"functions over {FUNCTION} lines of code", functions(), FUNCTION),
        (f"files over {FILE} lines", files(), FILE),
        ("signatures, the widest", signatures(), 10**9),
    ):
        shown = over(lengths, limit) or {}
        shown = {**shown, **dict(list(over(lengths, -1).items())[:number])}
        print(f"{what}: {len(over(lengths, limit)) or ''}".rstrip(": "))
        for name, length in shown.items():
            print(f"  {length:5} {name}")
    print("doors over their limit")
    for name, count in too_wide().items():
        print(f"  {count:5} {name} (limit {SIGNATURES[name]})")
    print("circles of imports")
    for circle in circles():
        print(f"        {' <-> '.join(circle)}")


if __name__ == "__main__":
    main()
