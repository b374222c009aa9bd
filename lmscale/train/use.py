"""A trained model at work: scored by any number of ranks, or loaded whole in this process."""

import logging
from pathlib import Path

from lmscale.checkpoint.load import load
from lmscale.config.run import RunConfig
from lmscale.dist.group import choose_device, distributed
from lmscale.dist.mesh import make_mesh
from lmscale.engine.build import build_engine
from lmscale.model.language import LanguageModel
from lmscale.run.folder import RunFolder
from lmscale.train.corpora import open_corpora
from lmscale.train.parts import model_of, validation_of
from lmscale.train.rank import Rank
from lmscale.train.record import Line
from lmscale.train.restore import Trained, check_tokenizer
from lmscale.world import World

log = logging.getLogger(__name__)


def score(trained: Trained, world: World) -> list[Line]:
    """Validation of a checkpoint's weights by any number of ranks, the lines of eval.jsonl."""
    cfg = trained.cfg
    corpora = open_corpora(cfg, world_size=world.size)
    check_tokenizer(trained, corpora.manifest.tokenizer.fingerprint)
    device = choose_device(world)
    with distributed(world, device=device):
        mesh = make_mesh(cfg.parallel, world, device.type)
        rank = Rank(cfg, mesh, device, RunFolder(trained.run_dir), None)
        model = model_of(cfg, corpora.manifest.tokenizer.vocab_size)
        engine = build_engine(cfg, model, mesh, device)
        tensors = {name: t for name, t in engine.state().items() if name.startswith("model.")}
        load(trained.path, tensors)
        return validation_of(rank, corpora).score(engine, rank, step=trained.step)


def load_model(cfg: RunConfig, checkpoint: Path, *, vocab_size: int) -> LanguageModel:
    """A model with a checkpoint's weights, in this process."""
    model = model_of(cfg, vocab_size)
    load(checkpoint, {f"model.{name}": p.data for name, p in model.named_parameters()})
    model.eval()
    return model
