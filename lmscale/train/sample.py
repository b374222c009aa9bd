"""Text from a model in training, to look at: drawn through the engine, so sharded models need no gathering."""

import numpy as np
import torch

from lmscale.batch import Batch
from lmscale.data.objective import Record, causal
from lmscale.dist.device import to_device
from lmscale.engine.protocol import Engine


def continuations(
    engine: Engine,
    device: torch.device,
    prompts: list[list[int]],
    *,
    max_new: int,
    seq_len: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """New tokens for each prompt. Collective: all ranks compute the same, every token costs one forward.

    The forward has one fixed shape (prompts, seq_len), which suits compiled models.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [list(prompt[-(seq_len - 1) :]) or [0] for prompt in prompts]
    starts = [len(text) for text in texts]
    for _ in range(min(max_new, seq_len - max(starts))):
        logits_BLV = engine.logits(to_device(_batch(texts, seq_len), device))
        last_BV = torch.stack([logits_BLV[row, len(text) - 1] for row, text in enumerate(texts)])
        probabilities_BV = torch.softmax(last_BV.double().cpu() / temperature, dim=-1)
        for text, token in zip(
            texts, torch.multinomial(probabilities_BV, 1, generator=generator), strict=True
        ):
            text.append(int(token))
    return [text[start:] for text, start in zip(texts, starts, strict=True)]


def _batch(texts: list[list[int]], seq_len: int) -> Batch[np.ndarray]:
    records = []
    for text in texts:
        tokens = np.zeros(seq_len + 1, np.int64)
        tokens[: len(text)] = text
        records.append(Record(tokens, np.empty(0, np.int64)))
    positions = np.arange(len(texts), dtype=np.int64)
    return causal(
        records, rows=len(texts), positions=positions, seq_len=seq_len, documents="joined"
    )
