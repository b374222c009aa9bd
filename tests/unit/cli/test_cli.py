"""The verbs from outside: exit codes, words, help, and that nothing heavy is loaded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmscale import __version__
from lmscale.base.errors import ConfigError, UsageError
from lmscale.base.units import show_bytes, show_count
from lmscale.checks.resume_checks import finished_step
from lmscale.cli import entry
from lmscale.cli.app import app
from lmscale.config.identity import identity
from lmscale.config.run_file import load
from lmscale.prepare.options import PrepareOptions
from lmscale.run_folder.attempts import claim, settle
from lmscale.run_folder.checkpoints import describe_file, write_manifest
from lmscale.run_folder.events import EventLog
from lmscale.run_folder.liveness import begin_start
from lmscale.run_folder.paths import RunFolder
from lmscale.train.stop_request import StopRequest
from lmscale_launcher.jobs.run_facts import find_run_folder
from lmscale_launcher.jobs.stop import stop
from lmscale_launcher.train import train as supervise_run
from lmscale_launcher.train import world_of
from lmscale_launcher.verify import kind_of, verify

ROOT = Path(__file__).parents[3]
RUN = """
model: {num_layers: 2, hidden_size: 32, num_heads: 2}
data: {corpora: [{path: CORPUS}]}
optim: {lr: 1e-3}
train: {steps: 40, global_batch_size: 7, micro_batch_size: 2, seq_len: 32}
"""


def lmscale(*argv: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    drop = ("RANK", "WORLD_SIZE", "LMSCALE_", "MASTER_", "SLURM_", "OMPI_", "PMIX")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return subprocess.run(
        [sys.executable, "-m", "lmscale", *map(str, argv)], cwd=cwd, text=True,
        env={**clean, "PYTHONPATH": os.pathsep.join(sys.path), **env}, capture_output=True, check=False, timeout=30,
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / "texts" / f"{number}.txt").write_text(f"{number} text to learn from. " * 20)
    done = lmscale(
        "prepare", folder / "out", folder / "texts", "--tokenizer", "bytes", "--chunk-tokens",
        "1024", "--heldout", "10%", "--workers", "1", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture
def folder(tmp_path: Path, corpus: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN.replace("CORPUS", str(corpus)))
    return tmp_path


def test_usage_errors_are_2_and_config_errors_78_in_words(folder: Path) -> None:
    assert lmscale("trian", cwd=folder).returncode == 2
    assert lmscale("train", "run.yaml", "--nproc", "0", cwd=folder).returncode == 2
    done = lmscale("train", "run.yaml", "optim.lrr=1", "train.stepz=2", cwd=folder)
    assert done.returncode == 78
    assert "optim.lrr" in done.stderr
    assert "train.stepz" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "runs").exists()


def test_a_missing_corpus_names_the_command(folder: Path) -> None:
    done = lmscale("train", "run.yaml", "data.corpora=nowhere", cwd=folder)
    assert done.returncode == 78
    assert f"lmscale prepare {folder / 'nowhere'}" in done.stderr
    assert not (folder / "runs").exists()


VERBS = (
    "prepare", "verify", "train", "plan", "eval", "generate", "config",
    "submit", "status", "logs", "stop", "resume", "doctor",
)  # fmt: skip


def imported(*argv: str) -> set[str]:
    """The modules that one command line imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lmscale", *argv], text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, check=False,
    )  # fmt: skip
    return {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}


def test_help_and_a_config_error_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: llama-1b\noptim: {lrr: 1e-3}\n")
    heavy = {"numpy", "torch", "tokenizers", "matplotlib"}
    shown = imported("--help")
    assert "typer" in shown
    assert not shown & (heavy | {"pydantic", "yaml", "rich", "psutil"})
    refused = imported("train", str(tmp_path / "run.yaml"))
    assert "pydantic" in refused
    assert not refused & heavy


