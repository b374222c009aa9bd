"""Exact dropout: the mask is a function of place, looks like chance, and costs the compiler no graph."""

from hashlib import sha256
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmscale.model.dropout import Dropout
from lmscale.parallel.activation_checkpointing import checkpoint_activations
from lmscale.parallel.passes import compile_blocks
from tests.support.tiny_model import gradients, random_batch, take, tiny

RATE = 0.25
LAYERS = 10  # more than the compiler's limit of 8 versions of one function


@pytest.fixture(autouse=True)
def _exact():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def kept(rows, tokens, width, *, seed=0, site=0, rate=RATE, part=0) -> Tensor:
    torch.manual_seed(seed)
    x = torch.ones(len(rows), tokens, width)
    dropout = Dropout.of(x, rate, rows_B=torch.tensor(rows), token_part=part)
    return (dropout.at_site(site) if site else dropout)(x) != 0


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(-1, 2**40), min_size=1, max_size=5),
    parts=st.integers(1, 4),
    tokens=st.integers(1, 5),
    site=st.integers(0, 300),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_part_of_the_tokens_and_a_row_get_their_slice_of_the_mask(
    rows, parts, tokens, site, seed
):
    whole = kept(rows, parts * tokens, 8, seed=seed, site=site)
    for part in range(parts):
        mine = kept(rows, tokens, 8, seed=seed, site=site, part=part)
        assert torch.equal(mine, whole.chunk(parts, 1)[part])
    for index, row in enumerate(rows):
        alone = kept([row], parts * tokens, 8, seed=seed, site=site)
        assert torch.equal(alone[0], whole[index])


def test_masks_of_a_seed_never_change():
    """A run that goes on under another version, or on another device, drops what it would have dropped."""
    bits = kept([0, -1, 2**40], 7, 33, seed=2**63 - 1, site=5, part=3).numpy().tobytes()
    assert sha256(bits).hexdigest()[:16] == "6b398f8f9eb702c3"


@pytest.mark.gpu
def test_cuda_drops_the_same():
    x = torch.ones(3, 64, 96)
    rows_B = torch.tensor([0, -1, 2**40])
    want = Dropout.of(x, RATE, rows_B=rows_B, token_part=1).at_site(3)(x)
    found = Dropout.of(x.cuda(), RATE, rows_B=rows_B.cuda(), token_part=1).at_site(3)(x.cuda())
    assert torch.equal(found.cpu(), want)


def deviations(mask: Tensor, rate: float, dims: tuple[int, ...]) -> Tensor:
    """How many standard deviations the count of kept elements is off, for each slice."""
    count = mask.double().sum(dims)
    n = mask.numel() / count.numel()
    return (count - n * (1 - rate)) / (n * rate * (1 - rate)) ** 0.5


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_holds_in_every_row_token_and_channel(rate):
    mask = kept(range(64), 64, 64, rate=rate)
    assert deviations(mask, rate, (0, 1, 2)).abs() < 4
    for dims in ((1, 2), (0, 2), (0, 1), (0,), (1,), (2,)):
        z = deviations(mask, rate, dims).flatten()
        assert z.abs().max() < 6, dims  # up to 4096 slices of at least 64
        # Too even is as suspicious as too uneven: the variance is 1 within its own deviation.
        assert abs(z.square().mean() - 1) < 5 * (2 / len(z)) ** 0.5 + 0.1, dims


NEIGHBOURS = {
    "rows": lambda m: (m[1:], m[:-1]),
    "tokens": lambda m: (m[:, 1:], m[:, :-1]),
    "channels": lambda m: (m[..., 1:], m[..., :-1]),
    "distant tokens": lambda m: (m[:, 32:], m[:, :-32]),
    "distant channels": lambda m: (m[..., 32:], m[..., :-32]),
}


