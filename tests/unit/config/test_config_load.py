"""Finding, overriding, resolving and dumping run files."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lmscale.base.errors import ConfigError, ExitCode
from lmscale.config.run_file import configs_dir, dump, load
from lmscale.config.schema import SECTIONS
from lmscale.config.validation_messages import fields_of, section_at

RUN = """
model: {num_layers: 2, hidden_size: 64, num_heads: 4}
data: {corpora: corpus}
optim: {lr: 1e-3}
train: {seq_len: 32, global_batch_size: 8, steps: 10}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RUN)
    return path


def problems(path: Path, *overrides: str, cwd: Path | None = None) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, cwd=cwd)
    assert caught.value.exit_code == ExitCode.CONFIG
    return {problem.path: f"{problem.fact} | {problem.hint}" for problem in caught.value.problems}


@pytest.mark.parametrize("name", [path.stem for path in (configs_dir() / "runs").glob("*.yaml")])
def test_shipped_runs_load_and_dumping_is_idempotent(name: str, tmp_path: Path) -> None:
    cfg = load(name)
    (tmp_path / "config.yaml").write_text(dump(cfg))
    again = load(tmp_path / "config.yaml", cwd=tmp_path)
    assert again == cfg
    assert dump(again) == dump(cfg)


@pytest.mark.parametrize(
    ("section", "file"),
    [
        (section, path)
        for section, folder in (("model", "models"), ("cluster", "clusters"))
        for path in (configs_dir() / folder).glob("*.yaml")
    ],
)
def test_shipped_sections_load_by_name(run: Path, section: str, file: Path) -> None:
    load(run, [f"{section}={file.stem}"])


def test_smoke_is_legal_for_up_to_eight_ranks_and_any_length() -> None:
    cfg = load("smoke.yaml", ["train.steps=2"])
    assert all(
        size % 4 == 0
        for size in (cfg.model.num_heads, cfg.model.num_kv_heads, cfg.model.ffn_hidden_size)
    )
    assert cfg.train.global_batch_size % 8 == 0
    assert cfg.model.dropout == 0
    assert not cfg.engine.compile
    assert cfg.optim.warmup_steps == "5%"


def test_defaults_follow_from_other_keys(run: Path) -> None:
    model = load(run).model
    assert (model.num_kv_heads, model.head_dim, model.ffn_hidden_size) == (4, 16, 192)
    model = load(
        run, ["model.activation=gelu", "model.num_kv_heads=null", "model.positions=learned"]
    ).model
    assert (model.num_kv_heads, model.ffn_hidden_size, model.max_positions) == (4, 256, 32)


def test_paths_are_absolute_against_the_current_folder(run: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "somewhere"
    cfg = load(
        run,
        [
            *("eval.corpora=[a/../b, {path: /c}]", "data.tokenizer=t.json"),
            *("train.resume=y", "data.corpora=[{path: p}]"),
        ],
        cwd=cwd,
    )
    assert cfg.eval.corpora == (f"{cwd}/b", "/c")
    assert cfg.data.tokenizer == f"{cwd}/t.json"
    assert cfg.data.corpora[0].path == f"{cwd}/p"
    assert cfg.train.resume == f"{cwd}/y"
    assert cfg.train.run_dir == f"{cwd}/runs/tiny"
    assert load(run, cwd=cwd).train.resume == "auto"


def test_later_overrides_win_and_values_are_yaml(run: Path) -> None:
    cfg = load(
        run,
        [
            *("optim.lr=1e-4", "optim.lr=2e-4", "optim.betas=[0.8, 0.9]", "log.profile.steps=2:3"),
            *(
                "data.corpora=[{path: a}]",
                "data.corpora.0.path=b",
                "optim.max_grad_norm=",
                "train.steps=2K",
            ),
        ],
    )
    assert cfg.optim.lr == 2e-4
    assert cfg.optim.betas == (0.8, 0.9)
    assert cfg.log.profile is not None
    assert cfg.log.profile.steps == "2:3"
    assert cfg.data.corpora[0].path.endswith("/b")
    assert cfg.optim.max_grad_norm is None
    assert cfg.train.steps == 2000


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("lr=3", "lr", "unknown key (override lr=3) | rename it to optim.lr"),
        ("optim.lrr=3", "optim.lrr", "did you mean 'lr'?"),
        ("train.lr=3", "train.lr", "rename it to optim.lr"),
        ("optmi.lr=3", "optmi", "did you mean 'optim'?"),
        ("optim.lr.x=3", "optim.lr", "has no keys"),
        ("data.corpora.0.path=x", "data.corpora", "has no keys"),
        ("optim.betas=[1, 2", "optim.betas", "cannot read '[1, 2'"),
        ("train.steps", "", "cannot read the override 'train.steps' | write section.key=value"),
        ("train..steps=3", "", "cannot read the override"),
        ("model=nothing-like-it", "model", "found no file 'nothing-like-it'"),
        ("model=llama-1bb", "model", "did you mean 'llama-1b'?"),
        (f"model={'long ' * 100}", "model", "found no file"),
        ("cluster=local.yml", "cluster", "did you mean 'local'?"),
        ("log.profile={step: 1}", "log.profile.step", "did you mean 'steps'?"),
    ],
)
def test_wrong_overrides_are_reported(run: Path, override: str, path: str, words: str) -> None:
    found = problems(run, override)
    assert words in found[path]


