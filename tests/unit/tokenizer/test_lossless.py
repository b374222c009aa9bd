"""Tokenizers that would lose text are refused, not trusted."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lmscale.base.errors import ConfigError
from lmscale.tokenizer.tokenizer import Tokenizer


def trained(path: Path, *, alphabet: list[str]) -> Path:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["plain ascii text"] * 9, trainer)
    made.save(str(path))
    return path


def test_a_byte_level_vocabulary_without_some_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="have no id"):
        Tokenizer.load(trained(tmp_path / "holes.json", alphabet=[]))


def test_one_with_all_bytes_is_taken(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole.json", alphabet=pre_tokenizers.ByteLevel.alphabet())
    text = "text 42 Zürich €"
    tokenizer = Tokenizer.load(whole)
    assert tokenizer.decode(tokenizer.encode(text)) == text
