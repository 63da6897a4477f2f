"""BlockManager: who owns a block, and who may find it."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from luthier_sampler.kv_cache import BlockManager

BLOCK_TOKENS = 4


def test_a_table_grows_to_hold_its_tokens_or_not_at_all():
    blocks = BlockManager(3, BLOCK_TOKENS)
    table: list[int] = []
    assert blocks.grow(table, 5)
    assert len(table) == 2
    assert blocks.grow(table, 8)
    assert len(table) == 2
    assert not blocks.grow(table, 13)
    assert len(table) == 2
    assert blocks.num_free == 1


def test_a_shared_block_is_free_when_its_last_owner_lets_go():
    blocks = BlockManager(2, BLOCK_TOKENS)
    first: list[int] = []
    second: list[int] = []
    blocks.grow(first, 4)
    blocks.publish(first[0], b"key")
    assert blocks.share(second, [b"key", b"unknown"]) == 4
    assert second == first
    blocks.release(first)
    assert blocks.num_free == 1
    blocks.release(second)
    assert blocks.num_free == 2


def test_a_free_block_is_found_until_its_place_is_needed():
    blocks = BlockManager(2, BLOCK_TOKENS)
    table: list[int] = []
    blocks.grow(table, 4)
    blocks.publish(table[0], b"key")
    blocks.release(table)
    assert blocks.share(table, [b"key"]) == 4
    blocks.release(table)
    blocks.grow(table, 8)
    blocks.release(table)
    assert blocks.share(table, [b"key"]) == 0


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning():
    blocks = BlockManager(3, BLOCK_TOKENS)
    keys = [b"0", b"1", b"2"]
    table: list[int] = []
    blocks.grow(table, 12)
    for block, key in zip(table, keys, strict=True):
        blocks.publish(block, key)
    blocks.release(table)
    other: list[int] = []
    blocks.grow(other, 4)
    assert blocks.share(table, keys) == 8


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences come, share, grow and go, beside a model that only counts."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_TOKENS)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        """The key under which each block was published since it was last allocated."""

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=4, unique=True))
    def join(self, keys: list[bytes]) -> None:
        table: list[int] = []
        assert self.blocks.share(table, keys) == len(table) * BLOCK_TOKENS
        assert [self.content.get(block) for block in table] == keys[: len(table)]
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), num_tokens=st.integers(0, 30))
    def grow(self, data: st.DataObject, num_tokens: int) -> None:
        table = data.draw(st.sampled_from(self.tables))
        before, num_free = list(table), self.blocks.num_free
        num_new = max(0, -(-num_tokens // BLOCK_TOKENS) - len(table))
        assert self.blocks.grow(table, num_tokens) == (num_new <= num_free)
        assert table[: len(before)] == before
        assert len(table) - len(before) == (num_new if num_new <= num_free else 0)
        for block in table[len(before) :]:
            self.content.pop(block, None)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from([b for table in self.tables for b in table]))
        self.blocks.publish(block, key)
        if key not in self.content.values():
            self.content.setdefault(block, key)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.blocks.release(self.tables.pop(index))

    @invariant()
    def every_block_is_owned_or_free(self) -> None:
        owned = {block for table in self.tables for block in table}
        assert len(owned) + self.blocks.num_free == self.blocks.num_blocks


BlockManagerMachine.TestCase.settings = settings(max_examples=60, deadline=None)
TestBlockManager = BlockManagerMachine.TestCase
