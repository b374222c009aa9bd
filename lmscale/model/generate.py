"""Continue a row of tokens with a trained model, in one process.

Shapes: L tokens so far, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmscale.base.batch import Stream
from lmscale.base.errors import UsageError
from lmscale.model.transformer import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    max_new: int,
    temperature: float = 0.0,
    eos: int | None = None,
    seed: int = 0,
    top_k: int | None = None,
) -> list[int]:
    """The new tokens, `eos` included if it came. Greedy at temperature 0, the lower id on a tie.

    Every token is a forward over the whole row: no cache, so the result is by construction what
    the model's own logits say, for every kind of model. Cost grows with the square of the length; at
    the sizes that one process samples from that is seconds.
    """
    _check(model, prompt_ids, max_new=max_new, temperature=temperature, top_k=top_k)
    device = model.decoder.embedding.weight.device
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens_L = torch.tensor(list(prompt_ids), device=device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new):
            logits_V = model.next_logits(_one_row(tokens_L))[0, -1]
            token = _choose(logits_V, temperature=temperature, top_k=top_k, generator=generator)
            tokens_L = torch.cat([tokens_L, tokens_L.new_tensor([token])])
            if token == eos:
                break
    finally:
        model.train(was_training)
    new: list[int] = tokens_L[len(prompt_ids) :].tolist()
    return new


def _choose(
    logits_V: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    # Drawn on the CPU in fp64, so that a seed means the same on every device.
    scaled_V = logits_V.to("cpu", torch.float64) / temperature
    if top_k is not None and top_k < len(scaled_V):
        keep = scaled_V.topk(top_k).indices
        scaled_V = torch.full_like(scaled_V, float("-inf")).scatter_(0, keep, scaled_V[keep])
    return int(torch.multinomial(scaled_V.softmax(0), 1, generator=generator))


def _one_row(tokens_L: Tensor) -> Stream[Tensor]:
    positions_L = torch.arange(len(tokens_L), device=tokens_L.device)
    return Stream(tokens_L[None], positions_L[None], None)


def _check(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    max_new: int,
    temperature: float,
    top_k: int | None,
) -> None:
    vocab = model.decoder.spec.vocab_size
    if not prompt_ids:
        raise UsageError("the prompt has no token; give at least one, e.g. the tokenizer's bos")
    if strange := [token for token in prompt_ids if not 0 <= token < vocab]:
        raise UsageError(f"token {strange[0]} of the prompt is not in the vocabulary of {vocab}")
    if max_new < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise UsageError(
            f"max_new {max_new}, temperature {temperature}, top_k {top_k}: the first two are at "
            "least 0, top_k at least 1"
        )
    length = len(prompt_ids) + max_new
    # The last token is not read again, so it needs no position.
    stack = model.decoder.spec
    if stack.positions == "learned" and length - 1 > stack.max_positions:
        raise UsageError(
            f"{len(prompt_ids)} + {max_new} tokens, but this model has learned "
            f"{stack.max_positions} positions; shorten the prompt or max_new"
        )
