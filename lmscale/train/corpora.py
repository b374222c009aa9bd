"""Opening the corpora of a run, and the checks that need a run file and a manifest together."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmscale.base.errors import ConfigError, Problem
from lmscale.config.schema import RunConfig
from lmscale.corpus.manifest import Manifest, corpus_folder, tokenizer_path
from lmscale.corpus.order import Order, chunks_in_use
from lmscale.corpus.reader import CorpusReader
from lmscale.tokenizer.tokenizer import SpecialTokens, Tokenizer


@dataclass(frozen=True)
class Corpora:
    """What a run reads: one training corpus, any number of held-out ones, one tokenizer."""

    train: CorpusReader
    held_out: dict[str, CorpusReader]  # by the path the user gave
    tokenizer: Tokenizer

    @property
    def manifest(self) -> Manifest:
        """The training corpus' manifest."""
        return self.train.manifest


def open_corpora(cfg: RunConfig, *, world_size: int) -> Corpora:
    """Open and check every corpus of the run. Raises ConfigError (all problems together) or DataError."""
    missing = [
        Problem(key, f"{path} does not exist", "make it with: lmscale prepare OUT INPUT...")
        for key, path in _paths(cfg)
        if not Path(path).exists()
    ]
    if missing:
        raise ConfigError(missing)
    in_use = chunks_in_use(
        streams=cfg.data.streams or cfg.train.global_batch_size,
        dp_size=world_size // cfg.parallel.tp,
        window_chunks=cfg.data.shuffle_window_chunks,
    )
    seq_len, memory = cfg.train.seq_len, cfg.data.window_memory
    train = CorpusReader(
        corpus_folder(Path(cfg.data.corpora[0].path), "train"),
        seq_len=seq_len,
        memory_bytes=memory,
        chunks_in_use=in_use,
        cache_dir=Path(cfg.data.cache_dir) if cfg.data.cache_dir else None,
    )
    held_out = {
        path: CorpusReader(
            corpus_folder(Path(path), "heldout"),
            seq_len=seq_len,
            memory_bytes=memory,
            chunks_in_use=1,
        )
        for path in cfg.eval.corpora
    }
    corpora = Corpora(train, held_out, corpus_tokenizer(train))
    if found := list(_problems(cfg, corpora)):
        raise ConfigError(found)
    return corpora


def corpus_tokenizer(reader: CorpusReader) -> Tokenizer:
    """The tokenizer that stands beside the corpus."""
    special = SpecialTokens(**reader.manifest.tokenizer.special)  # roles are not in tokenizer.json
    return Tokenizer.load(tokenizer_path(reader.path, reader.manifest), special)


def build_order(cfg: RunConfig, reader: CorpusReader, *, streams: int) -> Order:
    """The order in which the run reads its corpus."""
    return Order(
        reader.num_samples,
        reader.samples_per_chunk,
        streams,
        window_chunks=cfg.data.shuffle_window_chunks,
        seed=cfg.train.seed,
    )


def _paths(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    for index, corpus in enumerate(cfg.data.corpora):
        yield f"data.corpora[{index}].path", str(corpus.path)
    for index, path in enumerate(cfg.eval.corpora):
        yield f"eval.corpora[{index}]", str(path)
    if cfg.data.tokenizer is not None:
        yield "data.tokenizer", str(cfg.data.tokenizer)


def _problems(cfg: RunConfig, corpora: Corpora) -> Iterator[Problem]:
    manifest = corpora.manifest
    batch, samples = cfg.train.global_batch_size, corpora.train.num_samples
    if samples < batch:
        yield Problem(
            "train.global_batch_size",
            f"{batch} samples a step, but the corpus has only {samples} samples of {cfg.train.seq_len} tokens",
            f"use train.global_batch_size <= {samples}, a shorter train.seq_len, or a larger corpus",
        )
    if cfg.model.vocab_size is not None and cfg.model.vocab_size < manifest.tokenizer.vocab_size:
        yield Problem(
            "model.vocab_size",
            f"{cfg.model.vocab_size}, but the corpus' tokenizer has {manifest.tokenizer.vocab_size} ids",
            "leave model.vocab_size out: it is taken from the corpus",
        )
    wanted = manifest.tokenizer.fingerprint
    if cfg.data.tokenizer is not None:
        given = Tokenizer.load(Path(cfg.data.tokenizer)).fingerprint
        if given != wanted:
            yield Problem(
                "data.tokenizer",
                f"{cfg.data.tokenizer} ({given[:12]}) is not the one that the corpus was made with ({wanted[:12]})",
                f"leave data.tokenizer out, or prepare the corpus anew with --tokenizer {cfg.data.tokenizer}",
            )
    for index, (path, reader) in enumerate(corpora.held_out.items()):
        if reader.manifest.tokenizer.fingerprint != wanted:
            yield Problem(
                f"eval.corpora[{index}]",
                f"{path} was made with another tokenizer ({reader.manifest.tokenizer.fingerprint[:12]}) "
                f"than the training corpus ({wanted[:12]})",
                f"prepare it anew with --tokenizer {tokenizer_path(corpora.train.path, manifest)}",
            )
        if reader.num_samples == 0:
            yield Problem(
                f"eval.corpora[{index}]",
                f"{path} holds no sample of {cfg.train.seq_len} tokens",
                "use a larger held-out share (lmscale prepare --heldout 5%) or a shorter train.seq_len",
            )