@pytest.mark.parametrize("pair", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_are_independent(pair):
    one, other = pair(kept(range(64), 64, 64, rate=0.5))
    assert deviations(one == other, 0.5, (0, 1, 2)).abs() < 4


def test_sites_and_seeds_are_independent():
    masks = [kept(range(16), 32, 64, rate=0.5, site=site) for site in range(9)]
    masks += [kept(range(16), 32, 64, rate=0.5, seed=seed) for seed in (1, 2, 1 << 40, -1)]
    # A row of one seed is not a row of another, whatever row.
    masks.append(kept(range(1, 17), 32, 64, rate=0.5, seed=3))
    for one, other in combinations(masks, 2):
        assert deviations(one == other, 0.5, (0, 1, 2)).abs() < 5


def test_no_two_tokens_of_a_big_batch_share_a_mask():
    mask = kept(range(64), 1024, 64, rate=0.5)
    assert len(mask.flatten(0, 1).unique(dim=0)) == 64 * 1024


def test_what_is_kept_is_scaled_and_so_is_its_gradient():
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    y = Dropout.of(x, RATE)(x)
    y.sum().backward()
    assert torch.equal(y, torch.where(y != 0, x * (1 / (1 - RATE)), 0.0))
    assert torch.equal(x.grad, (y != 0) * torch.tensor(1 / (1 - RATE), dtype=torch.float64))


def test_plain_dropout_is_torchs_and_rate_zero_is_nothing():
    torch.use_deterministic_algorithms(False)
    x = torch.randn(2, 5, 8)
    torch.manual_seed(3)
    want = torch.nn.functional.dropout(x, RATE)
    torch.manual_seed(3)
    assert torch.equal(Dropout.of(x, RATE).at_site(2)(x), want)
    assert Dropout.of(x, 0.0)(x) is x


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_any_split_of_the_rows_is_the_batch(recompute):
    model, batch = tiny(dropout=RATE), random_batch(6, 8)
    torch.manual_seed(7)
    whole, want = model(batch), gradients(model, batch)
    plain = tiny()
    assert not torch.isclose(plain(batch).loss, whole.loss, rtol=1e-3)
    checkpoint_activations(model, recompute)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    torch.testing.assert_close(
        sum(model(take(batch, rows)).loss for rows in parts), whole.loss, rtol=1e-13, atol=0
    )
    split = [gradients(model, take(batch, rows)) for rows in parts]
    for name, gradient in want.items():
        torch.testing.assert_close(sum(g[name] for g in split), gradient, rtol=0, atol=1e-12)
    assert torch.equal(model.eval()(batch).loss, plain(batch).loss)


def test_every_site_of_a_model_has_its_own_mask(monkeypatch):
    masks = []
    called = Dropout.__call__

    def listening(self: Dropout, x: Tensor) -> Tensor:
        masks.append(called(self, torch.ones_like(x)) != 0)
        return called(self, x)

    monkeypatch.setattr(Dropout, "__call__", listening)
    tiny(num_layers=3, dropout=0.5)(random_batch(4, 16))
    assert len(masks) == 1 + 2 * 3
    for one, other in combinations(masks, 2):
        assert deviations(one == other, 0.5, (0, 1, 2)).abs() < 5


# The compiler looks at .grad of each input of a graph, activations too, and torch warns it of itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_equal_blocks_share_one_graph_whatever_layer_and_seed(recompute, monkeypatch):
    """Counted by a backend of the test; a break in the graph would count as a second one."""
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiler(f, backend=counting, **kw))
    torch._dynamo.reset()
    model, batch = tiny(num_layers=LAYERS, dropout=RATE), random_batch(3, 9)
    compiled = tiny(num_layers=LAYERS, dropout=RATE)
    checkpoint_activations(compiled, recompute)
    compile_blocks(compiled)
    for seed in range(3):
        torch.manual_seed(seed)
        want, found = gradients(model, batch), gradients(compiled, batch)
        for name, gradient in want.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)
    assert len(graphs) == 1
