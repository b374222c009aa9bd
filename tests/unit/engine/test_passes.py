"""Passes over a built model: what they must not change, and that they do what they are for."""

import pytest
import torch
from torch import nn

from lmscale.parallel.lowered import Lowered
from lmscale.parallel.passes import blocks, checkpoint_activations, compile_blocks

LAYERS = 10  # more than the compiler's limit of 8 versions of one function


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.calls += 1
        return x + self.linear(x).relu()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.Module()
        self.decoder.embedding = nn.Linear(4, 4)  # so that every block's input has a gradient
        self.decoder.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.decoder.embedding(x)
        for block in self.decoder.blocks:
            x = block(x)
        return x.square().sum()


def gradients(model: Model) -> list[torch.Tensor]:
    model(torch.linspace(-1, 1, 8).view(2, 4)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("mode", "twice"), [("none", 0), ("full", LAYERS), ("every:3", 4), ("every:99", 1)]
)
def test_checkpointed_blocks_run_twice_and_give_the_same(mode, twice):
    plain, model = Model(), Model()
    names = [name for name, _ in model.named_parameters()]
    checkpoint_activations(model, mode)
    assert [name for name, _ in model.named_parameters()] == names
    found = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(plain), strict=True))
    assert sum(block.calls for block in blocks(model)) == LAYERS + twice


# The compiler looks at .grad of each input of a graph, activations too, and torch warns it of itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_equal_blocks_are_compiled_once(checkpointing, monkeypatch):
    """Counted by a backend of the test, so that no C++ is compiled."""
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiler(f, backend=counting, **kw))
    torch._dynamo.reset()
    plain, model = Model(), Model()
    names = [name for name, _ in model.named_parameters()]
    checkpoint_activations(model, checkpointing)
    compile_blocks(model)
    assert [name for name, _ in model.named_parameters()] == names
    found = gradients(model)
    assert len(graphs) == 1
    assert sum(block.calls for block in blocks(model)) == 0, "a block ran outside the graph"
    for a, b in zip(found, gradients(plain), strict=True):
        torch.testing.assert_close(a, b)


def test_lowered_weights_are_low_only_inside():
    model = Model()
    block = blocks(model)[0]
    before = dict(model.named_parameters())
    lowered = Lowered(model, torch.bfloat16)
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    for _ in range(2):
        with lowered():
            assert block.linear.weight.dtype == torch.bfloat16
            model(x).backward()
    assert all(before[name] is p for name, p in model.named_parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    once = Model()
    with Lowered(once, torch.bfloat16)():
        once(x).backward()
    for twice, single in zip(model.parameters(), once.parameters(), strict=True):
        assert torch.equal(twice.grad, 2 * single.grad), "accumulated below fp32"


def test_lowered_weights_come_back_after_an_error():
    model = Model()
    with pytest.raises(RuntimeError), Lowered(model, torch.bfloat16)():
        model(torch.ones(2, 4))  # fp32 inputs do not fit
    assert all(p.dtype == torch.float32 for p in model.parameters())
