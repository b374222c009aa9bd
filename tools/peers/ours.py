"""lmscale's engines, built as `lmscale train` builds them."""

import torch
from task import Pace, Task
from torch import Tensor

from lmscale.base.batch import Batch, Stream
from lmscale.base.world import World
from lmscale.config.schema import EngineConfig, ModelConfig, OptimConfig, RunConfig
from lmscale.distributed.mesh import make_mesh
from lmscale.distributed.process_group import distributed
from lmscale.engine.build import build_engine
from lmscale.model.build import build_model


def config_of(task: Task) -> RunConfig:
    """options: keys of the run file's engine section."""
    return RunConfig.model_construct(
        model=ModelConfig(
            num_layers=task.layers,
            hidden_size=task.width,
            num_heads=task.heads,
            ffn_hidden_size=task.feed_forward,
            norm_eps=task.norm_eps,
            rope_theta=task.rope_theta,
        ),
        engine=EngineConfig(precision=task.precision, **task.options),
        optim=OptimConfig(
            lr=task.lr,
            betas=task.betas,
            eps=task.eps,
            weight_decay=task.weight_decay,
            max_grad_norm=task.clip,
        ),
    )


def run(task: Task, pace: Pace) -> None:
    cfg, world, device = config_of(task), World(), torch.device("cpu")
    model = build_model(cfg.model, vocab_size=task.vocab, max_positions=task.length)
    model.load_state_dict(task.weights())
    with distributed(world, device=device):
        engine = build_engine(cfg, model, make_mesh(cfg.parallel, world, "cpu"), device)
        pace.wait()
        for tokens, targets in task.batches():
            result = engine.step([batch_of(tokens, targets)], lr=task.lr)
            pace.done(result.loss, result.grad_norm)


def batch_of(tokens_BL: Tensor, targets_BL: Tensor) -> Batch[Tensor]:
    rows, length = tokens_BL.shape
    stream = Stream(tokens_BL, torch.arange(length).repeat(rows, 1), None)
    return Batch(stream, None, targets_BL, torch.ones(rows, length), torch.arange(rows))
