"""Paged attention beside its loop twin."""

import pytest
import torch

from luthier_model.base import ModelFacts
from luthier_model.paged import KvCache, PagedAttention, PagedAttentionLoop, Span, block_bytes

FACTS = ModelFacts(
    name="tiny",
    path="",
    architecture="",
    vocab_size=1,
    max_context_tokens=1,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=48,
    eos_token_ids=(),
)
BLOCK_TOKENS = 4
NUM_BLOCKS = 24


@pytest.fixture
def cache() -> KvCache:
    """Every slot but the padding holds something, as after a while of use."""
    torch.set_num_threads(1)
    cache = KvCache(
        FACTS,
        num_blocks=NUM_BLOCKS,
        block_tokens=BLOCK_TOKENS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(0)
    cache.keys[:, : cache.pad_slot].normal_(generator=generator)
    cache.values[:, : cache.pad_slot].normal_(generator=generator)
    return cache


def spans_of(*shapes: tuple[int, int]) -> list[Span]:
    """(num_queries, num_keys) of each sequence; blocks in a scattered order."""
    order = iter(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist())
    return [
        Span(queries, keys, [next(order) for _ in range(-(-keys // BLOCK_TOKENS))])
        for queries, keys in shapes
    ]


def step_tensors(spans: list[Span]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens = sum(span.num_queries for span in spans)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(FACTS.num_heads, num_tokens, FACTS.head_dim, generator=generator)
    key, value = torch.randn(2, FACTS.num_kv_heads, num_tokens, FACTS.head_dim, generator=generator)
    return query, key, value


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 1)],
        [(1, 9)],
        [(1, 8), (1, 8)],
        [(1, 1), (1, 17), (1, 4), (1, 5)],
        [(7, 7)],
        [(3, 11)],
        [(1, 6), (1, 2), (5, 5), (2, 9), (8, 20)],
    ],
    ids=str,
)
def test_the_batched_attention_equals_the_loop(cache, shapes, window, softcap):
    spans = spans_of(*shapes)
    query, key, value = step_tensors(spans)
    fast, slow = PagedAttention(cache, spans), PagedAttentionLoop(cache, spans)
    for layer in range(FACTS.num_layers):
        how = {"scale": 0.3, "window": window, "softcap": softcap}
        expected = slow.attend(layer, query, key, value, **how)
        got = fast.attend(layer, query, key, value, **how)
        assert got.shape == (query.shape[1], FACTS.num_heads, FACTS.head_dim)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_a_step_writes_the_slots_of_its_own_tokens_only(cache):
    spans = spans_of((1, 6), (3, 10))
    query, key, value = step_tensors(spans)
    before = cache.keys.clone()
    PagedAttention(cache, spans).attend(1, query, key, value, scale=1.0, window=None)
    changed = (cache.keys != before).any(-1).any(-1).nonzero().tolist()
    slots = [*cache.slots(spans[0].block_table, 5, 6), *cache.slots(spans[1].block_table, 7, 10)]
    assert sorted(changed) == sorted([1, int(slot)] for slot in slots)


def test_padding_reads_nothing_of_another_sequence(cache):
    spans = spans_of((1, 3), (1, 12))
    query, key, value = step_tensors(spans)
    own = cache.slots(spans[0].block_table, 0, 3)
    others = torch.ones(cache.pad_slot + 1, dtype=torch.bool).index_fill(
        0, torch.tensor(own), False
    )
    others[cache.pad_slot] = False
    cache.keys[:, others] = cache.values[:, others] = torch.nan
    out = PagedAttention(cache, spans).attend(0, query, key, value, scale=1.0, window=None)
    assert out[0].isfinite().all()


def test_the_size_of_a_block_is_what_the_cache_allocates(cache):
    num_bytes = cache.keys.nbytes + cache.values.nbytes
    one = block_bytes(FACTS, BLOCK_TOKENS, torch.float32)
    assert num_bytes == NUM_BLOCKS * one + one // BLOCK_TOKENS
