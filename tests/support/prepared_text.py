"""Inputs to prepare from, and what a prepared folder holds as tar and json see it."""

import gzip
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import zstandard

from lmscale.prepare.options import PrepareOptions
from lmscale.tokenizer.tokenizer import Tokenizer

SMALL = PrepareOptions(tokenizer="bytes", chunk_tokens=64, shard_chunks=3, heldout=0.1, workers=1)

# `prepare` as its command line runs it, with slices small enough for several jobs.
SCRIPT = """
import sys
from lmscale.prepare import inputs
inputs.MIN_SLICE_BYTES = {slice_bytes}
from lmscale.cli.entry import run
sys.exit(run(["prepare", *sys.argv[1:]]))
"""


def command(*arguments: str | Path, slice_bytes: int = 2000) -> list[str]:
    """The command line of a `lmscale prepare` with small slices."""
    script = SCRIPT.format(slice_bytes=slice_bytes)
    return [sys.executable, "-c", script, *map(str, arguments)]


def run(*arguments: str | Path, slice_bytes: int = 2000) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        command(*arguments, slice_bytes=slice_bytes), capture_output=True, text=True, check=False
    )


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    """Texts as JSON Lines, compressed as the name says."""
    content = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        half = len(content) // 2  # two frames, as `cat a.zst b.zst` makes them
        frames = (zstandard.compress(content[:half]), zstandard.compress(content[half:]))
        content = b"".join(frames)
    path.write_bytes(content)
    return path


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of all lengths, empty ones and other alphabets among them."""
    rng = np.random.default_rng(seed)
    words = ["def", "return", "x = 1\n", "naïve", "東京", "😀", "<eos>", "\n\n", "    ", '"quoted"']
    return [" ".join(rng.choice(words, rng.integers(0, 60))) for _ in range(count)]


def read_documents(folder: Path) -> list[str]:
    """A corpus' documents, from its tars by hand: chunks overlap by one token, starts agree with bos."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    stream: list[int] = []
    for tokens, starts in _chunks(folder):
        assert [i for i, token in enumerate(tokens) if token == tokenizer.special.bos] == starts
        assert not stream or stream[-1] == tokens[0]
        stream += tokens[1:] if stream else tokens
    documents: list[str] = []
    held: list[int] = []
    for token in stream:
        held.append(token)
        if token == tokenizer.special.eos:
            assert held[0] == tokenizer.special.bos
            documents.append(tokenizer.decode(held))
            held = []
    assert not held
    return documents


def _chunks(folder: Path) -> Iterator[tuple[list[int], list[int]]]:
    number = 0
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        while f"{number:08d}.u16" in members:
            tokens = np.frombuffer(members[f"{number:08d}.u16"], "<u2").tolist()
            yield tokens, np.frombuffer(members[f"{number:08d}.docs.u32"], "<u4").tolist()
            number += 1


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def nobody_can_be_denied() -> bool:
    """Root reads whatever the mode of a file says."""
    return os.geteuid() == 0
