"""Opening the corpora of a run."""

from dataclasses import dataclass
from pathlib import Path

from lmscale.base.errors import ConfigError
from lmscale.checks.corpus_checks import corpus_problems, missing_corpora
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
    if missing := list(missing_corpora(cfg)):
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
    problems = corpus_problems(
        cfg,
        train.manifest,
        tokenizer_file=tokenizer_path(train.path, train.manifest),
        held_out={path: reader.manifest for path, reader in held_out.items()},
    )
    if found := list(problems):
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
