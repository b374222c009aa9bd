"""The jobs of `prepare`, as calls with plain JSON values, and the worker processes that do them.

With one worker the jobs run in the calling process. Plain subprocesses rather than multiprocessing: the
caller's __main__ is not imported again, no semaphores are left behind, a dead worker is noticed at once, and
Ctrl-C reaches only the parent.
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
from lmscale.base.decoding import decode
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

Job = dict[str, Any]  # {"call": "digest" | "tokenize" | "shard", and plain arguments}
Report = Callable[[int, int], None]  # index of the job, bytes of it that are done so far

_RERUN = "run the same command again: it resumes where it stopped"


# ---- the jobs ------------------------------------------------------------------------------------


def do_job(job: Job, consumed: Callable[[int], None]) -> Any:
    """Do one job and return its result, a JSON value; `consumed` is called with the bytes done so far."""
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


def _shard(job: Job, scratch: Scratch, consumed: Callable[[int], None]) -> dict[str, Any]:
    """Write one shard of a part, then the entry that marks it as finished."""
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
    """The entry of a shard that an earlier run wrote; None if its file is missing or has another size."""
    if entry is None:
        return None
    path = folder / entry.name
    return entry if path.is_file() and path.stat().st_size == entry.bytes else None


@lru_cache(maxsize=1)
def _tokenizer(path: Path, fingerprint: str, special: SpecialTokens) -> Tokenizer:
    """The tokenizer, loaded once per process; the fingerprint distinguishes two at the same path."""
    tokenizer = Tokenizer.load(path, special)
    assert tokenizer.fingerprint == fingerprint, f"{path} is not the tokenizer of this run"
    return tokenizer


# ---- the processes -------------------------------------------------------------------------------


def run_all(
    jobs: Sequence[Job], *, num_workers: int, report: Report, keep_open: Sequence[int] = ()
) -> Iterator[tuple[int, Any]]:
    """Do all jobs, yielding (index, result) as they finish, in any order. The first error ends all.

    `keep_open` are descriptors that every worker process inherits and keeps open until it ends.
    """
    if min(num_workers, len(jobs)) <= 1:
        for index, job in enumerate(jobs):
            yield index, do_job(job, lambda consumed, index=index: report(index, consumed))  # type: ignore[misc]
        return
    workers: list[_WorkerProcess] = []
    try:
        with selectors.DefaultSelector() as selector:
            pending = iter(enumerate(jobs))
            for _ in range(min(num_workers, len(jobs))):
                worker = _WorkerProcess(keep_open)
                workers.append(worker)
                selector.register(worker.messages, selectors.EVENT_READ, worker)
                worker.assign(*next(pending))
            yield from _results(selector, pending, report)
    finally:
        for worker in workers:
            worker.kill()


def _results(
    selector: selectors.BaseSelector, pending: Iterator[tuple[int, Job]], report: Report
) -> Iterator[tuple[int, Any]]:
    while selector.get_map():
        for key, _ in selector.select():
            worker: _WorkerProcess = key.data
            message = worker.receive()
            if "consumed" in message:
                report(worker.index, message["consumed"])
                continue
            yield worker.index, message["done"]
            following = next(pending, None)
            if following is None:
                selector.unregister(worker.messages)
                worker.close_input()
            else:
                worker.assign(*following)


class _WorkerProcess:
    """The parent's end of one worker process."""

    index: int  # of the job that the process works on

    def __init__(self, keep_open: Sequence[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lmscale.prepare.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            # One thread per worker. The module path is that of this process: lmscale may not be installed.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false",
                 "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            pass_fds=keep_open,
            # Ctrl-C on a terminal reaches only the parent, which kills its workers.
            process_group=0,
        )  # fmt: skip
        # Unbuffered: select() does not report a line that already is in a buffer of this process.
        self.messages = cast(Any, self._process.stdout).buffer.raw

    def assign(self, index: int, job: Job) -> None:
        """Send a job. `receive` reports it if the process has died."""
        self.index = index
        stdin = cast(IO[str], self._process.stdin)
        with suppress(BrokenPipeError):
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next message. Raises the error that the worker reports, RetryableError if it died."""
        line = self.messages.readline()
        if not line.endswith(b"\n"):
            status = self._process.wait()
            reason = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise errors.RetryableError(
                f"a worker process died ({reason}). If memory ran out, use fewer --workers; {_RERUN}"
            )
        message = decode(dict[str, Any], line, where="a message of a worker process", hint=_RERUN)
        if "error" in message:
            raise _error(message["error"], message["message"])
        return message

    def close_input(self) -> None:
        """Let the process end: no job is left."""
        cast(IO[str], self._process.stdin).close()

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        self._process.kill()
        self._process.wait()
        self.messages.close()
        if self._process.stdin and not self._process.stdin.closed:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


_ERROR_KINDS: dict[str, type[errors.LmscaleError]] = {
    kind.__name__: kind
    for kind in (errors.DataError, errors.RetryableError, errors.UsageError, errors.ConfigError)
}


def error_kind(error: errors.LmscaleError) -> str:
    """The name by which a worker reports an error; a subclass counts as the class that has its exit code."""
    names = [base.__name__ for base in type(error).__mro__]
    return next((name for name in names if name in _ERROR_KINDS), names[0])


def _error(name: str, message: str) -> Exception:
    if name in _ERROR_KINDS:
        return _ERROR_KINDS[name](message)
    return RuntimeError(f"in a worker process:\n{message}")
