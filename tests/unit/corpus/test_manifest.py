import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lmscale.base.errors import ConfigError, DataError
from lmscale.corpus.manifest import (
    Collection,
    Manifest,
    corpus_folder,
    corpus_kind,
    tokenizer_path,
    write_sealed,
)
from tests.support.corpora import make, make_collection


def test_manifest_round_trips(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert Manifest.load(tmp_path) == made.manifest
    assert corpus_kind(tmp_path) == "stream"
    body = json.loads((tmp_path / "manifest.json").read_text())
    assert (body["format"], body["documents"]) == ("lmscale-corpus", len(made.starts))
    assert body["fingerprint"] == made.manifest.fingerprint


def test_flipped_bits_of_a_manifest_are_seen(tmp_path: Path) -> None:
    make(tmp_path, tokens=66, shard_chunks=1)
    path = tmp_path / "manifest.json"
    sound = path.read_bytes()
    for at in range(0, len(sound), 5):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << at // 5 % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"manifest\.json"):
            Manifest.load(tmp_path)
    for size in (1, 100, len(sound) - 1):
        path.write_bytes(sound[:size])
        with pytest.raises(DataError, match="damaged"):
            Manifest.load(tmp_path)


@pytest.mark.parametrize("state", ["missing", "empty", "folder"])
def test_corpus_without_its_manifest_is_damaged(state: str, tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    path.unlink()
    if state == "empty":
        path.touch()
    if state == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=r"damaged|not a regular file"):
        corpus_folder(tmp_path)


def test_no_corpus_at_all_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"lmscale prepare {tmp_path}/none INPUT"):
        corpus_folder(tmp_path / "none")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    body = {"format": "lmscale-corpus", "version": 3, "kind": "stream"}
    write_sealed(tmp_path / "manifest.json", body)
    with pytest.raises(DataError, match="version 3"):
        Manifest.load(tmp_path)
    write_sealed(tmp_path / "manifest.json", {**body, "version": 1, "cipher": "aes"})
    with pytest.raises(DataError, match="cipher 'aes'"):
        Manifest.load(tmp_path)


def test_manifest_with_a_hole_is_refused_when_written(tmp_path: Path) -> None:
    made = make(tmp_path)
    with pytest.raises(DataError, match="the shards contain 4 chunks"):
        replace(made.manifest, shards=made.manifest.shards[:-1]).save(tmp_path)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one, other = make(tmp_path / "a").manifest, make(tmp_path / "b").manifest
    assert one.fingerprint == other.fingerprint
    assert make(tmp_path / "c", seed=1).manifest.fingerprint != one.fingerprint


def test_samples_of_a_sequence_length(tmp_path: Path) -> None:
    manifest = make(tmp_path, tokens=333, chunk_tokens=64).manifest
    assert (manifest.num_samples(16), manifest.samples_per_chunk(16)) == (332 // 16, 4)
    with pytest.raises(ConfigError, match=r"48 does not divide .* 64 tokens") as error:
        manifest.num_samples(48)
    assert "use one of 2, 4, 8, 16, 32, 64" in str(error.value)


def test_collection_resolves_to_its_parts(tmp_path: Path) -> None:
    make_collection(tmp_path)
    assert corpus_folder(tmp_path) == tmp_path / "train"
    assert corpus_folder(tmp_path, "heldout") == tmp_path / "heldout"
    assert corpus_folder(tmp_path / "train", "heldout") == tmp_path / "train"
    with pytest.raises(DataError, match="collection"):
        Manifest.load(tmp_path)


def test_collection_covers_its_parts(tmp_path: Path) -> None:
    make_collection(tmp_path)
    os.replace(tmp_path / "heldout" / "manifest.json", tmp_path / "train" / "manifest.json")
    with pytest.raises(DataError, match="is not the one"):
        corpus_folder(tmp_path)
    with pytest.raises(DataError, match="missing"):
        corpus_folder(tmp_path, "heldout")
    Collection({"train": "0" * 64}, {}).save(tmp_path)
    with pytest.raises(DataError, match="no part 'heldout'"):
        corpus_folder(tmp_path, "heldout")


def test_damaged_tokenizer_is_not_handed_out(tmp_path: Path) -> None:
    made = make(tmp_path)
    path = tokenizer_path(tmp_path, made.manifest)
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="tokenizer is damaged"):
        tokenizer_path(tmp_path, made.manifest)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        tokenizer_path(tmp_path, made.manifest)
