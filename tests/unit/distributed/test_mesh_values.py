from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lmscale.base.batch import Batch, Stream
from lmscale.base.errors import (
    CheckpointError,
    ConfigError,
    DistributedError,
    LmscaleError,
    Overtaken,
    RetryableError,
)
from lmscale.base.world import World
from lmscale.distributed.mesh import resolve
from lmscale.distributed.process_group import (
    choose_device,
    collective,
    decisive_error,
    lost_peer,
    portable,
    to_device,
)


@dataclass(frozen=True)
class Sizes:
    dp_replicate: int = 1
    dp_shard: int | Literal["auto"] = "auto"
    tp: int = 1


@pytest.mark.parametrize(
    ("sizes", "world_size", "want"),
    [
        (Sizes(), 8, (1, 8, 1)),
        (Sizes(dp_replicate=2, tp=2), 8, (2, 2, 2)),
        (Sizes(dp_shard=4, tp=2), 8, (1, 4, 2)),
        (Sizes(), 1, (1, 1, 1)),
    ],
)
def test_the_wildcard_takes_the_ranks_left_over(sizes, world_size, want):
    assert resolve(sizes, world_size) == want


@pytest.mark.parametrize(
    ("sizes", "world_size"), [(Sizes(tp=3), 8), (Sizes(dp_shard=4), 8), (Sizes(dp_replicate=4), 2)]
)
def test_axes_that_do_not_fill_the_world_are_refused(sizes, world_size):
    with pytest.raises(ConfigError, match=f"cannot fill {world_size} rank"):
        resolve(sizes, world_size)


def test_a_batch_becomes_tensors_of_the_same_types_and_values():
    tokens = np.arange(6, dtype=np.int64).reshape(2, 3)
    tokens.flags.writeable = False  # as a view of a corpus is
    weights = np.ones((2, 3), np.float32)
    stream = Stream(tokens, tokens, None)
    got = to_device(Batch(stream, None, tokens, weights, np.array([5, -1])), torch.device("cpu"))
    assert torch.equal(got.inputs.tokens_BL, torch.arange(6).reshape(2, 3))
    assert got.inputs.documents_BL is None and got.source is None
    assert (got.weights_BL.dtype, got.targets_BL.dtype) == (torch.float32, torch.int64)
    assert got.rows_B.tolist() == [5, -1]


@pytest.mark.parametrize(
    "text",
    [
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1",
        "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation",
        "Application timeout caused pair closure",
    ],
)
def test_what_gloo_says_about_a_lost_peer_is_understood(text):
    with pytest.raises(DistributedError, match="sum"), collective("sum"):
        raise RuntimeError(text)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("[enforce fail at pair.cc] op.preamble.length <= op.nbytes. 8 vs 4"),
        ValueError("timed out"),
    ],
)
def test_a_bug_stays_a_bug(error):
    assert not lost_peer(error)
    with pytest.raises(type(error)), collective("sum"):
        raise error


def test_a_lost_store_is_a_lost_peer():
    assert lost_peer(dist.DistStoreError("wait timeout"))
    assert lost_peer(dist.DistNetworkError("The client socket has failed to connect"))


def test_the_error_of_several_ranks_follows_the_exit_codes():
    lost, full, old = DistributedError("peer"), CheckpointError("crc"), Overtaken("2")
    assert decisive_error([lost, full]) is full
    assert decisive_error([lost, full, old]) is old


def test_foreign_errors_become_ours():
    full = portable(OSError(28, "No space left on device", "/x/y"))
    assert isinstance(full, RetryableError) and "writing /x/y: No space left" in str(full)
    assert type(portable(KeyError("a"))) is LmscaleError
    assert "KeyError" in str(portable(KeyError("a")))


def test_without_cuda_the_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(World()) == torch.device("cpu")


def test_each_local_rank_gets_its_own_gpu_or_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(World(5, 1, 8, 4)) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"local rank 2 finds 2 CUDA"):
        choose_device(World(6, 2, 8, 4))
