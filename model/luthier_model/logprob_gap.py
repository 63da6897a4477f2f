"""How far a sampler's logprobs are from the trainer's, on one model with one adapter.

The same numbers are summed in another order: token by token over a paged cache of the model's
dtype, or all tokens packed in one forward. In float32 that is rounding; in bfloat16 it is what a
policy-gradient loss sees as the distance between two equal policies.

Dimensions: B sequences, T packed tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier_model.attention import PackedAttention
from luthier_model.base import BaseModel
from luthier_model.logprobs import token_logprobs
from luthier_model.lora import LoraAdapter, Segment
from luthier_model.paged import KvCache, PagedAttention, Span
from luthier_model.products import ROW_MULTIPLE

NUM_SEQUENCES = ROW_MULTIPLE
NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 4, 12
"""Together one block. Every new token is a step, and a run that saves waits for all of them."""


@dataclass(frozen=True, slots=True)
class LogprobGap:
    """Absolute differences, in nats; NaN if the adapter's logits are not finite."""

    max: float
    mean: float


@torch.no_grad()
def logprob_gap(model: BaseModel, adapter: LoraAdapter | None) -> LogprobGap:
    """Over tokens that are sampled for it at temperature 1, always with the same random numbers."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.facts.vocab_size
    prompts_BT = torch.randint(vocab_size, (NUM_SEQUENCES, NUM_PROMPT_TOKENS), generator=generator)
    tokens_BT, sampled_BT = _sample(model, adapter, prompts_BT, generator)
    length = tokens_BT.shape[1] - 1
    inputs_T = tokens_BT[:, :-1].reshape(-1)
    positions_T = torch.arange(length, device=model.device).repeat(NUM_SEQUENCES)
    segments = [Segment(0, len(inputs_T), adapter)]
    attention = PackedAttention([length] * NUM_SEQUENCES)
    hidden_TD = model.hidden(inputs_T, positions_T, attention, segments)
    targets_T = tokens_BT[:, 1:].reshape(-1)
    trained_T = token_logprobs(model, hidden_TD, targets_T, segments, chunk_tokens=len(inputs_T))
    trained_BT = trained_T.view(NUM_SEQUENCES, length)[:, -NUM_NEW_TOKENS:]
    gap_BT = (trained_BT - sampled_BT).abs()
    return LogprobGap(max=gap_BT.max().item(), mean=gap_BT.mean().item())


def _sample(
    model: BaseModel, adapter: LoraAdapter | None, prompts_BT: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens with their prompts, and the logprobs of those sampled, each row a sequence."""
    tokens_BT = prompts_BT.to(model.device)
    cache = KvCache(
        model.facts,
        num_blocks=NUM_SEQUENCES,
        block_tokens=NUM_PROMPT_TOKENS + NUM_NEW_TOKENS,
        dtype=model.dtype,
        device=model.device,
    )
    logprobs: list[Tensor] = []
    num_cached = 0
    for _ in range(NUM_NEW_TOKENS):
        new_BT = tokens_BT[:, num_cached:]
        num_new, num_keys = new_BT.shape[1], tokens_BT.shape[1]
        positions_T = torch.arange(num_cached, num_keys, device=model.device).repeat(NUM_SEQUENCES)
        attention = PagedAttention(
            cache, [Span(num_new, num_keys, [block]) for block in range(NUM_SEQUENCES)]
        )
        segments = [Segment(0, new_BT.numel(), adapter)]
        hidden_TD = model.hidden(new_BT.reshape(-1), positions_T, attention, segments)
        last_BD = hidden_TD.view(NUM_SEQUENCES, num_new, -1)[:, -1]
        logprobs_BV = model.logits(last_BD, [Segment(0, NUM_SEQUENCES, adapter)]).log_softmax(-1)
        # Gumbel's trick instead of multinomial, which raises where logits are not finite.
        noise_BV = -torch.empty(logprobs_BV.shape).exponential_(generator=generator).log()
        tokens_B1 = (logprobs_BV + noise_BV.to(logprobs_BV)).argmax(-1, keepdim=True)
        logprobs.append(logprobs_BV.gather(1, tokens_B1))
        tokens_BT = torch.cat([tokens_BT, tokens_B1], dim=1)
        num_cached = num_keys
    return tokens_BT, torch.cat(logprobs, dim=1)
