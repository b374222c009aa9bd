"""Hand-written loops, and torch's and DeepSpeed's engines used directly, around the hand-written model."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from hand_model import HandModel
from task import Pace, Task
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

Step = Callable[[Tensor, Tensor], tuple[Any, Any]]


def run(task: Task, pace: Pace) -> None:
    """options: way, one of WAYS; compile: each block; stage: ZeRO's."""
    with _group(task.options["way"] in ("ddp", "fsdp2", "deepspeed")):
        step = WAYS[task.options["way"]](task)
        pace.wait()
        for tokens, targets in task.batches():
            pace.done(*step(tokens, targets))


def plain(task: Task) -> Step:
    """What a page of PyTorch does in fp32."""
    return _loop(task, contextlib.nullcontext, _model(task))


def autocast(task: Task) -> Step:
    """The same in bf16, as most people write it: fp32 weights, operators cast on the way."""
    return _loop(task, _autocast, _model(task))


def masters(task: Task) -> Step:
    """bf16 weights, and fp32 copies that the optimizer updates."""
    model = _model(task)
    weights = list(model.parameters())
    wide = [nn.Parameter(weight.detach().clone()) for weight in weights]
    names = [name for name, _ in model.named_parameters()]
    adam = _adam(task, zip(names, wide, strict=True))
    model.to(torch.bfloat16)

    def step(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = model(tokens, targets)
        loss.backward()
        for master, weight in zip(wide, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        norm = clip_grad_norm_(wide, task.clip)
        adam.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, wide)
        return loss.detach(), norm

    return step


def ddp(task: Task) -> Step:
    """DistributedDataParallel, in a world of one as everywhere; bf16 by autocast."""
    model = nn.parallel.DistributedDataParallel(_model(task), gradient_as_bucket_view=True)
    lowered = contextlib.nullcontext if task.precision == "fp32" else _autocast
    return _loop(task, lowered, model)


def fsdp2(task: Task) -> Step:
    """fully_shard of each block and of the rest, clip_grad_norm_, AdamW over DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, mesh = _model(task), init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy()
    if task.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.decoder.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    adam = _adam(task, model.named_parameters())

    def step(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = model(tokens, targets)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), task.clip)
        adam.step()
        adam.zero_grad()
        return loss.detach(), norm.full_tensor()

    return step


def deepspeed(task: Task) -> Step:
    """deepspeed.initialize with a dict as its documentation has it, its own clipping, torch's AdamW.

    Set apart from the defaults: buckets of the model's size (the default allocates 2 GB), and no kernel that
    is compiled at the start.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model, bucket = _model(task), 1 << 24
    config = {
        "train_micro_batch_size_per_gpu": task.rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": task.clip,
        "bf16": {"enabled": task.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": task.options["stage"],
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=_adam(task, model.named_parameters()), config=config
    )

    def step(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        return loss.detach(), engine.get_global_grad_norm()

    return step


def products(task: Task) -> Step:
    """No training: matrix products and nothing else, the most that this machine can do."""
    dtype = torch.bfloat16 if task.precision == "bf16" else torch.float32
    left, right = torch.randn(2, *(2 * [task.options["size"]])).to(dtype)

    def step(tokens: Tensor, targets: Tensor) -> tuple[None, None]:
        for _ in range(task.options["times"]):
            torch.mm(left, right)
        return None, None

    return step


WAYS = {way.__name__: way for way in (plain, autocast, masters, ddp, fsdp2, deepspeed, products)}


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def _loop(task: Task, lowered: Callable[[], Any], model: nn.Module) -> Step:
    adam = _adam(task, model.named_parameters())

    def step(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with lowered():
            loss = model(tokens, targets)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), task.clip)
        adam.step()
        adam.zero_grad()
        return loss.detach(), norm

    return step


def _model(task: Task) -> HandModel:
    model = HandModel(task)
    if task.options.get("compile"):
        for block in model.decoder.blocks:
            block.compile(dynamic=False)
    return model


def _adam(task: Task, named: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        task.groups(named), lr=task.lr, betas=task.betas, eps=task.eps, fused=True
    )


@contextlib.contextmanager
def _group(wanted: bool) -> Iterator[None]:
    if wanted:
        for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
            os.environ[key] = str(value)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
