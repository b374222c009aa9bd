"""How a start becomes the run's newest attempt, from which checkpoint it resumes, and what a checkpoint
contains besides tensors: identity, placement, provenance and the train state.

choose   rank 0 lists checkpoints; identity and `finished` are judged before anything is touched
claim    attempts/k.json with from: null ends older attempts at their next publish
load     all ranks; a checkpoint proven damaged is left out, loudly, and the next one is tried
settle   from = the loaded step fences what older attempts publish late; list once more
cut      metrics, eval and trace lines after that step go, by copy and rename
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lmscale.base.errors import CheckpointError, ConfigError, Problem, RetryableError, UsageError
from lmscale.checkpoint.load import load_checkpoint
from lmscale.checkpoint.torch_dcp import Mismatch
from lmscale.checks.resume_checks import check_identity, read_checkpoint
from lmscale.config.identity import differing, fingerprint, identity, placement
from lmscale.config.schema import RunConfig
from lmscale.engine.base import Engine
from lmscale.run_folder import attempts
from lmscale.run_folder.checkpoints import MANIFEST, newest_valid, reason_to_reload
from lmscale.run_folder.paths import RunFolder, parse_checkpoint_name
from lmscale.train.environment import provenance
from lmscale.train.run_context import RunContext
from lmscale.train.run_corpora import Corpora

log = logging.getLogger(__name__)

_RELOADS = 2  # a newer checkpoint may be published while we load; then load again, this often


@dataclass(slots=True)
class TrainState:
    """The progress of a run. Stored as JSON in the checkpoint's manifest."""

    step: int = 0  # optimizer steps done, skipped ones included
    position: int = 0  # samples consumed, globally: the whole data cursor
    updates: int = 0  # updates that the optimizer applied (Adam's step count)
    skipped: int = 0  # steps skipped in a row for a gradient norm that was not finite
    streams: int = 0  # virtual streams of the order: resolved once, at the run's first start
    journal: list[dict[str, Any]] = field(
        default_factory=list
    )  # changes of identity keys on the way (train.allow_change): position, step, key, before, now

    def as_json(self) -> dict[str, Any]:
        """For the checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "TrainState":
        """From a checkpoint's manifest."""
        return cls(**body)


def run_identity(cfg: RunConfig, corpora: Corpora, *, streams: int) -> dict[str, Any]:
    """The run's identity, with the fingerprints of what it reads."""
    manifest = corpora.manifest
    found = identity(
        cfg,
        corpora=[manifest.fingerprint],
        tokenizer=manifest.tokenizer.fingerprint,
        streams=streams,
    )
    return dict(found)


def placement_facts(rank: RunContext) -> dict[str, Any]:
    """How this start is laid out, for attempts/k.json."""
    mesh, cfg = rank.mesh, rank.cfg
    return {
        "world_size": mesh.world.size,
        "engine": cfg.engine.kind,
        "zero_stage": cfg.engine.zero_stage if cfg.engine.traits.uses_zero_stage else None,
        "replicate": mesh.replicate_size if cfg.engine.traits.shards_parameters else mesh.dp_size,
        "shard": mesh.shard_size if cfg.engine.traits.shards_parameters else 1,
        "tp": mesh.tp_size,
        "sequence_parallel": cfg.parallel.sequence_parallel,
        "micro_batch": cfg.train.micro_batch_size,
    }


def checkpoint_body(
    rank: RunContext, current_identity: Mapping[str, Any], state: TrainState
) -> dict[str, Any]:
    """The manifest's body of this attempt's checkpoints, without the state that changes per step."""
    cfg = rank.cfg
    config = cfg.model_dump(mode="json", by_alias=True)
    order = {
        "version": 1,
        "seq_len": cfg.train.seq_len,
        "streams": state.streams,
        "shuffle_window": cfg.data.shuffle_window_chunks,
        "mix_block": cfg.data.mix_block,
    }
    return {
        "identity": dict(current_identity),
        "fingerprints": {
            "identity": fingerprint(current_identity),
            "placement": fingerprint(placement(cfg)),
        },
        "config": config,
        "provenance": provenance(config, rank.mesh.world),
        "state": {"seed": cfg.train.seed, "order": order},
    }


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A checkpoint to resume from."""

    path: Path
    step: int
    body: Mapping[str, Any]
    foreign: bool = False  # of another run (train.resume: PATH)


def choose(rank: RunContext, *, damaged: frozenset[Path] = frozenset()) -> ResumePoint | None:
    """The checkpoint to resume from; None: the run has none yet. Called on rank 0.

    The newest valid one of the run folder, else the one that train.resume names. Raises CheckpointError
    when the folder's, or the one named, are all damaged (`damaged` adds those that a load has proven so),
    ConfigError when train.resume forbids to resume or names no checkpoint.
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
                    f"never, but {folder.path} contains checkpoints",
                    "choose another train.run_dir, or train.resume: auto",
                )
            ]
        )
    return resume_point_of(found.path)


def _foreign(path: Path, damaged: frozenset[Path]) -> ResumePoint:
    """The checkpoint of another run, which nothing replaces where it is damaged."""
    named = parse_checkpoint_name(path.name) is not None  # then a missing manifest is damage
    if not path.is_dir() or not (named or (path / MANIFEST).is_file()):
        fact = f"{path} is not a checkpoint, and neither auto nor never"
        hint = "name a folder RUN/checkpoints/step-*, or leave the key out"
        raise ConfigError([Problem("train.resume", fact, hint)])
    if path in damaged:
        raise CheckpointError(
            f"{path} (train.resume) is damaged; restore it, or name another checkpoint of its run"
        )
    return resume_point_of(path, foreign=True)


