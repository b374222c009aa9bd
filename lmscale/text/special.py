"""Which ids play which part: beginning and end of document, padding and the like."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Special:
    """Ids of the special tokens, None where a vocabulary has none for that role."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None
    mask: int | None = None
    sep: int | None = None
    cls: int | None = None

    def as_dict(self) -> dict[str, int | None]:
        """Role -> id, as a corpus manifest holds it."""
        return {role: getattr(self, role) for role in ROLES}

    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stands before and after each document in a token stream.

        A vocabulary with one token for both ends (GPT-2's <|endoftext|>) gets it once, at the end.
        """
        before = () if self.bos is None or self.bos == self.eos else (self.bos,)
        return before, () if self.eos is None else (self.eos,)


ROLES: tuple[str, ...] = tuple(field.name for field in fields(Special))

NUM_RESERVED = 16
# Ids 0-15 of every vocabulary trained here. No text is ever encoded to them.
RESERVED_NAMES: tuple[str, ...] = (
    *(f"<{role}>" for role in ROLES),
    *(f"<reserved_{index}>" for index in range(len(ROLES), NUM_RESERVED)),
)

# Names that published vocabularies use; the first that a vocabulary has wins.
_KNOWN_NAMES: Mapping[str, tuple[str, ...]] = {
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
    "sep": ("<sep>", "[SEP]"),
    "cls": ("<cls>", "[CLS]"),
}


def special_of(ids: Mapping[str, int], config: Mapping[str, Any]) -> Special:
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
    return Special(**found)


def config_beside(path: Path) -> Path:
    """Where published tokenizers keep the roles of their special tokens."""
    return path.with_name("tokenizer_config.json")
