"""Saved by any number of ranks in any layout, loaded by any other, bit for bit."""

from itertools import product
from pathlib import Path

import pytest

from lmscale.checkpoint.load import load_checkpoint, load_weights_one_process
from lmscale.run_folder.attempts import claim
from lmscale.run_folder.checkpoints import damage, read_manifest
from lmscale.run_folder.paths import RunFolder
from tests.support.checkpoint_case import (
    SHAPES,
    differences,
    load_as,
    present,
    save_as,
    save_equal,
    whole,
)

SAVERS = [
    (1, "plain"),
    (2, "plain"),
    (2, "rows"),
    (2, "columns"),
    (3, "rows"),
    (3, "flat"),
    (4, "replicated_rows"),
    (4, "flat_tp"),
]
LOADERS = {
    1: ["plain", "rows", "flat"],
    2: ["plain", "columns", "flat"],
    3: ["rows", "flat"],
    4: ["rows", "replicated_rows", "flat_tp"],
}


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> dict[tuple[int, str], Path]:
    paths = {}
    for step, (size, kind) in enumerate(SAVERS):
        run = RunFolder(tmp_path_factory.mktemp(f"{kind}-{size}") / "run")
        run.path.mkdir()
        claim(run, {})
        answers = ranks(size)(save_as, str(run.path), kind, step)
        assert len(set(answers)) == 1
        paths[size, kind] = Path(answers[0])
    return paths


@pytest.mark.parametrize("saver", SAVERS, ids="{0[1]}-{0[0]}".format)
def test_any_ranks_load_what_any_ranks_saved(ranks, saved, saver):
    for size, kinds in LOADERS.items():
        for kind in kinds:
            assert ranks(size)(load_as, str(saved[saver]), kind) == [[]] * size, (size, kind)


@pytest.mark.parametrize("saver", SAVERS, ids="{0[1]}-{0[0]}".format)
def test_one_process_without_a_group_loads_it(saved, saver):
    tensors = present("plain", blank=True)
    load_checkpoint(saved[saver], tensors)
    assert differences(tensors) == []
    weights = load_weights_one_process(saved[saver])
    assert sorted(f"model.{name}" for name in weights) == [
        n for n in sorted(SHAPES) if "model" in n
    ]
    assert all(weights[name].equal(whole(f"model.{name}")) for name in weights)


def test_what_is_written_is_sound_and_written_once(saved):
    for path in saved.values():
        assert damage(path, deep=True) == []
        body = read_manifest(path)
        size = sum(entry["bytes"] for entry in body["files"].values())
        stored = sum(whole(name).numel() * 4 for name in SHAPES) + 8
        assert stored < size < stored + 4096 * len(body["files"])


def test_replicated_tensors_are_spread_over_the_ranks(ranks, tmp_path):
    claim(RunFolder(tmp_path), {})
    path = Path(ranks(2)(save_equal, str(tmp_path))[0])
    sizes = [entry["bytes"] for entry in read_manifest(path)["files"].values()]
    assert len(sizes) == 2 and sizes[0] == sizes[1] > 4 * 4000


def test_no_file_holds_a_pickle(saved):
    for file in (file for path in saved.values() for file in path.iterdir()):
        head = file.read_bytes()[:9]
        assert head[8:9] == b"{" if file.suffix == ".safetensors" else head[:1] == b"{", file


def test_every_pair_is_covered():
    layouts = {(size, kind) for size, kinds in LOADERS.items() for kind in kinds}
    assert len(list(product(SAVERS, layouts))) == 88
