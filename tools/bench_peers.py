"""One optimizer step of lmscale against other trainers, paired and interleaved, each in a process of its own.

    python tools/bench_peers.py [--rounds 15] [--contenders 'hf-*' 'lmscale-ddp-*'] [--json FILE] [--page FILE]

A round lets every contender do a step, one after the other in a random order while all others sleep; a ratio compares
two times of the same round, so a slow minute of the machine is in both. The hand-written loop runs twice: what its twin
differs by is noise, and no difference below it is claimed. All start from the same weights and see the same tokens;
losses and gradient norms of the first steps show that they do the same work. peers/contenders.py lists them;
environments for the foreign ones are made under build/peers-venv, once.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import torch
from contenders import Contender, chosen
from page import judged, page
from results import provenance
from safetensors.torch import save_file
from task import Task
from workers import Worker, busy_s, require_memory, touch_memory

from lmscale.config.model_spec import decoder_spec
from lmscale.config.schema import ModelConfig
from lmscale.model.build import build_model
from lmscale.modelspec.flops import flops_per_token


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        task = written_task(args, Path(scratch))
        found = measured(args, chosen(args.contenders), task, Path(scratch))
    found["settings"] = {"task": json.loads(task.to_json()), **provenance(), **vars(args)}
    found = judged(found)
    text = page(found)
    print(text)
    if args.page:
        args.page.write_text(text + "\n", encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    if found["other_work"]:
        raise SystemExit(f"not the same work: {', '.join(found['other_work'])}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--contenders", nargs="*", default=[], help="names, * matches anything")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1, help="measured steps a turn")
    parser.add_argument("--settle", type=int, default=1, help="steps a turn before them")
    parser.add_argument(
        "--first", type=int, default=6, help="warm-up steps whose losses are compared"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--touch", type=float, default=0.5, help="share of free memory to warm up")
    parser.add_argument(
        "--env", nargs="*", default=[], metavar="NAME=VALUE", help="for every contender"
    )
    for size in ("layers", "width", "heads", "feed_forward", "vocab", "rows", "length"):
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, default=getattr(Task, size))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="write the tables, as Markdown")
    return parser.parse_args()


def written_task(args: argparse.Namespace, folder: Path) -> Task:
    """Initial weights and tokens in a file that every environment can read.

    Tokens are Zipf's: rare ones are rare, so the loss falls within six steps and a missing update would show.
    """
    sizes = {name: getattr(args, name) for name in ("layers", "width", "heads", "feed_forward")}
    model = build_model(ModelConfig(**sizes), vocab_size=args.vocab, max_positions=args.length)
    draw = torch.Generator().manual_seed(0)
    shares = 1 / torch.arange(1, args.vocab + 1, dtype=torch.float64)
    shape = (max(2, args.first), args.rows, args.length + 1)
    tokens = torch.multinomial(shares, shape[0] * shape[1] * shape[2], True, generator=draw)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    file = folder / "task.safetensors"
    save_file({**weights, "tokens": tokens.view(shape)}, file)
    return Task(str(file), **sizes, vocab=args.vocab, rows=args.rows, length=args.length)


def measured(
    args: argparse.Namespace, contenders: list[Contender], task: Task, logs: Path
) -> dict[str, Any]:
    """The times of all rounds, and what is known of each contender."""
    env = {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    env |= dict(pair.split("=", 1) for pair in args.env)
    touch_memory(args.touch)
    workers: list[Worker] = []
    try:
        for contender in contenders:
            require_memory(contender.name)
            workers.append(Worker(contender, task, env=env, logs=logs))
            workers[-1].warm_up(args.first if contender.trains else 1)
            print(
                f"{contender.name}: first step after {workers[-1].start_s:.1f} s", file=sys.stderr
            )
        others = rounds(args, workers)
    finally:
        for worker in workers:
            worker.close()
    rows = {worker.contender.name: row(worker, args, task) for worker in workers}
    return {"rows": rows, "others_cores": others}


def rounds(args: argparse.Namespace, workers: list[Worker]) -> float:
    """Let all take turns; how many cores other programs kept busy meanwhile."""
    draw, order = random.Random(args.seed), list(workers)
    wall, begun, own = -os.times().elapsed, busy_s(), 0.0
    for number in range(args.rounds):
        draw.shuffle(order)
        for worker in order:
            worker.take_turn(settle=args.settle, steps=args.steps)
            own += worker.all_cpu_seconds
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    wall += os.times().elapsed
    return max(0.0, busy_s() - begun - own) / wall


def row(worker: Worker, args: argparse.Namespace, task: Task) -> dict[str, Any]:
    contender = worker.contender
    if contender.trains:
        model = ModelConfig(
            num_layers=task.layers,
            hidden_size=task.width,
            num_heads=task.heads,
            ffn_hidden_size=task.feed_forward,
        )
        flops = flops_per_token(
            decoder_spec(model, vocab_size=task.vocab, max_positions=task.length),
            seq_len=task.length,
            causal=True,
        )
        flops *= task.rows * task.length
    else:
        flops = 2.0 * contender.options["size"] ** 3 * contender.options["times"]
    return {
        "precision": contender.precision,
        "trains": contender.trains,
        "options": dict(contender.options),
        "tokens": task.rows * task.length if contender.trains else None,
        "flops": flops,
        "start_s": worker.start_s,
        "seconds": worker.seconds,
        "cpu_seconds": worker.cpu_seconds,
        "page_faults": worker.faults,
        "peak_rss_bytes": worker.peak_rss_bytes,
        **worker.first,
    }


if __name__ == "__main__":
    main()
