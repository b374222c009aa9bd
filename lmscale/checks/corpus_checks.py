"""Do the corpora and the tokenizer of a run exist, and do they fit its run file and each other?"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lmscale.base.errors import Problem
from lmscale.config.schema import RunConfig

if TYPE_CHECKING:  # it imports numpy, which a refused run file does not need
    from lmscale.corpus.manifest import Manifest


def missing_corpora(cfg: RunConfig) -> Iterator[Problem]:
    """One problem per corpus or tokenizer that does not exist, with the command that makes it."""
    for key, path in _corpus_paths(cfg):
        if not Path(path).exists():
            hint = f"make it with: lmscale prepare {path} INPUT..."
            yield Problem(key, f"{path} does not exist", hint)
    tokenizer = cfg.data.tokenizer
    if tokenizer is not None and not Path(tokenizer).exists():
        hint = "name the tokenizer.json of a corpus, or leave data.tokenizer out"
        yield Problem("data.tokenizer", f"{tokenizer} does not exist", hint)


def corpus_samples(cfg: RunConfig) -> int:
    """Samples of the training corpus: the length of a run in epochs depends on it. Raises DataError."""
    from lmscale.corpus.manifest import load_part

    _, manifest = load_part(Path(cfg.data.corpora[0].path))
    return manifest.num_samples(cfg.train.seq_len)


def corpus_problems(
    cfg: RunConfig,
    manifest: "Manifest",
    *,
    tokenizer_file: Path,
    held_out: "Mapping[str, Manifest]",
) -> Iterator[Problem]:
    """What of the corpora does not fit the run file.

    `manifest` and `tokenizer_file` are those of the training corpus; `held_out` are the manifests of eval.corpora, by
    path and in their order.
    """
    yield from too_few_samples(cfg, manifest)
    if cfg.model.vocab_size is not None and cfg.model.vocab_size < manifest.tokenizer.vocab_size:
        fact = (
            f"{cfg.model.vocab_size}, but the tokenizer of the corpus has "
            f"{manifest.tokenizer.vocab_size} ids"
        )
        hint = "leave model.vocab_size out: the value of the corpus is used"
        yield Problem("model.vocab_size", fact, hint)
    yield from _other_tokenizer(cfg, manifest)
    for index, (path, part) in enumerate(held_out.items()):
        yield from _held_out(cfg, index, path, part, manifest, tokenizer_file)


def too_few_samples(cfg: RunConfig, manifest: "Manifest") -> Iterator[Problem]:
    """A training corpus that cannot fill one optimizer step."""
    batch, samples = cfg.train.global_batch_size, manifest.num_samples(cfg.train.seq_len)
    if samples < batch:
        yield Problem(
            "train.global_batch_size",
            f"{batch} samples per step, but the corpus has only {samples} samples of {cfg.train.seq_len} tokens",
            f"use train.global_batch_size <= {samples}, a shorter train.seq_len, or a larger corpus",
        )


def _other_tokenizer(cfg: RunConfig, manifest: "Manifest") -> Iterator[Problem]:
    if cfg.data.tokenizer is None:
        return
    from lmscale.tokenizer.tokenizer import Tokenizer

    expected = manifest.tokenizer.fingerprint
    given = Tokenizer.load(Path(cfg.data.tokenizer)).fingerprint
    if given != expected:
        fact = (
            f"{cfg.data.tokenizer} (fingerprint {given[:12]}) is not the tokenizer of the training corpus "
            f"({expected[:12]})"
        )
        hint = f"leave data.tokenizer out, or prepare the corpus again with --tokenizer {cfg.data.tokenizer}"
        yield Problem("data.tokenizer", fact, hint)


def _held_out(
    cfg: RunConfig,
    index: int,
    path: str,
    part: "Manifest",
    training: "Manifest",
    tokenizer_file: Path,
) -> Iterator[Problem]:
    key, expected = f"eval.corpora[{index}]", training.tokenizer.fingerprint
    if part.tokenizer.fingerprint != expected:
        fact = (
            f"{path} was made with another tokenizer (fingerprint {part.tokenizer.fingerprint[:12]}) than the "
            f"training corpus ({expected[:12]})"
        )
        yield Problem(key, fact, f"prepare it again with --tokenizer {tokenizer_file}")
    if part.num_samples(cfg.train.seq_len) == 0:
        fact = f"{path} has no sample of {cfg.train.seq_len} tokens"
        hint = (
            "use a larger held-out share (lmscale prepare --heldout 5%) or a shorter train.seq_len"
        )
        yield Problem(key, fact, hint)


def _corpus_paths(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    for index, corpus in enumerate(cfg.data.corpora):
        yield f"data.corpora[{index}].path", str(corpus.path)
    for index, path in enumerate(cfg.eval.corpora):
        yield f"eval.corpora[{index}]", str(path)
