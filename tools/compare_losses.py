"""Same seed, same data: the smoke run under every engine, and how far its losses and gradient norms lie apart.

    python tools/compare_losses.py [--steps 200] [--lr 5e-4] [--only NAME ...] [--runs FOLDER] [--out docs]

Each contender is the real command on configs/runs/smoke.yaml in fp32, stopped at --steps on the schedule of the whole
run, at a quarter of its learning rate: at 2e-3 the run itself makes 2e-4 of loss out of the last bit, and the control,
which is the first contender with its sums in another order, is as far from it as an engine is.
Writes losses.json (every loss and norm, and the widest gaps) and losses.png into --out. Ends with 1 where two runs lie
further apart than the bars: 5e-5 in loss, 1e-4 of a gradient norm. Needs `make data/smoke/manifest.json`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import ROOT, provenance

from tests.support.jobs import LMSCALE, clean_env

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS = {"loss": 5e-5, "grad_norm": 1e-4}
ZERO = "engine.kind=deepspeed"
# The same sums in another order: what the run makes of rounding. No engine that adds otherwise can be closer.
CONTROL = "one process, micro-batches of 2"
# name -> ranks, overrides of the smoke run
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ("engine.kind=ddp",)),
    CONTROL: (1, ("engine.kind=ddp", "train.micro_batch_size=2")),
    "fsdp": (2, ()),
    "zero1": (2, (ZERO, "engine.zero_stage=1")),
    "zero2": (2, (ZERO, "engine.zero_stage=2")),
    "zero3": (2, (ZERO, "engine.zero_stage=3")),
    "tp2": (2, ("engine.kind=fsdp", "parallel.tp=2")),
}
QUIET = ("eval.corpora=[]", "log.trackers=[]", "checkpoint.every_steps=null")
Curves = Mapping[str, Sequence[float]]  # run -> a value a step


@dataclass(frozen=True)
class Gap:
    """Where the runs lie furthest apart."""

    gap: float
    bar: float
    step: int
    between: tuple[str, str]

    @property
    def holds(self) -> bool:
        return self.gap <= self.bar


def widest(curves: Curves, *, bar: float, relative: bool) -> Gap:
    """The largest difference between any two runs at the same step; `relative`: to the smaller value."""
    found = Gap(0.0, bar, 0, ("", ""))
    for step, values in enumerate(zip(*curves.values(), strict=True), start=1):
        named = dict(zip(curves, values, strict=True))
        low, high = min(named, key=named.__getitem__), max(named, key=named.__getitem__)
        gap = named[high] - named[low]
        if relative:
            gap /= named[low]
        if gap > found.gap:
            found = Gap(gap, bar, step, (low, high))
    return found


def curves_of(name: str, *, steps: int, runs: Path, lr: float) -> dict[str, list[float]]:
    """Train one contender; its loss and gradient norm of each step."""
    ranks, overrides = RUNS[name]
    folder = runs / name.replace(",", "").replace(" ", "-")
    begun = time.perf_counter()
    done = subprocess.run(
        [
            str(LMSCALE), "train", "smoke", "--nproc", str(ranks), *QUIET, *overrides,
            f"optim.lr={lr}", f"train.stop_at={steps}", f"train.run_dir={folder}",
        ],
        cwd=ROOT, env=clean_env(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.returncode}\n{done.stdout}{done.stderr}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1)), name
    print(f"{name:12} {steps} steps in {time.perf_counter() - begun:.0f} s", flush=True)
    return {key: [line[key] for line in lines] for key in BARS}


def draw(found: Mapping[str, Curves], gaps: Mapping[str, Gap], path: Path, *, lr: float) -> None:
    """The curves over each other, and what lies between each of them and the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, *below) = plt.subplots(3, 1, figsize=(9, 9), sharex=True, layout="constrained")
    for name, values in found["loss"].items():
        top.plot(range(1, len(values) + 1), values, label=name, linewidth=1)
    top.set(
        ylabel="loss, nats a token", title=f"Same seed, same data, fp32: the smoke run at lr {lr:g}"
    )
    top.legend(ncols=3, frameon=False)
    for axes, key, label in zip(
        below, BARS, ("loss, |difference|", "gradient norm, |relative|"), strict=True
    ):
        _differences(axes, found[key], gaps[key], relative=key == "grad_norm")
        axes.set(ylabel=f"{label}\nto {next(iter(found[key]))}", yscale="log")
    below[-1].set_xlabel("step")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _differences(axes: "Axes", curves: Curves, gap: Gap, *, relative: bool) -> None:
    (_, base), *others = curves.items()
    axes.plot([], [])  # the first run keeps its colour
    for name, values in others:
        far = [
            abs(a - b) / (b if relative else 1) or None for a, b in zip(values, base, strict=True)
        ]
        axes.plot(
            range(1, len(far) + 1), [float("nan") if d is None else d for d in far], label=name
        )
    axes.axhline(gap.bar, color="black", linestyle="--", linewidth=0.8)
    axes.annotate(
        f"bar {gap.bar:g}; widest gap of any two {gap.gap:.1e}, step {gap.step}",
        (0.01, gap.bar), xycoords=("axes fraction", "data"), fontsize=8, va="bottom",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--runs", type=Path, help="keep the runs here; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if not (ROOT / "data" / "smoke" / "manifest.json").exists():
        raise SystemExit("data/smoke is missing: make data/smoke/manifest.json")
    with tempfile.TemporaryDirectory() as scratch:
        # Always in folders of their own: a run that is there already would be resumed.
        runs = Path(tempfile.mkdtemp(dir=args.runs)) if args.runs else Path(scratch)
        curves = {
            name: curves_of(name, steps=args.steps, runs=runs, lr=args.lr) for name in args.only
        }
    found: dict[str, Curves] = {key: {name: c[key] for name, c in curves.items()} for key in BARS}
    gaps = {
        key: widest(found[key], bar=bar, relative=key == "grad_norm") for key, bar in BARS.items()
    }
    held = all(gap.holds for gap in gaps.values())
    args.out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        **provenance(),
        "run": "configs/runs/smoke.yaml",
        "lr": args.lr,
        "steps": args.steps,
        "ranks": {name: RUNS[name][0] for name in args.only},
        "held": held,
        "widest": {key: asdict(gap) for key, gap in gaps.items()},
        **{key: dict(values) for key, values in found.items()},
    }
    (args.out / "losses.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(found, gaps, args.out / "losses.png", lr=args.lr)
    for key, gap in gaps.items():
        words = "holds" if gap.holds else "IS BROKEN"
        print(
            f"{key}: widest gap {gap.gap:.2e} at step {gap.step} between {gap.between}; {gap.bar:g} {words}"
        )
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
