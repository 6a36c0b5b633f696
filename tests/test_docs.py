"""README and docs do what they say: every code block runs, and prints what stands below it; every command exists.

A page's Python blocks run in their order, in one namespace, in a process and an empty directory of the page's own. What
a block prints is compared with its lines `# -> ...`, or with a `text` block below it (`...` stands for anything). HTML
comments before a block say more, and nobody who reads the page sees them:

    <!-- docs: setup  CODE -->        code that runs first, the names that a page takes for granted
    <!-- docs: file NAME -->          the next block is written to that file besides
    <!-- docs: run -->                the commands of the next block are carried out, by this Python
    <!-- docs: skip REASON -->        the next block is not run; the reasons are printed, and there are few

A library that does this was looked for: pytest-examples has one namespace a block, Sybil compares no printed output of
fenced blocks, and neither knows a page's directory and process. The parser is markdown-it's.
"""

from __future__ import annotations

import doctest
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from bridge.cli.main import _parser, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
# (page, how its blocks are skipped): each of them with its reason in the page.
SKIPPED = 0
_DIRECTIVE = re.compile(r"<!--\s*docs:\s*(setup|file|run|skip)\s*(.*?)\s*-->", re.DOTALL)
# Words in capitals and the names of files of the reader's own stand for something.
_OF_THE_READER = ("fit.py", "script.py", "job.toml", "FILE.toml")


@dataclass(frozen=True)
class Block:
    """A block of a page: its language, where it stands, and what the comment before it says."""

    language: str
    code: str
    line: int
    directive: str = ""
    argument: str = ""
    expected: str | None = None


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    directive = argument = ""
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        line = token.map[0] + 2 if token.map else 0
        if token.type == "html_block" and (said := _DIRECTIVE.search(token.content)):
            directive, argument = said.groups()
            if directive == "setup":
                found.append(Block("python", argument, line))
                directive = ""
        elif token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else "sh"
            if language == "text" and found:
                found[-1] = Block(**{**vars(found[-1]), "expected": token.content})
            else:
                found.append(Block(language, token.content, line, directive, argument))
            directive = ""
    return found


def commands_of(page: Path) -> list[str]:
    """Every command of a page, in blocks and in the text, one line each."""
    lines = [line for block in blocks_of(page) if block.language == "sh" for line in block.code.splitlines()]
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        lines += [child.content for child in token.children or () if child.type == "code_inline"]
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


RUNNER = """
import contextlib, io, json, runpy, subprocess, sys
from pathlib import Path

sys.path.insert(0, "")
printed = []
namespace = {"__name__": "__main__"}
for block in json.loads(Path("blocks.json").read_text()):
    said = io.StringIO()
    if block["file"]:
        Path(block["file"]).write_text(block["code"])
    if block["language"] == "python":
        code = compile("\\n" * block["line"] + block["code"], block["page"], "exec")
        with contextlib.redirect_stdout(said):
            exec(code, namespace)
    elif block["run"]:
        from bridge.cli.main import main
        for command in block["commands"]:
            with contextlib.redirect_stdout(said):
                status = main(command)
            assert status == 0, (command, status)
    printed.append(said.getvalue())
    Path("printed.json").write_text(json.dumps(printed))
"""


def shown_in(block: Block) -> str | None:
    """What a block says that it prints."""
    lines = [line[5:] for line in block.code.splitlines() if line.startswith("# -> ")]
    return "\n".join(lines) + "\n" if lines else block.expected


with_code = [page for page in PAGES if any(b.language in ("python", "toml") for b in blocks_of(page))]


@pytest.mark.parametrize("page", with_code, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, run_alone, tmp_path):
    todo = [block for block in blocks_of(page) if block.directive != "skip"]
    todo = [b for b in todo if b.language == "python" or b.directive in ("file", "run")]
    described = [
        {
            "page": str(page.relative_to(ROOT)),
            "language": b.language,
            "code": b.code,
            "line": b.line,
            "file": b.argument if b.directive == "file" else "",
            "run": b.directive == "run",
            "commands": [shlex.split(x)[3:] for x in b.code.splitlines()] if b.directive == "run" else [],
        }
        for b in todo
    ]
    (tmp_path / "blocks.json").write_text(json.dumps(described), encoding="utf-8")
    result = run_alone(RUNNER, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    for block, printed in zip(todo, json.loads((tmp_path / "printed.json").read_text()), strict=True):
        expected = shown_in(block)
        if expected is None:
            assert not printed, f"{page.name}:{block.line} prints this, and does not say so:\n{printed}"
        else:
            alike = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
            assert alike, f"{page.name}:{block.line} says\n{expected}\nand prints\n{printed}"


def test_few_blocks_are_skipped_and_each_says_why(capsys):
    skipped = [(page, b) for page in PAGES for b in blocks_of(page) if b.directive == "skip"]
    with capsys.disabled():
        for page, block in skipped:
            print(f"\n{page.relative_to(ROOT)}:{block.line} is not run: {block.argument}", end="")
    assert all(block.argument for _, block in skipped)
    assert len(skipped) == SKIPPED


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_job_files_of_a_page_are_job_files(page):
    from bridge.cli.job import _KEYS, _SECTIONS, _settings

    for block in blocks_of(page):
        if block.language == "toml":
            data = tomllib.loads(block.code)
            assert set(data) <= set(_SECTIONS)
            _settings(data.get("fit", {}), page)  # makes the objects that its tables stand for
            assert all(set(data.get(section, {})) <= set(known) for section, known in _KEYS.items())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_exist_and_take_these_options(page, capsys):
    for command in commands_of(page):
        words = command.split("`")[0].split()
        while words and ("=" in words[0] or words[0] in ("mpirun", "mpiexec", "-n") or words[0].isdigit()):
            words = words[1:]
        if not words or "|" in command or "..." in command:
            continue
        if words[:3] == ["python", "-m", "bridge"] or words[0] == "bridge":
            words = words[3:] if words[0] == "python" else words[1:]
            check_bridge(words, command)
        elif words[0] in ("python", "pytest"):
            check_script(words[1:], command)
        elif words[0] == "make" and len(words) > 1:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), command
    capsys.readouterr()


def check_bridge(words: list[str], command: str) -> None:
    parser, known = _parser()
    if not words or words[0] not in known:
        assert not words, command
        return
    if len(words) == 1 and words[0] not in ("list", "doctor"):
        return  # the name of a command, in a sentence
    parser.parse_args(words)  # ends the test where an option is unknown
    if words[0] in ("list", "info", "plan"):
        assert main(words) == 0, command
    for word in words[1:]:
        if word.endswith((".toml", ".py")) and word not in _OF_THE_READER:
            assert (ROOT / word).is_file(), command


def check_script(words: list[str], command: str) -> None:
    files = [word for word in words if word.endswith(".py")]
    for file in files:
        if file in _OF_THE_READER:
            return
        assert (ROOT / file).is_file(), command
    if files and files[0] == words[0] and not Path(files[0]).name.startswith("test_"):
        source = (ROOT / files[0]).read_text(encoding="utf-8")
        for word in words[1:]:
            if word.startswith("--"):
                assert f'"{word.split("=")[0]}"' in source, command
