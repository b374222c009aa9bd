"""What an engine costs over a loop written by hand, on one rank: paired, interleaved, in random order.

    python tools/bench_engines.py [--rounds 15] [--precision bf16] [--json FILE]

Every round runs each contender once, in a random order; a ratio compares two times of the same round,
so a slow minute of the machine hits both. Each hand-written loop runs twice, as its own null peer:
differences smaller than between the twins are noise. Peers:

    plain   the unwrapped model, clip_grad_norm_ and fused AdamW; for bf16, bf16 weights and fp32 masters
    sharded the same loop around the very model the fsdp engine trains, split by fully_shard
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from lmscale.base.batch import Batch, Stream
from lmscale.base.world import World
from lmscale.config.schema import EngineConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig
from lmscale.distributed.mesh import Mesh, make_mesh
from lmscale.distributed.process_group import choose_device, distributed
from lmscale.engine.build import build_engine
from lmscale.model.build import build_model
from lmscale.optim.optimizer import build_adamw, parameter_groups
from lmscale.parallel.shard import ShardPolicy, shard

Step = Callable[[], object]
# Contender -> the loop it is compared with.
PEERS = {
    "plain": "plain",
    "plain again": "plain",
    "ddp": "plain",
    "deepspeed": "plain",
    "sharded": "plain",
    "sharded again": "sharded",
    "fsdp": "sharded",
}


@dataclass(frozen=True)
class Row:
    name: str
    peer: str
    seconds: float  # median of a step
    ratio: float  # median over rounds of own time / peer's time
    low: float
    high: float


class Bench:
    """Builds contenders over the same model and the same batches."""

    def __init__(self, args: argparse.Namespace, mesh: Mesh, device: torch.device) -> None:
        self.args, self.mesh, self.device = args, mesh, device
        self.model_config = ModelConfig(
            num_layers=args.layers, hidden_size=args.width, num_heads=max(1, args.width // 64)
        )
        self.optim = OptimConfig(lr=3e-4, max_grad_norm=1.0)
        self.batches = [self._batch(seed) for seed in range(args.accumulation)]
        self.weight = sum(batch.weights_BL.sum().item() for batch in self.batches)

    def contender(self, name: str) -> Step:
        match name.removesuffix(" again"):
            case "plain":
                return self._plain()
            case "sharded":
                return self._sharded()
            case kind:
                return self._engine(kind)

    def _engine(self, kind: str) -> Step:
        cfg = RunConfig.model_construct(
            engine=EngineConfig(kind=kind, precision=self.args.precision), optim=self.optim
        )
        engine = build_engine(cfg, self._model(), self.mesh, self.device)

        def step() -> float:
            # .item(): a loop looks at its loss, as the hand-written ones do
            return engine.step(self.batches, lr=3e-4).loss.item()

        return step

    def _plain(self) -> Step:
        model = self._model()
        weights = list(model.parameters())
        masters = weights
        if self.args.precision == "bf16":
            masters = [nn.Parameter(weight.detach().clone()) for weight in weights]
            model.to(torch.bfloat16)
        names = [name for name, _ in model.named_parameters()]
        adam = self._adam(zip(names, masters, strict=True))

        def step() -> float:
            total = 0.0
            for batch in self.batches:
                loss = model(batch).loss / self.weight
                loss.backward()
                total += loss.item()
                if masters is not weights:
                    for master, weight in zip(masters, weights, strict=True):
                        grad = weight.grad.float()
                        master.grad = grad if master.grad is None else master.grad.add_(grad)
                        weight.grad = None
            clip_grad_norm_(masters, 1.0).item()
            adam.step()
            adam.zero_grad()
            if masters is not weights:
                with torch.no_grad():
                    torch._foreach_copy_(weights, masters)
            return total

        return step

    def _sharded(self) -> Step:
        model = self._model()
        compute = torch.bfloat16 if self.args.precision == "bf16" else None
        root = shard(model, self.mesh, ShardPolicy(compute))
        adam = self._adam(model.named_parameters())

        def step() -> float:
            total = 0.0
            for index, batch in enumerate(self.batches):
                root.set_requires_gradient_sync(index == len(self.batches) - 1)
                loss = model(batch).loss / self.weight
                loss.backward()
                total += loss.item()
            clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            return total

        return step

    def _adam(self, named: Iterable[tuple[str, Tensor]]) -> torch.optim.AdamW:
        return build_adamw(parameter_groups(named, 0.1), self.optim, fused=True)

    def _model(self) -> nn.Module:
        return build_model(
            self.model_config,
            vocab_size=self.args.vocab,
            max_positions=self.args.length,
            device=self.device,
        )

    def _batch(self, seed: int) -> Batch[Tensor]:
        shape = (self.args.rows, self.args.length)
        draw = torch.Generator().manual_seed(seed)
        tokens_BL = torch.randint(0, self.args.vocab, shape, generator=draw)
        positions_BL = torch.arange(shape[1]).expand(shape).contiguous()
        batch = Batch(
            Stream(tokens_BL, positions_BL, None),
            None,
            tokens_BL.roll(-1, 1),
            torch.ones(shape),
            torch.arange(shape[0]),
        )
        return batch.map(lambda array: array.to(self.device))


def timed(step: Step, device: torch.device) -> float:
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(bench: Bench, rounds: int, names: list[str]) -> list[Row]:
    steps = {name: bench.contender(name) for name in names}
    for _ in range(2):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            seconds[name].append(timed(steps[name], bench.device))
    rows = []
    for name in names:
        pairs = zip(seconds[name], seconds[PEERS[name]], strict=True)
        ratios = sorted(own / peer for own, peer in pairs)
        quarter = len(ratios) // 4
        rows.append(
            Row(
                name,
                PEERS[name],
                statistics.median(seconds[name]),
                statistics.median(ratios),
                ratios[quarter],
                ratios[-1 - quarter],
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="contenders; their peers are added")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = set(args.only or PEERS)
    wanted |= {PEERS[name] for name in wanted} | {"plain"}
    names = [name for name in PEERS if name in wanted]
    world = World()
    device = choose_device(world)
    with distributed(world, device=device):
        mesh = make_mesh(ParallelConfig(), world, device.type)
        rows = measure(Bench(args, mesh, device), args.rounds, names)
    tokens = args.rows * args.length * args.accumulation
    print(f"{'contender':15}{'s/step':>9}{'tokens/s':>10}   ratio (half of the rounds) to")
    for row in rows:
        spread = f"{row.ratio:.3f} ({row.low:.3f}-{row.high:.3f})"
        print(
            f"{row.name:15}{row.seconds:9.4f}{tokens / row.seconds:10.0f}   {spread:21}{row.peer}"
        )
    if args.json:
        settings = {**vars(args), "json": str(args.json), "torch": torch.__version__}
        found = {"settings": settings, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
