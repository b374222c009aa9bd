from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.tokenizer.training import split_text, train_bpe

WORDS = [
    "def",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\n\n",
    "\t",
    "x1",
    "(",
    "):",
    "'s",
    "don't",
    "123",
    "é",
    "\x1c",
    "\u2028",
]
texts = st.lists(st.sampled_from(WORDS), max_size=80).map("".join)
BPE = train_bpe(iter([" ".join(WORDS) * 9]), 330)


@given(text=texts, size=st.integers(1, 40), blocks=st.lists(st.integers(1, 30), max_size=20))
@settings(max_examples=200, deadline=None)
def test_pieces_are_the_text_and_do_not_depend_on_the_blocks(
    text: str, size: int, blocks: list[int]
) -> None:
    cut, rest = [], text
    for length in blocks:
        cut.append(rest[:length])
        rest = rest[length:]
    whole = list(split_text([text], size))
    assert "".join(whole) == text
    assert all(0 < len(piece) <= size for piece in whole)
    assert list(split_text([*cut, rest], size)) == whole


@given(words=st.lists(st.sampled_from(WORDS), max_size=80))
@settings(max_examples=200, deadline=None)
def test_ids_of_the_pieces_are_the_ids_of_the_whole(words: list[str]) -> None:
    text = "".join(words)
    parts = list(split_text([text], 60))
    # A stretch of 60 without a place to cut is rare, and the stated exception.
    if all(part[-1:].strip() and following[:1] in " \n\r\t" for part, following in pairwise(parts)):
        assert [index for part in parts for index in BPE.encode(part)] == BPE.encode(text)