def report_damage(rank: RunContext, path: Path, error: Exception) -> None:
    """Report a damaged checkpoint, which is skipped, as a warning and an event."""
    if rank.is_root:
        log.warning("checkpoint %s is damaged and skipped: %s", path, error)
    rank.write_event("damage", path=str(path), reason=str(error))


class AttemptClaim:
    """The number of this start's attempt, and the steps that make it the run's newest."""

    def __init__(self, rank: RunContext) -> None:
        self.number = 0
        self._rank = rank
        self._damaged: frozenset[Path] = frozenset()
        self._identity: Mapping[str, Any] = {}

    def claim_and_load(
        self,
        engine: Engine,
        source: ResumePoint | None,
        *,
        placement: Mapping[str, Any],
        current_identity: Mapping[str, Any],
    ) -> ResumePoint | None:
        """Claim, load and settle. Collective. The checkpoint that was loaded; None for a fresh run.

        `current_identity` has been compared with that of `source`; any other checkpoint is compared too.
        """
        rank, self._identity = self._rank, current_identity
        self.number = rank.on_root(lambda: attempts.claim(rank.folder, dict(placement)))
        for _ in range(_RELOADS + 1):
            source = self._load(engine, source)
            overtaking = rank.on_root(partial(self._settle, source))
            if not overtaking:
                return source
            if rank.is_root:
                log.warning("loading again: %s", overtaking)
            source = self._choose_again()
        raise RetryableError(
            f"{rank.folder.path}: checkpoints kept appearing or vanishing while loading; another start of "
            "this run is still publishing. Start again when it has ended"
        )

    def _load(self, engine: Engine, source: ResumePoint | None) -> ResumePoint | None:
        """Load `source` or, where it is proven damaged, the next one down that is not."""
        while source is not None:
            damage = self._try_load(engine, source)
            if damage is None:
                break
            report_damage(self._rank, source.path, damage)
            self._damaged |= {source.path}
            source = self._choose_again()
        return source

    def _choose_again(self) -> ResumePoint:
        """Another checkpoint may be of before a change that train.allow_change had to allow."""
        source = self._rank.on_root(partial(choose, self._rank, damaged=self._damaged))
        if source is None:  # the engine may hold what it loaded: so this would not be a fresh run
            raise RetryableError(
                f"{self._rank.folder.path}: the checkpoint vanished while it was loaded, and no other is "
                "left; start again"
            )
        check_identity(self._rank.cfg, source.body, self._identity)
        return source

    def _try_load(self, engine: Engine, source: ResumePoint) -> CheckpointError | None:
        """None when all ranks loaded; else the damage, the same on all ranks. Collective."""
        try:
            load_checkpoint(source.path, engine.state(loading=True))
        except Mismatch:  # sound, but of another model: an older one would not fit either
            raise
        except CheckpointError as error:
            return error
        state = source.body["state"]
        engine.finish_load(
            optim_step=int(state["train"]["updates"]), loss_scale=state.get("loss_scale")
        )
        return None

    def _settle(self, source: ResumePoint | None) -> str:
        """Set `from`; if that came too late, take it back and return the reason."""
        folder = self._rank.folder
        foreign = str(source.path) if source and source.foreign else None
        attempts.settle(folder, self.number, source.step if source else 0, source=foreign)
        own = source.path if source and not source.foreign else None
        why = reason_to_reload(folder, self.number, loaded=own, damaged=self._damaged)
        if why:
            attempts.settle(folder, self.number, None)
        return why


def resume_point_of(path: Path, *, foreign: bool = False) -> ResumePoint:
    """A checkpoint to resume from. Raises CheckpointError where its manifest is damaged."""
    body = read_checkpoint(path)
    return ResumePoint(path, int(body["step"]), body, foreign)


def resumed_state(source: ResumePoint | None, cfg: RunConfig) -> TrainState:
    """The state to resume with."""
    if source is None:
        return TrainState(streams=cfg.data.streams or cfg.train.global_batch_size)
    state = TrainState.from_json(source.body["state"]["train"])
    if cfg.data.streams is not None:  # another number than before is a change of identity
        state.streams = cfg.data.streams
    return state


def note_changes(state: TrainState, source: ResumePoint | None, now: Mapping[str, Any]) -> None:
    """Record in the journal which identity keys change from this start on."""
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


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint, the run file it was trained with, and its manifest's body."""

    path: Path
    step: int
    cfg: RunConfig
    body: Mapping[str, Any]

    @property
    def run_dir(self) -> Path:
        """The run folder, if the checkpoint is in one."""
        return self.path.parent.parent


def check_tokenizer(trained: TrainedModel, fingerprint: str) -> None:
    """Raise ConfigError where a tokenizer is not the one of the checkpoint: its ids would mean other texts."""
    wanted = trained.body.get("identity", {}).get("data.tokenizer", fingerprint)
    if fingerprint != wanted:
        fact = (
            f"the tokenizer found now ({fingerprint[:12]}) is not the one that {trained.path} was trained "
            f"with ({wanted[:12]})"
        )
        corpus = trained.cfg.data.corpora[0].path
        raise ConfigError([Problem("data.tokenizer", fact, f"restore the corpus {corpus}")])


def find_trained(path: Path) -> TrainedModel:
    """A checkpoint folder, or the newest valid checkpoint of a run folder. Raises UsageError, CheckpointError."""
    if not path.is_dir():
        raise UsageError(
            f"{path} is not a folder; give a run folder or one of its checkpoints/step-*"
        )
    if (path / "checkpoints").is_dir():
        found = newest_valid(RunFolder(path))
        if found is None:
            raise CheckpointError(
                f"{path} contains no valid checkpoint; check it with `lmscale verify {path}`"
            )
        path = found.path
    body = read_checkpoint(path)
    return TrainedModel(path, int(body["step"]), RunConfig.model_validate(body["config"]), body)
