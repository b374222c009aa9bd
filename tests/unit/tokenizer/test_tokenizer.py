import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.base.errors import ConfigError
from lmscale.tokenizer.tokenizer import RESERVED_NAMES, Tokenizer
from lmscale.tokenizer.training import bytes_tokenizer, train_bpe

TEXTS = [
    "def area(width, height):\n    return width * height\n" * 20,
    "The <eos> of a story is not its <|endoftext|>. <reserved_7>" * 20,
    "naïve café – 東京 😀 \r\n\t\x00\x1c" * 10,
]
BYTES = bytes_tokenizer()
BPE = train_bpe(iter(TEXTS), 400)

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
tricky = st.lists(
    st.one_of(any_text, st.sampled_from([*RESERVED_NAMES, "<|endoftext|>", "\r\n", "  "]))
).map("".join)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@given(text=tricky)
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_and_never_holds_a_reserved_id(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(16 <= index < tokenizer.vocab_size for index in ids)
    sizes = tokenizer.token_bytes()
    assert sum(sizes[index] for index in ids) == len(text.encode())


@pytest.mark.parametrize("name", RESERVED_NAMES)
def test_the_name_of_a_special_is_ordinary_text_even_to_a_vocabulary_trained_on_it(
    name: str,
) -> None:
    trained = train_bpe(iter([name * 500, f" {name}" * 500]), 300)
    assert min(trained.encode(f"a{name}b")) >= 16
    assert trained.decode(trained.encode(name)) == name


def test_specials_are_ids_0_to_6_and_decode_to_nothing() -> None:
    for tokenizer in (BYTES, BPE):
        assert list(tokenizer.special.as_dict().values()) == list(range(7))
        assert tokenizer.decode([0, *tokenizer.encode("x"), 1, 15]) == "x"
        assert tokenizer.token_bytes()[:16] == [0] * 16


def test_bytes_tokenizer_is_byte_plus_16() -> None:
    assert BYTES.vocab_size == 272
    assert BYTES.encode("aé") == [16 + byte for byte in "aé".encode()]


def test_half_a_character_decodes_to_the_replacement_character_but_exact_bytes() -> None:
    half = BYTES.encode("é")[:1]
    assert BYTES.decode(half) == "\ufffd"
    assert BYTES.decode_bytes(half) == b"\xc3"


def test_a_lone_surrogate_is_not_text() -> None:
    with pytest.raises(UnicodeEncodeError):
        BPE.encode("a\ud800")


def test_save_and_load_keep_ids_and_fingerprint(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.fingerprint == BPE.fingerprint
    assert again.special == BPE.special
    assert [again.encode(text) for text in TEXTS] == BPE.encode_batch(TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_fingerprint_follows_the_rules_not_the_layout(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    BPE.save(path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document, sort_keys=True, indent=4))
    assert Tokenizer.load(path).fingerprint == BPE.fingerprint
    document["model"]["merges"] = document["model"]["merges"][:-1]
    path.write_text(json.dumps(document))
    assert Tokenizer.load(path).fingerprint != BPE.fingerprint


def test_training_is_the_same_for_any_number_of_threads() -> None:
    code = (
        "import pathlib, lmscale.tokenizer.training as t;"
        "texts = [p.read_text() for p in sorted(pathlib.Path(t.__file__).parent.glob('*.py'))];"
        "print(t.train_bpe(iter(texts), 600).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            check=True,
        ).stdout
        for threads in ("1", "3")
    }
    assert len(prints) == 1


def test_a_vocabulary_has_no_more_ids_than_the_text_has_merges() -> None:
    assert train_bpe(iter(["ab ab"]), 4096).vocab_size == 272 + 2  # "ab", " ab"


def test_too_small_a_vocabulary_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="at least bpe:272"):
        train_bpe(iter(["x"]), 100)


def _foreign(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "tokenizer.json"
    BPE.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_foreign_file_cannot_cut_pad_or_drop(tmp_path: Path) -> None:
    strict = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    assert Tokenizer.load(_foreign(tmp_path, truncation=strict)).encode(TEXTS[0]) == BPE.encode(
        TEXTS[0]
    )
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"] | {"dropout": 0.5}
    assert Tokenizer.load(_foreign(tmp_path, model=model)).encode(TEXTS[0]) == BPE.encode(TEXTS[0])


def test_roles_of_a_foreign_file_come_from_its_config_then_from_names(tmp_path: Path) -> None:
    path = _foreign(tmp_path)
    text = path.read_text().replace('"<bos>"', '"<|endoftext|>"').replace('"<eos>"', '"<|im_end|>"')
    path.write_text(text)
    special = Tokenizer.load(path).special
    assert (special.bos, special.eos) == (None, 0)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"})
    )
    special = Tokenizer.load(path).special
    assert (special.bos, special.eos) == (0, 1)
    assert special.frame() == ((0,), (1,))


def test_added_tokens_that_are_text_count_their_bytes(tmp_path: Path) -> None:
    path = _foreign(tmp_path)
    document = json.loads(path.read_text())
    spaces = {"id": BPE.vocab_size, "content": "     ", "special": False, "single_word": False,
              "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    document["added_tokens"].append(spaces)
    path.write_text(json.dumps(document))
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode("a     b")
    assert BPE.vocab_size in ids
    assert tokenizer.decode(ids) == "a     b"
    assert sum(tokenizer.token_bytes()[index] for index in ids) == 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "not a tokenizer.json"),
        ('{"model": {"type": "Nonsense"}}', "cannot read it"),
    ],
)
def test_an_unreadable_file_is_explained(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


def test_a_vocabulary_that_loses_text_is_refused(tmp_path: Path) -> None:
    lossy = {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": {"<unk>": 0}}  # fmt: skip
    path = _foreign(tmp_path, model=lossy, pre_tokenizer=None, decoder=None, added_tokens=[])
    with pytest.raises(ConfigError, match="loses text"):
        Tokenizer.load(path)
