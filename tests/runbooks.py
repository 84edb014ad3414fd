"""Runbooks as a tired person uses them: each block of commands is copied from the page and pasted in a shell.

A block is what stands between a line "```sh" and the next "```". The block of kind `text` behind it, if
there is one, is an example of what it prints, and its lines must come again (numbers and spaces aside; "…"
stands for what differs from plane to plane).
`sh status=1` is a block that ends with that status. A block that asks (`read -r -p "…" GROUP`) is answered,
and what it was told stays in the shell, as on a page where later blocks say "$GROUP". Where EVIDENCE names a
folder, each block that was pasted and did as the page says is noted there: `python -m monitoring pasted`.
What it printed stands there, too, in printed.md.
"""

import hashlib
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.postgres import ROOT

RUNBOOKS = ROOT / "runbooks"
SECTIONS = ["Meaning", "Impact", "Diagnosis", "Mitigation", "Verify recovered", "Escalate"]

_WORD = re.compile(r"[A-Za-z][A-Za-z_'-]+")
_BLOCK = re.compile(r"^```(?P<info>.*)\n(?P<text>(?:.*\n)*?)```$", re.MULTILINE)
_SAYS = re.compile(r"<!-- (?:Not run: (?P<why>[^>]+?)|Run by (?P<test>[\w./-]+)[^>]*?) -->\n\Z")
_ASKS = re.compile(r"^read -r -p \"[^\"]+\" (\w+)$")
Run = Callable[[str], tuple[int, str]]
"""Runs a script in bash; answers its exit status, and what it printed on both outputs."""


@dataclass(frozen=True)
class Block:
    """Commands that are pasted together."""

    text: str
    section: str
    status: int = 0
    example: str | None = None
    not_run: str = ""
    """Why no test can run it, which a comment above it may say; runbooks have no such blocks."""
    run_by: str = ""
    """The file of the test that runs it, where the comment names one."""

    @property
    def asks(self) -> str | None:
        """The variable that it asks a person for."""
        match = _ASKS.match(self.text.strip())
        return match[1] if match else None


@dataclass(frozen=True)
class Page:
    """One runbook."""

    path: Path
    sections: list[str]
    blocks: list[Block]


def read_page(path: Path) -> Page:
    """Read a page.

    Raises:
        ValueError: a block is neither commands nor an example of what commands print.
    """
    content = path.read_text()
    headings = [(match.start(), match[1]) for match in re.finditer(r"^## (.+)$", content, re.MULTILINE)]
    blocks: list[Block] = []
    for match in _BLOCK.finditer(content):
        section = next((name for start, name in reversed(headings) if start < match.start()), "")
        kind, _, status = match["info"].partition(" status=")
        if kind == "sh":
            blocks.append(Block(match["text"], section, int(status or 0)))
        elif kind == "text" and blocks and blocks[-1].example is None:
            blocks[-1] = Block(blocks[-1].text, section, blocks[-1].status, match["text"])
        else:
            raise ValueError(
                f"{path.name}: a block of {match['info']!r} is neither `sh` nor an example of one"
            )
    return Page(path, [name for _, name in headings], blocks)


def read_docs(path: Path) -> list[Block]:
    """The commands of a page that also shows other things, such as files."""
    content = path.read_text()
    blocks = []
    for match in _BLOCK.finditer(content):
        if match["info"] == "sh":
            says = _SAYS.search(content[: match.start()])
            why, test = says.group("why", "test") if says else ("", "")
            blocks.append(Block(match["text"], section="", not_run=why or "", run_by=test or ""))
    return blocks


@dataclass
class Reader:
    """Somebody who works through a page; after the last section nothing of it may be left."""

    page: Page
    run: Run
    variables: dict[str, str] = field(default_factory=dict)
    _next: int = 0

    def paste(self, section: str, **answers: str | Callable[[str], str]) -> list[str]:
        """Paste the blocks of a section in order; what each printed.

        Args:
            section: the next one that has commands.
            answers: what a person says when asked for a variable, or how it follows from what the block
                before printed.
        """
        said: list[str] = []
        while self._next < len(self.page.blocks) and self.page.blocks[self._next].section == section:
            block = self.page.blocks[self._next]
            self._next += 1
            if block.asks:
                answer = answers[block.asks]
                said.append(self._ask(block, answer if isinstance(answer, str) else answer(said[-1])))
            else:
                said.append(self._paste(block))
            if evidence := os.environ.get("EVIDENCE"):
                _note(Path(evidence), self.page, block, said[-1])
        assert said, f"{self.page.path.name} has no commands under {section} here"
        return said

    def assert_nothing_is_left(self) -> None:
        """Every command of the page was run."""
        left = [block.text for block in self.page.blocks[self._next :]]
        assert not left, f"nobody ran these commands of {self.page.path.name}: {left}"

    def _ask(self, block: Block, answer: str) -> str:
        script = f"printf '%s\\n' {shlex.quote(answer)} | {{ {block.text}\nprintf %s \"${block.asks}\"; }}"
        status, output = self.run(script)
        assert status == 0, output
        assert output.endswith(answer), output
        self.variables[str(block.asks)] = answer
        return output

    def _paste(self, block: Block) -> str:
        known = "".join(f"{name}={shlex.quote(value)}\n" for name, value in self.variables.items())
        status, output = self.run(known + block.text)
        assert status == block.status, f"{block.text}\nended with {status}:\n{output}"
        lines = [_words(line) for line in output.splitlines()]
        for wanted in map(_words, (block.example or "").splitlines()):
            assert any(wanted <= line for line in lines), f"{block.text}\nprinted no {wanted}:\n{output}"
        return output


def never_pasted(record: Path) -> list[str]:
    """The blocks of all runbooks that the record of a run doesn't have, a sentence each."""
    noted = set(record.read_text().splitlines(keepends=True))
    return [
        f"{path.name}, {block.section}: nobody pasted {block.text.splitlines()[0]!r}"
        for path in pages("*.md")
        if path.stem != "README"
        for page in (read_page(path),)
        for block in page.blocks
        if _noted(page, block) not in noted
    ]


def _note(evidence: Path, page: Page, block: Block, output: str) -> None:
    """That a block was pasted, and what it printed: where a page's examples are taken from."""
    with (evidence / "pasted.txt").open("a") as record:
        record.write(_noted(page, block))
    with (evidence / "printed.md").open("a") as record:
        record.write(f"## {page.path.name}, {block.section}\n\n")
        record.write(f"```sh\n{block.text}```\n\n```text\n{output}\n```\n\n")


def _noted(page: Page, block: Block) -> str:
    """The line of a record that says that a block, as it stands, was pasted."""
    return f"{page.path.name} {hashlib.sha256(block.text.encode()).hexdigest()}\n"


def _words(line: str) -> set[str]:
    """The words of a line, without what differs from one time to the next: numbers, places and dates."""
    line = re.sub(r"\S*/|\b[A-Z][a-z]{2} +\d+ [\d:]+", " ", line)
    return set(_WORD.findall(line))


def bash(environment: Mapping[str, str], directory: Path) -> Run:
    """A shell on this machine with that environment and nothing else."""

    def run(script: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", script],
            env=dict(environment),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        return done.returncode, done.stdout

    return run


def pages(pattern: str) -> Iterator[Path]:
    """The runbooks whose names match."""
    yield from sorted(RUNBOOKS.glob(pattern))
