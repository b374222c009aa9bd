"""What one rank really holds, in bytes: run on the ranks of a pool (tests/support/rank_pool.py) for bench_memory.py."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint as recomputation
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from lmscale.base.batch import Batch, Stream
from lmscale.base.world import World
from lmscale.config.schema import EngineConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig
from lmscale.distributed.mesh import Mesh, make_mesh
from lmscale.engine import base
from lmscale.engine.build import build_engine
from lmscale.model.build import build_model

VOCAB, ROWS, LENGTH = 512, 1, 128
# Many small matrices: ZeRO keeps the gradient of one that straddles two ranks whole, which is not in the formula.
MODEL = {"num_layers": 12, "hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 384}


@dataclass(frozen=True)
class Setting:
    """Keys of the run file's sections. Every rank has ROWS x LENGTH tokens a step."""

    engine: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)

    def config(self) -> RunConfig:
        return RunConfig.model_construct(
            model=ModelConfig(**MODEL),
            engine=EngineConfig(**self.engine),
            optim=OptimConfig(lr=1e-3),
            parallel=ParallelConfig(**self.parallel),
        )


@dataclass(frozen=True)
class Held:
    """Bytes of one rank."""

    parameters: int  # between two steps
    gradients: int  # when the update is made
    optimizer: int  # moments and counters; masters where weights are kept in a lower precision
    saved: int  # for the backward, at the end of the decoder's forward
    peak: int  # allocated in a step, all of it


def held(setting: Setting) -> dict[str, int]:
    """Of a real engine on this rank, after a first step. Collective."""
    cfg, before = setting.config(), everything()
    model = build_model(cfg.model, vocab_size=VOCAB, max_positions=LENGTH)
    engine = build_engine(cfg, model, _mesh(cfg.parallel), torch.device("cpu"))
    engine.step([batch()], lr=1e-3)  # buckets and buffers of the first step
    stands = everything() - before
    saved = _Saved(model)
    with _gradients(engine) as gradients, saved.watching():
        engine.step([batch()], lr=1e-3)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        engine.step([batch()], lr=1e-3)
    weights = _storages(weight.tensor for weight in engine.weights())
    optimizer = _optimizer(engine)
    found = Held(
        sum(weights.values()),
        gradients[0],
        sum(size for place, size in optimizer.items() if place not in weights),
        saved.bytes,
        stands + _highest(events),
    )
    return asdict(found)


def batch() -> Batch[Tensor]:
    tokens_BL = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % VOCAB
    stream = Stream(tokens_BL, torch.arange(LENGTH).repeat(ROWS, 1), None)
    return Batch(stream, None, tokens_BL, torch.ones(ROWS, LENGTH), torch.arange(ROWS))


def everything() -> int:
    """All tensors that this process holds."""
    gc.collect()
    # By type, not isinstance: that asks proxies of deprecated names for their class, and they warn.
    return sum(_storages(o for o in gc.get_objects() if issubclass(type(o), Tensor)).values())


@cache
def _mesh_of(replicate: int, tp: int) -> Mesh:
    rank, size = dist.get_rank(), dist.get_world_size()
    return make_mesh(
        ParallelConfig(dp_replicate=replicate, tp=tp), World(rank, rank, size, size), "cpu"
    )


def _mesh(sizes: ParallelConfig) -> Mesh:
    return _mesh_of(sizes.dp_replicate, sizes.tp)


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Each storage once: address -> bytes."""
    found = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        if storage.data_ptr():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _optimizer(engine: Any) -> dict[int, int]:
    """What torch's AdamW keeps, and what it updates."""
    adam = engine._optimizer
    kept = [t for values in adam.state.values() for t in values.values() if torch.is_tensor(t)]
    updated = [p for group in adam.param_groups for p in group["params"]]
    return _storages([*kept, *updated, *adam.state])


@contextmanager
def _gradients(engine: Any) -> Iterator[list[int]]:
    """Bytes of what the global norm is summed over, which every engine passes to engine/base.py, and of the update's.

    The second is the first, but for ZeRO in fp32, which makes a flat copy for the update.
    """
    result, kept = [0], {}
    count = base.sum_of_squares

    def look(tensors: Any, device: torch.device) -> Tensor:
        keep(tensors)
        return count(tensors, device)

    def keep(tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.numel():  # an empty one may be a view of something else
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    def look_again(adam: torch.optim.Optimizer, *_: Any) -> None:
        updated = [p for group in adam.param_groups for p in group["params"]]
        keep(p.grad for p in updated if p.grad is not None)

    base.sum_of_squares = look
    handle = engine._optimizer.register_step_pre_hook(look_again)
    try:
        yield result
    finally:
        base.sum_of_squares = count
        handle.remove()
        result[0] = sum(storage.nbytes() for storage in kept.values())


class _Saved:
    """Bytes that the decoder's forward leaves for its backward, weights and the batch's integers left out.

    By the hooks of saved tensors. What selective recomputation keeps never becomes a saved tensor: it lies in the
    dictionaries of torch's caching mode, which are looked into. Nor do rotary angles where blocks are recomputed:
    they travel in the blocks' context.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._model = model
        self._kept: dict[int, Any] = {}  # storages: held, so that no address is used twice
        self._caches: list[Any] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a step."""
        decoder = self._model.get_submodule("decoder")
        handles = [
            decoder.register_forward_pre_hook(lambda *_: self._hooks.__enter__()),
            decoder.get_submodule("blocks.0").register_forward_pre_hook(self._see_context),
            decoder.register_forward_hook(self._end),
        ]
        made, caches = recomputation._CachingTorchDispatchMode.__init__, self._caches

        def remember(self: Any, policy: Any, storage: Any, *rest: Any, **named: Any) -> None:
            caches.append(storage)
            made(self, policy, storage, *rest, **named)

        recomputation._CachingTorchDispatchMode.__init__ = remember
        try:
            yield
        finally:
            recomputation._CachingTorchDispatchMode.__init__ = made
            for handle in handles:
                handle.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        # The weights of this moment: gathered, or lowered copies.
        weights = _storages(self._model.parameters())
        for place in _storages([tensor]):
            if tensor.is_floating_point() and place not in weights:
                self._kept[place] = tensor.untyped_storage()
        return tensor

    def _see_context(self, _: Any, args: Any) -> None:
        for tensor in vars(args[1].rotation).values():
            self._keep(tensor)

    def _end(self, *_: Any) -> None:
        self._hooks.__exit__(None, None, None)
        for tensor in _leaves(self._caches):
            self._keep(tensor)
        self.bytes = sum(storage.nbytes() for storage in self._kept.values())
        self._kept.clear()


def _leaves(caches: Iterable[Any]) -> Iterator[Tensor]:
    for storage in caches:
        for value in tree_leaves([list(calls.values()) for calls in storage.values()]):
            tensor = getattr(value, "val", value)
            if isinstance(tensor, Tensor):
                yield tensor


def _highest(found: Any) -> int:
    """The most that a step allocates above what stood before it."""
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
