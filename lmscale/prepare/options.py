"""The options of `lmscale prepare`, checked before anything is read."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.base.errors import UsageError
from lmscale.tokenizer.training import MIN_BPE_SIZE

FORMAT = 1  # increased when the same input and options give other bytes


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """The flags of `lmscale prepare`; all but `workers` decide the result."""

    tokenizer: str = "bpe:4096"  # "bytes", "bpe:SIZE" or the path of a tokenizer.json
    chunk_tokens: int = 1 << 18  # a run's seq_len must divide it
    shard_chunks: int = 256  # 128 MiB per shard at 2 bytes per token
    heldout: float = 0.01  # fraction of documents
    text_key: str = "text"  # of JSON Lines
    workers: int = 0  # processes; 0 = all cores of this process

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise UsageError(f"--chunk-tokens {self.chunk_tokens}: must be at least 1; try 262144")
        if self.shard_chunks < 1:
            raise UsageError(f"--shard-chunks {self.shard_chunks}: must be at least 1; try 256")
        if not (self.heldout == 0 or 0 < self.heldout <= 0.5):
            raise UsageError(
                f"--heldout {self.heldout:g}: must be 0 to 50 % of the documents; try 1%"
            )
        if self.workers < 0:
            raise UsageError(f"--workers {self.workers}: must be at least 1, or 0 for all cores")
        if self.tokenizer.startswith("bpe:") and self.bpe_size is None:
            raise UsageError(
                f"--tokenizer {self.tokenizer}: write bpe:SIZE with a size of at least "
                f"{MIN_BPE_SIZE} ids, e.g. bpe:4096"
            )

    @property
    def bpe_size(self) -> int | None:
        """Size of the vocabulary to train; None where none is trained."""
        match = re.fullmatch(r"bpe:(\d+)", self.tokenizer)
        return int(match[1]) if match and int(match[1]) >= MIN_BPE_SIZE else None

    @property
    def tokenizer_path(self) -> Path | None:
        """The file to load; None for `bytes` and `bpe:SIZE`."""
        return None if self.tokenizer == "bytes" or self.bpe_size else Path(self.tokenizer)

    @property
    def heldout_every(self) -> int:
        """n, where every n-th document is held out (document i when i mod n = n - 1); 0: none is."""
        return round(1 / self.heldout) if self.heldout else 0

    @property
    def num_workers(self) -> int:
        """Number of processes; with 1 the calling process does the work."""
        if self.workers:
            return self.workers
        if hasattr(os, "sched_getaffinity"):  # Linux: the cores this process may use
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    def identity(self) -> dict[str, Any]:
        """The options that decide the bytes of the result. A tokenizer file is identified by its content elsewhere."""
        return {
            "format": FORMAT,
            "tokenizer": self.tokenizer if self.tokenizer_path is None else "file",
            "chunk_tokens": self.chunk_tokens,
            "shard_chunks": self.shard_chunks,
            "heldout_every": self.heldout_every,
            "text_key": self.text_key,
        }
