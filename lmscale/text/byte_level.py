"""The printable stand-ins that byte-level BPE writes for the 256 bytes in vocabularies and merges.

The table is GPT-2's (github.com/openai/gpt-2, encoder.py, bytes_to_unicode): bytes that print keep
their own character, the others take the next free code points from U+0100 on.
"""


def _stand_ins() -> tuple[str, ...]:
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in own else next(spare)) for byte in range(256))


STAND_INS = _stand_ins()  # index: the byte
_BYTE_OF = {char: byte for byte, char in enumerate(STAND_INS)}


def token_to_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for. Raises KeyError for any other character."""
    return bytes(_BYTE_OF[char] for char in token)
