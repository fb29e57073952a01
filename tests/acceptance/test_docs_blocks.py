"""Every block of the README and of the tutorial works as the page describes.

`bash` and `python` blocks are executed in order against a live server with the example project. A
`text` or `json` block after one shows its output. The lines of a `text` block occur in the output
in this order, with other lines allowed between them; `…` matches anything. A `json` block is a part
of the output.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.long_forms import long_case

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/tutorial/first-run.md", "docs/tutorial/first-cancel.md")
#: The address of `belay dev`, as used by the pages.
URL = "http://127.0.0.1:2024"
MOST_NOT_EXECUTED = 5
SECONDS = 60
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_EXECUTED = re.compile(r"<!-- not executed: .+ -->\n\Z")
_EXECUTED = ("bash", "python")
_OUTPUT = ("text", "json")
#: Languages of blocks that would not be executed, although they look as if they were.
_DISGUISED = ("sh", "shell", "console", "zsh", "py", "pycon", "")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    is_executed: bool
    #: The following block that shows its output: language and text.
    output: tuple[str, str] | None = None


def blocks_of(name: str) -> list[Block]:
    text = (ROOT / name).read_text()
    found = list(_BLOCK.finditer(text))
    blocks = []
    for match, behind in zip(found, [*found[1:], None], strict=True):
        is_executed = match[1] in _EXECUTED and not _NOT_EXECUTED.search(text[: match.start()])
        shows_output = behind is not None and behind[1] in _OUTPUT
        blocks.append(
            Block(
                language=match[1],
                text=match[2],
                line=text[: match.start()].count("\n") + 1,
                is_executed=is_executed,
                output=(behind[1], behind[2]) if behind is not None and shows_output else None,
            )
        )
    return blocks


def test_few_blocks_are_not_executed():
    blocks = [block for name in PAGES for block in blocks_of(name)]
    assert not [block for block in blocks if block.language in _DISGUISED]
    left_out = [b for b in blocks if b.language in _EXECUTED and not b.is_executed]
    assert len(left_out) <= MOST_NOT_EXECUTED
    assert sum(block.is_executed for block in blocks) > 4 * len(left_out)


# --- executing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(newcomers_server):
    return newcomers_server


class Shell:
    """Executes `bash` blocks; variables persist from one block to the next."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._variables = folder / "variables"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environ = {**os.environ, "PATH": path}

    def execute(self, source: str) -> str:
        script = f"set -a\n{source}\nenv -0 > '{self._variables}'\n"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self._folder,
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        pairs = self._variables.read_text().split("\0")
        self._environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return done.stdout


#: Reads one source per line as JSON, and writes its output and its exception for each. Tests that
#: a source defines are called.
_INTERPRETER = """
import ast, asyncio, contextlib, inspect, io, json, sys, traceback
names = {"__name__": "__main__"}
async def execute(source):
    code = compile(source, "<block>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.isawaitable(result):
        await result
    for name in [name for name in names if name.startswith("test_")]:
        names.pop(name)()
with asyncio.Runner() as runner:
    for line in sys.stdin:
        printed, error = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            try:
                runner.run(execute(json.loads(line)))
            except BaseException:
                error = traceback.format_exc()
        print(json.dumps([printed.getvalue(), error]), flush=True)
"""


class Interpreter:
    """Executes `python` blocks as `python -m asyncio` does; names persist between blocks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def execute(self, source: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(source) + "\n")
        self._process.stdin.flush()
        printed, error = json.loads(self._process.stdout.readline())
        assert error is None, error
        return str(printed)


@contextmanager
def interpreter(folder: Path) -> Iterator[Interpreter]:
    with subprocess.Popen(
        [sys.executable, "-c", _INTERPRETER],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Interpreter(process)
        finally:
            process.kill()


@pytest.mark.parametrize("name", [PAGES[0], *map(long_case, PAGES[1:])])
def test_every_block_works_as_the_page_describes(server, tmp_path, name):
    shell = Shell(tmp_path)
    with interpreter(tmp_path) as python:
        for block in blocks_of(name):
            if not block.is_executed:
                continue
            source = block.text.replace(URL, server.url)
            execute = shell.execute if block.language == "bash" else python.execute
            printed = execute(source)
            if block.output is not None:
                refuse_other_output(f"{name}:{block.line}", *block.output, printed)


def refuse_other_output(where: str, language: str, expected: str, printed: str) -> None:
    if language == "json":
        assert is_part(json.loads(expected), json.loads(printed)), f"{where}\n{printed}"
        return
    left = iter(printed.splitlines())
    for line in expected.splitlines():
        pattern = ".*".join(map(re.escape, line.rstrip().split("…")))
        found = any(re.fullmatch(pattern, printed_line.rstrip()) for printed_line in left)
        assert found, f"{where} has no line {line!r} (in this order):\n{printed}"


def is_part(expected: Any, found: Any) -> bool:
    if isinstance(expected, dict) and isinstance(found, dict):
        return all(key in found and is_part(expected[key], found[key]) for key in expected)
    return bool(expected == found)


@pytest.mark.parametrize(
    ("language", "expected"), [("text", "a\nc…e\n"), ("json", '{"a": {"b": 1}}')]
)
def test_output_that_differs_from_the_page_fails(language, expected):
    right = {"text": "a\nb\ncde\n", "json": '{"a": {"b": 1, "c": 2}}'}[language]
    wrong = {"text": "cde\na\n", "json": '{"a": {"b": 2}}'}[language]
    refuse_other_output("here", language, expected, right)
    with pytest.raises(AssertionError):
        refuse_other_output("here", language, expected, wrong)
