"""Attention over packed tokens, put into transformers' models through its attention interface.

A model loaded with attn_implementation="luthier" calls the AttentionContext that its forward got as
`attention=`: PackedAttention here, or one that reads a paged cache.

Dimensions: T packed tokens, H query heads, Hkv key/value heads, Dh features per head.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from luthier_core.errors import Unsupported

ATTENTION_NAME = "luthier"
"""Unknown to transformers' mask registry, so it builds no mask."""


class AttentionContext(Protocol):
    """How the tokens of one forward attend: made anew for each forward."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """query [H, T, Dh], key and value [Hkv, T, Dh], rotated -> [T, H, Dh].

        `window`: a token sees itself and the window - 1 tokens before it; None is no limit.
        `softcap`: scores become softcap * tanh(score / softcap), as Gemma 2 has it.
        """


class PackedAttention:
    """Causal attention within each of several sequences that lie end to end, without padding."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        if len(self.lengths) == 1:
            return _causal(query, key, value, scale, window, softcap).transpose(0, 1)
        packed = (torch.split(x, self.lengths, dim=1) for x in (query, key, value))
        parts = [_causal(q, k, v, scale, window, softcap) for q, k, v in zip(*packed, strict=True)]
        return torch.cat(parts, dim=1).transpose(0, 1)


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One sequence: [H, T, Dh] and twice [Hkv, T, Dh] -> [H, T, Dh]."""
    num_tokens = query.shape[1]
    if softcap is not None:
        seen = _window_mask(num_tokens, window or num_tokens, query.device)
        return capped_attention(query, key, value, seen, scale=scale, softcap=softcap)
    windowed = window is not None and num_tokens > window
    out: Tensor = F.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=_window_mask(num_tokens, window, query.device) if windowed else None,
        is_causal=not windowed,
        scale=scale,
        enable_gqa=len(query) != len(key),
    )
    return out[0]


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, *, scale: float, softcap: float
) -> Tensor:
    """[..., H, Q, Dh] and twice [..., Hkv, L, Dh] -> [..., H, Q, Dh]; `seen` broadcasts to [Q, L].

    Written out, because torch's attention caps no scores; it holds [H, Q, L] in memory.
    """
    group = query.shape[-3] // key.shape[-3]
    key, value = (x.repeat_interleave(group, dim=-3) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(value.dtype) @ value


def _window_mask(num_tokens: int, window: int | None, device: torch.device) -> Tensor:
    """bool[T, T], True where query row t may see key column s."""
    assert window is not None
    position = torch.arange(num_tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention: AttentionContext,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' calling convention: query [1, H, T, Dh] -> ([1, T, H, Dh], no weights)."""
    # Silently computing something else than the model means is worse than refusing it.
    if extra.get("s_aux") is not None:
        raise Unsupported("attention with s_aux, which this base model uses")
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = attention.attend(
        layer,
        query[0],
        key[0],
        value[0],
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out[None], None


AttentionInterface.register(ATTENTION_NAME, _attention_function)
