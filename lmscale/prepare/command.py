"""The verb `lmscale prepare`: options from their texts, progress, and the summary at the end."""

import json
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lmscale.base.console import stage_bars
from lmscale.base.errors import ExitCode, UsageError
from lmscale.base.units import parse_count, parse_percent, show_count, show_seconds
from lmscale.prepare.cuts import HELDOUT, TRAIN
from lmscale.prepare.options import PrepareOptions
from lmscale.prepare.run import Summary, prepare


def parse_options(
    *,
    tokenizer: str,
    chunk_tokens: str,
    shard_chunks: str,
    heldout: str,
    text_key: str,
    workers: str,
) -> PrepareOptions:
    """The options from their texts on the command line. Raises UsageError."""
    return PrepareOptions(
        tokenizer=tokenizer,
        chunk_tokens=_count("--chunk-tokens", chunk_tokens),
        shard_chunks=_count("--shard-chunks", shard_chunks),
        heldout=_share(heldout),
        text_key=text_key,
        workers=_count("--workers", workers),
    )


def prepare_verb(
    out: Path, inputs: Sequence[Path], options: PrepareOptions, *, as_json: bool
) -> ExitCode:
    """Prepare the corpora and print a summary. After Ctrl-C the same command resumes (85)."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stage_bars(sys.stderr, announce=_announce) as show, _messages():
            summary = prepare(
                out, inputs, options, lambda now: show(now.stage, now.done, now.total)
            )
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again: it resumes where it stopped\n")
        return ExitCode.SAVED
    sys.stdout.write(_json(summary) if as_json else _text(out, summary))
    return ExitCode.DONE


def _count(flag: str, text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error


def _share(text: str) -> float:
    """The fraction that a text such as 1%, 0.01 or 0 stands for."""
    try:
        return parse_percent(text) if text.strip().endswith("%") else float(text)
    except ValueError as error:
        raise UsageError(f"--heldout {text}: write a share, e.g. 1% or 0.01") from error


def _announce(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def _messages() -> Iterator[None]:
    """Send the log lines of lmscale.prepare to standard error where logging is not configured."""
    logger = logging.getLogger("lmscale.prepare")
    if logger.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _json(summary: Summary) -> str:
    parts = {
        name: {
            "documents": part.documents,
            "tokens": part.tokens,
            "text_bytes": part.text_bytes,
            "shards": len(part.shards),
            "chunks": part.num_chunks,
            "fingerprint": part.fingerprint,
        }
        for name, part in summary.parts.items()
    }
    part = next(iter(summary.parts.values()))  # the same tokenizer and chunks in all
    document = {
        "parts": parts,
        "vocab_size": part.tokenizer.vocab_size,
        "tokenizer": part.tokenizer.fingerprint,
        "chunk_tokens": part.chunk_tokens,
        "seconds": round(summary.seconds, 3),
        "already": summary.already,
    }
    return json.dumps(document) + "\n"


def _text(out: Path, summary: Summary) -> str:
    lines = [f"{out} was finished before: same input, same options" if summary.already
             else f"{out} is ready after {show_seconds(summary.seconds)}"]  # fmt: skip
    for name in (TRAIN, HELDOUT):
        part = summary.parts.get(name)
        if part is None:
            lines.append(f"  {name:<8} none")
            continue
        lines.append(
            f"  {name:<8} {show_count(part.documents)} documents, {show_count(part.tokens)} tokens, "
            f"{part.text_bytes / part.tokens:.2f} bytes per token, "
            f"{len(part.shards)} {'shard' if len(part.shards) == 1 else 'shards'}"
        )
    manifest = next(iter(summary.parts.values()))
    lines.append(
        f"  vocabulary of {manifest.tokenizer.vocab_size} ids, chunks of {manifest.chunk_tokens} tokens"
    )
    lines.append(f"next: lmscale train RUN.yaml data.corpora={out}")
    return "\n".join(lines) + "\n"
