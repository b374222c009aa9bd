"""A new feed-forward is two edits: the recipe of docs/extending.md, carried out in a copy of the product."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
CORPUS = ROOT / "tests" / "golden" / "v937e9f1" / "corpus"

# File: text to find, and the text that is inserted before it.
EDITS = {
    "lmscale/modelspec/feed_forward.py": (
        "    # Saved: the result only, which both backwards read.\n",
        '    "squared_gate": FeedForwardKind(up=("key", "up"), saved=4, products=2, products_read=1),\n',
    ),
    "lmscale/model/layers.py": (
        "# One class for each entry of FEED_FORWARDS in lmscale/modelspec/feed_forward.py.\n",
        "class SquaredGate(FeedForward):\n"
        '    """relu(key)^2 * up."""\n\n'
        "    key: nn.Linear\n\n"
        "    def hidden(self, x_BLD: Tensor) -> Tensor:\n"
        '        """[B, L, D] -> [B, L, F]."""\n'
        "        return F.relu(self.key(x_BLD)).square() * self.up(x_BLD)\n\n\n",
    ),
}
CLASS_ENTRY = ('    "relu": ReLU,\n', '    "squared_gate": SquaredGate,\n')

RUN = {
    "model": {
        "num_layers": 2, "hidden_size": 32, "num_heads": 2, "activation": "squared_gate",
    },
    "data": {"corpora": [str(CORPUS)]},
    "engine": {"kind": "fsdp", "precision": "fp32"},
    "optim": {"lr": 1e-3},
    "train": {"steps": 2, "seq_len": 64, "global_batch_size": 4, "micro_batch_size": 2},
    "eval": {"every_steps": None},
    "log": {"trackers": []},
}  # fmt: skip


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """A copy of the packages with the new feed-forward."""
    for folder in ("lmscale", "launcher", "configs", "cluster"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name, (anchor, inserted) in EDITS.items():
        insert_before(tmp_path / name, anchor, inserted)
    insert_before(tmp_path / "lmscale/model/layers.py", *CLASS_ENTRY)
    return tmp_path


def insert_before(path: Path, anchor: str, inserted: str) -> None:
    text = path.read_text()
    assert text.count(anchor) == 1, f"{path}: {anchor!r}"
    path.write_text(text.replace(anchor, inserted + anchor))


def lmscale(product: Path, *argv: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith("LMSCALE_")}
    env |= {"PYTHONPATH": f"{product}:{product / 'launcher'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lmscale", *argv],
        cwd=product, env=env, capture_output=True, text=True, check=False, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


def test_two_edited_files_plan_and_train_a_new_feed_forward(product: Path) -> None:
    (product / "run.yaml").write_text(yaml.safe_dump(RUN))
    plan = json.loads(lmscale(product, "plan", "run.yaml", "--json"))
    # Three matrices, so the default hidden size is 8/3 of 32 rounded up to 64 rows; and the vocabulary of 384.
    hidden, block = 128, 4 * 32 * 32 + 2 * 32
    assert plan["model"]["parameters"] == 2 * 384 * 32 + 32 + 2 * (block + 3 * hidden * 32)
    lmscale(product, "train", "run.yaml", "train.run_dir=run", "--nproc", "1")
    lines = [json.loads(line) for line in (product / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert 0 < lines[0]["loss"] < 10
    assert lines[0]["grad_norm"] > 0
