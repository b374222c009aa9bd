"""Write the source text of this interpreter's standard library as JSON Lines: a corpus that needs no network.

    python tools/stdlib_corpus.py data/stdlib.jsonl
    lmscale prepare data/smoke data/stdlib.jsonl --tokenizer bpe:4096

A line a file: {"path": ..., "text": ...}; about 10 to 15 MB, by distribution. Tests are left out, because some
distributions ship them and some do not, and so are files that are not UTF-8 and what other packages have
installed. The order is by a hash of the path: the same everywhere, and mixed, so that every n-th document (the
held-out ones) is a fair sample of all packages.
"""

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# Written when this interpreter was built: paths and compiler flags of some machine, not library text.
_GENERATED = ("_sysconfigdata_", "config-")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python tools/stdlib_corpus.py OUT.jsonl", file=sys.stderr)
        return 2
    out = Path(arguments[0])
    root = Path(sysconfig.get_path("stdlib"))
    texts = dict(library_texts(root))
    if not texts:
        print(f"{root} holds no Python source: is this a stripped installation?", file=sys.stderr)
        return 65
    lines = (
        json.dumps({"path": path, "text": texts[path]}, ensure_ascii=False) + "\n"
        for path in sorted(texts, key=_mixed)
    )
    content = "".join(lines).encode()
    size = sum(len(text.encode()) for text in texts.values())
    facts = f"{len(texts)} files, {size / 1e6:.1f} MB of text from {root}"
    # The same content is left alone, so that a corpus made from it stays up to date.
    if out.is_file() and out.read_bytes() == content:
        print(f"{out}: up to date ({facts})")
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f"{out.name}.tmp")
    scratch.write_bytes(content)
    scratch.rename(out)
    print(f"{out}: {facts}")
    return 0


def library_texts(root: Path) -> Iterator[tuple[str, str]]:
    """(path inside the library, text) of each source file that is UTF-8."""
    for parent, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in _LEFT_OUT and not name.startswith(_GENERATED)
        ]
        for name in names:
            if not name.endswith(".py") or name.startswith(_GENERATED):
                continue
            path = Path(parent, name)
            try:
                text = path.read_bytes().decode()
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                yield path.relative_to(root).as_posix(), text


def _mixed(path: str) -> bytes:
    return hashlib.sha256(path.encode()).digest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
