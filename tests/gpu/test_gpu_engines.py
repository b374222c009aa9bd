"""On one GPU: engines with the GPU's own kernels take the steps that one process takes on a CPU."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))

from gradient_case import GradientCase
from gradient_errors import compared
from gradient_run import on_ranks, one_process

from lmscale.dist.group import distributed
from lmscale.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the compiler's own remarks differ by driver and card
]

ENGINES = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
# Joined documents in bf16 take the flash kernel, separate ones FlexAttention.
SETTINGS = (
    "fp32 separate llama accumulated unequal clipped",
    "fp32 joined gpt2 full dropout",
    "bf16 joined llama selective clipped",
    "bf16 separate gpt2 accumulated unequal",
    "bf16 joined mixed full dropout accumulated unequal clipped",
    "bf16 separate llama selective dropout",
)
COMPILED = (
    "fp32 separate mixed",
    "bf16 joined llama",
    "bf16 separate llama selective accumulated unequal",
    "bf16 joined gpt2 full clipped",
)
NAMES = (
    *(f"{engine} tp1 {words}" for engine in ENGINES for words in SETTINGS),
    *(f"{e} tp1 {words} compiled" for e in ENGINES if e != "zero3" for words in COMPILED),
    *(f"{engine} tp1 fp16 joined llama full unequal" for engine in ENGINES if "zero" in engine),
    "fsdp tp1 fp64 separate llama",
    "fsdp tp1 bf16 offload-all joined llama clipped",
    "fsdp tp1 bf16 gathered joined llama",
    "zero2 tp1 bf16 offload-optimizer joined llama clipped",
    "zero3 tp1 bf16 offload-all separate llama",
)


@pytest.fixture(scope="module", autouse=True)
def _group_of_one() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with distributed(World(0, 0, 1, 1), device=torch.device("cuda", 0)):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_are_one_cpu_process(name: str) -> None:
    case = GradientCase.named(name)
    _, beyond = compared(case, on_ranks(case, "cuda"), one_process(case))
    assert not beyond
