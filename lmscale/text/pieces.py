"""Cut long texts where byte-level BPE starts a new word anyway, so that memory stays bounded."""

from collections.abc import Iterable, Iterator

PIECE_CHARS = 1 << 18  # encoding holds about 100 bytes a character


def pieces(blocks: Iterable[str], size: int = PIECE_CHARS) -> Iterator[str]:
    """The text in pieces of at most `size` characters, cut after a word and before a space.

    There the patterns of GPT-2 and of later vocabularies end a word whatever comes next, so the ids of the
    pieces put together are the ids of the whole. (Not after a line break: where a run of white space
    ends depends on what follows it; nor before one, which Llama-3's pattern binds to punctuation.) A
    stretch of `size` characters without such a place is cut at its end: nothing is lost, one word
    may be split. A function of the text alone, however it comes in blocks.
    """
    held = ""
    for block in blocks:
        held += block
        start = 0
        while len(held) - start > size:
            cut = _word_end(held, start, start + size)
            yield held[start:cut]
            start = cut
        held = held[start:]
    if held:
        yield held


def _word_end(text: str, start: int, stop: int) -> int:
    """The last place in (start, stop] where a word ends before a space, else `stop`. text[stop] exists."""
    for place in range(stop, start, -1):
        if text[place] == " " and not text[place - 1].isspace():
            return place
    return stop
