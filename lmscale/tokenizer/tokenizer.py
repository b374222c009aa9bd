"""Text to ids and back, without loss, with Hugging Face `tokenizers`.

Text is always ordinary text: a document that contains "<eos>" or "<|endoftext|>" is encoded as those
characters, never as the special token. The code that builds a token stream inserts special tokens as ids.

Byte-level BPE writes each of the 256 bytes as a printable character in vocabularies and merges. The table
is GPT-2's (github.com/openai/gpt-2, encoder.py, bytes_to_unicode): printable bytes are their own
character, the others take the next free code points from U+0100 on.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from lmscale.base.decoding import Limits, RecordError, decode_file
from lmscale.base.errors import ConfigError
from lmscale.base.fs import UnsuitableFile, atomic_writer


def _stand_ins() -> tuple[str, ...]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


STAND_INS = _stand_ins()  # index: the byte
_BYTE_OF = {char: byte for byte, char in enumerate(STAND_INS)}


def token_to_bytes(token: str) -> bytes:
    """The bytes of a byte-level token. Raises KeyError for a character outside the table."""
    return bytes(_BYTE_OF[char] for char in token)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the special tokens, None where a vocabulary has none for that role."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None
    mask: int | None = None
    sep: int | None = None
    cls: int | None = None

    def as_dict(self) -> dict[str, int | None]:
        """Role -> id, as a corpus manifest contains it."""
        return {role: getattr(self, role) for role in ROLES}

    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids before and after each document in a token stream.

        Where one token has both roles (GPT-2's <|endoftext|>), it is written once, at the end.
        """
        before = () if self.bos is None or self.bos == self.eos else (self.bos,)
        return before, () if self.eos is None else (self.eos,)


ROLES: tuple[str, ...] = tuple(field.name for field in fields(SpecialTokens))

# tokenizer_config.json of many published models has model_max_length 10^30.
_LIMITS = Limits(max_bytes=1 << 28, wide_integers=True, foreign=True)

NUM_RESERVED = 16
# Ids 0-15 of every vocabulary trained here. No text is ever encoded to them.
RESERVED_NAMES: tuple[str, ...] = (
    *(f"<{role}>" for role in ROLES),
    *(f"<reserved_{index}>" for index in range(len(ROLES), NUM_RESERVED)),
)

# Names in published vocabularies; the first one that a vocabulary has is used.
_KNOWN_NAMES: Mapping[str, tuple[str, ...]] = {
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
    "sep": ("<sep>", "[SEP]"),
    "cls": ("<cls>", "[CLS]"),
}


def find_special_tokens(ids: Mapping[str, int], config: Mapping[str, Any]) -> SpecialTokens:
    """Roles from a tokenizer_config.json (`bos_token` and so on), then from well-known names.

    `ids` maps each special token's text to its id.
    """
    found: dict[str, int] = {}
    for role in ROLES:
        stated = config.get(f"{role}_token")
        if isinstance(stated, Mapping):  # {"content": "<s>", "lstrip": ...}
            stated = stated.get("content")
        names: Collection[object] = (stated, *_KNOWN_NAMES[role])
        for name in names:
            if isinstance(name, str) and name in ids:
                found[role] = ids[name]
                break
    return SpecialTokens(**found)


def tokenizer_config_path(path: Path) -> Path:
    """The file in which published tokenizers keep the roles of their special tokens."""
    return path.with_name("tokenizer_config.json")


_BYTE_LEVEL, _SENTENCEPIECE = "byte-level", "sentencepiece"


