import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from lmscale.base.errors import CheckpointError, RetryableError
from lmscale.checkpoint import tensor_io as read
from lmscale.checkpoint.tensor_format import (
    TensorBox,
    TensorLocation,
    from_table,
    header,
    raw_bytes,
    to_table,
)
from lmscale.checkpoint.tensor_io import BlockReader, fill, write_blocks, write_tensors
from lmscale.run_folder.checkpoints import describe_file


def whole(name: str, tensor: torch.Tensor) -> TensorBox:
    shape = tuple(tensor.shape)
    return TensorBox(name, tensor.dtype, shape, (0,) * len(shape), shape)


def write(path, tensors):
    return write_tensors(path, {whole(name, tensor): tensor for name, tensor in tensors.items()})


ODD = {
    "model.matrix": torch.randn(7, 5),
    "model.strided": torch.randn(6, 8).t(),
    "model.column": torch.randn(9, 4)[:, 1],
    "model.scalar": torch.tensor(3.5),
    "model.empty": torch.zeros(0, 4),
    "model.empty_strided": torch.zeros(4, 0).t(),
    "model.wide": torch.randn(5, dtype=torch.float64),
    "count": torch.tensor([2**62, -1]),
    "generator": torch.arange(13, dtype=torch.uint8),
    "model.grad": torch.ones(2, requires_grad=True),
}


def test_any_safetensors_reader_opens_our_files(tmp_path):
    write(tmp_path / "a.safetensors", ODD)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(ODD)
        for name, tensor in ODD.items():
            got = file.get_tensor(name)
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert torch.equal(got, tensor), name


def test_the_entry_is_what_stands_on_the_disk(tmp_path):
    written = write(tmp_path / "a.safetensors", {"w": torch.randn(1_500_000), **ODD})
    assert written.entry == describe_file(tmp_path / "a.safetensors")
    assert len(written.entry["crc32c"]) == 2
    data = (tmp_path / "a.safetensors").read_bytes()
    for part, begin in written.boxes:
        assert begin % part.dtype.itemsize == 0
        if part.name == "count":
            assert data[begin : begin + 8] == (2**62).to_bytes(8, "little")


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 17))
@settings(max_examples=100, deadline=None)
def test_checksums_of_blocks_do_not_depend_on_the_pieces(tmp_path_factory, pieces, block_bytes):
    path = tmp_path_factory.mktemp("blocks") / "f"
    entry = write_blocks(path, pieces, block_bytes=block_bytes)
    assert path.read_bytes() == b"".join(pieces)
    assert entry == describe_file(path, block_bytes=block_bytes)


def test_a_part_is_named_by_its_place(tmp_path):
    part = TensorBox("w", torch.float32, (4, 6), (2, 3), (2, 3))
    assert part.key == "w[2:4,3:6]"
    text, (begin,) = header([part])
    assert begin == len(text) and begin % 64 == 0
    assert json.loads(text[8:])["w[2:4,3:6]"]["shape"] == [2, 3]


def test_strided_tensors_are_copied_a_window_at_a_time(monkeypatch):
    monkeypatch.setattr("lmscale.checkpoint.tensor_format._WINDOW_BYTES", 64)
    tensor = torch.randn(3, 10, 5).permute(1, 2, 0)
    pieces = list(raw_bytes(tensor))
    assert b"".join(pieces) == tensor.contiguous().numpy().tobytes()
    assert max(map(len, pieces)) <= 64


def test_the_table_names_every_part_and_survives_json():
    parts = [
        (TensorBox("w", torch.float32, (4, 2), (2, 0), (2, 2)), "b", 64),
        (TensorBox("w", torch.float32, (4, 2), (0, 0), (2, 2)), "a", 128),
        (TensorBox("s", torch.int64, (), (), ()), "a", 64),
    ]
    table = json.loads(json.dumps(to_table(parts)))
    metadata, places = from_table(table)
    assert metadata.state_dict_metadata["w"].size == (4, 2)
    assert places[MetadataIndex("w", (2, 0))] == TensorLocation("b", 64, (2, 2), torch.float32)
    assert places[MetadataIndex("s", ())] == TensorLocation("a", 64, (), torch.int64)
    with pytest.raises(AssertionError, match="w: 4 elements"):
        to_table(parts[:1])


