"""The one rule of internal precision: at least fp32. `.float()` is a downcast in an fp64 run."""

import torch


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums, angles and losses of values stored as `dtype`."""
    return torch.promote_types(dtype, torch.float32)
