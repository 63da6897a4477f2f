"""Paged attention beside its loop twin."""

import pytest
import torch
from torch.nn import functional as F

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
    cache.keys[:, : cache.pad_block].normal_(generator=generator)
    cache.values[:, : cache.pad_block].normal_(generator=generator)
    return cache


def spans_of(*shapes: tuple[int, int]) -> list[Span]:
    """(num_queries, num_keys) of each sequence; blocks in a scattered order."""
    order = iter(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist())
    return [
        Span(queries, keys, [next(order) for _ in range(-(-keys // BLOCK_TOKENS))])
        for queries, keys in shapes
    ]


def rows_are_independent() -> bool:
    """Whether a row of a matrix product is the same in products of different size."""
    x, y = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(3))
    return all(torch.equal((x[:rows] @ y)[0], (x @ y)[0]) for rows in range(4, 64))


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


def test_a_step_writes_its_own_slots_and_clears_the_blocks_that_it_begins(cache):
    spans = spans_of((1, 6), (3, 10))
    query, key, value = step_tensors(spans)
    before = cache.keys.clone()
    PagedAttention(cache, spans).attend(1, query, key, value, scale=1.0, window=None)
    changed = (cache.keys != before).flatten(3).any(-1)
    assert not changed[0].any()
    # The second sequence begins its third block, whose slots 10 and 11 hold something old.
    slots = [*cache.slots(spans[0].block_table, 5, 6), *cache.slots(spans[1].block_table, 7, 12)]
    assert changed[1].flatten().nonzero()[:, 0].tolist() == sorted(slots)


def test_padding_reads_nothing_of_another_sequence(cache):
    cache.keys[:, : cache.pad_block] = cache.values[:, : cache.pad_block] = torch.nan
    after = spans_of((1, 3), (1, 12))
    before = [Span(2, 2, after[0].block_table), Span(11, 11, after[1].block_table)]
    for spans in (before, after):
        query, key, value = step_tensors(spans)
        out = PagedAttention(cache, spans).attend(0, query, key, value, scale=1.0, window=None)
        assert out.isfinite().all()


def test_tokens_beyond_the_spans_are_padding(cache):
    spans = spans_of((1, 3))
    query, key, value = (F.pad(part, (0, 0, 0, 3)) for part in step_tensors(spans))
    out = PagedAttention(cache, spans).attend(0, query, key, value, scale=1.0, window=None)
    assert out.shape[0] == 4
    assert not out[1:].any()
    assert not cache.keys[:, cache.pad_block].any()


def test_a_copied_block_holds_what_its_source_holds(cache):
    cache.copy_blocks([1, 2], [5, 6])
    for cached in (cache.keys, cache.values):
        assert torch.equal(cached[:, 5:7], cached[:, 1:3])


@pytest.mark.parametrize("window", [None, 9])
def test_a_token_attends_to_the_last_bit_alike_whatever_else_is_in_the_step(cache, window):
    if not rows_are_independent():
        pytest.skip("on this CPU a product's number of rows decides the bits of each")
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(FACTS.num_heads, 40, FACTS.head_dim, generator=generator)
    key, value = torch.randn(2, FACTS.num_kv_heads, 40, FACTS.head_dim, generator=generator)
    table = list(range(6))
    # The first has blocks enough to pad ours, in one group with it.
    others = [
        Span(1, 31, list(range(6, 14))),
        Span(1, 7, [14, 15]),
        Span(20, 31, list(range(16, 24))),
    ]

    def last_of_23(*spans: Span) -> torch.Tensor:
        """Token 22 of one sequence, computed by the last of `spans`, in a step of its own."""
        for step in spans:
            rows = slice(step.num_keys - step.num_queries, step.num_keys)
            part = (x[:, rows] for x in (query, key, value))
            out = PagedAttention(cache, [step]).attend(0, *part, scale=0.3, window=window)
        return out[-1]

    whole = last_of_23(Span(23, 23, table))
    assert torch.equal(last_of_23(Span(22, 22, table), Span(1, 23, table)), whole)
    assert torch.equal(last_of_23(Span(5, 5, table), Span(18, 23, table)), whole)
    spans = [Span(1, 23, table), *others]
    packed = [torch.cat([x[:, 22:23], x[:, :22]], dim=1) for x in (query, key, value)]
    beside = PagedAttention(cache, spans).attend(0, *packed, scale=0.3, window=window)
    assert torch.equal(beside[0], whole)


def test_the_size_of_a_block_is_what_the_cache_allocates(cache):
    num_bytes = cache.keys.nbytes + cache.values.nbytes
    one = block_bytes(FACTS, BLOCK_TOKENS, torch.float32)
    assert num_bytes == (NUM_BLOCKS + 1) * one
