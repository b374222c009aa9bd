"""How memory follows the mesh; the byte-exact check against real engines is tests/distributed/test_plan_memory.py."""

from typing import Any

import pytest

from lmscale.config.model_spec import decoder_spec
from lmscale.config.schema import EngineConfig, ModelConfig
from lmscale.modelspec.activations import Device
from lmscale.modelspec.parameters import num_elements, parameters
from lmscale.modelspec.spec import ModelSpec
from lmscale_launcher.planner.memory_estimate import (
    HeldMemory,
    MeshSizes,
    checkpoint_bytes,
    held_by,
)


def spec_of(**changes: Any) -> ModelSpec:
    model = ModelConfig(num_layers=4, hidden_size=256, num_heads=8, ffn_hidden_size=1024, **changes)
    return decoder_spec(model, vocab_size=1024, max_positions=64)


SPEC = spec_of()
SIZE = num_elements(parameters(SPEC))


def held(
    mesh: MeshSizes, *, micro_batches: int = 1, device: Device = "cpu", **engine: Any
) -> HeldMemory:
    return held_by(SPEC, EngineConfig(**engine), mesh, micro_batches=micro_batches, device=device)


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_what_is_sharded_falls_with_the_ranks(kind: str) -> None:
    one, many = held(MeshSizes(1, 1, 1), kind=kind), held(MeshSizes(1, 64, 1), kind=kind)
    assert many.optimizer == pytest.approx(one.optimizer / 64, rel=0.01)
    assert many.gradients == pytest.approx(one.gradients / 64, rel=0.01)
    whole = kind == "deepspeed"  # ZeRO-2 keeps whole weights, in bf16
    assert many.parameters == pytest.approx(2 * SIZE if whole else 4 * SIZE / 64, rel=0.01)


def test_replicas_hold_the_same() -> None:
    assert held(MeshSizes(4, 8, 1)) == held(MeshSizes(1, 8, 1))
    ddp = held(MeshSizes(1, 1, 1), kind="ddp")
    assert ddp.parameters == ddp.gradients == 4 * SIZE
    assert held(MeshSizes(8, 1, 1), kind="ddp") == ddp


@pytest.mark.parametrize("mesh", [MeshSizes(1, 64, 1), MeshSizes(8, 1, 1)])
@pytest.mark.parametrize("kind", ["fsdp", "ddp", "deepspeed"])
def test_accumulation_keeps_no_more_gradients(kind: str, mesh: MeshSizes) -> None:
    assert held(mesh, micro_batches=2, kind=kind).gradients == held(mesh, kind=kind).gradients


def test_what_is_offloaded_is_the_hosts() -> None:
    mesh, zero = MeshSizes(1, 8, 1), {"kind": "deepspeed", "zero_stage": 3}
    stays = held(mesh, **zero)
    for offload, moved in (
        ("optimizer", ("gradients", "optimizer")),
        ("all", ("parameters", "gradients", "optimizer")),
    ):
        found = held(mesh, device="cuda", offload=offload, **zero)
        assert found.host == sum(getattr(stays, part) for part in moved)
        assert all(getattr(found, part) == 0 for part in moved)
        assert held(mesh, offload=offload, **zero) == stays  # a CPU is its own host
    assert held(mesh, device="cuda", offload="all").host == 16 * SIZE / 8 + 4 * len(
        parameters(SPEC)
    )


@pytest.mark.parametrize("kind", ["fsdp", "ddp", "deepspeed"])
def test_tensor_parallelism_divides_all_but_the_norms(kind: str) -> None:
    whole, half = held(MeshSizes(1, 1, 1), kind=kind), held(MeshSizes(1, 1, 2), kind=kind)
    for part in ("parameters", "gradients", "optimizer"):
        assert getattr(half, part) == pytest.approx(getattr(whole, part) / 2, rel=0.01), part
        assert getattr(half, part) > getattr(whole, part) / 2


def test_weights_that_stay_gathered_are_counted() -> None:
    stays = held(MeshSizes(1, 64, 1), reshard_after_forward=False)
    block = num_elements(p for p in parameters(SPEC) if p.block) // 4
    assert stays.working - held(MeshSizes(1, 64, 1)).working == 2 * (4 - 2) * block


def test_a_checkpoint_holds_weights_and_two_moments() -> None:
    assert checkpoint_bytes(SPEC, EngineConfig()) == 12 * SIZE
    assert checkpoint_bytes(SPEC, EngineConfig(precision="fp64")) == 24 * SIZE
    frozen = spec_of(trainable=("heads.*",))
    assert checkpoint_bytes(frozen, EngineConfig()) == 4 * SIZE + 8 * 1024 * 256
