"""Tokens a second and MFU of a large decoder on one GPU, under every engine that fits.

    python tools/bench_gpu.py [--model llama-1b] [--vocab 128256] [--rows 8] [--steps 12] [--rounds 3]
                              [--only NAME ...] [--json FILE] [--device cpu --model smoke --vocab 512 --seq-len 64]

Each setting has a process of its own in every round, in an order that is drawn anew: allocators and compilers start
clean, and a card that slows down when it is warm does so for all. Real engines, whole steps (clipping and AdamW too),
random tokens. MFU counts the attention of all keys (PaLM's convention) and no recomputation, against the data sheet.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from results import ROOT, provenance, table

from lmscale.base.batch import Batch, Stream
from lmscale.base.world import World
from lmscale.config.model_spec import decoder_spec
from lmscale.config.schema import EngineConfig, ModelConfig, OptimConfig, RunConfig
from lmscale.config.yaml import parse
from lmscale.distributed.mesh import make_mesh
from lmscale.distributed.process_group import distributed
from lmscale.engine.build import build_engine
from lmscale.model.build import build_model
from lmscale.modelspec.flops import flops_per_token
from lmscale.train.environment import peak_of

_BF16 = {"precision": "bf16"}
_FSDP = {"kind": "fsdp", **_BF16}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "fsdp": _FSDP,
    "fsdp compiled": {**_FSDP, "compile": True},
    "fsdp compiled selective": {
        **_FSDP,
        "compile": True,
        "activation_checkpointing": "selective",
    },
    "fsdp compiled full": {**_FSDP, "compile": True, "activation_checkpointing": "full"},
    "ddp compiled": {"kind": "ddp", **_BF16, "compile": True},
    "zero1 compiled": {"kind": "deepspeed", "zero_stage": 1, **_BF16, "compile": True},
    "zero2 compiled": {"kind": "deepspeed", "zero_stage": 2, **_BF16, "compile": True},
    "zero3": {"kind": "deepspeed", "zero_stage": 3, **_BF16},
}


def main() -> int:
    args = arguments()
    if args.one:
        print(json.dumps(measured(args, SETTINGS[args.one])))
        return 0
    names = args.only or list(SETTINGS)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    document = {**provenance(), "settings": vars(args), "found": found}
    for number in range(args.rounds):
        for name in random.sample(names, len(names)):
            found[name].append(in_a_process(name))
            print(
                f"round {number + 1} of {args.rounds}: {name}: {found[name][-1]}", file=sys.stderr
            )
            if args.json:  # after each, so that a machine that is taken back takes nothing along
                text = json.dumps(document, indent=1, default=str)
                args.json.write_text(text + "\n", encoding="utf-8")
    print(table(("setting", "ms a step", "tokens/s", "TFLOP/s", "MFU", "peak GiB"), rows(found)))
    return int(any("error" in one for several in found.values() for one in several))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="llama-1b", help="of configs/models")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--warm", type=int, default=4, help="steps before those that count")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", choices=SETTINGS)
    parser.add_argument("--one", choices=SETTINGS, help="in this process; prints JSON")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def in_a_process(name: str) -> dict[str, Any]:
    """What one setting did; {"error": ...} where it did not."""
    command = [sys.executable, *sys.argv, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"error": " / ".join(done.stderr.strip().splitlines()[-12:])}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(args: argparse.Namespace, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of one engine on one device."""
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)
    world = World()
    text = (ROOT / "configs" / "models" / f"{args.model}.yaml").read_text(encoding="utf-8")
    cfg = RunConfig.model_construct(
        model=ModelConfig(**parse(text, name="yaml").value),
        engine=EngineConfig(**engine),
        optim=OptimConfig(lr=1e-4),
    )
    model = build_model(cfg.model, vocab_size=args.vocab, max_positions=args.seq_len)
    batch = batch_of(args).map(lambda array: array.to(device))
    seconds = []
    with distributed(world, device=device):
        built = build_engine(cfg, model, make_mesh(cfg.parallel, world, device.type), device)
        for _ in range(args.warm + args.steps):
            begun = time.perf_counter()
            loss = built.step([batch], lr=1e-4).loss.item()  # waits for the device
            seconds.append(time.perf_counter() - begun)
    step_s = statistics.median(seconds[args.warm :])
    tokens_per_s = args.rows * args.seq_len / step_s
    flops = flops_per_token(
        decoder_spec(cfg.model, vocab_size=args.vocab, max_positions=args.seq_len),
        seq_len=args.seq_len,
        causal=False,
    )
    peak = peak_of(device, torch.bfloat16).flops_per_s
    on_gpu = device.type == "cuda"
    return {
        "step_s": step_s,
        "tokens_per_s": tokens_per_s,
        "flops_per_s": flops * tokens_per_s,
        "mfu": flops * tokens_per_s / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "loss": loss,
    }


def batch_of(args: argparse.Namespace) -> Batch[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shape = (args.rows, args.seq_len)
    tokens_BL, targets_BL = torch.randint(0, args.vocab, (2, *shape), generator=draw)
    stream = Stream(tokens_BL, torch.arange(args.seq_len).repeat(args.rows, 1), None)
    return Batch(stream, None, targets_BL, torch.ones(shape), torch.arange(args.rows))


def rows(found: Mapping[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Medians over the rounds."""
    lines = []
    for name, several in found.items():
        ran = [one for one in several if "error" not in one]
        if not ran:
            lines.append([name, "failed", "", "", "", ""])
            continue
        middle = sorted(ran, key=lambda one: one["step_s"])[len(ran) // 2]
        lines.append(
            [
                name,
                f"{1e3 * middle['step_s']:.1f}",
                f"{middle['tokens_per_s']:,.0f}",
                f"{middle['flops_per_s'] / 1e12:.3g}",
                f"{middle['mfu']:.1%}" if middle["mfu"] else "",
                f"{middle['peak_bytes'] / 2**30:.1f}" if middle["peak_bytes"] else "",
            ]
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
