"""`lmscale prepare`: the command line, its progress bar and what it says at the end."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from lmscale.base.errors import ExitCode, LmscaleError, UsageError
from lmscale.base.units import parse_count, parse_percent, show_bytes, show_count, show_seconds
from lmscale.prepare.cuts import HELDOUT, TRAIN
from lmscale.prepare.options import PrepareOptions
from lmscale.prepare.run import Summary, prepare
from lmscale.prepare.stages import PrepareProgress


def prepare_main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code. Errors go to standard error in words, without a traceback."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or printed the help
        return int(stop.code or 0)
    try:
        options = PrepareOptions(
            tokenizer=arguments.tokenizer,
            chunk_tokens=_count("--chunk-tokens", arguments.chunk_tokens),
            shard_chunks=_count("--shard-chunks", arguments.shard_chunks),
            heldout=_share(arguments.heldout),
            text_key=arguments.text_key,
            workers=_count("--workers", arguments.workers),
        )
        with _bar() as progress, _messages():
            summary = prepare(arguments.out, arguments.inputs, options, progress)
    except LmscaleError as error:
        sys.stderr.write(f"error: {error}\n")
        return int(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again, it goes on where it stopped\n")
        return int(ExitCode.SAVED)
    sys.stdout.write(_json(summary) if arguments.json else _words(arguments.out, summary))
    return int(ExitCode.DONE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmscale prepare",
        description="Turn text into corpora: OUT/train and OUT/heldout, in checked tar shards. "
        "Killed? The same command goes on. The result is the same for any number of workers.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder for the corpora")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        type=Path,
        nargs="+",
        help="UTF-8 text (a document a file), JSON Lines (.jsonl, a document a line), each also as .gz "
        "or .zst, or a folder of such files",
    )
    _add_options(parser, PrepareOptions())
    return parser


def _add_options(parser: argparse.ArgumentParser, default: PrepareOptions) -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="FILE|bytes|bpe:SIZE",
        default=default.tokenizer,
        help="a tokenizer.json, plain bytes, or a byte-level BPE trained on the input (%(default)s)",
    )
    parser.add_argument(
        "--chunk-tokens",
        metavar="N",
        default=str(default.chunk_tokens),
        help="tokens a chunk; a run's seq_len must divide it (%(default)s)",
    )
    parser.add_argument(
        "--shard-chunks",
        metavar="N",
        default=str(default.shard_chunks),
        help="chunks a shard (%(default)s)",
    )
    parser.add_argument(
        "--heldout",
        metavar="SHARE",
        default="1%",
        help="share of the documents kept out of training, every n-th (1%%); 0 for none",
    )
    parser.add_argument(
        "--text-key",
        metavar="KEY",
        default=default.text_key,
        help="key of the text in JSON Lines (%(default)s)",
    )
    parser.add_argument(
        "--workers", metavar="N", default="0", help="processes (0: one for each core)"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def _count(flag: str, text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error


def _share(text: str) -> float:
    """1%, 0.01 or 0 as a fraction."""
    try:
        return parse_percent(text) if text.strip().endswith("%") else float(text)
    except ValueError as error:
        raise UsageError(f"--heldout {text}: write a share, e.g. 1% or 0.01") from error


@contextmanager
def _bar() -> Iterator[Callable[[PrepareProgress], None]]:
    """A bar a stage on standard error; on what is no terminal, a line at the end of each stage."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), DownloadColumn(True),
               TimeRemainingColumn())  # fmt: skip
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(progress: PrepareProgress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(progress.stage, total=progress.total)
                if not console.is_terminal:
                    sys.stderr.write(f"{progress.stage}: {show_bytes(progress.total)}\n")
            bar.update(tasks[progress.stage], completed=progress.done)

        yield show


@contextmanager
def _messages() -> Iterator[None]:
    """Let this room's log lines reach standard error, whoever has configured logging or not."""
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
    some = next(iter(summary.parts.values()))
    facts = {
        "parts": parts,
        "vocab_size": some.tokenizer.vocab_size,
        "tokenizer": some.tokenizer.fingerprint,
        "chunk_tokens": some.chunk_tokens,
        "seconds": round(summary.seconds, 3),
        "already": summary.already,
    }
    return json.dumps(facts) + "\n"


def _words(out: Path, summary: Summary) -> str:
    lines = [f"{out} was finished before: same input, same options" if summary.already
             else f"{out} is ready after {show_seconds(summary.seconds)}"]  # fmt: skip
    for name in (TRAIN, HELDOUT):
        part = summary.parts.get(name)
        if part is None:
            lines.append(f"  {name:<8} none")
            continue
        lines.append(
            f"  {name:<8} {show_count(part.documents)} documents, {show_count(part.tokens)} tokens, "
            f"{part.text_bytes / part.tokens:.2f} bytes a token, "
            f"{len(part.shards)} {'shard' if len(part.shards) == 1 else 'shards'}"
        )
    some = next(iter(summary.parts.values()))
    lines.append(
        f"  vocabulary of {some.tokenizer.vocab_size} ids, chunks of {some.chunk_tokens} tokens"
    )
    lines.append(f"next: lmscale train RUN.yaml data.corpora={out}")
    return "\n".join(lines) + "\n"
