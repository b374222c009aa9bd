"""A new engine takes two files: one module and one row in the table (docs/extending.md)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

MODULE = """
from torch import Tensor

from lmscale.engine.base import EngineInputs
from lmscale.engine.torch_engine import TorchEngine


class ToyEngine(TorchEngine):
    def __init__(self, inputs: EngineInputs) -> None:
        super().__init__(inputs, inputs.model, gradient_copies=1)

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor

    def _offset(self, parameter: Tensor) -> int:
        return 0
"""
ROW = 'EngineKind(name="toy", module="lmscale.engine.toy", class_name="ToyEngine"),\n        '
FIRST_ROW = "EngineKind(\n"
TRAIN = """
import sys
from pathlib import Path

import torch

import lmscale
from lmscale.base.errors import ConfigError
from lmscale.base.world import World
from lmscale.config.run_file import load
from lmscale.distributed.process_group import distributed
from tests.support.engine_case import Case, train

assert Path(lmscale.__file__).is_relative_to(sys.argv[1]), lmscale.__file__
with distributed(World(0, 0, 1, 1), device=torch.device("cpu")):
    toy, _ = train(Case("toy"), range(2))
    assert toy == train(Case("ddp"), range(2))[0]
try:
    load("smoke", ["engine.kind=toy"], cwd=Path(sys.argv[1]))
except ConfigError as error:
    print(error)
"""


def test_a_new_engine_is_one_module_and_one_row_of_the_table(tmp_path: Path) -> None:
    for name in ("lmscale", "configs", "tests/support"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    table = tmp_path / "lmscale" / "config" / "engine_kinds.py"
    before, _, after = table.read_text().partition(FIRST_ROW)
    table.write_text(before + ROW + FIRST_ROW + after)
    (tmp_path / "lmscale" / "engine" / "toy.py").write_text(MODULE)

    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    # Until its cases in the gradient matrix have passed, no run may use it.
    assert "engine.kind=toy" in done.stdout
