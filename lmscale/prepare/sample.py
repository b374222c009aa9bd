"""The text that a vocabulary is trained on: all of a small input, an even sample of a large one."""

import codecs
from collections.abc import Callable, Iterator, Sequence

from lmscale.prepare.documents import documents
from lmscale.prepare.inputs import Slice
from lmscale.text.pieces import pieces

SAMPLE_BYTES = 64 << 20  # 8 s of training on two cores; more text hardly changes the merges


def sample(
    work: Sequence[Slice], text_key: str, consumed: Callable[[int], None], limit: int = SAMPLE_BYTES
) -> Iterator[str]:
    """From the beginning of every slice the same share of its bytes, `limit` in all; cut inside a document if need be.

    Depends on the input alone. An uncompressed input of at most `limit` bytes is used whole.
    """
    total = sum(each.size for each in work)
    done = 0
    for each in work:
        quota = each.size if total <= limit else -(-limit * each.size // total)
        for document in documents(each, text_key):
            for piece in pieces(document):
                taken = piece if len(piece) <= quota else _first(piece, quota)
                quota -= len(taken) if taken.isascii() else len(taken.encode())
                if taken:
                    yield taken
                if quota <= 0:
                    break
            if quota <= 0:
                break
        done += each.size
        consumed(done)


def _first(text: str, size: int) -> str:
    """The beginning of a text, at most `size` bytes of UTF-8 without half a character."""
    return codecs.utf_8_decode(text[:size].encode()[:size], "ignore", False)[0]
