"""The table of a manifest's shards compared with plain JSON: same entries, same text, same fingerprint."""

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.base.errors import DataError
from lmscale.corpus import shard_table
from lmscale.corpus.integrity import verify
from lmscale.corpus.manifest import (
    Manifest,
    TokenizerEntry,
    corpus_folder,
    load_part,
    write_sealed,
)
from lmscale.corpus.shard_format import ShardEntry, shard_name
from lmscale.corpus.shard_table import ShardTable
from tests.support.corpora import make, make_collection

GOLDEN = Path(__file__).parents[2] / "golden" / "v937e9f1" / "corpus"
FINGERPRINT = "b285a77e3b92ac386d7d446626dc848e5e22cd62faf67dd59a17ba226b7312fe"

numbers = st.one_of(st.integers(0, 9), st.integers(0, (1 << 63) - 1))
names = st.one_of(
    st.integers(999_990, 1_000_010).map(shard_name),
    st.sampled_from(["a b.tar", 'a"b', "a\\b", "é.tar", "a\x7f", "%s", '},\n  },\n   "name": "x']),
)


@st.composite
def entries(draw: st.DrawFn) -> ShardEntry:
    sha256 = hashlib.sha256(draw(st.binary(max_size=2))).hexdigest()
    return ShardEntry(draw(names), draw(numbers), sha256, *(draw(numbers) for _ in range(5)))


def as_json(shards: list[ShardEntry]) -> str:
    return json.dumps([asdict(shard) for shard in shards], sort_keys=True, separators=(",", ":"))


def rewrite(folder: Path, *, drop: tuple[str, ...] = (), **changes: object) -> None:
    """Change keys of a manifest and write it with a digest that fits."""
    body = json.loads((folder / "manifest.json").read_bytes()) | changes
    for key in ("digest", *drop):
        del body[key]
    write_sealed(folder / "manifest.json", body)


@settings(deadline=None)
@given(st.lists(entries(), min_size=1, max_size=30), st.sampled_from([1, 4, 1 << 12]))
def test_any_entries_survive_the_file_and_have_the_text_of_json(
    shards: list[ShardEntry], block: int
) -> None:
    table = ShardTable.from_npy(ShardTable.from_entries(shards).to_npy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_table, "_BLOCK", block)
        assert list(table) == shards
        assert f"[{b''.join(table.canonical_json()).decode()}]" == as_json(shards)
    assert [table[number] for number in range(len(shards))] == shards
    assert table[1:] == shards[1:]


def test_the_table_is_plain_numpy(tmp_path: Path) -> None:
    made = make(tmp_path)
    table = np.load(tmp_path / "shards.npy", allow_pickle=False)
    assert table["chunks"].sum() == made.manifest.num_chunks
    assert table["name"][0] == b"shard-000000.tar"


@pytest.mark.parametrize("flip_every", [7])
def test_flipped_bits_of_the_table_are_seen(tmp_path: Path, flip_every: int) -> None:
    make(tmp_path)
    path = tmp_path / "shards.npy"
    sound = path.read_bytes()
    for offset in range(0, len(sound), flip_every):
        damaged = bytearray(sound)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"shards\.npy.* is damaged"):
            Manifest.load(tmp_path)
    path.write_bytes(sound[:-1])
    assert any("shards.npy" in problem for problem in verify(tmp_path))
    path.unlink()
    with pytest.raises(DataError, match=r"shards\.npy is missing"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 2)), "one row per shard"),
        (np.zeros(3, dtype=[("name", "S4")]), "one row per shard"),
        ("pickle", "one row per shard|cannot|not"),
        ("negative", "negative number"),
        ("short", "rows, its header says"),
        (b"not a table", "magic|header"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, array: object, reason: str) -> None:
    manifest = make(tmp_path).manifest
    data = ShardTable.from_entries(manifest.shards).to_npy()
    path = tmp_path / "shards.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif isinstance(array, np.ndarray):
        np.save(path, array)
    elif array == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif array == "negative":
        shards = [replace(shard, bytes=-1) for shard in manifest.shards]
        path.write_bytes(ShardTable.from_entries(shards).to_npy())
    else:
        path.write_bytes(data[: -np.load(path).dtype.itemsize])
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    table = {"file": "shards.npy", "bytes": len(data), "sha256": digest}
    rewrite(tmp_path, shard_table=table)
    with pytest.raises(DataError, match=reason):
        Manifest.load(tmp_path)


