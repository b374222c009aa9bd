"""The end of a run: last validation, counted baselines, sampled text, last checkpoint, report, summary.

Text is sampled through the engine, so sharded models need no gathering.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from lmscale.base.batch import Batch
from lmscale.base.errors import ExitCode
from lmscale.data.held_out import held_out_batches
from lmscale.data.loader import Loader
from lmscale.data.objective import Record, causal_batch
from lmscale.distributed.process_group import to_device
from lmscale.engine.base import Engine
from lmscale.run_folder.attempts import mark_finished
from lmscale.train.callbacks import Line
from lmscale.train.loop import TrainLoop
from lmscale.train.report.page import write_report
from lmscale.train.run_corpora import Corpora

log = logging.getLogger(__name__)

_SAMPLES = 2
_PROMPT_TOKENS = 16
_NEW_TOKENS = 96
_TEMPERATURE = 0.8


def continuations(
    engine: Engine,
    device: torch.device,
    prompts: list[list[int]],
    *,
    max_new: int,
    seq_len: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """New tokens for each prompt. Collective: all ranks compute the same, every token costs one forward.

    The forward has one fixed shape (prompts, seq_len), which suits compiled models.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [list(prompt[-(seq_len - 1) :]) or [0] for prompt in prompts]
    starts = [len(text) for text in texts]
    for _ in range(min(max_new, seq_len - max(starts))):
        logits_BLV = engine.logits(to_device(_batch(texts, seq_len), device))
        last_BV = torch.stack([logits_BLV[row, len(text) - 1] for row, text in enumerate(texts)])
        probabilities_BV = torch.softmax(last_BV.double().cpu() / temperature, dim=-1)
        for text, token in zip(
            texts, torch.multinomial(probabilities_BV, 1, generator=generator), strict=True
        ):
            text.append(int(token))
    return [text[start:] for text, start in zip(texts, starts, strict=True)]


def _batch(texts: list[list[int]], seq_len: int) -> Batch[np.ndarray]:
    records = []
    for text in texts:
        tokens = np.zeros(seq_len + 1, np.int64)
        tokens[: len(text)] = text
        records.append(Record(tokens, np.empty(0, np.int64)))
    positions = np.arange(len(texts), dtype=np.int64)
    return causal_batch(
        records, rows=len(texts), sample_positions=positions, seq_len=seq_len, documents="joined"
    )


def finish(loop: TrainLoop, corpora: Corpora, *, counted: Loader) -> ExitCode:
    """Close a run that has done its last step. Collective. RETRY when the last checkpoint could not be saved."""
    loop.evaluate()
    rank, step = loop.rank, loop.state.step
    rank.progress.tick("finish")
    if rank.is_root and corpora.held_out:
        lines = loop.validation.count_baselines(
            counted,
            position=loop.state.position,
            vocab_size=corpora.manifest.tokenizer.vocab_size,
            step=step,
        )
        loop.announce(lines)
        for path in corpora.held_out:
            log.info(verdict(path, [*loop.scores, *lines]))
    _sample(loop, corpora)
    if not loop.save_step():
        return ExitCode.RETRY
    rank.on_root(lambda: mark_finished(rank.folder, loop.saver.attempt, step))
    return ExitCode.DONE


def summarize(loop: TrainLoop, code: ExitCode) -> None:
    """Log how the start ended and how to resume, and write the report. Not collective."""
    rank, state = loop.rank, loop.state
    if not rank.is_root:
        return
    if loop.callbacks.progress is not None:
        loop.callbacks.progress.close()
    if code == ExitCode.RETRY:
        log.error(
            "step %d of %d: the last checkpoint could not be saved. Free some space, then start the same "
            "command again: it resumes from step %s", state.step, loop.total_steps, loop.saver.newest_step or 0,
        )  # fmt: skip
    elif state.step < loop.total_steps:
        why = "stopped at" if code == ExitCode.DONE else "stopped on request and saved at"
        log.info(
            "%s step %d of %d. The same command resumes from there",
            why,
            state.step,
            loop.total_steps,
        )
    else:
        log.info(
            "finished %d steps, %s tokens", state.step, f"{state.position * loop.loader.seq_len:,}"
        )
    try:
        log.info("report: %s", write_report(rank.folder))
    except Exception:  # a failed report must not change the exit code
        log.warning("%s could not be written", rank.folder.report, exc_info=True)


def _sample(loop: TrainLoop, corpora: Corpora) -> None:
    """Continue the beginnings of held-out samples, for inspection. Collective."""
    if not corpora.held_out:
        return
    seq_len = loop.loader.seq_len
    reader = next(iter(corpora.held_out.values()))
    batch = next(
        held_out_batches(
            reader, documents="joined", micro_batch_size=_SAMPLES, max_samples=_SAMPLES
        )
    )
    length = min(_PROMPT_TOKENS, seq_len // 2)
    prompts = [row[:length].tolist() for row in batch.inputs.tokens_BL[batch.rows_B >= 0]]
    texts = continuations(
        loop.engine, loop.rank.device, prompts,
        max_new=_NEW_TOKENS, seq_len=seq_len, temperature=_TEMPERATURE, seed=loop.rank.cfg.train.seed,
    )  # fmt: skip
    for prompt, text in zip(prompts, texts, strict=True):
        before, after = corpora.tokenizer.decode(prompt), corpora.tokenizer.decode(text)
        loop.rank.write_event("sample", prompt=before, text=after)
        log.info("sample, continuing %r:\n%s", before, after)


def verdict(corpus: str, lines: Sequence[Line]) -> str:
    """Validation compared with the counted baselines, as a sentence."""
    values = {line["metric"]: line["value"] for line in lines if line["corpus"] == corpus}
    model = values["bits_per_byte"]
    unigram, bigram = values["bits_per_byte_unigram"], values["bits_per_byte_bigram"]
    than = "below both" if model < min(unigram, bigram) else "not yet below both"
    return (
        f"validation: {model:.3f} bits per byte, {than} models counted on the same tokens "
        f"(unigram {unigram:.3f}, bigram {bigram:.3f}) on {corpus}"
    )
