"""Vocabularies of our own, byte-level BPE learned from text and plain bytes; and splitting long texts."""

import json
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lmscale.base.errors import ConfigError
from lmscale.tokenizer.tokenizer import NUM_RESERVED, RESERVED_NAMES, STAND_INS, Tokenizer

PART_CHARS = 1 << 18  # encoding needs about 100 bytes of memory per character


def split_text(blocks: Iterable[str], size: int = PART_CHARS) -> Iterator[str]:
    """The text in parts of at most `size` characters, cut after a word and before a space.

    There the patterns of GPT-2 and of later vocabularies always end a word, so the concatenated ids of the
    parts are the ids of the whole text. (Not after a line break: the end of a run of white space depends
    on what follows it; nor before one, which Llama-3's pattern binds to punctuation.) A stretch of `size`
    characters without such a place is cut at its end: nothing is lost, one word may be split. The result
    depends on the text alone, not on its blocks.
    """
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > size:
            cut = _word_end(rest, start, start + size)
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


def _word_end(text: str, start: int, stop: int) -> int:
    """The last offset in (start, stop] where a word ends before a space, else `stop`. text[stop] exists."""
    for offset in range(stop, start, -1):
        if text[offset] == " " and not text[offset - 1].isspace():
            return offset
    return stop


MIN_BPE_SIZE = NUM_RESERVED + 256


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE with at most `vocab_size` ids, 0-15 reserved.

    Deterministic: the same texts in any grouping that keeps words whole give the same merges, on any
    number of threads (ties are broken by id). The vocabulary is smaller where the text has no more pairs
    to merge. Costs about 4 s for 30 MB on two cores; memory grows with the distinct words, not the text.
    """
    if vocab_size < MIN_BPE_SIZE:
        raise ConfigError(
            f"tokenizer bpe:{vocab_size}: too small; 16 reserved ids and 256 bytes need at least "
            f"bpe:{MIN_BPE_SIZE} (or use `bytes`)"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # GPT-2's pattern never puts letters and punctuation into one word, so no merge can spell "<eos>".
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(RESERVED_NAMES),
        initial_alphabet=list(STAND_INS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = Tokenizer(json.loads(tokenizer.to_str()))
    sizes = trained.token_bytes()
    assert not any(sizes[:NUM_RESERVED]), "ids 0-15 have no text"
    assert all(sizes[NUM_RESERVED:]), "all other ids have text"
    return trained


def bytes_tokenizer() -> Tokenizer:
    """Byte b is id 16 + b: no training, no out-of-vocabulary, three to four times the tokens."""
    vocab = {name: index for index, name in enumerate(RESERVED_NAMES)}
    vocab |= {char: NUM_RESERVED + byte for byte, char in enumerate(STAND_INS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    # The pattern only keeps words short: BPE is slow on a word as long as a document.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(RESERVED_NAMES))
    return Tokenizer(json.loads(tokenizer.to_str()))
