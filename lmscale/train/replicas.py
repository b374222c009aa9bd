"""`train.replica_check_every_steps`: are the copies of a parameter on different ranks bitwise equal?

Every rank applies the same gradients to the same weights, so copies stay equal to the last bit. A
flipped bit, a broken core or a lost reduction makes one drift away, and nothing else would show it.
Tensors are compared by a 64-bit digest that is computed on their device.
"""

import logging
import os
import socket
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lmscale.base.errors import LmscaleError, RetryableError
from lmscale.distributed.process_group import gather_objects
from lmscale.distributed.seeds import mix
from lmscale.engine.base import Engine
from lmscale.run_folder.bad_nodes import write_bad_nodes
from lmscale.train.run_context import RunContext

log = logging.getLogger(__name__)

# Elements that are widened to int64 at a time: on a CPU they stay in the cache, on a GPU launches stay few.
_CHUNK = {"cpu": 1 << 18}
_LARGE_CHUNK = 1 << 23
_BETWEEN_CHUNKS = -7046029254386353131  # odd: 2**64 / golden ratio, as a signed number
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
PieceKey = tuple[str, str]  # name of a parameter, and which piece of it
_NAMES_SHOWN = 3


def digest(tensor: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device: the bits times odd numbers by place, summed modulo 2**64.

    One changed element always changes it, for its difference (below 2**32) times an odd number is not 0 modulo
    2**64; other differences cancel with a chance of about 2**-32. Positions count, so swapped values are seen.
    Nothing is copied to the host. 4 GB/s on one CPU core, three times less than crc32c, which no GPU has.
    """
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
    keys = _keys(tensor.device)
    found = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(len(keys)):
        found = found * _BETWEEN_CHUNKS + (chunk * keys[: len(chunk)]).sum()
    return found


@cache
def _keys(device: torch.device) -> Tensor:
    """Odd 64-bit numbers, the same on every rank."""
    count = _CHUNK.get(device.type, _LARGE_CHUNK)
    draw = torch.Generator().manual_seed(20)
    return (torch.randint(-(2**63), 2**63 - 1, (count,), generator=draw) | 1).to(device)


class ReplicaMismatch(RetryableError):
    """Copies of a parameter differ between ranks. A start from the newest checkpoint makes them equal again."""


@dataclass(frozen=True, slots=True)
class ReplicaDifference:
    """Which parameters differ, and which ranks have the wrong copy."""

    names: Sequence[str]
    ranks: Sequence[int]  # the odd ones; without a majority all that hold a copy
    majority: bool


@dataclass(frozen=True, slots=True)
class RankDigests:
    """The node of a rank, and the digest of each piece on the rank."""

    host: str
    digests: Mapping[PieceKey, int]


class Replicas:
    """Compares copies every so many steps, and before each checkpoint. Every method is collective."""

    def __init__(self, rank: RunContext, engine: Engine) -> None:
        self._rank = rank
        self._engine = engine
        self._every = rank.cfg.train.replica_check_every_steps
        self._compared = -1  # step

    def after_step(self, step: int) -> None:
        """Compare every train.replica_check_every_steps steps. Raises ReplicaMismatch."""
        if self._every is not None and step % self._every == 0:
            self._compare(step)

    def before_save(self, step: int) -> None:
        """Compare, if replicas are compared at all: a checkpoint holds one copy, which must not be the wrong one."""
        if self._every is not None and self._compared != step:
            self._compare(step)

    def _compare(self, step: int) -> None:
        """One pass over the local weights, one wait for the device, one small exchange; the rest only on a drift."""
        own = digests_of(self._engine, self._rank.device)
        if differ(gather_objects(by_piece(own))):
            holders = gather_objects(RankDigests(_host(), own))
            drift = judge([holder.digests for holder in holders])
            if drift is not None:
                self._stop(drift, [holder.host for holder in holders], step)
        self._compared = step

    def _stop(self, drift: ReplicaDifference, hosts: Sequence[str], step: int) -> None:
        involved = sorted({hosts[rank] for rank in drift.ranks})
        words = _words(drift, hosts, step)
        # A host that has a bad copy for certain: by majority, or because all suspects are on it.
        bad_hosts = involved if drift.majority or len(involved) == 1 else []
        # All ranks wait here: mpirun kills rank 0 within 0.3 s of the first exit.
        self._rank.on_root(lambda: self._record(drift, involved, bad_hosts, step, words))
        raise ReplicaMismatch(words)

    def _record(
        self,
        drift: ReplicaDifference,
        hosts: Sequence[str],
        bad_hosts: Sequence[str],
        step: int,
        words: str,
    ) -> None:
        try:
            self._rank.write_event(
                "drift",
                step=step,
                ranks=list(drift.ranks),
                hosts=list(hosts),
                majority=drift.majority,
                parameters=list(drift.names),
            )
            write_bad_nodes(self._rank.folder, dict.fromkeys(bad_hosts, words.splitlines()[0]))
        except LmscaleError as error:  # a full disk must not hide the drift
            log.warning("%s", error)


def digests_of(engine: Engine, device: torch.device) -> dict[PieceKey, int]:
    """The digest of every piece that this rank holds. Waits for the device once."""
    places, found = [], []
    for name, piece, tensor in engine.weights():
        places.append((name, piece))
        found.append(digest(tensor).to(device, non_blocking=True))
    values = torch.stack(found).tolist() if found else []
    return dict(zip(places, values, strict=True))


def by_piece(digests: Mapping[PieceKey, int]) -> dict[str, int]:
    """One number for all parameters of which this rank holds the same piece."""
    parts: dict[str, list[int | str]] = defaultdict(list)
    for (name, piece), value in digests.items():
        parts[piece] += (name, value)
    return {piece: mix(*values) for piece, values in parts.items()}


def differ(summaries: Iterable[Mapping[str, int]]) -> bool:
    """Whether two ranks disagree about a piece that both hold."""
    seen: dict[str, int] = {}
    return any(
        seen.setdefault(piece, value) != value
        for summary in summaries
        for piece, value in summary.items()
    )


def judge(ranks: Sequence[Mapping[PieceKey, int]]) -> ReplicaDifference | None:
    """Which ranks hold other bits than most; None where all copies agree.

    Where no value has more than half of the copies, all their holders are suspects, unless one of them is known
    by a majority elsewhere.
    """
    holders: dict[PieceKey, dict[int, int]] = defaultdict(dict)
    for rank, digests in enumerate(ranks):
        for place, value in digests.items():
            holders[place][rank] = value
    names, odd, ties = [], set(), []
    for (name, _), values in holders.items():
        (most, times), *others = Counter(values.values()).most_common()
        if not others:
            continue
        names.append(name)
        if 2 * times > len(values):
            odd |= {rank for rank, value in values.items() if value != most}
        else:
            ties.append(set(values))
    unexplained = [tied for tied in ties if not tied & odd]
    if not names:
        return None
    return ReplicaDifference(
        sorted(set(names)), sorted(odd.union(*unexplained)), majority=not unexplained
    )


def _host() -> str:
    """This node by its scheduler's name, because RUN/bad-nodes is read where nodes are requested."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _words(drift: ReplicaDifference, hosts: Sequence[str], step: int) -> str:
    shown = ", ".join(drift.names[:_NAMES_SHOWN])
    more = len(drift.names) - _NAMES_SHOWN
    names = f"{shown} and {more} more" if more > 0 else shown
    who = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in drift.ranks)
    if drift.majority:
        verdict = f"{who}: other bits than most ranks have"
        advice = "test that host's memory and processor before it trains again"
    else:
        verdict = f"{who}: two values, and no majority that shows which is right"
        advice = "if a host is named again with another peer, that host is bad"
    return (
        f"step {step}: copies of parameters have drifted apart: {names} ({verdict})\n"
        f"The same command resumes from the newest checkpoint, which was compared before it was saved; {advice}"
    )
