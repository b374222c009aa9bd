"""Long programs that may be stopped at any time: one line a finished piece of work, and a page made from all lines.

A line counts only for the sources it was measured on (`sources`), so a result never outlives the code; and a
program ends when they change under it.
"""

import ast
import hashlib
import io
import json
import os
import platform
import subprocess
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lmscale

ROOT = Path(__file__).resolve().parents[1]
# Where the lmscale that runs comes from: an editable install may point to another checkout.
PRODUCT = Path(lmscale.__file__).parents[1]
Line = dict[str, Any]


class Results:
    """A file of JSON lines. A torn last line, of a killed program, is dropped at the next start."""

    def __init__(self, path: Path, *, sources: str) -> None:
        self.path = path
        self._sources = sources
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole != raw:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self._all: list[Line] = [json.loads(line) for line in whole.splitlines()]

    @property
    def lines(self) -> list[Line]:
        """Those of the present sources, in the order they were written."""
        return [line for line in self._all if line["sources"] == self._sources]

    def append(self, **fields: Any) -> Line:
        """Write one line; it is on the disk when this returns. Ends the program where the sources have changed."""
        if sources() != self._sources:
            raise SystemExit(
                "the sources changed meanwhile: this result counts for neither; start again"
            )
        line = {**fields, "sources": self._sources, "time": datetime.now(UTC).isoformat()[:19]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._all.append(line)
        return line


def sources() -> str:
    """Names the product's code: a digest over every Python file of lmscale/ and launcher/."""
    digest = hashlib.sha256()
    for path in sorted([*PRODUCT.glob("lmscale/**/*.py"), *PRODUCT.glob("launcher/**/*.py")]):
        digest.update(f"{path.relative_to(PRODUCT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def code_of(source: str) -> str:
    """What a Python file does: without comments, docstrings and empty lines, so that better words change no result."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        owner = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if owner and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            for row in range(text.lineno - 1, text.end_lineno or text.lineno):
                lines[row] = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1]:
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def provenance() -> dict[str, str]:
    """What a table was measured on."""
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    if _git("status", "--porcelain", "--", "lmscale", "launcher"):
        commit += " and changes that were not committed"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "numpy"))
    return {
        "commit": commit,
        "sources": sources(),
        "versions": f"Python {platform.python_version()}, {packages}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _git(*argv: str) -> str:
    done = subprocess.run(["git", *argv], cwd=PRODUCT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def facts(given: Mapping[str, object]) -> str:
    """A list of name and value."""
    return "\n".join(f"- {name}: {value}" for name, value in given.items())


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_page(path: Path, parts: Iterable[str]) -> None:
    """Paragraphs with an empty line between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
