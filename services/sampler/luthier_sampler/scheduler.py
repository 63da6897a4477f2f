"""Which tokens of which sequences the next step computes: waiting and running, preemption.

Everything is in order of arrival. Running sequences come before waiting ones, and every running
sequence that decodes gets its token before prompts share what is left of the step, so a long prompt
cannot stop those who already generate.
"""

from bisect import insort
from collections.abc import Iterable

from luthier_sampler.kv_cache import BlockManager
from luthier_sampler.sequence import Chunk, Sequence


class Scheduler:
    """The two queues, both by arrival. A sequence that waits has no blocks."""

    def __init__(self, blocks: BlockManager, *, max_running: int, max_step_tokens: int) -> None:
        assert max_running <= max_step_tokens, "a step must have a token for each that decodes"
        self.blocks = blocks
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def fork(self, parent: Sequence, sibling: Sequence) -> list[tuple[int, int]] | None:
        """Let a new sibling run on from where its parent is, with the same tokens.

        It shares the parent's full blocks and gets a block of its own for the rest, returned as
        (source, target) to be copied. None if there is no room: then add() it, and it waits.
        """
        blocks, full = self.blocks, parent.num_computed // self.blocks.block_tokens
        num_own = len(parent.block_table) - full
        # As for a newcomer, one spare block for each that runs.
        if len(self.running) >= self.max_running or blocks.num_free < num_own + len(self.running):
            return None
        blocks.hold(sibling.block_table, parent.block_table[:full])
        grown = blocks.grow(sibling.block_table, parent.num_computed)
        assert grown
        sibling.num_computed = parent.num_computed
        insort(self.running, sibling, key=_order)
        return list(zip(parent.block_table[full:], sibling.block_table[full:], strict=False))

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that finished, failed or was cancelled, and free its blocks."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self.blocks.release(sequence.block_table)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, whose blocks are allocated: decodes first, then by adapter.

        Empty only without sequences, given that each fits the cache when alone.
        """
        num_preemptions = self.num_preemptions
        chunks = self._continue_running()
        # After a preemption there is no room: a newcomer would be the next to be preempted.
        if self.num_preemptions == num_preemptions:
            chunks += self._admit(self.max_step_tokens - sum(c.num_tokens for c in chunks))
        return sorted(chunks, key=lambda c: (c.num_tokens > 1, c.sequence.request.adapter_key))

    def commit(self, chunks: Iterable[Chunk]) -> None:
        """The chunks are in the cache: go on after them, and let others share full blocks."""
        block_tokens = self.blocks.block_tokens
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.stop
            filled = range(chunk.start // block_tokens, chunk.stop // block_tokens)
            if filled:
                keys = sequence.block_keys(filled.stop, block_tokens)
                for i in filled:
                    self.blocks.publish(sequence.block_table[i], keys[i])

    def _continue_running(self) -> list[Chunk]:
        num_decoding = sum(sequence.num_to_compute == 1 for sequence in self.running)
        budget, chunks = self.max_step_tokens - num_decoding, []
        for index, sequence in enumerate(list(self.running)):
            if index >= len(self.running):
                break  # Preempted for an older one, and so are all that come after it.
            num_tokens = sequence.num_to_compute
            if num_tokens > 1:
                num_tokens = min(num_tokens, budget)
                budget -= num_tokens
            if num_tokens and self._make_room(sequence, sequence.num_computed + num_tokens):
                chunks.append(_next_chunk(sequence, num_tokens))
        return chunks

    def _admit(self, budget: int) -> list[Chunk]:
        chunks = []
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            if not self._allocate_all(sequence):
                break
            self.waiting.pop(0)
            insort(self.running, sequence, key=_order)
            num_tokens = min(sequence.num_to_compute, budget)
            chunks.append(_next_chunk(sequence, num_tokens))
            budget -= num_tokens
        return chunks

    def _allocate_all(self, sequence: Sequence) -> bool:
        """Blocks for all its tokens, shared where they are known; False if there is no room."""
        request, blocks = sequence.request, self.blocks
        num_blocks = sequence.num_sharable // blocks.block_tokens
        keys = sequence.block_keys(num_blocks, blocks.block_tokens)
        sequence.num_computed = blocks.share(sequence.block_table, keys)
        # One spare block for each that runs, or it would be preempted as soon as one of them grows.
        num_missing = blocks.blocks_for(len(sequence.tokens)) - len(sequence.block_table)
        if num_missing + len(self.running) > blocks.num_free:
            self._let_go(sequence)
            return False
        grown = blocks.grow(sequence.block_table, len(sequence.tokens))
        assert grown
        if request.num_cached_tokens is None:
            request.num_cached_tokens = sequence.num_computed
        return True

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for num_tokens of a running sequence; the youngest lose theirs, perhaps itself."""
        while not self.blocks.grow(sequence.block_table, num_tokens):
            victim = self.running.pop()
            self._let_go(victim)
            self.add(victim)
            self.num_preemptions += 1
            if victim is sequence:
                return False
        return True

    def _let_go(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.num_computed = 0


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _next_chunk(sequence: Sequence, num_tokens: int) -> Chunk:
    start = sequence.num_computed
    return Chunk(sequence, start, start + num_tokens)