def test_both_forms_of_a_manifest_have_the_same_fingerprint(tmp_path: Path) -> None:
    """Checkpoints name corpora by their fingerprints; this one was written by commit 937e9f1."""
    manifest = make(tmp_path).manifest
    with_table = Manifest.load(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_bytes())["version"] == 2
    replace(manifest, table_file=None).save(tmp_path)
    digest = hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert digest == "789d49100e39a54c87e1c7b64511177ba4a39390778e213ce54781b82c5042f7"
    assert any("shards.npy: not part of" in problem for problem in verify(tmp_path))
    os.unlink(tmp_path / "shards.npy")
    with_list = Manifest.load(tmp_path)
    assert with_list == with_table == manifest
    assert with_list.fingerprint == with_table.fingerprint == FINGERPRINT
    assert verify(tmp_path) == []


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_a_corpus_of_an_earlier_release_keeps_its_fingerprint(tmp_path: Path, part: str) -> None:
    stored = json.loads((GOLDEN / part / "manifest.json").read_bytes())["fingerprint"]
    manifest = load_part(GOLDEN, part)[1]
    assert manifest.table_file is None
    assert manifest.fingerprint == stored
    replace(manifest, table_file="shards.npy").save(tmp_path)
    assert Manifest.load(tmp_path).fingerprint == stored


@pytest.mark.parametrize("indent", [None, 2])
def test_a_manifest_with_other_blanks_has_the_same_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    manifest = replace(make(tmp_path).manifest, table_file=None)
    manifest.save(tmp_path)
    dumps = json.dumps
    monkeypatch.setattr(
        "lmscale.corpus.manifest.json.dumps",
        lambda body, **_: dumps(body, indent=indent).removesuffix("}").rstrip() + "\n}",
    )
    rewrite(tmp_path)
    monkeypatch.undo()
    assert Manifest.load(tmp_path) == manifest


@pytest.mark.parametrize("key", ["fingerprint", "tokens", "shard_table"])
def test_a_sealed_manifest_that_contradicts_itself_is_refused(tmp_path: Path, key: str) -> None:
    made = make(tmp_path)
    if key == "shard_table":
        rewrite(tmp_path, drop=("shard_table",))
    else:
        rewrite(tmp_path, **{key: "0" * 64 if key == "fingerprint" else 334})
    with pytest.raises(DataError, match=r"fingerprint|the shards contain|lists no shards"):
        Manifest.load(tmp_path)
    for change in ({"bytes": 1}, {"name": "another.tar"}):
        shards = [replace(made.manifest.shards[0], **change), *made.manifest.shards[1:]]
        replace(made.manifest, shards=shards).save(tmp_path)
        rewrite(tmp_path, fingerprint=made.manifest.fingerprint)
        with pytest.raises(DataError, match="fingerprint"):
            Manifest.load(tmp_path)


def test_a_manifest_with_a_wrong_type_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    rewrite(tmp_path, chunk_tokens="64")
    with pytest.raises(DataError, match="chunk_tokens"):
        Manifest.load(tmp_path)


def test_load_part_equals_corpus_folder_and_load(tmp_path: Path) -> None:
    make_collection(tmp_path)
    for part in ("train", "heldout"):
        folder = corpus_folder(tmp_path, part)
        assert load_part(tmp_path, part) == (folder, Manifest.load(folder))
        assert load_part(folder) == (folder, Manifest.load(folder))
    (tmp_path / "train" / "manifest.json").write_bytes(
        (tmp_path / "heldout" / "manifest.json").read_bytes()
    )
    with pytest.raises(DataError, match="is not the one"):
        load_part(tmp_path)


@pytest.mark.parametrize("table_file", [None, "shards.npy"])
def test_a_corpus_without_shards_is_read(tmp_path: Path, table_file: str | None) -> None:
    tokenizer = TokenizerEntry("t.json", "0" * 64, "0" * 64, 256, {"bos": 0})
    empty = Manifest("u16", 64, 1, 0, 0, tokenizer, (), table_file=table_file)
    empty.save(tmp_path)
    assert Manifest.load(tmp_path) == empty
    assert empty.first_chunks.tolist() == [0]
