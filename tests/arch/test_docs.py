"""What documents say is true: their paths exist, their commands are accepted, their run files load.

Commands are parsed against the command line here. They are run elsewhere: `make train` in tests/e2e/test_smoke.py, each
command of the README's Slurm section on a real cluster in tests/cluster/test_first_job.py.
"""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from lmscale.cli.app import app
from lmscale.config.run_file import load
from tests.arch.test_layers import ROOT

PAGES = [
    path
    for path in [*ROOT.glob("*.md"), *sorted({*ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")})]
    if path.name != "CHANGELOG.md"
]
READMES = sorted([*ROOT.glob("lmscale/**/README.md"), *ROOT.glob("launcher/**/README.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    \S.*\n(?:^    .*\n|^\n(?=    ))*)+", re.MULTILINE)
# Words that stand for what a reader fills in.
PLACEHOLDERS = {"a.b=c", "N", "RUN", "PATH", "KEY"}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each code block of a page."""
    text = page.read_text(encoding="utf-8")
    yield from FENCE.findall(text)
    for block in INDENTED.findall(FENCE.sub("", text)):
        yield "", re.sub(r"^    ", "", block, flags=re.MULTILINE)


def command_lines(page: Path) -> Iterator[list[str]]:
    """The commands of a page's code blocks, without comments, prompts and what precedes the program."""
    for language, text in blocks(page):
        if language in {"mermaid", "yaml", "json", "python", "text"}:
            continue
        for line in text.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:
                continue
            if words[:1] and words[0] in {
                "lmscale",
                "make",
                "python",
                "mpirun",
                "srun",
                "torchrun",
                "accelerate",
            }:
                yield words


def lmscale_arguments(words: list[str]) -> list[str] | None:
    """The arguments of lmscale in a command line that may start it through another program."""
    for start in (["lmscale"], ["-m", "lmscale"]):
        for index in range(len(words)):
            if words[index : index + len(start)] == start:
                return words[index + len(start) :]
    return None


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_accepted(page: Path) -> None:
    group = typer.main.get_command(app)
    for words in command_lines(page):
        arguments = lmscale_arguments(words)
        if arguments is not None and arguments[:1] != ["--install-completion"]:
            verb, *rest = [
                re.sub(r"[\[\]]", "", word) for word in arguments if word not in {"...", "[...]"}
            ]
            command = group.commands[verb]  # type: ignore[attr-defined]
            command.make_context(verb, [word for word in rest if word], resilient_parsing=True)
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= known | {
                "-h",
                "--help",
            }
        elif words[0] == "make":
            makefile = (ROOT / "Makefile").read_text()
            for target in [
                word for word in words[1:] if "=" not in word and not word.startswith("-")
            ]:
                assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), words
        elif words[0] == "python" and words[1:] and words[1].endswith(".py"):
            program = (ROOT / words[1]).read_text()
            for option in [
                word.strip("[]") for word in words[2:] if word.strip("[").startswith("--")
            ]:
                assert f'"{option}"' in program, words


def test_run_files_load(tmp_path: Path) -> None:
    loaded = 0
    for page in PAGES:
        for _, text in blocks(page):
            if re.match(r"(#.*\n)*model:", text):
                path = tmp_path / f"{loaded}.yaml"
                path.write_text(text)
                load(path, cwd=tmp_path)
                loaded += 1
    assert loaded


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"link to {target}"
    tops = "lmscale|launcher|configs|cluster|tools|tests|docs"
    for mention in set(re.findall(rf"`((?:{tops})/[\w./*{{}},-]+)`", text)):
        patterns = _expanded(mention)
        assert any(list(ROOT.glob(pattern.rstrip("/"))) for pattern in patterns), mention


def _expanded(mention: str) -> list[str]:
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", mention)
    if match is None:
        return [mention]
    return [match[1] + choice + match[3] for choice in match[2].split(",")]


def test_the_questions_of_the_architecture_page_are_answered_by_code() -> None:
    """Where a contributor is sent for a question, the code that answers it is there."""
    page = (ROOT / "docs/architecture.md").read_text()
    answers = {
        "Where is a gradient clipped?": r"def clip",
        "Where is a dead node noticed?": r"lost",
        "Where is a CRC checked?": r"crc32c",
    }
    for question, pattern in answers.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| {question}")]
        for path in re.findall(r"`([\w/.]+\.py)`", row):
            assert re.search(pattern, (ROOT / path).read_text()), (question, path)


def test_the_glossary_stays_short() -> None:
    rows = [
        line
        for line in (ROOT / "docs/glossary.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    assert len(rows) - 1 <= 40
    assert os.linesep == "\n"
