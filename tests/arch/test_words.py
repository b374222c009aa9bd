"""Messages, docstrings and documents use the field's plain words: this list refuses what readers stumbled over."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arch.test_layers import ROOT, SOURCES

# What is refused, and what to write instead.
WORDS = {
    r"\b(the|this|its|our) (house|roof|lobby|crew|ears)\b": "name the package or the component",
    r"\bfloors?\b(?! of|\()": "layer (or the mathematical floor as `floor(x)`)",
    r"\bheirs?\b": "newer attempt",
    r"\b(is|are|was|were|be|been|gets?) told\b|\btells?\b": "is configured with, reports, receives, shows",
    r"\bwithout a word\b|\bin a word\b|\bin words\b": "without an exit event; as text",
    r"\bin vain\b": "without progress",
    r"\bmend(s|ed|ing)?\b": "fix, repair",
    r"\bunfit\b": "unhealthy",
    r"\bshall\b": "must, will",
    r"\bwhoever\b|\bsomebody\b|\bnobody\b": "the real actor, or the passive voice",
    r"\banew\b": "again",
    r"\b(goes|going|gone|went|go) on\b(?! to\b)": "resume, continue",
    r"\bcareful\b": "warning",
    r"(?<!there )\bis no (run|corpus|checkpoint|number|count|time|file|folder|node|rank|job)\b": "is not a ...",
    r"\b(vouche?s?|insists?|owes?)\b": "a verb for what the program does",
}
# Words that quote what another program prints, or that are terms of art where they stand.
ALLOWED: dict[str, tuple[str, ...]] = {
    "CHANGELOG.md": (),
}
DOCUMENTS = sorted(
    path
    for path in [
        *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("lmscale/**/README.md"),
        *ROOT.glob("launcher/**/README.md"), *ROOT.glob("*/README.md"), *ROOT.glob("tests/*/README.md"),
    ]
    if ".venv" not in path.parts
)  # fmt: skip


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and texts: the lines of a document, the string literals of a Python file."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(content.splitlines(), start=1)
        return
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for offset, line in enumerate(node.value.splitlines()):
                yield node.lineno + offset, line


def refused(path: Path) -> list[str]:
    """Each refused word of a file, with its line and the advice."""
    allowed = ALLOWED.get(str(path.relative_to(ROOT)), ())
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: write {advice}"
        for number, line in texts(path)
        for pattern, advice in WORDS.items()
        for match in re.finditer(pattern, line, re.IGNORECASE)
        if match[0] not in allowed
    ]


@pytest.mark.parametrize(
    "path", [*SOURCES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_plain_words(path: Path) -> None:
    assert not refused(path), "\n".join(refused(path))


def test_the_list_refuses_what_it_names(tmp_path: Path) -> None:
    sample = "start again once it is mended; nobody goes on without a word"
    matches = [pattern for pattern in WORDS if re.search(pattern, sample, re.IGNORECASE)]
    assert len(matches) == 4
