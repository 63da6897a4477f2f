"""BlockManager: which sequence owns which block of the KV cache, and which blocks can be shared.

A full block whose content is known by a key may be owned by several sequences. When the last owner
lets go, the block stays findable until its place is needed, least recently used first.
"""

from collections import OrderedDict
from collections.abc import Sequence


class BlockManager:
    """Owners of `num_blocks` blocks of `block_tokens` tokens.

    A block table is a list of block ids that belongs to one sequence; only this class changes it.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._num_owners = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks without an owner; some may still be findable by key."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Add blocks to `table` until it holds num_tokens; False and no change if too few."""
        num_new = self.blocks_for(num_tokens) - len(table)
        if num_new > len(self._free):
            return False
        for _ in range(num_new):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._num_owners[block] = 1
            table.append(block)
        return True

    def share(self, table: list[int], keys: Sequence[bytes]) -> int:
        """Fill the empty `table` with the known blocks of `keys`, up to the first unknown one.

        Returns how many tokens they hold.
        """
        assert not table
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._num_owners[block] += 1
            self._free.pop(block, None)
            table.append(block)
        return len(table) * self.block_tokens

    def hold(self, table: list[int], blocks: Sequence[int]) -> None:
        """Fill the empty `table` with blocks that another sequence owns too."""
        assert not table
        for block in blocks:
            assert self._num_owners[block] > 0
            self._num_owners[block] += 1
        table.extend(blocks)

    def publish(self, block: int, key: bytes) -> None:
        """The block is full and computed: whoever has the same key may share it from now on."""
        assert self._num_owners[block] > 0
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, table: list[int]) -> None:
        """Give up every block of `table` and empty it."""
        # The last block first: a chain of keys is useless from its first missing block on.
        for block in reversed(table):
            self._num_owners[block] -= 1
            assert self._num_owners[block] >= 0
            if self._num_owners[block] == 0:
                self._free[block] = None
        table.clear()

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
