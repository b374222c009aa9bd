import os
import signal
import time

import pytest
import torch

from lmscale.config.run_file import load
from lmscale.train import stop_request as signals
from lmscale.train.out_of_memory import explained, is_out_of_memory
from lmscale.train.stop_request import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_is_a_request_and_a_repeat_is_ignored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.signal == number
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_later_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_REPEAT_S", 0.05)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGTERM


def test_the_real_errors_of_torch_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.float32)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def levers(*overrides: str) -> str:
    return str(explained(load("smoke", overrides), MemoryError()))


def test_levers_follow_the_run() -> None:
    cfg = load("smoke")
    text = str(explained(cfg, MemoryError()))
    assert f"train.micro_batch_size={cfg.train.micro_batch_size // 2}" in text
    assert "engine.activation_checkpointing=full" in text
    assert "engine.kind=fsdp" not in text, "the run is sharded already"
    small = cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch_size": 1})})
    assert "train.micro_batch_size=" not in str(explained(small, MemoryError()))


def test_levers_of_splitting_and_offload_are_those_that_the_engine_has() -> None:
    sharded = levers("engine.kind=fsdp")
    assert "parallel.tp=2" in sharded and "engine.offload=all" in sharded
    assert "parallel.sequence_parallel" not in sharded, "nothing to split without tp"
    assert "parallel.sequence_parallel=true" in levers("parallel.tp=2")
    assert "parallel.tp=8" not in levers("parallel.tp=4"), "four heads do not divide by eight"
    staged = levers("engine.kind=deepspeed", "engine.zero_stage=2")
    assert "engine.zero_stage=3" in staged and "engine.offload=optimizer" in staged
    whole = levers("engine.kind=ddp")
    assert "engine.kind=fsdp" in whole and "offload" not in whole


def test_recomputation_is_offered_from_cheap_to_dear() -> None:
    text = levers()
    assert text.index("=selective") < text.index("activation_checkpointing=full")
    some = levers("engine.activation_checkpointing=selective")
    assert "=selective" not in some and "activation_checkpointing=full" in some
    assert "activation_checkpointing" not in levers("engine.activation_checkpointing=full")
