"""The table of a manifest's shards, held against plain JSON: same entries, same text, same fingerprint."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.base.errors import DataError
from lmscale.corpus import manifest as entries_module
from lmscale.corpus.manifest import Manifest, Shards, TokenizerEntry, corpus_folder, load_part
from lmscale.corpus.shard_format import ShardEntry, shard_name, write_sealed
from tests.support.corpora import make, make_collection

numbers = st.one_of(st.integers(0, 9), st.integers(0, (1 << 63) - 1))
names = st.one_of(
    st.integers(999_990, 1_000_010).map(shard_name),
    st.sampled_from(["a b.tar", 'a"b', "a\\b", "é.tar", "a\x7f", '},\n  },\n   "name": "x']),
)


@st.composite
def entries(draw: st.DrawFn) -> ShardEntry:
    sha256 = hashlib.sha256(draw(st.binary(max_size=2))).hexdigest()
    return ShardEntry(draw(names), draw(numbers), sha256, *(draw(numbers) for _ in range(5)))


def as_json(shards: list[ShardEntry]) -> str:
    return json.dumps([asdict(shard) for shard in shards], sort_keys=True, separators=(",", ":"))


@settings(deadline=None)
@given(st.lists(entries(), min_size=1, max_size=30), st.sampled_from([1, 300, 2000, 1 << 20]))
def test_text_of_any_entries_is_read_as_json_reads_it(shards: list[ShardEntry], block: int) -> None:
    text = json.dumps({"shards": [asdict(s) for s in shards]}, indent=1, sort_keys=True).encode()
    inside = slice(text.index(b"[\n") + 2, text.rindex(b"\n ]"))
    pieces: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries_module, "_BLOCK_BYTES", block)
        read = Shards.parse(text, inside, pieces.append)
    assert list(read) == shards
    assert [read[number] for number in range(len(shards))] == shards
    assert read[1:] == shards[1:]
    assert f"[{b''.join(pieces).decode()}]" == as_json(shards)
    assert f"[{b''.join(read.compact()).decode()}]" == as_json(shards)


def regular(count: int) -> list[ShardEntry]:
    sha256 = hashlib.sha256(b"").hexdigest()
    return [
        ShardEntry(shard_name(n), 10**n, sha256, 512, 80, 7**n, 1, 65 + (n == count - 1))
        for n in range(count)
    ]


def test_usual_text_is_read_without_json(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = regular(16)
    text = json.dumps({"shards": [asdict(s) for s in shards]}, indent=1, sort_keys=True).encode()
    monkeypatch.setattr(json, "loads", None)
    inside = slice(text.index(b"[\n") + 2, text.rindex(b"\n ]"))
    assert list(Shards.parse(text, inside, len)) == shards


@pytest.mark.parametrize(
    "change",
    [
        ('"bytes": 1,', '"bytes": -1,'),
        ('"bytes": 1,', '"bytes": 1 ,'),
        ('"bytes"', '"byt\\u0065s"'),
        ("shard-000000.tar", "shard-00000\\u0030.tar"),
        ("  {", "   {"),
        ("\n", "\r\n"),
    ],
)
def test_unusual_text_means_what_json_says(change: tuple[str, str]) -> None:
    text = json.dumps({"shards": [asdict(s) for s in regular(3)]}, indent=1, sort_keys=True)
    text = text.replace(*change)
    want = [ShardEntry(**body) for body in json.loads(text)["shards"]]
    inside = slice(text.index("[") + 1, text.rindex("]"))
    pieces: list[bytes] = []
    assert list(Shards.parse(text.encode(), inside, pieces.append)) == want
    assert f"[{b''.join(pieces).decode()}]" == as_json(want)


def test_manifests_are_the_same_bytes_for_ever(tmp_path: Path) -> None:
    """Checkpoints name corpora by their fingerprints; written before shards were a table."""
    made = make(tmp_path)
    assert (
        made.manifest.fingerprint
        == "b285a77e3b92ac386d7d446626dc848e5e22cd62faf67dd59a17ba226b7312fe"
    )
    digest = hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert digest == "789d49100e39a54c87e1c7b64511177ba4a39390778e213ce54781b82c5042f7"
    assert Manifest.load(tmp_path).fingerprint == made.manifest.fingerprint


@pytest.mark.parametrize("indent", [None, 2])
def test_a_manifest_in_another_form_has_the_same_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    manifest = make(tmp_path).manifest
    body = json.loads((tmp_path / "manifest.json").read_bytes())
    del body["digest"]
    dumps = json.dumps
    monkeypatch.setattr(
        "lmscale.corpus.shard_format.json.dumps",
        lambda body, **_: dumps(body, indent=indent).removesuffix("}").rstrip() + "\n}",
    )
    write_sealed(tmp_path / "manifest.json", body)
    monkeypatch.undo()
    assert Manifest.load(tmp_path) == manifest


@pytest.mark.parametrize("key", ["fingerprint", "bytes", "name", "tokens"])
def test_a_sealed_manifest_that_contradicts_itself_is_refused(tmp_path: Path, key: str) -> None:
    make(tmp_path)
    body = json.loads((tmp_path / "manifest.json").read_bytes())
    del body["digest"]
    where = body if key in body and key != "tokens" else body["shards"][1]
    where[key] = where[key] + 1 if isinstance(where[key], int) else where[key][::-1]
    write_sealed(tmp_path / "manifest.json", body)
    with pytest.raises(DataError, match=r"fingerprint|the shards hold"):
        Manifest.load(tmp_path)


def test_one_call_is_resolve_and_load(tmp_path: Path) -> None:
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


def test_a_corpus_without_shards_is_read(tmp_path: Path) -> None:
    tokenizer = TokenizerEntry("t.json", "0" * 64, "0" * 64, 256, {"bos": 0})
    empty = Manifest("u16", 64, 1, 0, 0, tokenizer, ())
    empty.save(tmp_path)
    assert Manifest.load(tmp_path) == empty
    assert empty.firsts.tolist() == [0]
