"""Whether the gradient table in the repository was measured on this very code."""

import hashlib
import json

from results import PRODUCT, ROOT, code_of

# Of lmscale/: the packages and modules that compute a step.
SOURCES = ("base/batch.py", "distributed", "engine", "model", "modelspec", "optim", "parallel")
# The modules that define and judge the cases.
CASES = ("case", "errors", "run")
LINES = ROOT / "docs" / "gradients.jsonl"


def digest() -> str:
    """Names the code that computes a step and the cases that it is judged by; comments do not count."""
    paths = [ROOT / "tests" / "gradients" / f"{name}.py" for name in CASES]
    for name in SOURCES:
        source = PRODUCT / "lmscale" / name
        files = [source] if source.suffix else list(source.glob("**/*.py"))
        assert files, f"{source} has no code: SOURCES must follow the packages' names"
        paths += files
    code = hashlib.sha256()
    for path in sorted(paths):
        code.update(f"{path.name}\0{code_of(path.read_text())}\0".encode())
    return code.hexdigest()[:12]


def outdated_lines() -> tuple[int, int]:
    """(lines of docs/gradients.jsonl that were measured on other code, all lines)."""
    present = digest()
    sources = [json.loads(line)["sources"] for line in LINES.read_text().splitlines()]
    return sum(source != present for source in sources), len(sources)