class Tokenizer:
    """A vocabulary and its rules. Immutable."""

    def __init__(self, document: dict[str, Any], special: SpecialTokens | None = None) -> None:
        # A file from elsewhere may truncate, pad, or drop merges at random: all of it is switched off.
        self._document = {**document, "truncation": None, "padding": None}
        model = self._document.get("model")
        if isinstance(model, dict) and model.get("dropout"):
            self._document["model"] = {**model, "dropout": None}
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._document))
        self._tokenizer.encode_special_tokens = True  # "<eos>" in a text is text
        self._kind = _kind(self._document)
        _check_bytes(self._kind, self._tokenizer)
        self._added: dict[int, str] = {}  # added tokens that are text, e.g. runs of spaces
        special_ids: dict[str, int] = {}
        for token in self._document.get("added_tokens", ()):
            if token["special"]:
                special_ids[token["content"]] = token["id"]
            else:
                self._added[token["id"]] = token["content"]
        self.special = find_special_tokens(special_ids, {}) if special is None else special
        self._special_ids = frozenset(special_ids.values()) | {
            role for role in self.special.as_dict().values() if role is not None
        }

    @classmethod
    def load(cls, path: Path, special: SpecialTokens | None = None) -> "Tokenizer":
        """Read a tokenizer.json. Roles come from `special`, else tokenizer_config.json beside it, else names."""
        document = _read_json(path)
        if not isinstance(document, dict) or "model" not in document:
            raise ConfigError(
                f"{path} is not a tokenizer.json of Hugging Face tokenizers (no `model` in it); "
                "give such a file, `bytes`, or `bpe:SIZE` to train one"
            )
        config_path = tokenizer_config_path(path)
        if special is None and config_path.exists():
            names = {
                token["content"]: token["id"]
                for token in document.get("added_tokens", ())
                if token["special"]
            }
            config = _read_json(config_path)
            special = find_special_tokens(names, config if isinstance(config, Mapping) else {})
        try:
            return cls(document, special)
        except ConfigError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for what it cannot read
            raise ConfigError(f"{path}: the tokenizers library cannot read it: {error}") from error

    def save(self, path: Path) -> None:
        """Write a tokenizer.json that `load` and Hugging Face tokenizers read; durable. Raises OSError."""
        text = json.dumps(self._document, ensure_ascii=False, indent=1) + "\n"
        # A fixed temporary name: `verify` would report what a killed `prepare` left under another one.
        with atomic_writer(path, single_writer=True) as file:
            file.write(text.encode())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what determines the ids of a text; the file's layout and library version do not."""
        essence = {
            k: v for k, v in self._document.items() if k not in ("version", "post_processor")
        }
        return hashlib.sha256(
            json.dumps(essence, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def cuttable(self) -> bool:
        """Whether a long text may be encoded in parts (split_text): nothing is added or normalised."""
        return (
            self._kind == _BYTE_LEVEL
            and self._document.get("normalizer") is None
            and not any(
                stage.get("add_prefix_space") for stage in _stages(self._document, "pre_tokenizer")
            )
        )

    def encode(self, text: str) -> list[int]:
        """Ids of the text, no specials. Raises UnicodeEncodeError for a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, no specials; on all cores unless TOKENIZERS_PARALLELISM=false."""
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                text.encode()  # a lone surrogate: this error contains its place
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; specials are dropped, a broken UTF-8 sequence becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of the ids; specials are dropped."""
        if self._kind == _BYTE_LEVEL:
            return b"".join(self._bytes_of_ids[index] for index in ids)
        kept = [index for index in ids if index not in self._special_ids]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text.encode()

    def token_bytes(self) -> list[int]:
        """For each id the number of UTF-8 bytes of its text, 0 for special tokens: for bits per byte."""
        return [len(piece) for piece in self._bytes_of_ids]

    @cached_property
    def _bytes_of_ids(self) -> list[bytes]:
        texts = [b""] * self.vocab_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in self._special_ids:
                continue
            if index in self._added:
                texts[index] = self._added[index].encode()
            elif self._kind == _BYTE_LEVEL:
                texts[index] = token_to_bytes(token)
            elif token.startswith("<0x") and token.endswith(">") and len(token) == 6:
                texts[index] = bytes([int(token[3:5], 16)])
            else:
                texts[index] = token.replace("▁", " ").encode()
        return texts


def _stages(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The stages of a pre-tokenizer or decoder, nested sequences flattened."""
    stage = document.get(key)
    if not stage:
        return []
    if stage["type"] == "Sequence":
        return [
            inner
            for item in stage["pretokenizers" if key == "pre_tokenizer" else "decoders"]
            for inner in _stages({key: item}, key)
        ]
    return [stage]


def _kind(document: Mapping[str, Any]) -> str:
    kinds = {stage["type"] for stage in _stages(document, "pre_tokenizer")}
    decoders = {stage["type"] for stage in _stages(document, "decoder")}
    if "ByteLevel" in kinds | decoders:
        return _BYTE_LEVEL
    if document["model"].get("byte_fallback"):
        return _SENTENCEPIECE
    raise ConfigError(
        f"tokenizer: a {document['model'].get('type')} model that is neither byte-level nor has byte fallback "
        "loses text outside its vocabulary; use `bpe:SIZE`, `bytes` or a byte-level tokenizer.json"
    )


def _check_bytes(kind: str, tokenizer: tokenizers.Tokenizer) -> None:
    """Every byte of UTF-8 needs an id: the library drops a byte without one silently."""
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    missing = [
        byte
        for byte in range(256)
        if byte not in never
        and tokenizer.token_to_id(STAND_INS[byte] if kind == _BYTE_LEVEL else f"<0x{byte:02X}>")
        is None
    ]
    if missing:
        raise ConfigError(
            f"tokenizer: {len(missing)} of the bytes of UTF-8 have no id (e.g. 0x{missing[-1]:02X}), so text with "
            "them would be lost; train it with initial_alphabet=ByteLevel.alphabet(), or use `bpe:SIZE` or `bytes`"
        )


def _read_json(path: Path) -> object:
    try:
        return decode_file(object, path, limits=_LIMITS, hint="name another tokenizer.json")
    except OSError as error:
        raise ConfigError(f"tokenizer {path}: cannot be read: {error.strerror}") from error
    except (RecordError, UnsuitableFile) as error:
        raise ConfigError(f"tokenizer {error}") from error
