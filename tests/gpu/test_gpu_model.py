"""On a GPU: its own kernels give what the CPU gives."""

import pytest
import torch
from torch import Tensor

from lmscale.base.batch import Batch, Stream
from lmscale.config.schema import ModelConfig, OptimConfig
from lmscale.model.build import build_model
from lmscale.model.transformer import LanguageModel
from lmscale.optim.optimizer import build_adamw, parameter_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the compiler's own remarks differ by driver and card
]

VOCAB, ROWS, LENGTH = 300, 3, 200  # 200: no multiple of FlexAttention's blocks of 128
packings = pytest.mark.parametrize("packed", [False, True])


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def build(device: str, dtype: torch.dtype = torch.float32, **changes: object) -> LanguageModel:
    sizes = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "init_std": 0.1,
        **changes,
    }
    return build_model(
        ModelConfig(**sizes), vocab_size=VOCAB, max_positions=LENGTH, dtype=dtype, device=device
    )


def make_batch(device: str, *, packed: bool) -> Batch[Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens_BL, targets_BL = torch.randint(0, VOCAB, (2, ROWS, LENGTH), generator=g)
    weights_BL = torch.randint(0, 2, (ROWS, LENGTH), generator=g).float()
    documents_BL = None
    if packed:
        documents_BL = (torch.rand(ROWS, LENGTH, generator=g) < 0.03).long().cumsum(1)
        documents_BL[-1, 150:] = -1
        weights_BL[-1, 150:] = 0
    positions_BL = torch.arange(LENGTH).repeat(ROWS, 1)
    stream = Stream(tokens_BL, positions_BL, documents_BL)
    batch = Batch(stream, None, targets_BL, weights_BL, torch.arange(ROWS))
    return batch.map(lambda x: x.to(device))


def gradients(model: LanguageModel, batch: Batch[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(batch).loss.backward()
    return {n: p.grad.cpu().double() for n, p in model.named_parameters() if p.grad is not None}


def close(got: dict[str, Tensor], want: dict[str, Tensor], error: float) -> None:
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= error * gradient.norm(), name


def test_initial_values_are_the_cpus():
    for here, there in zip(build("cuda").parameters(), build("cpu").parameters(), strict=True):
        assert torch.equal(here.cpu(), there)


@packings
@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.05)],
)
def test_gradients_are_the_cpus(packed, dtype, error):
    want = gradients(build("cpu", torch.float64), make_batch("cpu", packed=packed))
    close(gradients(build("cuda", dtype), make_batch("cuda", packed=packed)), want, error)


@packings
def test_small_heads_work_too(packed):
    want = gradients(build("cpu", head_dim=8), make_batch("cpu", packed=packed))
    close(gradients(build("cuda", head_dim=8), make_batch("cuda", packed=packed)), want, 1e-4)


@packings
def test_compiled_blocks_give_the_same_gradients(packed):
    model, batch = build("cuda"), make_batch("cuda", packed=packed)
    want = gradients(model, batch)
    for block in model.decoder.blocks:
        block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)
    close(gradients(model, batch), want, 1e-4)


def test_packed_attention_is_fused():
    """No tensor of the size of all scores: 8 heads x 8192 x 8192 in bf16 would be 1 GiB."""
    model = build("cuda", torch.bfloat16, hidden_size=128, num_heads=8, num_layers=1)
    length = 8192
    tokens_BL = torch.zeros(1, length, dtype=torch.long, device="cuda")
    positions_BL = torch.arange(length, device="cuda")[None]
    stream = Stream(tokens_BL, positions_BL, positions_BL // 1000)
    batch = Batch(stream, None, tokens_BL, torch.ones(1, length, device="cuda"), tokens_BL[:, 0])
    model(batch).loss.backward()
    torch.cuda.reset_peak_memory_stats()
    model(batch).loss.backward()
    assert torch.cuda.max_memory_allocated() < 0.7 * 2**30


def test_fused_adamw_is_the_plain_one():
    cfg = OptimConfig(lr=1e-2)
    results = []
    for fused in (False, True):
        model, batch = build("cuda"), make_batch("cuda", packed=False)
        groups = parameter_groups(model.named_parameters(), cfg.weight_decay)
        optimizer = build_adamw(groups, cfg, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            sums = model(batch)
            (sums.loss / sums.weight).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for plain, fused_result in zip(*results, strict=True):
        torch.testing.assert_close(fused_result, plain, rtol=1e-4, atol=1e-4)
