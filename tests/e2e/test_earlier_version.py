"""What commit 937e9f1 has written: its run continues as the same run, and its losses are computed again, bit for bit.

Where torch or the processor differs from that of tests/golden/v937e9f1, losses are compared with a relative tolerance.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.base.errors import ConfigError
from lmscale.checks.resume_checks import check_identity, read_checkpoint
from lmscale.config.earlier_keys import translate_config
from lmscale.config.identity import fingerprint
from lmscale.config.run_file import load
from lmscale.config.yaml import parse, render
from lmscale.train.restore import find_trained
from tests.support.jobs import lmscale

GOLDEN = Path(__file__).parents[1] / "golden" / "v937e9f1"
CHECKPOINT = "step-00000010-a2"
SEED = int(os.environ.get("LMSCALE_TEST_SEED", random.SystemRandom().randrange(10**6)))
EXPECTED = json.loads((GOLDEN / "expected-losses.json").read_text())
CASES = json.loads((GOLDEN / "engine-losses.json").read_text())
SAME_BITS = torch.__version__ == "2.13.0+cpu" and (
    torch.backends.cpu.get_cpu_capability() == "AVX512"  # type: ignore[no-untyped-call]
)
# Three cases per run of make test-long, chosen by the printed seed; make matrix runs all of them.
WHOLE = os.environ.get("LMSCALE_TEST_WHOLE") == "1"
SAMPLE = list(CASES) if WHOLE else random.Random(SEED).sample(sorted(CASES), 3)


def copied(tmp_path: Path) -> Path:
    for name in ("run", "corpus"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    return tmp_path


def paths(folder: Path) -> list[str]:
    corpus = folder / "corpus"
    return [
        f"data.corpora.0.path={corpus}", f"eval.corpora=[{corpus}]", f"train.run_dir={folder / 'run'}",
    ]  # fmt: skip


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same(got: list[float], want: list[str]) -> None:
    expected = [float.fromhex(text) for text in want]
    if SAME_BITS:
        assert got == expected
    else:
        assert got == pytest.approx(expected, rel=1e-5)


def test_a_run_of_the_earlier_version_continues_with_the_same_losses(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    run = folder / "run"
    done = lmscale("status", run, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"stopped"' in done.stdout
    again = lmscale(
        "train", run / "config.yaml", *paths(folder), "train.stop_at=null", "--nproc", "2", cwd=tmp_path
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    steps = metrics(run)
    assert [step["step"] for step in steps] == list(range(1, 17))
    assert_same([step["loss"] for step in steps], EXPECTED["losses"])
    assert_same([step["grad_norm"] for step in steps], EXPECTED["grad_norms"])
    stored = parse((run / "config.yaml").read_text(), name="config.yaml").value
    assert stored["model"]["hidden_size"] == 32, "written again, with the names of today"
    newest = max((run / "checkpoints").iterdir())
    assert read_checkpoint(newest)["state"]["train"]["journal"] == [], "no key counts as changed"
    scored = lmscale("eval", run, "--json", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert (run / "report.html").read_text().count("<svg") > 0


def test_a_job_can_be_resumed_from_its_stored_run_file(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    corpora = paths(folder)[:2]
    done = lmscale(
        "resume", folder / "run", *corpora, "train.stop_at=null", "--dry-run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step 10 ({CHECKPOINT})" in done.stdout


def test_the_stored_checkpoint_has_the_identity_of_the_run_file_of_today(tmp_path: Path) -> None:
    body = read_checkpoint(GOLDEN / "run" / "checkpoints" / CHECKPOINT)
    assert body["identity"]["model.hidden_size"] == 32
    assert body["identity"]["optim.max_grad_norm"] == 0.5
    assert body["fingerprints"]["identity"] == fingerprint(body["identity"])
    trained = find_trained(GOLDEN / "run")
    assert (trained.cfg.model.num_kv_heads, trained.cfg.parallel.dp_replicate) == (1, 2)
    folder = copied(tmp_path)
    cfg = load(folder / "run" / "config.yaml", paths(folder))
    assert check_identity(cfg, body, body["identity"]) == []
    with pytest.raises(ConfigError, match=f"{CHECKPOINT} was trained with 32"):
        check_identity(cfg, body, {**body["identity"], "model.hidden_size": 64})


def test_a_run_file_of_a_user_is_not_translated(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    shutil.copy(GOLDEN / "run.yaml", mine)
    with pytest.raises(ConfigError) as caught:
        load(mine)
    hints = {problem.path: problem.hint for problem in caught.value.problems}
    assert hints["model.width"] == "rename it to model.hidden_size"
    assert hints["train.check_replicas_every"] == "rename it to train.replica_check_every_steps"
    assert len(hints) == 17, "each renamed key once, and nothing else"


def test_both_names_of_a_key_in_a_stored_file_are_refused(tmp_path: Path) -> None:
    run = copied(tmp_path) / "run"
    text = (
        (run / "config.yaml")
        .read_text()
        .replace("  width: 32\n", "  width: 32\n  hidden_size: 64\n")
    )
    (run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(run / "config.yaml")
    assert {problem.path for problem in caught.value.problems} == {"model.width"}


def losses_again(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = parse((GOLDEN / "engine-losses.yaml").read_text(), name="base").value
    for override in case["overrides"]:
        key, _, value = override.partition("=")
        section, key = key.split(".")
        base.setdefault(section, {})[key] = parse(value, name="override").value
    run_file = tmp_path / "case.yaml"
    run_file.write_text(render(translate_config(base)))
    done = lmscale(
        "train", run_file, f"data.corpora=[{GOLDEN / 'corpus'}]", f"train.run_dir={tmp_path / 'run'}",
        "--nproc", str(case["ranks"]), cwd=tmp_path, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    steps = metrics(tmp_path / "run")
    assert_same([step["loss"] for step in steps], case["losses"])
    assert_same([step["grad_norm"] for step in steps], case["grad_norms"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_an_engine_computes_the_losses_of_the_earlier_version(name: str, tmp_path: Path) -> None:
    losses_again(name, tmp_path)