def test_a_list_entry_that_is_not_there_cannot_be_set(run: Path) -> None:
    found = problems(run, "data.corpora=[{path: a}]", "data.corpora.1={path: b}")
    assert "the list has 1 entries" in found["data.corpora.1"]


def test_text_sections_are_found_beside_the_run_file_and_then_by_name(tmp_path: Path) -> None:
    text = RUN.replace("{num_layers: 2, hidden_size: 64, num_heads: 4}", "llama-1b")
    (tmp_path / "r.yaml").write_text(text)
    assert load(tmp_path / "r.yaml").model.num_layers == 16
    (tmp_path / "llama-1b.yaml").write_text("num_layers: 3\nhidden_size: 64\nnum_heads: 4\n")
    assert load(tmp_path / "r.yaml", ["model.num_heads=2"]).model.num_layers == 3
    (tmp_path / "llama-1b.yaml").write_text("num_layers: x\nhiden_size: 64\n")
    found = problems(tmp_path / "r.yaml", cwd=tmp_path)
    assert found["model.num_layers"].startswith(
        "expected a whole number, got the text 'x' (llama-1b.yaml:1)"
    )
    assert "did you mean 'hidden_size'?" in found["model.hiden_size"]


def test_a_run_file_is_never_taken_for_a_section(tmp_path: Path) -> None:
    """A run may have the name of its model and lie in the same folder."""
    text = RUN.replace("{num_layers: 2, hidden_size: 64, num_heads: 4}", "llama-1b")
    (tmp_path / "llama-1b.yaml").write_text(text)
    assert load(tmp_path / "llama-1b.yaml").model.num_layers == 16
    keys = {key for section in SECTIONS for key, _ in fields_of(section_at((section,)))}
    assert not keys & set(SECTIONS)


def test_an_override_replaces_a_text_section_that_cannot_be_found(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RUN + "cluster: not-here\n")
    assert load(tmp_path / "r.yaml", ["cluster=local", "cluster.nodes=1"]).cluster.max_restarts == 3
    assert "not-here" in problems(tmp_path / "r.yaml")["cluster"]


def test_an_overriding_section_file_may_lie_in_the_current_folder(
    run: Path, tmp_path: Path
) -> None:
    cwd = tmp_path / "elsewhere"
    (cwd / "my").mkdir(parents=True)
    (cwd / "my" / "model.yaml").write_text("{num_layers: 5, hidden_size: 64, num_heads: 4}")
    assert load(run, ["model=my/model.yaml"], cwd=cwd).model.num_layers == 5
    assert "model" in problems(run, "model=my/model.yaml", cwd=tmp_path)


def test_a_run_is_found_without_its_suffix(run: Path, tmp_path: Path) -> None:
    assert load("tiny", cwd=tmp_path) == load(run, cwd=tmp_path)


def test_missing_and_unreadable_run_files(tmp_path: Path) -> None:
    assert "did you mean 'smoke'?" in problems(Path("smok"), cwd=tmp_path)[""]
    assert "names in configs/runs" in problems(Path("x/y.yaml"), cwd=tmp_path)[""]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.yaml").write_text(RUN)
    assert "did you mean folder/config.yaml?" in problems(Path("folder"), cwd=tmp_path)[""]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in problems(tmp_path / "binary.yaml", cwd=tmp_path)[""]
    (tmp_path / "list.yaml").write_text("- a\n")
    assert list(problems(tmp_path / "list.yaml", cwd=tmp_path)) == [""]
    (tmp_path / "broken.yaml").write_text("model: [1\ntrain: x")
    assert list(problems(tmp_path / "broken.yaml", cwd=tmp_path)) == [""]


def test_an_empty_file_lists_what_must_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    found = problems(tmp_path / "empty.yaml")
    assert set(found) == {
        *("model.num_layers", "model.hidden_size", "model.num_heads", "data.corpora", "optim.lr"),
        *("train.seq_len", "train.global_batch_size", "train.steps"),
    }


def test_a_config_cannot_be_changed(run: Path) -> None:
    cfg = load(run)
    with pytest.raises(ValidationError):
        cfg.train.steps = 3  # type: ignore[misc]


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "train.steps": st.integers(1, 10**15) | st.sampled_from(["20M", "1_000"]),
    "train.seed": st.integers(0, 2**63 - 1),
    "optim.lr": st.floats(1e-300, 1e300),
    "optim.warmup_steps": st.just(0) | st.integers(0, 100).map("{}%".format),
    "optim.betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
    "data.window_memory": st.integers(0, 2**50) | st.sampled_from(["1 GiB", "1.5 MB"]),
    "train.run_dir": st.text("ab é'\"#:[]{}-~1", min_size=1),
    "model.trainable": st.lists(st.text("abc.*[]{}", min_size=1)),
    "parallel.dp_shard": st.just("auto") | st.integers(1, 9),
    "cluster.max_restarts": st.integers(0, 9),
    "train.allow_change": st.just([]) | st.just(["train.steps", "optim.lr"]),
}


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_any_config_round_trips(tmp_path_factory: Any, values: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("round")
    (folder / "tiny.yaml").write_text(RUN)
    overrides = [f"{key}={_flow(value)}" for key, value in values.items()]
    cfg = load(folder / "tiny.yaml", overrides, cwd=folder)
    (folder / "config.yaml").write_text(dump(cfg))
    assert load(folder / "config.yaml", cwd=Path("/")) == cfg


def _flow(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # YAML 1.2 is a superset of JSON
