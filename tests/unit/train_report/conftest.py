import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lmscale.run_folder.paths import RunFolder


class Run(RunFolder):
    """A run folder with hands to write what a run writes."""

    def write(self, path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write_metrics(self, steps: int, **changed: Callable[[int], Any]) -> None:
        self.write(self.metrics, (metric_line(step, **changed) for step in range(1, steps + 1)))

    def write_eval(self, corpus: str, bits: Mapping[int, float], **baselines: float) -> None:
        lines = [
            {"step": 0, "corpus": corpus, "metric": f"bits_per_byte_{name}", "value": value}
            for name, value in baselines.items()
        ]
        for step, value in bits.items():
            for metric, of in (("loss", 1.4), ("bits_per_byte", 1.0)):
                line = {"step": step, "corpus": corpus, "metric": metric, "value": of * value}
                lines.append({**line, "count": 4096})
        with self.eval.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def write_events(self, start: str, events: Iterable[Mapping[str, Any]]) -> None:
        origin = {"start": start, "host": "a-host", "pid": 4242, "ticks": 987654}
        self.write(self.events / f"{start}.jsonl", ({**origin, **event} for event in events))


def metric_line(step: int, **changed: Callable[[int], Any]) -> dict[str, Any]:
    line: dict[str, Any] = {
        "step": step,
        "loss": 2 + 4 / math.sqrt(step),
        "tokens": step * 1000,
        "position": step * 10,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_s": 2000.0,
        "mfu": None,
    }
    return line | {name: value(step) for name, value in changed.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Run:
    run = Run(tmp_path / "tales")
    run.path.mkdir()
    run.config.write_text(
        "model: {num_layers: 2, hidden_size: 128, num_heads: 4}\ntrain: {steps: 100}\n"
    )
    return run
