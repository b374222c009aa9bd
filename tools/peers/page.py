"""From the times of all rounds to what is said about them."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from contenders import PRECISIONS, bars, every, reference
from ratios import claim, disagreement, noise, ratio, verdict
from results import table

# Of the first steps' losses, in nats, and gradient norms, relative, against the hand-written loop of the precision.
# fp32: sums in another order (losses: measured 2e-5); but torch's own norm, which the loop by hand and the foreign
# trainers clip by, adds squares in fp32, 1.4e-3 off our float64 one (DeepSpeed's is 1e-6 off).
# bf16: autocast and bf16 weights round at other places.
SAME_WORK = {"fp32": (2e-4, 3e-3), "bf16": (3e-2, 5e-2)}


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """`found` with ratios, noise, claims, bars, and who does not do the same work."""
    rows: Mapping[str, dict[str, Any]] = found["rows"]
    known = every()
    noises, other_work = {}, []
    for precision in [name for name in PRECISIONS if f"hand-{name}" in rows]:
        twin = ratio(*(rows[f"{name}-{precision}"]["seconds"] for name in ("hand-again", "hand")))
        noises[precision] = noise(twin)
    for name, row in rows.items():
        seconds = statistics.median(row["seconds"])
        row["gflops"] = row["flops"] / seconds / 1e9
        row["median_s"] = seconds
        limit = rows[f"products-{row['precision']}"]
        row["of_limit"] = row["gflops"] / (limit["flops"] / min(limit["seconds"]) / 1e9)
        if not row["trains"]:
            continue
        base = rows[reference(known[name])]
        against = ratio(row["seconds"], base["seconds"])
        row["ratio"], row["claim"] = asdict(against), claim(against, noises[row["precision"]])
        row["off"] = disagreement(row, base)
        if any(a > most for a, most in zip(row["off"], SAME_WORK[row["precision"]], strict=True)):
            other_work.append(name)
    return {
        **found,
        "noise": noises,
        "other_work": other_work,
        "bars": [_bar(found, bar, noises) for bar in bars(list(rows))],
    }


def _bar(found: Mapping[str, Any], bar: Any, noises: Mapping[str, float]) -> dict[str, Any]:
    rows = found["rows"]
    against = ratio(rows[bar.own]["seconds"], rows[bar.peer]["seconds"])
    size = noises[rows[bar.own]["precision"]]
    return {
        **asdict(bar),
        "ratio": asdict(against),
        "claim": claim(against, size),
        "verdict": verdict(against, bar, size),
    }


def page(found: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    parts = [_heading(found)]
    for precision in found["noise"]:
        parts.append(_contenders(found, precision))
    if found["bars"]:
        parts.append(_bars(found))
    return "\n\n".join(parts)


def _heading(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    task = settings["task"]
    noises = ", ".join(f"{size:.1%} ({name})" for name, size in found["noise"].items())
    return (
        f"{task['layers']} layers, width {task['width']}, {task['heads']} heads, SwiGLU {task['feed_forward']}, "
        f"vocabulary {task['vocab']}, {task['rows']} x {task['length']} tokens a step, {settings['threads']} threads; "
        f"{settings['rounds']} rounds in random order; commit {settings['commit']}; {settings['versions']}; "
        f"{settings['machine']}, {settings['date']}. Environment: {' '.join(settings['env']) or 'as it is'}.\n\n"
        "Speed is the median over rounds of the peer's time over one's own, with the middle half of the rounds in "
        f"brackets. A loop differs from its twin by up to {noises}; smaller differences are not claimed. Other "
        f"programs kept {found['others_cores']:.2f} cores busy meanwhile."
    )


def _contenders(found: Mapping[str, Any], precision: str) -> str:
    rows = {name: row for name, row in found["rows"].items() if row["precision"] == precision}
    head = (
        "contender", "s a step", "CPU s", "tokens/s", "GFLOP/s", "of the products' limit",
        f"speed against hand-{precision}", "claimed", "losses off by", "norms off by", "first step after",
    )  # fmt: skip
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["trains"]):
        line = [
            name,
            f"{row['median_s']:.3f}",
            f"{statistics.median(row['cpu_seconds']):.3f}",
            "",
            f"{row['gflops']:.0f}",
            f"{row['of_limit']:.0%}",
        ]
        if row["trains"]:
            line[3] = f"{row['tokens'] / row['median_s']:,.0f}"
            losses, norms = row["off"]
            line += [_said(row["ratio"]), row["claim"], f"{losses:.1e}", f"{norms:.1e}"]
            line += [f"{row['start_s']:.1f} s"]
        lines.append(line + [""] * (len(head) - len(line)))
    return table(head, lines)


def _bars(found: Mapping[str, Any]) -> str:
    lines = [
        (bar["own"], bar["peer"], bar["least"], _said(bar["ratio"]), bar["claim"], bar["verdict"])
        for bar in found["bars"]
    ]
    return table(("lmscale", "peer", "asked for", "speed", "claimed", "verdict"), lines)


def _said(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"
