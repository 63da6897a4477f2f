"""Deltas in batched products: those of the loop, the same to the bit whoever shares the step."""

import random

import pytest
import torch

from luthier_model.adapter_stacks import MAX_STACKS, AdapterStacks
from luthier_model.lora import LoraAdapter, LoraPair, LoraSpec, Segment, add_deltas_loop

NAME, NUM_IN, NUM_OUT = "lm_head", 24, 40


def random_adapter(rank: int, name: str = NAME) -> LoraAdapter:
    pair = LoraPair(a=torch.randn(rank, NUM_IN), b=torch.randn(NUM_OUT, rank))
    return LoraAdapter(spec=LoraSpec(rank=rank, seed=0), pairs={name: pair})


def segments_of(*rows: tuple[int, LoraAdapter | None]) -> list[Segment]:
    segments, stop = list[Segment](), 0
    for num_rows, adapter in rows:
        segments.append(Segment(stop, stop + num_rows, adapter))
        stop += num_rows
    return segments


def with_deltas(
    stacks: AdapterStacks, base_TE: torch.Tensor, x_TD: torch.Tensor, segments: list[Segment]
) -> torch.Tensor:
    out_TE = base_TE.clone()
    with torch.inference_mode():
        for deltas in stacks.deltas(segments):
            deltas.add_to(out_TE, x_TD, NAME)
    return out_TE


def test_deltas_are_those_of_the_loop_while_adapters_come_and_go() -> None:
    torch.manual_seed(0)
    chosen, stacks = random.Random(0), AdapterStacks()
    adapters: list[LoraAdapter | None] = []
    adapters += [random_adapter(rank) for rank in (4, 4, 4, 4, 4, 8, 8, 1)]
    adapters += [random_adapter(4, "another_module"), *[None] * 3]
    for _ in range(100):
        some = chosen.sample(adapters, chosen.randint(1, 9))
        segments = segments_of(*((chosen.choice((1, 2, 4, 4, 7, 16, 30)), a) for a in some))
        x_TD = torch.randn(segments[-1].stop, NUM_IN)
        base_TE = torch.randn(len(x_TD), NUM_OUT)
        expected = add_deltas_loop(base_TE, x_TD, segments, NAME)
        got = with_deltas(stacks, base_TE, x_TD, segments)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_a_row_has_the_same_bits_whoever_shares_the_step(rank: int) -> None:
    torch.manual_seed(1)
    adapters = [random_adapter(rank) for _ in range(7)]
    x_TD, base_TE = torch.randn(40, NUM_IN), torch.randn(40, NUM_OUT)
    layouts = [[4] * 7, [1, 2, 3, 4, 5, 6, 7], [1] * 7, [16, 1, 16, 1, 1, 1, 1], [1, 30, 1, 2, 2]]
    for lengths in layouts:
        stacks = AdapterStacks()
        segments = segments_of(*zip(lengths, adapters, strict=False))
        together = with_deltas(stacks, base_TE, x_TD, segments)
        for segment in segments:
            rows = slice(segment.start, segment.stop)
            lone = segments_of((segment.stop - segment.start, segment.adapter))
            alone = with_deltas(AdapterStacks(), base_TE[rows], x_TD[rows], lone)
            assert torch.equal(together[rows], alone), (lengths, segment.start)


def test_a_diverged_adapter_leaves_the_rows_of_others_alone() -> None:
    torch.manual_seed(2)
    first, diverged, last = (random_adapter(4) for _ in range(3))
    diverged.pairs[NAME].b.fill_(float("nan"))
    x_TD, base_TE = torch.randn(12, NUM_IN), torch.randn(12, NUM_OUT)
    stacks = AdapterStacks()
    out_TE = with_deltas(stacks, base_TE, x_TD, segments_of((4, first), (4, diverged), (4, last)))
    assert out_TE.isfinite().all(1).tolist() == [True] * 4 + [False] * 4 + [True] * 4
    # Now it lies between two that are in one batch.
    out_TE = with_deltas(stacks, base_TE, x_TD, segments_of((5, first), (7, last)))
    assert out_TE.isfinite().all()


@pytest.mark.parametrize("rank", [4, 16])
def test_an_adapter_keeps_its_weights_when_it_loses_its_place(rank: int) -> None:
    torch.manual_seed(3)
    stacks, x_TD, base_TE = AdapterStacks(), torch.randn(4, NUM_IN), torch.zeros(4, NUM_OUT)
    adapters = [random_adapter(rank) for _ in range(3)]
    before = [(a.pairs[NAME].a.clone(), a.pairs[NAME].b.clone()) for a in adapters]
    for adapter in adapters:
        with_deltas(stacks, base_TE, x_TD, segments_of((4, adapter)))
    for other_rank in range(20, 21 + MAX_STACKS):
        with_deltas(stacks, base_TE, x_TD, segments_of((4, random_adapter(other_rank))))
    for adapter, (a, b) in zip(adapters, before, strict=True):
        assert torch.equal(adapter.pairs[NAME].a, a)
        assert torch.equal(adapter.pairs[NAME].b, b)
