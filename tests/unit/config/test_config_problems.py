"""All problems together, in plain words; conflicts between keys; refusals."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.base.errors import ConfigError, Problem
from lmscale.config.fields import key_of
from lmscale.config.rules import CHECKS, shard_size, world_problems
from lmscale.config.run_file import load
from lmscale.config.schema import RunConfig
from lmscale.config.validation_messages import fields_of, section_at
from lmscale.config.yaml import render

JARGON = re.compile(
    r"Input should|pydantic|valid |_type\b|Tuple|dict\b|bool\b|int\b|\bstr\b|None\b|Value error|Config\b"
)


def tree() -> dict[str, Any]:
    return {
        "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4},
        "data": {"corpora": "corpus"},
        "optim": {"lr": 1e-3},
        "train": {"seq_len": 32, "global_batch_size": 8, "steps": 10},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "r.yaml"
    path.write_text(render(tree()))
    return path


def found(path: Path, *overrides: str) -> list[Problem]:
    try:
        load(path, overrides)
    except ConfigError as error:
        return list(error.problems)
    return []


def test_every_problem_of_a_file_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: {num_layers: 0, hidden_size: 64, num_heads: 5, num_heads: 4}\n"
        "data: {corpora: []}\n"
        "optim: {lrr: 1e-3, max_grad_norm: on, betas: [0.9]}\n"
        "parallel: {tp: 2}\n"
        "engine: {kind: deepsped, compile: yes, zero_stage: 5}\n"
        "train: {steps: 20 apples, tokens: 5B, seq_len: 1e3, global_batch_size: '8', replica_check_every_steps: 0}\n"
        "checkpoint: {async: true, keep: 0}\n"
        "evl: {}\n"
    )
    problems = found(tmp_path / "r.yaml", "data.prefetch_steps=-1")
    assert {problem.path for problem in problems} == {
        *(
            "model.num_layers",
            "model.num_heads",
            "data.corpora",
            "data.prefetch_steps",
            "optim.lrr",
            "optim.lr",
        ),
        *(
            "optim.max_grad_norm",
            "optim.betas.1",
            "engine.kind",
            "engine.compile",
            "engine.zero_stage",
        ),
        *(
            "train.steps",
            "train.seq_len",
            "train.global_batch_size",
            "train.replica_check_every_steps",
        ),
        *("checkpoint.async", "checkpoint.keep", "evl"),
    }


@pytest.mark.parametrize(
    ("override", "fact", "hint"),
    [
        ("engine.compile=yes", "expected true or false, got the text 'yes'", "write true"),
        ("engine.compile=off", "expected true or false, got the text 'off'", "write false"),
        ("model.num_layers=2.0", "expected a whole number, got 2.0", "write 2"),
        (
            "model.num_layers='2'",
            "expected a whole number, got the text '2'",
            "write 2, without quotes",
        ),
        (
            "model.num_layers=1_0",
            "expected a whole number, got the text '1_0'",
            "write 10, without",
        ),
        ("model.num_layers=true", "expected a whole number, got true", ""),
        ("model.num_layers=0", "must be at least 1, got 0", ""),
        ("optim.lr=0", "must be above 0, got 0", ""),
        ("optim.lr=.inf", "expected a finite number", ""),
        ("model.dropout=1", "must be below 1", ""),
        ("optim.final_lr_frac=2", "must be at most 1", ""),
        ("optim.betas=[0.9, 1.0]", "must be at least 0 and below 1, got 1.0", "[0.9, 0.95]"),
        ("optim.betas=[1,2,3]", "has 3 entries", "Decay of the first and second"),
        ("optim.betas=0.9", "expected a list, got 0.9", ""),
        ("train.run_dir=5", "expected text, got 5", 'write "5"'),
        ("train.run_dir=''", "is empty", "the run folder"),
        (
            "engine.kind=fsdpp",
            "'fsdpp' is not one of: fsdp, ddp, deepspeed",
            "did you mean 'fsdp'?",
        ),
        ("engine.zero_stage=7", "7 is not one of: 0, 1, 2, 3", ""),
        ("train.steps=20 apples", "cannot read '20 apples'", "write e.g. 20_000_000"),
        ("train.steps=0", "must be at least 1, got 0", ""),
        ("data.window_memory=5 apples", "cannot read '5 apples'", 'e.g. "64 MiB"'),
        ("data.window_memory=1.5", "expected a whole number, got 1.5", ""),
        ("cluster.time_limit=1 week", "cannot read '1 week'", '"90m"'),
        ("optim.warmup_steps=5.5", "cannot read 5.5", '"5%"'),
        ("optim.warmup_steps=200%", "cannot read '200%'", '"5%"'),
        ("parallel.dp_shard=0", "cannot read 0", '"auto"'),
        ("engine.activation_checkpointing=every:0", "cannot read 'every:0'", "every:N"),
        ("engine.activation_checkpointing=budget:1", "'budget:1' is not a part", "budget:0.5"),
        ("engine.activation_checkpointing=budget:0.0", "'budget:0.0' is not a part", "budget:0.5"),
        ("engine.activation_checkpointing=budget", "cannot read 'budget'", "budget:0.5"),
        ("log.profile.steps=5:2", "cannot read '5:2'", '"10:12"'),
        ("log.profile=5", "expected a section", ""),
        ("model=5", "expected a section (keys and values), got 5", ""),
        (
            "data.corpora=[{weight: 1}]",
            "missing",
            "e.g. data/smoke: Path of a folder made by lmscale prepare.",
        ),
        ("data.corpora=[{path: x, weight: -1}]", "must be at least 0, got -1", ""),
        ("data.corpora=[5]", "expected a section", ""),
        ("eval.corpora=[{path: x, weight: 1}]", "expected text, got a mapping", ""),
    ],
)
def test_wrong_values_are_named_in_plain_words(
    run: Path, override: str, fact: str, hint: str
) -> None:
    problems = found(run, override)
    assert len(problems) == 1
    assert fact in problems[0].fact
    assert hint in problems[0].hint
    assert not JARGON.search(problems[0].fact)


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["x", "", "5%", "on"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=4,
)
KEYS = [
    (section, key)
    for section, _ in fields_of(RunConfig)
    for key in (None, *(key for key, _ in fields_of(section_at((section,)))))
]


@settings(max_examples=70, deadline=None)
@given(values=st.dictionaries(st.sampled_from(KEYS), ANY, min_size=1, max_size=4))
def test_any_value_loads_or_is_refused_without_jargon(run: Path, values: dict[Any, Any]) -> None:
    broken = tree()
    for (section, key), value in values.items():
        if key is None:
            broken[section] = value
        elif isinstance(broken.setdefault(section, {}), dict):
            broken[section][key] = value
    path = run.parent / "any.yaml"
    path.write_text(render(broken))
    for problem in found(path):
        assert problem.path
        assert not JARGON.search(problem.fact), problem


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["train.steps=null"], "train.steps", "missing"),
        (["train.epochs=1"], "train.steps", "steps and epochs both define"),
        (["model.num_kv_heads=3"], "model.num_kv_heads", "3 does not divide model.num_heads 4"),
        (["model.hidden_size=66"], "model.num_heads", "4 does not divide model.hidden_size 66"),
        (["model.head_dim=15"], "model.head_dim", "is odd"),
        (["model.max_positions=16"], "model.max_positions", "fewer than train.seq_len 32"),
        (["optim.warmup_steps=11"], "optim.warmup_steps", "longer than the run of 10 steps"),
        (
            ["optim.schedule=wsd", "optim.warmup_steps=5", "optim.decay_steps=60%"],
            "optim.decay_steps",
            "longer than the run",
        ),
        (
            ["engine.kind=ddp", "parallel.dp_shard=2"],
            "parallel.dp_shard",
            "only fsdp reads this key",
        ),
        (
            ["engine.kind=deepspeed", "parallel.dp_replicate=2"],
            "parallel.dp_replicate",
            "only fsdp",
        ),
        (
            ["engine.kind=ddp", "engine.reshard_after_forward=false"],
            "engine.reshard_after_forward",
            "only fsdp",
        ),
        (["data.corpora=[{path: x, weight: 0}]"], "data.corpora", "weight above 0"),
        (["cluster.min_nodes=2"], "cluster.min_nodes", "above cluster.nodes 1"),
        (["train.allow_change=[optim.lrr]"], "train.allow_change", "there is no key 'optim.lrr'"),
        (
            ["train.allow_change=[engine.kind]"],
            "train.allow_change",
            "may change without permission",
        ),
        (["train.allow_change=[train.seq_len]"], "train.allow_change", "lose and repeat samples"),
        (["parallel.tp=8"], "parallel.tp", "8 does not divide model.num_heads 4"),
        (
            ["parallel.tp=4", "model.num_kv_heads=2"],
            "parallel.tp",
            "4 ranks cannot share model.num_kv_h",
        ),
        (
            ["parallel.tp=4", "model.ffn_hidden_size=130"],
            "parallel.tp",
            "model.ffn_hidden_size 130",
        ),
        (
            [
                "parallel.tp=3",
                "model.num_heads=6",
                "model.hidden_size=66",
                "model.ffn_hidden_size=66",
            ],
            "parallel.tp",
            "3 does not divide 128, of which padded vocabularies",
        ),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel", "parallel.tp is 1"),
        (
            ["parallel.sequence_parallel=true", "parallel.tp=4", "train.seq_len=30"],
            "parallel.sequence_parallel",
            "parallel.tp 4 does not divide train.seq_len 30",
        ),
        (["engine.zero_stage=3"], "engine.zero_stage", "only deepspeed reads this key"),
        (["engine.kind=ddp", "engine.offload=all"], "engine.offload", "ddp keeps the whole"),
        (["engine.offload=optimizer"], "engine.offload", "together"),
        (
            ["engine.kind=deepspeed", "engine.zero_stage=0", "engine.offload=optimizer"],
            "engine.offload",
            "whole optimizer",
        ),
        (["engine.kind=deepspeed", "engine.offload=all"], "engine.offload", "whole weights"),
        (
            ["engine.precision=fp16", "optim.max_nonfinite_steps=50"],
            "engine.precision",
            "fsdp has no fp16",
        ),
        (
            ["engine.kind=deepspeed", "engine.precision=fp16", "optim.max_nonfinite_steps=19"],
            "optim.max_nonfinite_steps",
            "19, but fp16 finds its loss scale by skipping",
        ),
        (["engine.kind=deepspeed", "engine.precision=fp64"], "engine.precision", "has no fp64"),
        (
            ["engine.kind=deepspeed", "engine.zero_stage=3", "engine.compile=true"],
            "engine.compile",
            "zero_stage 3",
        ),
    ],
)
def test_conflicts_between_keys(run: Path, overrides: list[str], path: str, words: str) -> None:
    problems = found(run, *overrides)
    assert any(problem.path == path and words in problem.fact for problem in problems), problems
    assert all(problem.hint for problem in problems)


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["engine.offload=nvme"], "engine.offload"),
        (["engine.offload=nvme", "engine.kind=ddp"], "engine.offload"),
        (
            ["engine.offload=nvme", "engine.kind=deepspeed", "engine.zero_stage=3"],
            "engine.offload",
        ),
        (["checkpoint.async=true"], "checkpoint.async"),
        (["data.corpora=[a, b]"], "data.corpora"),
        (["data.corpora=s3://a/b"], "data.corpora"),
        (["eval.corpora=s3://a/b"], "eval.corpora"),
        (["data.on_damage=mask"], "data.on_damage"),
        (["log.trackers=[tensorboard, wandb]"], "log.trackers"),
        (["data.max_damage_rate=0.1"], "data.max_damage_rate"),
        (["train.init_from=step-00000010-a1"], "train.init_from"),
        (["cluster.time_limit=2h"], "cluster.time_limit"),
        (["cluster.kind=kubernetes"], "cluster.kind"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_nearest(
    run: Path, overrides: list[str], path: str
) -> None:
    problems = found(run, *overrides)
    assert [problem.path for problem in problems] == [path]
    assert problems[0].hint


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.kind=ddp", "engine.precision=fp64", "engine.compile=true"],
        ["engine.kind=deepspeed", "engine.activation_checkpointing=full"],
        ["engine.activation_checkpointing=every:2", "parallel.dp_shard=2"],
        ["parallel.tp=4", "parallel.sequence_parallel=true", "parallel.dp_replicate=2"],
        ["engine.kind=deepspeed", "engine.zero_stage=3", "engine.offload=all"],
        ["engine.kind=deepspeed", "engine.zero_stage=1", "engine.offload=optimizer"],
        ["engine.kind=deepspeed", "engine.precision=fp16", "optim.max_nonfinite_steps=20"],
        ["engine.kind=deepspeed", "engine.compile=true"],
        ["engine.offload=all", "engine.activation_checkpointing=selective"],
        ["train.replica_check_every_steps=10", "log.layer_stats=true"],
        ["log.trackers=[]", "train.steps=null", "train.tokens=20B"],
        ["model.hidden_size=66", "model.head_dim=16"],
        ["optim.warmup_steps=10"],
        ["train.allow_change=[optim.lr, train.steps]"],
    ],
)
def test_what_is_supported_is_not_refused(run: Path, overrides: list[str]) -> None:
    assert found(run, *overrides) == []


class Recorder:
    """A config that notes which keys a check reads."""

    def __init__(self, value: Any, path: str, seen: set[str]) -> None:
        self._value, self._path, self._seen = value, path, seen

    def __getattr__(self, name: str) -> Any:
        if name.startswith("model_"):
            return getattr(self._value, name)
        if isinstance(derived := getattr(type(self._value), name, None), property):
            return derived.fget(self)  # records the keys that it reads
        field = type(self._value).model_fields[name]
        path = ".".join(part for part in (self._path, key_of(name, field)) if part)
        value = getattr(self._value, name)
        if not self._path:
            return Recorder(value, path, self._seen)
        self._seen.add(path)
        return value


def variants(run: Path) -> Iterator[RunConfig]:
    yield load(run)
    yield load(run, ["engine.kind=deepspeed", "optim.schedule=wsd"])
    yield load(
        run, ["engine.kind=deepspeed", "engine.precision=fp16", "optim.max_nonfinite_steps=20"]
    )
    yield load(run, ["engine.kind=ddp", "train.allow_change=[optim.lr]"])
    yield load(run, ["parallel.tp=4", "parallel.sequence_parallel=true"])


def test_checks_declare_every_key_they_read(run: Path) -> None:
    """Else a check would look at a stand-in for a broken value and report what is not there."""
    for cfg in variants(run):
        for keys, check in CHECKS:
            seen: set[str] = set()
            list(check(Recorder(cfg, "", seen)))  # type: ignore[arg-type]
            assert seen <= set(keys)


@pytest.mark.parametrize(
    ("overrides", "world", "path"),
    [
        (["train.global_batch_size=3"], 4, "train.global_batch_size"),
        (["parallel.dp_shard=2"], 4, "parallel.dp_shard"),
    ],
)
def test_conflicts_with_the_number_of_ranks(
    run: Path, overrides: list[str], world: int, path: str
) -> None:
    problems = list(world_problems(load(run, overrides), world_size=world))
    assert [problem.path for problem in problems] == [path]
    assert problems[0].hint


def test_conflicts_of_the_mesh_with_the_number_of_ranks(run: Path) -> None:
    cfg = load(run)
    tp = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"tp": 2})})
    assert [p.path for p in world_problems(tp, world_size=3)] == ["parallel.tp"]
    assert list(world_problems(tp, world_size=4)) == []
    assert shard_size(tp, world_size=4) == 2
    hsdp = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"dp_replicate": 2})})
    assert [p.path for p in world_problems(hsdp, world_size=3)] == ["parallel.dp_replicate"]
    assert shard_size(hsdp, world_size=8) == 4
    assert shard_size(load(run, ["parallel.dp_shard=2"]), world_size=2) == 2


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_sound_run_has_no_problem_with_its_world(run: Path, world: int) -> None:
    assert list(world_problems(load(run), world_size=world)) == []
