"""How a start becomes the run's newest attempt, and from which checkpoint it goes on.

choose   rank 0 lists checkpoints; identity and `finished` are judged before anything is touched
claim    attempts/k.json with from: null ends older attempts at their next publish
load     all ranks; a checkpoint proven damaged is left out, loudly, and the next one is tried
settle   from = the loaded step fences what older attempts publish late; list once more
cut      metrics, eval and trace lines after that step go, by copy and rename
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lmscale.checkpoint.load import load, read_body
from lmscale.checkpoint.plan import Mismatch
from lmscale.config.identity import ORDER_KEYS, differing
from lmscale.config.run import RunConfig
from lmscale.engine.protocol import Engine
from lmscale.errors import CheckpointError, ConfigError, Problem, RetryableError
from lmscale.run import attempts
from lmscale.run.checkpoints import newest_valid, reason_to_reload
from lmscale.run.folder import parse_checkpoint_name
from lmscale.run.manifest import MANIFEST
from lmscale.train.rank import Rank
from lmscale.train.state import TrainState

log = logging.getLogger(__name__)

_RELOADS = 2  # a newer checkpoint may be published while we load; then load anew, this often


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to go on from."""

    path: Path
    step: int
    body: Mapping[str, Any]
    foreign: bool = False  # of another run (train.resume: PATH)


def choose(rank: Rank, *, damaged: frozenset[Path] = frozenset()) -> Source | None:
    """The checkpoint to go on from; None: the run has none yet. Called on rank 0.

    The newest valid one of the run folder, else the one that train.resume names. Raises CheckpointError
    when the folder's, or the one named, are all damaged (`damaged` adds those that a load has proven so),
    ConfigError when train.resume forbids to go on or names no checkpoint.
    """
    folder, resume = rank.folder, rank.cfg.train.resume
    found = newest_valid(folder, damaged=damaged)
    if found is None:
        return None if resume in ("auto", "never") else _foreign(Path(resume), damaged)
    if resume == "never":
        raise ConfigError(
            [
                Problem(
                    "train.resume",
                    f"never, but {folder.path} holds checkpoints",
                    "choose another train.run_dir, or train.resume: auto",
                )
            ]
        )
    return source_of(found.path)


def _foreign(path: Path, damaged: frozenset[Path]) -> Source:
    """The checkpoint of another run, which nothing replaces where it is damaged."""
    named = parse_checkpoint_name(path.name) is not None  # then a missing manifest is damage
    if not path.is_dir() or not (named or (path / MANIFEST).is_file()):
        fact = f"{path} is no checkpoint, and neither auto nor never"
        hint = "name a folder RUN/checkpoints/step-*, or leave the key out"
        raise ConfigError([Problem("train.resume", fact, hint)])
    if path in damaged:
        raise CheckpointError(
            f"{path} (train.resume) is damaged; restore it, or name another checkpoint of its run"
        )
    return source_of(path, foreign=True)


def report_damage(rank: Rank, path: Path, error: Exception) -> None:
    """Say loudly that a checkpoint is damaged and left out."""
    if rank.is_root:
        log.warning("checkpoint %s is damaged and left out: %s", path, error)
    rank.write_event("damage", path=str(path), reason=str(error))


