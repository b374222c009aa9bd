"""From numpy in the loader to tensors on the device."""

import numpy as np
import torch

from lmscale.batch import Batch


def to_device(batch: Batch[np.ndarray], device: torch.device) -> Batch[torch.Tensor]:
    """The same batch as tensors. On CUDA the copy is asynchronous, from pinned memory.

    On the CPU the tensors share memory with writable arrays: the loader must not reuse them.
    """

    def convert(array: np.ndarray) -> torch.Tensor:
        # from_numpy warns about read-only arrays (views of a corpus): writing there would be fatal
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return batch.map(convert)
