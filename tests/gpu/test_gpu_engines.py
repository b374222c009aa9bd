"""On one GPU: engines with the GPU's own kernels take the steps that one process takes on a CPU."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from lmscale.base.world import World
from lmscale.distributed.process_group import distributed
from lmscale.model import kernels
from lmscale.model.attention import causal_mask, on_device
from tests.gradients import case as gradient_case
from tests.gradients import run as gradient_run
from tests.gradients.case import GradientCase, rows_of
from tests.gradients.errors import compared
from tests.gradients.run import on_ranks, one_process

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
# Heads of 16 and rows of more than FlexAttention's block of 128: below, other kernels take their place.
LENGTH = 160
HEADS = {
    "llama": {"num_heads": 4, "num_kv_heads": 2},
    "gpt2": {"num_heads": 4},
    "mixed": {"num_heads": 8, "head_dim": 16},
}


@pytest.fixture(scope="module", autouse=True)
def _on_a_gpu() -> Iterator[None]:
    """A group of one, exact products, and shapes that reach the GPU's attention kernels."""
    styles = {name: {**sizes, **HEADS[name]} for name, sizes in gradient_case._STYLES.items()}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with (
        patch.object(gradient_case, "LENGTH", LENGTH),
        patch.object(gradient_case, "_STYLES", styles),
        patch.object(kernels, "VERSIONS", 64),  # of attention, which all rows share
        distributed(World(0, 0, 1, 1), device=torch.device("cuda", 0)),
    ):
        gradient_run._one_process.cache_clear()
        yield
    gradient_run._one_process.cache_clear()
    on_device.cache_clear()  # versions that were compiled here are not counted elsewhere
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("style", HEADS)
def test_separate_documents_take_flex_attention(style: str) -> None:
    case = GradientCase(engine="ddp", style=style)
    documents_BL = rows_of(case, 1).inputs.documents_BL
    assert documents_BL is not None
    head_dim = case.model().head_dim
    assert isinstance(causal_mask(documents_BL.cuda(), head_dim, torch.bfloat16), BlockMask)


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_are_one_cpu_process(name: str) -> None:
    case = GradientCase.named(name)
    _, beyond = compared(case, on_ranks(case, "cuda"), one_process(case))
    assert not beyond
