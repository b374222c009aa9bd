"""Passes over a built model: what they must not change, and that they do what they are for."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lmscale.base.errors import ConfigError
from lmscale.model.transformer import blocks_of
from lmscale.parallel.activation_checkpointing import checkpoint_activations
from lmscale.parallel.low_precision import LowPrecision
from lmscale.parallel.passes import compile_blocks

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


class Broken(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else x  # the graph would depend on a number


class Model(nn.Module):
    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.Module()
        self.decoder.embedding = nn.Linear(4, 4)  # so that every block's input has a gradient
        self.decoder.blocks = nn.ModuleList(block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.decoder.embedding(x)
        for block in self.decoder.blocks:
            x = block(x)
        return x.square().sum()


def rows(count: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 4 * count).view(count, 4)


def gradients(model: Model) -> list[torch.Tensor]:
    model(rows(2)).backward()
    return [p.grad for p in model.parameters()]


@pytest.fixture
def graphs(monkeypatch):
    """What was compiled: by a backend of the test, so that no C++ is."""
    found = []

    def counting(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        found.append(graph)
        return graph

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiler(f, backend=counting, **kw))
    return found


# The compiler looks at .grad of each input of a graph, activations too, and torch warns it of itself.
no_leaf = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.mark.parametrize(
    ("mode", "twice"),
    [("none", 0), ("full", LAYERS), ("selective", LAYERS), ("every:3", 4), ("every:99", 1)],
)
def test_checkpointed_blocks_run_twice_and_give_the_same(mode, twice):
    plain, model = Model(), Model()
    names = [name for name, _ in model.named_parameters()]
    checkpoint_activations(model, mode)
    assert [name for name, _ in model.named_parameters()] == names
    found = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(plain), strict=True))
    assert sum(block.calls for block in blocks_of(model)) == LAYERS + twice


@no_leaf
@pytest.mark.parametrize(
    ("checkpointing", "kinds"), [("none", 1), ("full", 1), ("selective", 1), ("every:2", 2)]
)
def test_equal_blocks_are_compiled_once(checkpointing, kinds, graphs):
    plain, model = Model(), Model()
    names = [name for name, _ in model.named_parameters()]
    checkpoint_activations(model, checkpointing)
    compile_blocks(model)
    assert [name for name, _ in model.named_parameters()] == names
    found = gradients(model)
    assert len(graphs) == kinds
    assert sum(block.calls for block in blocks_of(model)) == 0, "a block ran outside the graph"
    for a, b in zip(found, gradients(plain), strict=True):
        torch.testing.assert_close(a, b)


@no_leaf
def test_each_shape_and_evaluation_are_compiled_until_an_error(graphs, monkeypatch):
    """And other models of the process do not count."""
    monkeypatch.setattr("lmscale.model.kernels.VERSIONS", 4)
    for _ in range(2):
        model = Model()
        compile_blocks(model)
        graphs.clear()
        for _ in range(2):
            for count in (2, 1):  # as a last, short micro-batch
                model(rows(count)).backward()
                with torch.no_grad():
                    model(rows(count))
        assert len(graphs) == 4
    with pytest.raises(ConfigError, match=r"engine.compile: .* more than 4 different shapes"):
        model(rows(3))


@no_leaf
def test_a_graph_break_in_a_block_is_an_error(graphs):
    model = Model(Broken)
    compile_blocks(model)
    with pytest.raises(ConfigError, match=r"could not be compiled(.|\n)*engine.compile=false"):
        model(rows(2))


_WITHOUT_COMPILER = """
import torch
from torch import nn
from lmscale.parallel.passes import compile_blocks

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.blocks = nn.ModuleList([nn.GELU()])

model = Model()
compile_blocks(model)
try:
    model.decoder.blocks[0](torch.ones(2, 4))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow  # the compiler is imported and looks for another: 8 s
def test_a_missing_compiler_is_an_error_that_names_the_setting(tmp_path):
    environment = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", _WITHOUT_COMPILER],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert found.stdout.startswith("ConfigError"), found.stderr
    assert "No working C++ compiler" in found.stdout
    assert "engine.compile=false" in found.stdout


def test_lowered_weights_are_low_only_inside():
    model = Model()
    block = blocks_of(model)[0]
    before = dict(model.named_parameters())
    lowered = LowPrecision(model, torch.bfloat16)
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    for _ in range(2):
        with lowered():
            assert block.linear.weight.dtype == torch.bfloat16
            model(x).backward()
    assert all(before[name] is p for name, p in model.named_parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    once = Model()
    with LowPrecision(once, torch.bfloat16)():
        once(x).backward()
    for twice, single in zip(model.parameters(), once.parameters(), strict=True):
        assert torch.equal(twice.grad, 2 * single.grad), "accumulated below fp32"


def test_lowered_weights_come_back_after_an_error():
    model = Model()
    with pytest.raises(RuntimeError), LowPrecision(model, torch.bfloat16)():
        model(torch.ones(2, 4))  # fp32 inputs do not fit
    assert all(p.dtype == torch.float32 for p in model.parameters())
