"""Kinds of keys, fingerprints, the editor schema, and what loading may cost."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config import json_schema as schema
from lmscale.config.fields import kind_of
from lmscale.config.identity import differing, fingerprint, identity, kinds, placement
from lmscale.config.run_file import configs_dir, dump, load
from lmscale.config.schema import SECTIONS, RunConfig
from lmscale.config.validation_messages import fields_of, section_at
from lmscale.config.yaml import parse

NESTED = [("data", "corpora"), ("log", "profile")]
IDENTITY_OF_TRAIN = {
    "seq_len",
    "global_batch_size",
    "steps",
    "tokens",
    "epochs",
    "seed",
    "init_from",
}
IDENTITY_OF_DATA = {
    "corpora",
    "tokenizer",
    "documents",
    "streams",
    "shuffle_window_chunks",
    "mix_block",
}


@pytest.mark.parametrize("path", [*((section,) for section in SECTIONS), *NESTED])
def test_every_key_has_a_kind_and_a_description(path: tuple[str, ...]) -> None:
    model = section_at(path)
    assert model is not None
    for key, field in fields_of(model):
        assert kind_of(field) in ("identity", "placement"), key
        assert field.description, key
        assert not field.is_required() or field.examples, key


def test_identity_is_what_is_trained() -> None:
    found = kinds()
    whole = {key.split(".")[0] for key, kind in found.items() if kind == "identity"}
    assert whole == {"model", "data", "objective", "optim", "train"}
    for section in ("model", "objective", "optim"):
        assert all(k == "identity" for key, k in found.items() if key.startswith(f"{section}."))
    for section, keys in (("train", IDENTITY_OF_TRAIN), ("data", IDENTITY_OF_DATA)):
        mine = {
            key for key, k in found.items() if key.startswith(f"{section}.") and k == "identity"
        }
        assert mine == {f"{section}.{key}" for key in keys}


def test_the_two_kinds_cover_all_keys() -> None:
    cfg = load("smoke")
    mine = identity(cfg, corpora=["c0ffee"], tokenizer="70c", streams=16)
    where = placement(cfg)
    every = {
        f"{section}.{key}" for section in SECTIONS for key, _ in fields_of(section_at((section,)))
    }
    assert mine.keys() | where.keys() == every
    assert mine.keys() & where.keys() == {"data.corpora", "data.tokenizer"}
    assert mine["data.corpora"] == [["c0ffee", 1]]
    assert mine["data.streams"] == 16
    assert mine["model.hidden_size"] == 128
    assert where["checkpoint.async"] is False
    assert json.loads(json.dumps(mine)) == mine


def fingerprints(*overrides: str) -> tuple[str, str]:
    cfg = load("smoke", overrides)
    mine = identity(cfg, corpora=["c0ffee"], tokenizer="70c", streams=16)
    return fingerprint(mine), fingerprint(placement(cfg))


def test_fingerprints_follow_their_kind_only() -> None:
    same, where = fingerprints()
    assert fingerprints() == (same, where)
    for override in ("data.corpora=elsewhere", "train.micro_batch_size=3", "engine.kind=ddp"):
        mine, other = fingerprints(override)
        assert mine == same
        assert other != where
    for override in ("optim.lr=1e-4", "train.seed=1", "model.num_heads=2"):
        mine, other = fingerprints(override)
        assert mine != same
        assert other == where


def test_spelling_does_not_change_the_identity() -> None:
    same, _ = fingerprints()
    assert (
        fingerprints("train.steps='500'", "model.num_kv_heads=null", "optim.max_grad_norm=1")[0]
        == same
    )


def test_the_fingerprint_is_known() -> None:
    """It stands in checkpoints: it must never depend on versions or machines."""
    text = b'{"a":"\\u00e9","b":[1,2.5,null]}'
    digest = "84afbf1d4853005f9dd0c81cb1819b53ce86978340764c062160f6e8356665de"
    assert hashlib.sha256(text).hexdigest() == digest
    assert fingerprint({"b": [1, 2.5, None], "a": "é"}) == digest


def test_differing_names_the_keys() -> None:
    assert differing({"a": 1, "b": 2, "d": None}, {"a": 1, "b": 3, "c": None}) == ["b", "c", "d"]


@settings(max_examples=50, deadline=None)
@given(*[st.dictionaries(st.sampled_from("abc"), st.integers(0, 2) | st.none())] * 2)
def test_fingerprints_differ_where_keys_differ(
    old: dict[str, object], new: dict[str, object]
) -> None:
    assert (fingerprint(old) == fingerprint(new)) == (differing(old, new) == [])


def test_the_shipped_schema_is_true() -> None:
    """Renew it with: python -m lmscale.config.json_schema > configs/schema.json."""
    assert (configs_dir() / "schema.json").read_text() == schema.text()


def test_the_schema_knows_all_sections_and_takes_names_for_them() -> None:
    made = schema.json_schema()
    assert set(made["properties"]) == set(SECTIONS)
    assert made["additionalProperties"] is False
    assert set(made["required"]) == {"model", "data", "optim", "train"}
    assert all({"type": "string"} in made["properties"][s]["anyOf"] for s in SECTIONS)
    assert "$ref" in json.dumps(made["properties"]["model"])


def test_a_dumped_config_has_every_key_in_the_order_of_the_sections() -> None:
    tree = parse(dump(load("smoke")), name="dump").value
    assert tuple(tree) == tuple(RunConfig.model_fields)
    for section in SECTIONS:
        assert list(tree[section]) == [key for key, _ in fields_of(section_at((section,)))]


def test_a_config_error_costs_neither_numpy_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("optim: {lrr: 1}\n")
    code = (
        "import sys\n"
        "from lmscale.config.run_file import load\n"
        "from lmscale.base.errors import ConfigError\n"
        "try:\n    load(sys.argv[1])\n"
        "except ConfigError as error:\n    assert 'lrr' in str(error)\n"
        "else:\n    raise SystemExit('no error')\n"
        "heavy = {'numpy', 'torch', 'tokenizers', 'deepspeed', 'rich'} & set(sys.modules)\n"
        "raise SystemExit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bad.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
