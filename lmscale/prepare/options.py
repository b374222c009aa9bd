"""What a user chooses about a corpus, checked before anything is read."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.base.errors import UsageError
from lmscale.tokenizer.training import MIN_BPE_SIZE

FORMAT = 1  # raised when the same input and options give other bytes


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """The flags of `lmscale prepare`; only `workers` leaves the result as it is."""

    tokenizer: str = "bpe:4096"  # "bytes", "bpe:SIZE" or the path of a tokenizer.json
    chunk_tokens: int = 1 << 18  # a run's seq_len must divide it
    shard_chunks: int = 256  # 128 MiB a shard at 2 bytes a token
    heldout: float = 0.01  # fraction of documents
    text_key: str = "text"  # of JSON Lines
    workers: int = 0  # processes; 0 = all cores of this process

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise UsageError(f"--chunk-tokens {self.chunk_tokens}: at least 1; try 262144")
        if self.shard_chunks < 1:
            raise UsageError(f"--shard-chunks {self.shard_chunks}: at least 1; try 256")
        if not (self.heldout == 0 or 0 < self.heldout <= 0.5):
            raise UsageError(
                f"--heldout {self.heldout:g}: a share of 0 to 50 % of the documents; try 1%"
            )
        if self.workers < 0:
            raise UsageError(f"--workers {self.workers}: at least 1, or 0 for all cores")
        if self.tokenizer.startswith("bpe:") and self.bpe_size is None:
            raise UsageError(
                f"--tokenizer {self.tokenizer}: write bpe:SIZE with a size of at least "
                f"{MIN_BPE_SIZE} ids, e.g. bpe:4096"
            )

    @property
    def bpe_size(self) -> int | None:
        """The vocabulary to train, None where none is trained."""
        match = re.fullmatch(r"bpe:(\d+)", self.tokenizer)
        return int(match[1]) if match and int(match[1]) >= MIN_BPE_SIZE else None

    @property
    def tokenizer_path(self) -> Path | None:
        """The file to load, None for `bytes` and `bpe:SIZE`."""
        return None if self.tokenizer == "bytes" or self.bpe_size else Path(self.tokenizer)

    @property
    def every(self) -> int:
        """Document i is held out when i mod every = every - 1; 0: none is."""
        return round(1 / self.heldout) if self.heldout else 0

    @property
    def num_workers(self) -> int:
        """Processes to use; one works inside the calling process."""
        if self.workers:
            return self.workers
        if hasattr(os, "sched_getaffinity"):  # Linux: the cores this process may use
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the result, beside the input; a tokenizer file counts by content."""
        return {
            "format": FORMAT,
            "tokenizer": self.tokenizer if self.tokenizer_path is None else "file",
            "chunk_tokens": self.chunk_tokens,
            "shard_chunks": self.shard_chunks,
            "heldout_every": self.every,
            "text_key": self.text_key,
        }
