"""The scheduler alone: who is in the next step, and who loses its blocks."""

from luthier_sampler.kv_cache import BlockManager
from luthier_sampler.scheduler import Scheduler
from luthier_sampler.sequence import Chunk, Request, SampleRequest, Sequence

BLOCK_TOKENS = 4


def scheduler(
    *, num_blocks: int = 100, max_running: int = 8, max_step_tokens: int = 16
) -> Scheduler:
    blocks = BlockManager(num_blocks, BLOCK_TOKENS)
    return Scheduler(blocks, max_running=max_running, max_step_tokens=max_step_tokens)


def sequence(
    arrival: int, num_tokens: int, *, prompt_logprobs: bool = False, cache_scope: str | None = None
) -> Sequence:
    spec = SampleRequest(
        request_id=str(arrival),
        prompt=tuple(range(num_tokens)),
        prompt_logprobs=prompt_logprobs,
        cache_scope=cache_scope,
    )
    request = Request(
        spec, arrival=arrival, seed=0, max_new_tokens=99, adapter=None, stop_tokens=frozenset()
    )
    return request.sequences[0]


def step(sched: Scheduler) -> list[tuple[int, int, int]]:
    """One step, as (arrival, start, stop) of its chunks; who samples gets one more token."""
    chunks = sched.schedule()
    sampling = [chunk.sequence for chunk in chunks if chunk.samples]
    sched.commit(chunks)
    for sampled in sampling:
        sampled.tokens.append(1000 + sampled.order[0])
    return [_shape(chunk) for chunk in chunks]


def _shape(chunk: Chunk) -> tuple[int, int, int]:
    return chunk.sequence.order[0], chunk.start, chunk.stop


def test_a_long_prompt_is_computed_in_chunks_while_others_decode():
    sched = scheduler(max_step_tokens=10)
    sched.add(sequence(0, 30))
    assert step(sched) == [(0, 0, 10)]
    sched.add(sequence(1, 3))
    assert step(sched) == [(0, 10, 20)]
    assert step(sched) == [(0, 20, 30)]
    assert step(sched) == [(0, 30, 31), (1, 0, 3)]
    sched.add(sequence(2, 25))
    assert step(sched) == [(0, 31, 32), (1, 3, 4), (2, 0, 8)]
    assert step(sched) == [(0, 32, 33), (1, 4, 5), (2, 8, 16)]


def test_an_older_prompt_leaves_a_token_to_each_that_decodes():
    sched = scheduler(max_step_tokens=4, max_running=2)
    old, young = sequence(0, 40), sequence(1, 2)
    sched.add(young)
    step(sched)
    sched.add(old)
    assert step(sched) == [(1, 2, 3), (0, 0, 3)]
    assert step(sched) == [(1, 3, 4), (0, 3, 6)]


def test_no_more_sequences_run_than_the_limit():
    sched = scheduler(max_running=2)
    for arrival in range(3):
        sched.add(sequence(arrival, 2))
    assert step(sched) == [(0, 0, 2), (1, 0, 2)]
    sched.remove(sched.running[0])
    assert step(sched) == [(1, 2, 3), (2, 0, 2)]


def test_the_youngest_loses_its_blocks_and_returns_before_later_arrivals():
    sched = scheduler(num_blocks=4)
    sched.add(sequence(0, 5))
    sched.add(sequence(1, 3))
    assert step(sched) == [(0, 0, 5), (1, 0, 3)]
    sched.add(sequence(2, 9))
    for _ in range(3):
        assert [shape[0] for shape in step(sched)] == [0, 1]
    # The ninth token of the first needs a block, and the second took the last free one.
    assert step(sched) == [(0, 8, 9)]
    assert sched.num_preemptions == 1
    assert [(s.order[0], s.num_computed, s.block_table) for s in sched.waiting] == [
        (1, 0, []),
        (2, 0, []),
    ]


def test_a_sequence_is_admitted_only_with_a_spare_block_for_each_that_runs():
    sched = scheduler(num_blocks=4)
    sched.add(sequence(0, 5))
    sched.add(sequence(1, 5))
    assert step(sched) == [(0, 0, 5)]
    sched.remove(sched.running[0])
    assert step(sched) == [(1, 0, 5)]


def test_a_known_prefix_is_not_computed_again_but_its_last_token_is():
    sched = scheduler(max_step_tokens=32)
    sched.add(sequence(0, 12, cache_scope="tenant"))
    assert step(sched) == [(0, 0, 12)]
    for arrival, num_tokens in enumerate([12, 11, 6], start=1):
        sched.add(sequence(arrival, num_tokens, cache_scope="tenant"))
    sched.add(sequence(4, 12, cache_scope="another tenant"))
    assert step(sched) == [(0, 12, 13), (1, 8, 12), (2, 8, 11), (3, 4, 6), (4, 0, 12)]


def test_a_prompt_to_be_scored_is_computed_whole():
    sched = scheduler(max_step_tokens=32)
    sched.add(sequence(0, 12, cache_scope="tenant"))
    step(sched)
    sched.add(sequence(1, 12, cache_scope="tenant", prompt_logprobs=True))
    assert step(sched) == [(0, 12, 13), (1, 0, 12)]


def test_removal_frees_the_blocks_of_running_and_waiting_sequences():
    sched = scheduler(num_blocks=3, max_running=1)
    sequences = [sequence(arrival, 9) for arrival in range(2)]
    for each in sequences:
        sched.add(each)
    step(sched)
    assert sched.blocks.num_free == 0
    for each in sequences:
        sched.remove(each)
        sched.remove(each)
    assert sched.blocks.num_free == 3
    assert sched.schedule() == []
