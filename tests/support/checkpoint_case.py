"""One set of global tensors, presented by any number of ranks in every layout an engine may have."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from lmscale.base.errors import LmscaleError
from lmscale.checkpoint.fragment import Fragment, TpShard
from lmscale.checkpoint.load import load_checkpoint
from lmscale.checkpoint.save import save_checkpoint
from lmscale.run_folder.paths import RunFolder

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embedding.weight": (130, 10_007),  # more than one 4 MiB block, no power of two anywhere
    "model.q.weight": (10, 6),
    "model.norm.weight": (7,),
    "model.few_rows": (2, 12),  # fewer rows than ranks: empty shards
    "model.scalar": (),
    "model.nothing": (0, 4),
    "optim.exp_avg.q.weight": (10, 6),
}
KINDS = ("plain", "rows", "columns", "replicated_rows", "flat", "flat_tp")


def whole(name: str) -> torch.Tensor:
    made = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(SHAPES[name], generator=made)


def present(kind: str, *, blank: bool = False) -> dict[str, torch.Tensor]:
    """This rank's view of all tensors; `blank` to load into."""
    values = {
        name: torch.full_like(w, -7.0) if blank else w for name in SHAPES for w in [whole(name)]
    }
    values["optim.count"] = torch.tensor(-7 if blank else 123)
    layouts = {
        "plain": lambda: {},
        "rows": lambda: _dtensors(values, init_device_mesh("cpu", (dist.get_world_size(),)), 0),
        "columns": lambda: _dtensors(values, init_device_mesh("cpu", (dist.get_world_size(),)), 1),
        "replicated_rows": lambda: _dtensors(values, init_device_mesh("cpu", (2, 2)), 0),
        "flat": lambda: _fragments(values, dist.get_rank(), dist.get_world_size()),
        "flat_tp": lambda: _tp_fragments(values),
    }
    return {**values, **layouts[kind]()}


def _dtensors(
    values: dict[str, torch.Tensor], mesh: DeviceMesh, dim: int
) -> dict[str, torch.Tensor]:
    def placements(tensor: torch.Tensor) -> list[Placement]:
        last: Placement = Shard(min(dim, tensor.dim() - 1)) if tensor.dim() else Replicate()
        return [Replicate()] * (mesh.ndim - 1) + [last]

    return {
        name: distribute_tensor(tensor, mesh, placements(tensor), src_data_rank=None)
        for name, tensor in values.items()
    }


def _fragments(values: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
    """As ZeRO: all parameters in one flat line, cut into equal pieces wherever that falls."""
    total = sum(tensor.numel() for tensor in values.values() if tensor.is_floating_point())
    begin, end = total * rank // size, total * (rank + 1) // size
    fragments, at = {}, 0
    for name, tensor in values.items():
        if tensor.is_floating_point():
            first = min(max(begin - at, 0), tensor.numel())
            last = min(max(end - at, 0), tensor.numel())
            fragments[name] = Fragment(tensor.flatten()[first:last], first, tensor.shape)
            at += tensor.numel()
    return fragments


def _tp_fragments(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two TP ranks split dim 1 (or share the whole), the dp ranks of each cut it flat."""
    dp_rank, tp_rank = divmod(dist.get_rank(), 2)
    dp_size = dist.get_world_size() // 2
    fragments: dict[str, torch.Tensor] = {}
    for name, tensor in values.items():
        if not tensor.is_floating_point():
            continue
        split = TpShard(1, tp_rank, 2) if tensor.dim() == 2 and tensor.shape[1] % 2 == 0 else None
        local = tensor.chunk(2, dim=1)[tp_rank] if split else tensor
        count = local.numel()
        first, last = count * dp_rank // dp_size, count * (dp_rank + 1) // dp_size
        flat = local.flatten()[first:last].clone()
        writes = split is not None or tp_rank == 0
        fragments[name] = Fragment(flat, first, local.shape, split=split, writes=writes)
    return fragments


def differences(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Which of this rank's parts do not hold what they should."""
    wrong = [] if int(_local(tensors["optim.count"])) == 123 else ["optim.count"]
    for name in SHAPES:
        tensor, want = tensors[name], whole(name)
        if isinstance(tensor, Fragment):
            pairs = [
                (box, want[tuple(slice(o, o + n) for o, n in zip(at, box.shape, strict=True))])
                for at, box in tensor._boxes.items()
            ]
        elif isinstance(tensor, DTensor):
            again = distribute_tensor(
                want, tensor.device_mesh, tensor.placements, src_data_rank=None
            )
            pairs = [(tensor.to_local(), again.to_local())]
        else:
            pairs = [(tensor, want)]
        if not all(torch.equal(*pair) for pair in pairs):
            wrong.append(name)
    return wrong


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_as(folder: str, kind: str, step: int) -> str:
    tensors = present(kind)
    return str(
        save_checkpoint(RunFolder(Path(folder)), tensors, step=step, attempt=1, body={"kind": kind})
    )


def save_equal(folder: str) -> str:
    """Eight replicated tensors of one size."""
    tensors = {f"model.{number}": torch.zeros(1000) for number in range(8)}
    return str(save_checkpoint(RunFolder(Path(folder)), tensors, step=1, attempt=1, body={}))


def load_as(path: str, kind: str) -> list[str]:
    tensors = present(kind, blank=True)
    load_checkpoint(Path(path), tensors)
    return differences(tensors)


def try_load(path: str) -> tuple[str, str]:
    """Load rows; the error's class and text."""
    try:
        load_checkpoint(Path(path), present("rows", blank=True))
    except LmscaleError as error:
        return type(error).__name__, str(error)
    return "fine", ""


def save_with_fault(folder: str, fault: str, rank: int, step: int) -> tuple[str, str]:
    """Save rows; on one rank the fault strikes when its file is written and about to be synced."""
    real = os.fsync

    def strike(descriptor: int) -> None:
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
            return real(descriptor)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "io":
            raise OSError(5, "Input/output error", "disk")
        raise ZeroDivisionError("a bug in the writer")

    if dist.get_rank() == rank:
        os.fsync = strike  # type: ignore[assignment]
    try:
        return "fine", save_as(folder, "rows", step)
    except LmscaleError as error:
        return type(error).__name__, str(error)
    finally:
        os.fsync = real


def save_numbers(folder: str, numbers: int, step: int) -> tuple[str, str]:
    """Save `numbers` fp32 numbers on every rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = torch.zeros(dist.get_world_size(), numbers)
    parts = {"model.w": distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)}
    try:
        path = save_checkpoint(RunFolder(Path(folder)), parts, step=step, attempt=1, body={})
    except LmscaleError as error:
        return type(error).__name__, str(error)
    return "fine", path.name


def save_mixed_precision(folder: str) -> tuple[str, str]:
    """One rank hands over bf16."""
    dtype = torch.bfloat16 if dist.get_rank() == 1 else torch.float32
    try:
        save_checkpoint(
            RunFolder(Path(folder)),
            {"model.w": torch.ones(4, dtype=dtype)},
            step=1,
            attempt=1,
            body={},
        )
    except LmscaleError as error:
        return type(error).__name__, str(error)
    return "fine", ""