@st.composite
def boxes(draw):
    sizes = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    offsets = tuple(draw(st.integers(0, size - 1)) for size in sizes)
    lengths = tuple(
        draw(st.integers(1, size - offset)) for size, offset in zip(sizes, offsets, strict=True)
    )
    return sizes, offsets, lengths


@given(boxes(), st.sampled_from([4, 20, 64]), st.sampled_from([8, 32, 1000]))
@settings(max_examples=150, deadline=None)
def test_any_box_of_a_part_is_read_whatever_the_window(tmp_path_factory, case, window, block_bytes):
    sizes, offsets, lengths = case
    stored = torch.randn(sizes)
    path = tmp_path_factory.mktemp("box") / "f"
    entry = write_blocks(path, [b"x" * 12, *raw_bytes(stored)], block_bytes=block_bytes)
    place = TensorLocation("f", 12, sizes, torch.float32)
    index = MetadataIndex("w", offsets)
    item = ReadItem(LoadItemType.TENSOR, index, offsets, index, offsets, lengths)
    target = torch.zeros([2 * n for n in lengths])[tuple(slice(n) for n in lengths)]
    blocks = BlockReader(path, entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "_WINDOW_BYTES", window)
        fill(target, place, item, blocks)
    blocks.close()
    want = stored[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
    assert torch.equal(target, want)


@pytest.fixture
def blocks(tmp_path):
    data = bytes(range(256)) * 4
    entry = write_blocks(tmp_path / "f", [data], block_bytes=100)
    opened = BlockReader(tmp_path / "f", entry)
    yield opened, tmp_path / "f", data
    opened.close()


def test_a_flipped_bit_is_found_in_its_block_and_nowhere_else(blocks):
    reader, path, data = blocks
    damaged = bytearray(data)
    damaged[555] ^= 4
    path.write_bytes(damaged)
    assert bytes(reader.read(0, 500)) == data[:500]
    for begin, end in ((500, 501), (599, 601), (0, 1024)):
        with pytest.raises(CheckpointError, match=r"/f: block 5 \(bytes 500-600\)"):
            reader.read(begin, end)
        assert bytes(reader.read(0, 90)) == data[:90], "not what the failed read left behind"
    assert bytes(reader.read(600, 1024)) == data[600:]


def test_another_size_is_damage(blocks):
    reader, path, data = blocks
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="1023 bytes, expected 1024"):
        reader.read(0, 10)


def test_a_missing_file_is_damage_but_a_missing_folder_is_not(blocks):
    reader, path, _ = blocks
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        reader.read(0, 10)
    path.parent.rmdir()
    with pytest.raises(RetryableError, match="is gone"):
        reader.read(0, 10)


def test_a_read_that_fails_is_tried_again_and_is_never_damage(blocks, monkeypatch):
    reader, _, data = blocks
    failures = [OSError(116, "Stale file handle"), OSError(5, "Input/output error")]
    real = read.os.preadv

    def flaky(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    waits = []
    monkeypatch.setattr(read.os, "preadv", flaky)
    monkeypatch.setattr("lmscale.base.retry.time.sleep", waits.append)
    assert bytes(reader.read(0, 1024)) == data
    assert len(waits) == 2
    failures += [OSError(5, "Input/output error")] * 3
    with pytest.raises(RetryableError, match="Input/output error"):
        BlockReader.read(
            BlockReader(reader._path, {"bytes": 1024, "block_bytes": 100, "crc32c": []}), 0, 9
        )


def test_a_fifo_in_place_of_a_file_is_damage_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    entry = {"bytes": 10, "block_bytes": 10, "crc32c": [0]}
    with pytest.raises(CheckpointError, match="FIFO"):
        BlockReader(tmp_path / "a.safetensors", entry).read(0, 10)
