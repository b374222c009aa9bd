"""A run is proven when every three of its factor values were tested together; else the untested ones are named."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.base.errors import ConfigError, Problem
from lmscale.config.proven import FACTORS, KEYS, OPEN, ProvenTable, clash, factors, problems
from lmscale.config.run_file import load
from lmscale.config.schema import RunConfig
from lmscale.config.yaml import render

LLAMA = {"num_layers": 2, "hidden_size": 64, "num_heads": 8}
GPT2 = {
    **LLAMA, "norm": "layer", "positions": "learned", "activation": "gelu_tanh", "bias": True, "tie_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proven")


def config(folder: Path, *overrides: str, model: Mapping[str, Any] = LLAMA) -> RunConfig:
    tree = {
        "model": dict(model),
        "data": {"corpora": "corpus"},
        "optim": {"lr": 1e-3},
        "train": {"seq_len": 32, "global_batch_size": 8, "steps": 10},
    }
    path = folder / "r.yaml"
    path.write_text(render(tree))
    return load(path, overrides)


# As many values as keep all legal combinations a few thousand cases.
SMALL = {
    **{name: values[:1] for name, values in FACTORS.items()},
    "engine": ("ddp", "fsdp", "hsdp", "zero2"),
    "tp": ("1", "2", "4"),
    "sequence_parallel": ("off", "on"),
    "recompute": ("none", "full", "selective"),
    "precision": ("fp32", "bf16"),
    "compile": ("off", "on"),
    **OPEN,
}


def every_case() -> Iterator[dict[str, str]]:
    for values in product(*SMALL.values()):
        case = dict(zip(SMALL, values, strict=True))
        if clash(case) is None:
            yield case


EVERY = list(every_case())


def table(
    *, without: Mapping[str, str] | None = None, refused: list[Any] | None = None
) -> ProvenTable:
    """All cases, but those that have all of the words of `without`."""
    gone = (without or {"engine": "none"}).items()
    cases = [case for case in EVERY if not gone <= case.items()]
    return ProvenTable({"cases": cases, "refused": refused or []})


def test_the_factors_of_a_run(folder: Path) -> None:
    assert factors(config(folder)) == {
        "engine": "fsdp", "tp": "1", "sequence_parallel": "off", "recompute": "none", "documents": "separate",
        "precision": "bf16", "style": "llama", "dropout": "off", "offload": "none", "compile": "off",
        "reshard": "on",
    }  # fmt: skip
    other = [
        "parallel.dp_replicate=2",
        "engine.activation_checkpointing=every:3",
        "model.dropout=0.1",
    ]
    found = factors(config(folder, *other, "engine.reshard_after_forward=false", model=GPT2))
    words = ("engine", "recompute", "dropout", "reshard", "style")
    assert [found[word] for word in words] == ["hsdp", "every", "on", "off", "gpt2"]
    found = factors(config(folder, "engine.kind=deepspeed", "model.tie_embeddings=true"))
    assert (found["engine"], found["style"]) == ("zero2", "mixed")
    wide = {**LLAMA, "num_heads": 16, "ffn_hidden_size": 256}
    assert factors(config(folder, "parallel.tp=16", model=wide))["tp"] == "8"


def test_factors_have_known_values_and_real_keys(folder: Path) -> None:
    words = factors(config(folder))
    assert list(words) == list(FACTORS) == list(KEYS)
    assert all(words[name] in values for name, values in FACTORS.items())
    tree = config(folder).model_dump(mode="json", by_alias=True)
    for keys in KEYS.values():
        for key in keys:
            section, name = key.split(".")
            assert name in tree[section]


def test_what_the_checks_refuse_clashes_and_nothing_else(folder: Path) -> None:
    """The matrix and the search leave out exactly what a user is told cannot be."""
    kinds = [
        ["engine.kind=fsdp"],
        ["engine.kind=fsdp", "parallel.dp_replicate=2"],
        ["engine.kind=ddp"],
    ]
    kinds += [["engine.kind=deepspeed", f"engine.zero_stage={stage}"] for stage in range(4)]
    for kind, offload, precision, reshard, compiled in product(
        kinds, FACTORS["offload"][:3], FACTORS["precision"], ("true", "false"), ("true", "false")
    ):
        overrides = [
            *kind, f"engine.offload={offload}", f"engine.precision={precision}", "optim.max_nonfinite_steps=20",
            f"engine.reshard_after_forward={reshard}", f"engine.compile={compiled}",
        ]  # fmt: skip
        try:
            words = factors(config(folder, *overrides))
        except ConfigError:
            zero = kind[0].endswith("deepspeed")
            engine = f"zero{kind[1][-1]}" if zero else ("hsdp" if kind[1:] else kind[0][12:])
            words = {
                "engine": engine, "offload": offload, "precision": precision,
                "reshard": "on" if reshard == "true" else "off",
                "compile": "on" if compiled == "true" else "off",
            }  # fmt: skip
            assert clash(words) is not None, overrides
        else:
            assert clash(words) is None, overrides


ALL = table()
SETTINGS = st.fixed_dictionaries({name: st.sampled_from(SMALL[name]) for name in FACTORS})


@given(words=SETTINGS)
def test_all_is_proven_where_all_was_run(words: dict[str, str]) -> None:
    assert ALL.proves(words) == (clash(words) is None)


@settings(max_examples=10)
@given(
    words=SETTINGS, names=st.sampled_from(list(combinations([*FACTORS, *OPEN], 3))), data=st.data()
)
def test_a_triple_that_was_not_run_proves_nothing(
    words: dict[str, str], names: tuple[str, str, str], data: st.DataObject
) -> None:
    """Of the factors that a run leaves open each value is needed."""
    gone = {name: words.get(name) or data.draw(st.sampled_from(OPEN[name])) for name in names}
    missing = [dict(triple) for triple in table(without=gone).missing(words)]
    if clash(words) is None:
        assert gone in missing


def only(found: Iterator[Problem]) -> Problem:
    (problem,) = found
    return problem


@pytest.mark.parametrize(
    ("without", "overrides", "path", "named"),
    [
        (
            {"recompute": "selective", "tp": "2", "precision": "bf16"},
            ["engine.activation_checkpointing=selective", "parallel.tp=2"],
            "engine.precision",
            "parallel.tp=2, engine.activation_checkpointing=selective with engine.precision=bf16",
        ),
        (
            {"compile": "on", "engine": "fsdp", "accumulation": "3"},
            ["engine.compile=true"],
            "engine.compile",
            "engine.kind=fsdp, engine.compile=true with several micro-batches per step",
        ),
        (
            {"tp": "4", "engine": "fsdp"},
            ["parallel.tp=8"],
            "parallel.tp",
            "engine.kind=fsdp with parallel.tp=8",
        ),
        (
            {"engine": "hsdp"},
            ["parallel.dp_replicate=2", "parallel.dp_shard=2"],
            "engine.kind",
            "engine.kind=fsdp with parallel.dp_replicate=2",
        ),
        (
            {"engine": "zero2", "precision": "bf16"},
            ["engine.kind=deepspeed"],
            "engine.precision",
            "engine.kind=deepspeed, engine.zero_stage=2 with engine.precision=bf16",
        ),
    ],
)  # fmt: skip
def test_the_values_that_were_not_tested_together_are_named(
    folder: Path, without: dict[str, str], overrides: list[str], path: str, named: str
) -> None:
    found = only(problems(config(folder, *overrides), table(without=without)))
    assert found.path == path
    assert found.fact == f"{named} is not covered by the gradient tests"
    assert "docs/gradients.md" in found.hint


def test_a_single_value_that_was_never_tested_is_named_alone(folder: Path) -> None:
    found = only(problems(config(folder, "model.dropout=0.1"), table()))
    assert (found.path, found.fact) == (
        "model.dropout", "model.dropout=0.1 is not covered by the gradient tests",
    )  # fmt: skip


def test_a_run_of_which_nothing_was_tested_is_one_problem(folder: Path) -> None:
    found = only(problems(config(folder), ProvenTable({"cases": [], "refused": []})))
    assert "docs/gradients.md" in found.hint


def test_what_failed_is_refused_with_its_reason(folder: Path) -> None:
    entry = {"factors": {"engine": "fsdp", "tp": "4"}, "why": "norms drift", "nearest": "a wish"}
    found = only(problems(config(folder, "parallel.tp=8"), table(refused=[entry])))
    assert found.path == "parallel.tp"
    assert found.fact == "engine.kind=fsdp with parallel.tp=8 is refused: norms drift"
    assert found.hint == "a wish"
    assert not list(problems(config(folder, "parallel.tp=2"), table(refused=[entry])))
    # An open factor is one that a run may come to at any restart.
    entry["factors"] = {"engine": "fsdp", "targets": "unequal"}
    assert "norms drift" in only(problems(config(folder), table(refused=[entry]))).fact


def test_what_users_need_is_proven_by_the_table_that_we_ship() -> None:
    shipped = ProvenTable.read()
    needed = {
        **{name: FACTORS[name] for name in ("engine", "sequence_parallel", "documents", "dropout")},
        **{"tp": ("1", "2", "4"), "recompute": ("none", "full", "selective")},
        **{"precision": ("fp32", "bf16"), "style": FACTORS["style"]},
        **{"offload": ("none",), "compile": ("off",), "reshard": ("on",)},
    }
    for values in product(*needed.values()):
        words = dict(zip(needed, values, strict=True))
        assert clash(words) is not None or shipped.proves(words), words
    for engine in FACTORS["engine"]:
        largest = {**words, "engine": engine, "tp": "8"}
        assert shipped.proves(largest)
        assert not shipped.proves({**largest, "tp": "3"})


def test_nvme_is_refused_with_the_package_that_it_would_need(folder: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        config(folder, "engine.kind=deepspeed", "engine.zero_stage=3", "engine.offload=nvme")
    (found,) = raised.value.problems
    assert found.path == "engine.offload"
    assert "libaio-dev" in found.fact
    assert "use all" in found.hint


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"cases": [{}], "refused": []}', '{"cases": []}']
)
def test_a_table_that_cannot_be_read_is_an_installation_error(
    tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "proven.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))) as raised:
        ProvenTable.read(path)
    assert "install lmscale again" in str(raised.value)


def test_the_table_is_read_without_numpy_and_torch(folder: Path) -> None:
    path = folder / "table.json"
    path.write_text(json.dumps({"cases": EVERY[:200], "refused": []}))
    config(folder, "engine.compile=true")
    code = f"""
import sys
from pathlib import Path
from lmscale.config.run_file import load
from lmscale.config.proven import ProvenTable, problems
cfg = load({str(folder / "r.yaml")!r}, ["engine.compile=true"])
assert list(problems(cfg, ProvenTable.read(Path({str(path)!r}))))
assert not {{"numpy", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
