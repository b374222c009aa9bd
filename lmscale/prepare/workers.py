"""The jobs of `prepare`, as calls with plain JSON values, and a few worker processes that do them.

With one worker the jobs run in this process. The worker processes are our own rather than multiprocessing's:
the caller's __main__ is not imported again, no semaphores are left behind, a dead worker is noticed at once,
and Ctrl-C reaches only the parent.
"""

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

from lmscale.base import errors
from lmscale.corpus.shard_format import (
    DTYPES,
    Chunk,
    ShardEntry,
    chunk_range,
    dtype_for,
    shard_name,
    write_shard,
)
from lmscale.corpus.shard_format import num_chunks as chunks_of
from lmscale.prepare.cuts import Cuts, PartStream
from lmscale.prepare.documents import slice_sha256
from lmscale.prepare.inputs import Slice
from lmscale.prepare.scratch import Scratch, write_errors, write_json
from lmscale.prepare.tokenize import tokenize
from lmscale.tokenizer.tokenizer import SpecialTokens, Tokenizer


def do_job(job: dict[str, Any], consumed: Callable[[int], None]) -> Any:  # as JSON
    """Do one job; `consumed` hears the bytes dealt with so far."""
    call = job["call"]
    if call == "digest":
        return slice_sha256(Slice.from_json(job["slice"]))
    scratch = Scratch(Path(job["scratch"]))
    with write_errors(scratch.path.parent):
        if call == "shard":
            return _shard(job, scratch, consumed)
        assert call == "tokenize", call
        tokenize(
            Slice.from_json(job["slice"]),
            scratch=scratch,
            tokenizer=_tokenizer(
                scratch.tokenizer, job["fingerprint"], SpecialTokens(**job["special"])
            ),
            text_key=job["text_key"],
            consumed=consumed,
        )
        return None


def _shard(
    job: dict[str, Any], scratch: Scratch, consumed: Callable[[int], None]
) -> dict[str, Any]:
    """Write one shard of a part and note that it is finished."""
    part, shard, chunk_tokens = job["part"], job["shard"], job["chunk_tokens"]
    cuts = Cuts.load(scratch)
    dtype = dtype_for(job["vocab_size"])
    tokens = cuts.sizes[part].tokens
    stream = PartStream(scratch, cuts, part, DTYPES[dtype])
    first = shard * job["shard_chunks"]
    stop = min(first + job["shard_chunks"], chunks_of(tokens, chunk_tokens))

    def chunks() -> Iterator[Chunk]:
        for chunk in range(first, stop):
            bounds = chunk_range(chunk, tokens=tokens, chunk_tokens=chunk_tokens)
            yield Chunk(*stream.read(*bounds))
            consumed((bounds[1] - first * chunk_tokens) * DTYPES[dtype].itemsize)

    entry = write_shard(
        scratch.part(part) / shard_name(shard), chunks(), first_chunk=first, dtype=dtype
    )
    write_json(scratch.shard_entry(part, shard), asdict(entry))
    return asdict(entry)


def finished_shard(entry: ShardEntry | None, folder: Path) -> ShardEntry | None:
    """The entry of a shard that an earlier run wrote, None if the file is not there whole."""
    if entry is None:
        return None
    path = folder / entry.name
    return entry if path.is_file() and path.stat().st_size == entry.bytes else None


@lru_cache(maxsize=1)
def _tokenizer(path: Path, fingerprint: str, special: SpecialTokens) -> Tokenizer:
    """Loaded once per process; the fingerprint distinguishes two tokenizers at the same path."""
    tokenizer = Tokenizer.load(path, special)
    assert tokenizer.fingerprint == fingerprint, f"{path} is not the tokenizer of this run"
    return tokenizer


Job = dict[str, Any]  # {"call": ..., plain arguments}: see work.py
Report = Callable[[int, int], None]  # number of the job, bytes consumed of it so far


def run_all(
    jobs: Sequence[Job], *, workers: int, report: Report, keep_open: Sequence[int] = ()
) -> Iterator[tuple[int, Any]]:
    """Do all jobs, yielding (number, result) as they finish, in any order. The first error ends all.

    `keep_open` are descriptors that the workers hold as long as they live.
    """
    if min(workers, len(jobs)) <= 1:
        for number, job in enumerate(jobs):
            yield number, do_job(job, lambda consumed, number=number: report(number, consumed))  # type: ignore[misc]
        return
    crew: list[_Worker] = []
    try:
        with selectors.DefaultSelector() as ready:
            left = iter(enumerate(jobs))
            for _ in range(min(workers, len(jobs))):
                worker = _Worker(keep_open)
                crew.append(worker)
                ready.register(worker.answers, selectors.EVENT_READ, worker)
                worker.take(next(left))
            yield from _serve(ready, left, report)
    finally:
        for worker in crew:
            worker.kill()


def _serve(
    ready: selectors.BaseSelector, left: Iterator[tuple[int, Job]], report: Report
) -> Iterator[tuple[int, Any]]:
    while ready.get_map():
        for key, _ in ready.select():
            worker: _Worker = key.data
            message = worker.hear()
            if "consumed" in message:
                report(worker.number, message["consumed"])
                continue
            yield worker.number, message["done"]
            following = next(left, None)
            if following is None:
                ready.unregister(worker.answers)
                worker.dismiss()
            else:
                worker.take(following)


class _Worker:
    """The parent's end of one worker process."""

    number: int

    def __init__(self, keep_open: Sequence[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lmscale.prepare.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            # One thread a worker; paths of this process, which may not be an installed one.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false",
                 "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            pass_fds=keep_open,
            process_group=0,  # a terminal's Ctrl-C reaches the parent only, which kills us
        )  # fmt: skip
        # Raw: a line that waits in a buffer of ours is one that select() never tells of.
        self.answers = cast(Any, self._process.stdout).buffer.raw

    def take(self, numbered: tuple[int, Job]) -> None:
        """Start on a job."""
        self.number, job = numbered
        stdin = cast(IO[str], self._process.stdin)
        with suppress(BrokenPipeError):  # it is dead: hear() says so
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next message. Raises what went wrong in the worker, RetryableError if it died."""
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            status = self._process.wait()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise errors.RetryableError(
                f"a worker process died ({how}). If memory ran out, use fewer --workers; "
                "run the same command again: it resumes where it stopped"
            )
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise _error(message["error"], message["message"])
        return message

    def dismiss(self) -> None:
        """Let it end: there is no more work."""
        cast(IO[str], self._process.stdin).close()

    def kill(self) -> None:
        """End it now and wait for that."""
        self._process.kill()
        self._process.wait()
        self.answers.close()
        if self._process.stdin and not self._process.stdin.closed:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


def _error(name: str, message: str) -> Exception:
    kinds: dict[str, type[errors.LmscaleError]] = {
        kind.__name__: kind
        for kind in (errors.DataError, errors.RetryableError, errors.UsageError, errors.ConfigError)
    }
    if name in kinds:
        return kinds[name](message)
    return RuntimeError(f"in a worker process:\n{message}")
