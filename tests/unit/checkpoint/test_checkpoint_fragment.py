import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from lmscale.checkpoint.fragment import Fragment, TpShard, rectangles

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def slices(draw):
    shape = draw(shapes)
    begin = draw(st.integers(0, math.prod(shape)))
    return shape, begin, draw(st.integers(begin, math.prod(shape)))


@given(slices())
@settings(max_examples=200)
def test_rectangles_are_the_slice_exactly_and_in_order(case):
    shape, begin, end = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = []
    for box in rectangles(shape, begin, end):
        place = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        inside = numbers[place].flatten().tolist()
        assert inside[0] == box.begin
        found += inside
    assert found == list(range(begin, end))


@given(slices())
@settings(max_examples=200)
def test_there_are_few_rectangles(case):
    shape, begin, end = case
    boxes = list(rectangles(shape, begin, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    if begin == 0 and end == math.prod(shape):
        assert len(boxes) == 1, "a whole tensor is one box"


def test_a_fragment_shows_live_memory_under_the_global_shape():
    flat = torch.arange(100.0, 107.0)  # elements 3..9 of a 3 x 4 local part
    fragment = Fragment(flat, 3, (3, 4), split=TpShard(dim=1, rank=1, size=2))
    assert fragment.shape == (3, 8)
    chunks = {tuple(c.offsets): tuple(c.sizes) for c in fragment.__create_chunk_list__()}
    assert chunks == {(0, 7): (1, 1), (1, 4): (1, 4), (2, 4): (1, 2)}
    box = fragment.__get_tensor_shard__(MetadataIndex("w", (1, 4)))
    assert box.tolist() == [[101.0, 102.0, 103.0, 104.0]]
    box.zero_()
    assert flat.tolist() == [100.0, 0, 0, 0, 0, 105.0, 106.0]


def test_only_the_one_who_writes_writes_but_all_load():
    fragment = Fragment(torch.zeros(4), 0, (4,), writes=False)
    assert fragment.__create_write_items__("w", fragment) == []
    assert len(fragment.__create_chunk_list__()) == 1


def test_an_empty_fragment_and_a_scalar():
    assert Fragment(torch.zeros(0), 0, (3, 4)).__create_chunk_list__() == []
    (chunk,) = Fragment(torch.ones(1), 0, ()).__create_chunk_list__()
    assert tuple(chunk.sizes) == ()


def test_a_slice_beyond_its_parameter_is_a_bug():
    with pytest.raises(AssertionError, match=r"\[9, 14\) is not in \(3, 4\)"):
        Fragment(torch.zeros(5), 9, (3, 4))
    with pytest.raises(NotImplementedError, match="not computed with"):
        Fragment(torch.zeros(4), 0, (4,)) + 1
