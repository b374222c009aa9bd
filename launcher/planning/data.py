"""`lmscale plan --data`: which sample each rank reads where."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.planning.places import placed
from launcher.planning.standing import standing
from lmscale.config.length import total_steps
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError, DataError, Problem


def data_rows(cfg: RunConfig, steps: str | None, env: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One row a sample of the steps A:B (both included, from 1; all steps without)."""
    from lmscale.corpus.manifest import resolve
    from lmscale.corpus.order import Order
    from lmscale.corpus.plan import rows
    from lmscale.corpus.reader import Reader

    place, stands = placed(cfg, env), standing(cfg)
    reader = Reader(
        resolve(Path(cfg.data.corpora[0].path)), seq_len=cfg.train.seq_len, memory_bytes=0
    )
    if reader.num_samples == 0:
        raise DataError(f"{reader.path} holds no sample of {cfg.train.seq_len} tokens")
    order = Order(
        reader.num_samples,
        reader.samples_per_chunk,
        stands.streams,
        window=cfg.data.shuffle_window,
        seed=cfg.train.seed,
    )
    last = total_steps(cfg, lambda: reader.num_samples, step=stands.step, position=stands.position)
    found = rows(
        reader,
        order,
        steps=_steps(steps, last),
        phases=stands.phases,
        dp_size=place.mesh.dp,
        tp_size=place.mesh.tp,
    )
    return (dict(row) for row in found)


def row_in_words(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['position']:>10}  epoch {row['epoch']}  sample {row['sample']:>8}  "
        f"rank {row['rank']:>4}  {row['shard']} at {row['offset']}, {row['bytes']} bytes"
    )


def _steps(text: str | None, last: int) -> range:
    match = re.fullmatch(r"(\d+):(\d+)", text or f"1:{last}")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        hint = "write first:last, both included, from 1, e.g. 1:10"
        raise ConfigError([Problem("--steps", f"cannot read {text!r}", hint)])
    return range(int(match[1]), int(match[2]) + 1)