def test_only_the_standard_library_is_imported_before_a_rank_catches_signals(
    tmp_path: Path,
) -> None:
    code = """
import sys
before = set(sys.modules)
from lmscale.cli import entry
from lmscale.train import stop_request
class Entered(Exception):
    pass
class Stop:
    def __enter__(self):
        raise Entered
    def __exit__(self, *error):
        pass
stop_request.StopRequest = Stop
sys.argv = ["lmscale", "train", "run.yaml"]
try:
    entry.main()
except Entered:
    names = {name.partition(".")[0] for name in set(sys.modules) - before}
    print(*sorted(names - set(sys.stdlib_module_names) - {"lmscale", "lmscale_launcher"}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RANK": "0", "WORLD_SIZE": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = CliRunner().invoke(app, [verb, "--help"])
    assert done.exit_code == 0
    assert "Usage" in done.output
    assert CliRunner().invoke(app, [verb, "-h"]).output == done.output


def test_summaries_of_the_verbs_are_not_truncated() -> None:
    help_text = CliRunner().invoke(app, ["--help"], terminal_width=80).output
    listed = help_text.partition("Commands:")[2].splitlines()[1:]
    assert [line.split()[0] for line in listed] == list(VERBS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed), listed


def test_version_and_completion(tmp_path: Path) -> None:
    assert lmscale("--version", cwd=tmp_path).stdout == f"lmscale {__version__}\n"
    completion = lmscale("pl", cwd=tmp_path, _LMSCALE_COMPLETE="source_bash")
    assert "_lmscale_completion" in completion.stdout
    words = {"COMP_WORDS": "lmscale pl", "COMP_CWORD": "1"}
    completed = lmscale(cwd=tmp_path, _LMSCALE_COMPLETE="complete_bash", **words)
    assert completed.stdout.strip() == "plan"


def test_a_size_of_no_cache_is_refused(folder: Path) -> None:
    refused = lmscale("plan", "run.yaml", "data.cache_bytes=5GiB", cwd=folder)
    assert refused.returncode == 78
    assert "data.cache_bytes" in refused.stderr
    assert "data.cache_dir is not set" in refused.stderr
    planned = ("plan", "run.yaml", "data.cache_bytes=5GiB", "data.cache_dir=cache")
    assert "nothing fills it" not in lmscale(*planned, cwd=folder).stdout
    assert "nothing fills it" in lmscale(*planned, "cluster.kind=mpi", cwd=folder).stdout


def test_what_may_be_left_out_stands_in_one_pair_of_brackets() -> None:
    for verb in VERBS:
        assert "[[" not in CliRunner().invoke(app, [verb, "--help"]).output, verb


def test_doctor_looks_at_nodes_of_a_slurm_cluster_alone(tmp_path: Path) -> None:
    done = lmscale("doctor", "--nodes", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert "--nodes needs --cluster" in done.stderr


def test_counts_and_sizes_are_never_shown_with_an_exponent() -> None:
    counts = [999, 999.6, 999_499, 999_500, 999_999, 999_999_999, 5e15]
    assert [show_count(count) for count in counts] == [
        "999", "1K", "999K", "1M", "1M", "1B", "5000T",
    ]  # fmt: skip
    sizes = [1023.7, 1000 << 10, (1 << 20) - 1, 1 << 50]
    assert [show_bytes(size) for size in sizes] == ["1 KiB", "1000 KiB", "1 MiB", "1024 TiB"]


def test_the_defaults_of_prepare_are_those_of_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[PrepareOptions] = []

    def prepared(out: Path, inputs: list[Path], options: PrepareOptions, *, as_json: bool) -> int:
        given.append(options)
        return 0

    monkeypatch.setattr("lmscale.prepare.command.prepare_verb", prepared)
    assert CliRunner().invoke(app, ["prepare", "out", "in"]).exit_code == 0
    assert given == [PrepareOptions()]


def test_config_explains_a_key_and_refuses_an_unknown_one(tmp_path: Path) -> None:
    shown = lmscale("config", "optim.lr", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("optim.lr\n")
    assert "train.seq_len=" in lmscale("config", cwd=tmp_path).stdout
    refused = lmscale("config", "optim.lrr", cwd=tmp_path)
    assert refused.returncode == 78
    assert "optim.lr" in refused.stderr


def test_a_prompt_and_token_ids_exclude_each_other() -> None:
    both = ["generate", "x", "--max-new", "5", "--prompt", "a", "--tokens", "1"]
    assert isinstance(CliRunner().invoke(app, both).exception, UsageError)
    assert isinstance(CliRunner().invoke(app, both[:4]).exception, UsageError)


def test_words_of_a_prompt_arrive_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "lmscale.train.commands.generate_verb",
        lambda checkpoint, **options: given.append((checkpoint, options)),
    )
    argv = ["generate", "run/x", "--max-new=5", "--prompt", "-a b", "--temperature", "1e-1"]
    assert CliRunner().invoke(app, argv).exit_code == 0
    ((checkpoint, options),) = given
    assert (checkpoint, options["prompt"]) == (Path("run/x"), "-a b")
    assert (options["max_new"], options["temperature"]) == (5, 0.1)


@pytest.mark.parametrize(
    ("argv", "env", "variables"),
    [
        (["train", "r"], {}, None),
        (["train", "r"], {"RANK": "1", "WORLD_SIZE": "2"}, {}),
        (["train", "r", "--nproc", "2"], {"RANK": "1", "WORLD_SIZE": "2"}, None),
        (["train", "--nproc=2", "r"], {"RANK": "1", "WORLD_SIZE": "2"}, None),
        (["eval", "r"], {"RANK": "1", "WORLD_SIZE": "2"}, None),
        (
            ["train", "r"],
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            {"RANK": "1", "WORLD_SIZE": "2"},
        ),
    ],
)
def test_train_is_a_rank_where_a_launcher_has_started_ranks(
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    env: dict[str, str],
    variables: dict[str, str] | None,
) -> None:
    for name in list(os.environ):
        if name.startswith(("RANK", "WORLD_SIZE", "OMPI_", "PMI", "SLURM_", "LOCAL_")):
            monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert entry._rank_variables(argv) == variables


def test_a_rank_runs_the_rank_program_with_its_stop_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []

    def ranked(source: str, overrides: list[str], stop: StopRequest) -> int:
        given.append((source, overrides, stop))
        return 85

    monkeypatch.setattr("lmscale.train.main.main", ranked)
    stop = StopRequest()
    argv = ["train", "run.yaml", "train.steps=3", "--cluster", "slurm"]
    assert entry.run(argv, stop) == 85
    assert given == [("run.yaml", ["cluster=slurm", "train.steps=3"], stop)]


def test_nproc_sets_the_number_of_supervised_ranks(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(
        "lmscale_launcher.supervisor.supervisor.supervise", lambda job: list(job.command)[4:]
    )
    monkeypatch.chdir(folder)
    for name in ("LMSCALE_START", "LMSCALE_NODES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    command: Any = supervise_run("run.yaml", ["train.steps=3"], 2)
    assert command == ["train", "run.yaml", "train.steps=3", "cluster.ranks_per_node=2"]


def test_a_cluster_comes_before_the_keys_that_change_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[str]] = []

    def trained(source: str, overrides: list[str], nproc: int | None) -> int:
        seen.append(overrides)
        return 75

    monkeypatch.setattr("lmscale_launcher.train.train", trained)
    argv = ["train", "run.yaml", "cluster.nodes=2", "--cluster", "slurm"]
    assert CliRunner().invoke(app, argv).exit_code == 75
    assert seen == [["cluster=slurm", "cluster.nodes=2"]]


def test_the_number_of_ranks_and_nodes(folder: Path) -> None:
    cfg = load("run.yaml", cwd=folder)
    assert world_of(cfg, {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}) == (2, 1, 0, None)
    assert world_of(cfg, {"CUDA_VISIBLE_DEVICES": "0,1,2"})[0] == 3
    four = load("run.yaml", ["cluster.ranks_per_node=4", "cluster.nodes=2"], cwd=folder)
    there = {"LMSCALE_NODES": "2", "LMSCALE_NODE_RANK": "1", "LMSCALE_MASTER": "head:1"}
    assert world_of(four, there | {"LMSCALE_START": "7.0"}) == (4, 2, 1, "head:1")
    with pytest.raises(UsageError, match="LMSCALE_START"):
        world_of(four, there)  # each node would make up a name of its own, and none meet
    with pytest.raises(ConfigError, match=r"cluster\.nodes"):
        world_of(four, {})
    for wrong in (
        {"LMSCALE_NODES": "x"},
        {**there, "LMSCALE_NODE_RANK": "2"},
        there | {"LMSCALE_MASTER": "h"},
    ):
        with pytest.raises(UsageError):
            world_of(four, wrong)


def completed(cfg: Any, step: int) -> RunFolder:
    run = RunFolder(Path(cfg.train.run_dir))
    settle(run, claim(run, {}), 0)
    path = run.checkpoint(step, 1)
    path.mkdir(parents=True)
    (path / "a.safetensors").write_bytes(b"x" * 100)
    files = {"a.safetensors": describe_file(path / "a.safetensors")}
    same = identity(cfg, corpora=["c"], tokenizer="t", streams=7)
    write_manifest(
        path, {"format": 1, "step": step, "attempt": 1, "files": files, "identity": same}
    )
    return run


def test_a_finished_run_says_so_and_another_identity_is_left_to_the_ranks(folder: Path) -> None:
    cfg = load("run.yaml", cwd=folder)
    run = completed(cfg, 40)
    done = lmscale("train", "run.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stderr
    assert not run.events.exists()
    assert finished_step(load("run.yaml", ["train.steps=41"], cwd=folder), run) is None
    assert finished_step(load("run.yaml", ["optim.lr=1"], cwd=folder), run) is None
    assert finished_step(load("run.yaml", ["train.resume=never"], cwd=folder), run) is None
    allowed = ["train.steps=30", "train.allow_change=[train.steps]"]
    assert finished_step(load("run.yaml", allowed, cwd=folder), run) == 40


def test_plan_counts_what_the_file_says(folder: Path, corpus: Path) -> None:
    done = lmscale("plan", "run.yaml", "--nproc", "2", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["steps"], plan["tokens"], plan["dp_size"]) == (40, 40 * 7 * 32, 2)
    assert plan["micro_batches"] == 2  # 4 and 3 samples on two ranks, 2 at a time
    assert plan["wasted_frac"] == pytest.approx(1 / 8)
    assert plan["epochs"] == pytest.approx(280 / plan["corpus_samples"])
    words = lmscale("plan", "run.yaml", "--nproc", "2", cwd=folder).stdout
    assert "12.5 % of the rows" in words
    twice = lmscale("plan", "run.yaml", "train.steps=null", "train.epochs=2", "--json", cwd=folder)
    assert json.loads(twice.stdout)["steps"] == -(-2 * plan["corpus_samples"] // 7)


def test_plan_data_lists_each_position_once_with_its_bytes(folder: Path) -> None:
    done = lmscale("plan", "run.yaml", "--data", "--steps", "2:3", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["position"] for row in rows] == list(range(7, 21))
    keys = {"position", "corpus", "epoch", "sample", "rank", "shard", "offset", "bytes"}
    assert all(row.keys() == keys and row["bytes"] == 66 for row in rows)
    assert lmscale("plan", "run.yaml", "--data", "--steps", "3:2", cwd=folder).returncode == 78
    assert lmscale("plan", "run.yaml", "--steps", "1:2", cwd=folder).returncode == 2


def test_verify_knows_what_it_looks_at_and_names_damage(folder: Path, corpus: Path) -> None:
    run = completed(load("run.yaml", cwd=folder), 40)
    for path, kind in ((corpus, "corpus"), (corpus / "train", "corpus"), (run.path, "run")):
        done = lmscale("verify", path, "--json", cwd=folder)
        assert done.returncode == 0, done.stdout
        assert json.loads(done.stdout)["kind"] == kind
    part = run.checkpoint(40, 1) / "a.safetensors"
    part.write_bytes(b"x" * 99 + b"y")
    for path in (run.path, run.checkpoint(40, 1)):
        done = lmscale("verify", path, cwd=folder)
        assert done.returncode == 65
        assert f"{part}: CRC32C" in done.stdout
        assert len(done.stdout.splitlines()) == 1
    assert lmscale("verify", folder, cwd=folder).returncode == 78


def test_verify_sees_torn_and_foreign_things_in_a_run(folder: Path) -> None:
    run = completed(load("run.yaml", cwd=folder), 40)
    (run.checkpoints / "step-00000050-a1.tmp").mkdir()
    (run.checkpoint(40, 1) / "notes").write_text("")
    run.metrics.write_bytes(b'{"step": 1}\nnonsense\n{"step": 3}\n')
    verdict = verify(run.path, lambda done, total: None)
    assert [p for p in verdict.problems if "metrics.jsonl: line 2" in p] == verdict.problems
    assert len(verdict.notes) == 2
    copy = folder / "copied"
    run.checkpoint(40, 1).rename(copy)
    assert kind_of(copy) == "checkpoint"
    run.checkpoint(60, 1).mkdir()
    assert any(
        "manifest.json is missing" in p for p in verify(run.path, lambda d, t: None).problems
    )


def test_a_run_on_another_host_is_waited_for_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    monkeypatch.setattr("lmscale.run_folder.events.this_host", lambda: "elsewhere/1")
    other = EventLog(run, "other")
    other.write("start")
    monkeypatch.undo()
    slept: list[float] = []

    def silent(seconds: float) -> None:
        slept.append(seconds)
        os.utime(other.path, (time.time() - 30 * len(slept) - 1,) * 2)

    monkeypatch.setattr("lmscale.run_folder.liveness.time.sleep", silent)
    begin_start(run, "mine", by_hand=True, ranks=1).close()
    assert len(slept) == 2
    (run.events / "mine.jsonl").unlink()

    def beats(_: float) -> None:
        other.beat()

    os.utime(other.path, (time.time() - 40,) * 2)
    monkeypatch.setattr("lmscale.run_folder.liveness.time.sleep", beats)
    with pytest.raises(ConfigError, match=r"elsewhere(.|\n)*lmscale stop"):
        begin_start(run, "mine", by_hand=True, ranks=1)
    other.close()


def test_stop_of_what_does_not_run_keeps_it_stopped(folder: Path, capsys: Any) -> None:
    run = completed(load("run.yaml", cwd=folder), 40)
    run.events.mkdir()
    done = lmscale("stop", "run", cwd=folder)  # by its name in runs/
    assert done.returncode == 0, done.stderr
    assert "is not running" in done.stdout
    assert run.stop.exists()
    assert lmscale("stop", "nowhere", cwd=folder).returncode == 78
    with pytest.raises(ConfigError):
        find_run_folder(str(folder))


LIVE = """
import signal, sys, time
from pathlib import Path
from lmscale.run_folder.events import EventLog
from lmscale.run_folder.paths import RunFolder
log = EventLog(RunFolder(Path(sys.argv[1])), "s")
def end(*_):
    log.write("save", step=12)
    log.write("exit", code=85, reason="saved, 85")
    sys.exit(85)
signal.signal(signal.SIGTERM, end)
log.write("start")
print("live", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("now", [False, True])
def test_stop_signals_waits_and_says_what_happened(
    tmp_path: Path, now: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "live\n"
    assert stop(str(tmp_path), now=now, as_json=True) == 0
    process.communicate(timeout=5)
    assert process.returncode == (-signal.SIGKILL if now else 85)
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["ended"]
    want = ("killed", None, None) if now else ("stopped", 85, 12)
    assert (result["what"], result["code"], result["checkpoint"]) == want
    assert "no checkpoint was saved" in err if now else "step 12" in err
