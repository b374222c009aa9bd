"""What every engine holds on a rank, and what every way of recomputation keeps, against the formulas of `lmscale plan`.

    python tools/bench_memory.py [--only NAME] [--page docs/memory.md] [--json FILE]

Real engines on up to four gloo ranks, memory_probe.py; formulas in lmscale_launcher.planner. Parameters, gradients and
optimizer state must lie within 5 % of the formula, saved activations within 15 %. Exits with 1 where one does not.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from memory_probe import LENGTH, MODEL, ROWS, VOCAB, Setting, held
from results import facts, provenance, table, write_page

from lmscale.config.model_spec import decoder_spec
from lmscale.config.schema import ModelConfig
from lmscale.modelspec.activations import MicroBatch, activation_bytes, block_bytes, recompute_modes
from lmscale.modelspec.spec import ModelSpec
from lmscale_launcher.planner.memory_estimate import MeshSizes, held_by
from tests.support.rank_pool import CaseFailed, Pool

DEADLINE_S = 600.0
WITHIN = {"parameters": 0.05, "gradients": 0.05, "optimizer": 0.05, "saved": 0.15}


@dataclass(frozen=True)
class Row:
    name: str
    ranks: int
    setting: Setting

    @property
    def mesh(self) -> MeshSizes:
        cfg = self.setting.config()
        tp, replicate = cfg.parallel.tp, cfg.parallel.dp_replicate
        data = self.ranks // tp
        sharded = cfg.engine.kind == "fsdp"
        return MeshSizes(replicate, data // replicate, tp) if sharded else MeshSizes(data, 1, tp)


def rows() -> Iterator[Row]:
    zero = {f"ZeRO-{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)}
    engines = {"ddp": {"kind": "ddp"}, **zero, "fsdp": {"kind": "fsdp"}}
    for precision in ("fp32", "bf16"):
        for name, keys in engines.items():
            for ranks in (1, 2, 4):
                yield _row(name, ranks, {**keys, "precision": precision})
        fsdp, ddp = (
            {"kind": "fsdp", "precision": precision},
            {"kind": "ddp", "precision": precision},
        )
        yield _row("hsdp 2 x 2", 4, fsdp, replicate=2)
        for tp in (2, 4):
            yield _row(f"ddp, tp {tp}", tp, ddp, tp=tp)
            yield _row(f"ddp, tp {tp}, sequence parallel", tp, ddp, tp=tp, sequence_parallel=True)
        yield _row("fsdp, tp 2", 4, fsdp, tp=2)
        yield _row("ZeRO-2, tp 2", 4, {**zero["ZeRO-2"], "precision": precision}, tp=2)
        for mode in ("none", "selective", "every:3", "every:2", "full", "budget:0.5"):
            yield _row("fsdp", 2, {**fsdp, "activation_checkpointing": mode})


def _row(name: str, ranks: int, engine: dict[str, Any], **parallel: Any) -> Row:
    mode = engine.get("activation_checkpointing")
    title = f"{name}, {engine['precision']}" + (f", {mode}" if mode else "")
    return Row(title, ranks, Setting(engine, parallel))


def by_formula(row: Row) -> dict[str, int]:
    cfg = row.setting.config()
    spec = decoder_spec(ModelConfig(**MODEL), vocab_size=VOCAB, max_positions=LENGTH)
    plan = held_by(spec, cfg.engine, row.mesh, micro_batches=1)
    return {
        "parameters": plan.parameters,
        "gradients": plan.gradients,
        "optimizer": plan.optimizer,
        "saved": saved_by_formula(spec, row),
    }


def saved_by_formula(spec: ModelSpec, row: Row) -> int:
    """At the end of the forward: without the block that recomputation fills again in the backward."""
    cfg = row.setting.config()
    stack = spec.stack("decoder")
    plain = MicroBatch(
        device="cpu", precision=cfg.engine.precision, rows=ROWS, seq_len=LENGTH, separate=False,
        tp=cfg.parallel.tp, sequence_parallel=cfg.parallel.sequence_parallel,
    )  # fmt: skip
    modes = recompute_modes(stack, replace(plain, recompute=cfg.engine.activation_checkpointing))
    blocks = sum(count * block_bytes(stack, plain, mode) for mode, count in modes.items())
    rest = activation_bytes(spec, plain) / plain.tokens - stack.num_layers * block_bytes(
        stack, plain, "none"
    )
    return round(plain.tokens * (blocks + rest))


def compared(row: Row, real: Mapping[str, int]) -> dict[str, Any]:
    """Measured over formula, and what is outside of its bounds."""
    want = by_formula(row)
    ratios = {name: real[name] / want[name] for name in WITHIN}
    outside = [name for name, ratio in ratios.items() if abs(ratio - 1) > WITHIN[name]]
    if row.name.startswith("ZeRO-1") and ratios["gradients"] < 1 - WITHIN["gradients"]:
        outside.remove(
            "gradients"
        )  # whole in the backward, which the formula says; gone when we look
    return {"name": row.name, "ranks": row.ranks, "real": real, "formula": want, "ratios": ratios,
            "outside": outside}  # fmt: skip


def fullest(found: list[dict[str, int]]) -> dict[str, int]:
    """The most that any rank holds: what the formulas speak of."""
    return {name: max(rank[name] for rank in found) for name in found[0]}


def measured(only: str) -> Iterator[dict[str, Any]]:
    pools: dict[int, Pool] = {}
    try:
        for row in sorted((row for row in rows() if only in row.name), key=lambda row: row.ranks):
            pool = pools.setdefault(row.ranks, Pool(row.ranks))
            try:
                real = pool(held, row.setting, deadline_s=DEADLINE_S)
            except CaseFailed as error:
                print(f"{row.name}, {row.ranks} ranks: failed\n{error}", file=sys.stderr)
                yield {"name": row.name, "ranks": row.ranks, "failed": str(error).strip()[-300:]}
                continue
            line = compared(row, fullest(real))
            ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in line["ratios"].items())
            print(f"{row.name}, {row.ranks} ranks: {ratios}", file=sys.stderr, flush=True)
            yield line
    finally:
        for pool in pools.values():
            pool.close()


def lines_of(found: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for line in found:
        if "failed" in line:
            yield (line["name"], str(line["ranks"]), "failed", "", "", "", "")
            continue
        cells = [f"{line['real'][name] / 1e3:,.0f} ({line['ratios'][name]:.3f})" for name in WITHIN]
        yield (line["name"], str(line["ranks"]), *cells, f"{line['real']['peak'] / 1e3:,.0f}")


def page(found: list[dict[str, Any]]) -> list[str]:
    shape = ", ".join(f"{name} {value}" for name, value in MODEL.items())
    head = ("setting", "ranks", "parameters", "gradients", "optimizer", "saved activations", "peak")
    outside = [
        f"{line['name']} ({', '.join(line['outside'])})" for line in found if line.get("outside")
    ]
    return [
        "# Memory of a rank",
        "Written by `tools/bench_memory.py`. Kilobytes of the fullest rank in real engines over gloo, and in brackets "
        "what was measured over what `lmscale plan` says (lmscale_launcher.planner). Parameters, "
        "gradients (when the update is made) and optimizer state (with fp32 masters where weights are lower) are "
        "storages; saved activations are "
        "what the decoder's forward leaves for the backward, by the hooks of saved tensors; the peak is the most that "
        "a whole step has allocated at once, from the profiler's memory events.",
        f"The model: {shape}, vocabulary {VOCAB}; {ROWS} x {LENGTH} tokens a step on each data-parallel rank.",
        facts(provenance()),
        table(head, lines_of(found)),
        "Allowed: 5 % for what an engine holds, 15 % for activations. "
        + (
            f"Outside: {'; '.join(outside)}."
            if outside
            else "All are inside; the formula counts ZeRO-1's gradients whole, as the backward has them, and part "
            "is gone when we look."
        ),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = list(measured(args.only))
    print("\n\n".join(page(found)))
    if args.page:
        write_page(args.page, page(found))
    if args.json:
        args.json.write_text(json.dumps({"rows": found, **provenance()}, indent=1) + "\n")
    sys.exit(any("failed" in line or line["outside"] for line in found))


if __name__ == "__main__":
    main()
