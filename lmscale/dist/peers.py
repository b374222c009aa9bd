"""Tell the loss of a peer from a bug: torch reports both as RuntimeError."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lmscale.errors import DistributedError

# What gloo (torch 2.13), the TCP store and NCCL's watchdog say when a peer is gone or silent. A
# mismatched collective ("enforce fail", "op.preamble") is a bug of ours and stays a RuntimeError.
_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|timed? ?out|not connected"
    r"|connectFullMesh failed|failed to connect|socket error|remote process exited|recvValue failed"
    r"|connection was likely closed|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)
_TYPES = (dist.DistNetworkError, dist.DistStoreError)


def lost_peer(error: BaseException) -> bool:
    """Whether this exception says that a peer is gone or did not answer in time."""
    if isinstance(error, (*_TYPES, ConnectionError, TimeoutError)):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


@contextmanager
def collective(what: str) -> Iterator[None]:
    """Turn the loss of a peer inside the block into a DistributedError that names `what`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DistributedError) or not lost_peer(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DistributedError(
            f"{what}: a peer is gone or did not answer in time ({reason}). The cause is in that "
            "peer's log; the same command goes on from the newest checkpoint"
        ) from error