def check_identity(cfg: RunConfig, body: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that differ and are allowed to. Raises ConfigError naming those that are not."""
    before = body["identity"]
    changed = differing(before, now)
    refused = [key for key in changed if key not in cfg.train.allow_change]
    if refused:
        raise ConfigError(
            Problem(
                key,
                f"{now.get(key)!r}, but the checkpoint was trained with {before.get(key)!r}",
                "set it back, or choose another train.run_dir"
                if key in ORDER_KEYS
                else f"set it back, or allow it with train.allow_change: [{key}], or choose another train.run_dir",
            )
            for key in refused
        )
    return changed


class Attempt:
    """This start's number, and the moves that make it the run's newest."""

    def __init__(self, rank: Rank) -> None:
        self.number = 0
        self._rank = rank
        self._damaged: frozenset[Path] = frozenset()
        self._same: Mapping[str, Any] = {}

    def begin(
        self,
        engine: Engine,
        source: Source | None,
        *,
        placement: Mapping[str, Any],
        same: Mapping[str, Any],
    ) -> Source | None:
        """Claim, load and settle. Collective. The checkpoint that was loaded; None for a fresh run.

        `same`: this start's identity, which `source` has been held against; another one will be too.
        """
        rank, self._same = self._rank, same
        self.number = rank.on_root(lambda: attempts.claim(rank.folder, dict(placement)))
        for _ in range(_RELOADS + 1):
            source = self._load(engine, source)
            overtaking = rank.on_root(partial(self._settle, source))
            if not overtaking:
                return source
            if rank.is_root:
                log.warning("loading anew: %s", overtaking)
            source = self._choose_anew()
        raise RetryableError(
            f"{rank.folder.path}: checkpoints kept appearing or vanishing while loading; another start of "
            "this run is still publishing. Start again when it has ended"
        )

    def _load(self, engine: Engine, source: Source | None) -> Source | None:
        """Load `source` or, where it is proven damaged, the next one down that is not."""
        while source is not None:
            damage = self._try_load(engine, source)
            if damage is None:
                break
            report_damage(self._rank, source.path, damage)
            self._damaged |= {source.path}
            source = self._choose_anew()
        return source

    def _choose_anew(self) -> Source:
        """Another checkpoint may be of before a change that train.allow_change had to allow."""
        source = self._rank.on_root(partial(choose, self._rank, damaged=self._damaged))
        if source is None:  # the engine may hold what it loaded: that is no fresh run
            raise RetryableError(
                f"{self._rank.folder.path}: the checkpoint vanished while it was loaded, and no other is "
                "left; start again"
            )
        check_identity(self._rank.cfg, source.body, self._same)
        return source

    def _try_load(self, engine: Engine, source: Source) -> CheckpointError | None:
        """None when all ranks loaded; else the damage, the same on all ranks. Collective."""
        try:
            load(source.path, engine.state(loading=True))
        except Mismatch:  # sound, but of another model: an older one would not fit either
            raise
        except CheckpointError as error:
            return error
        state = source.body["state"]
        engine.loaded(optim_step=int(state["train"]["updates"]), loss_scale=state.get("loss_scale"))
        return None

    def _settle(self, source: Source | None) -> str:
        """Set `from`; where that came too late, take it back and say why."""
        folder = self._rank.folder
        foreign = str(source.path) if source and source.foreign else None
        attempts.settle(folder, self.number, source.step if source else 0, source=foreign)
        own = source.path if source and not source.foreign else None
        why = reason_to_reload(folder, self.number, loaded=own, damaged=self._damaged)
        if why:
            attempts.settle(folder, self.number, None)
        return why


def source_of(path: Path, *, foreign: bool = False) -> Source:
    """A checkpoint as a place to go on from. Raises CheckpointError where its manifest is damaged."""
    body = read_body(path)
    return Source(path, int(body["step"]), body, foreign)


def resumed_state(source: Source | None, cfg: RunConfig) -> TrainState:
    """The state to go on with."""
    if source is None:
        return TrainState(streams=cfg.data.streams or cfg.train.global_batch)
    state = TrainState.from_json(source.body["state"]["train"])
    if cfg.data.streams is not None:  # another number than before is a change of identity
        state.streams = cfg.data.streams
    return state


def note_changes(state: TrainState, source: Source | None, now: Mapping[str, Any]) -> None:
    """Enter in the journal which identity keys change where this start goes on."""
    before = source.body["identity"] if source else now
    state.journal = [
        *state.journal,
        *(
            {
                "position": state.position,
                "step": state.step,
                "key": key,
                "before": before.get(key),
                "now": now.get(key),
            }
            for key in differing(before, now)
        ),
    ]
