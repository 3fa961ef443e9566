"""KVCache: keys and values of the sequences being decoded, one row each.

Slot i of a row holds position i of its canvas. A forward pass writes the positions it is fed and reads whole rows, so
the first pass over a row that was just acquired must feed every position.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


class KVCache:
    """Keys and values (P, S, heads, D) of each layer: P rows of S slots. Without rows in use it holds no memory."""

    def __init__(self, layers: int, heads: int, head_dim: int, *, like: Tensor) -> None:
        """An empty cache for a model of so many `layers` and key `heads`, in dtype and on the device of `like`."""
        self._empty = [like.new_zeros(0, 0, heads, head_dim)] * layers
        self.keys = self._empty
        self.values = self._empty
        self._lengths: list[int] = []  # of each row's canvas; 0 where the row is free

    @property
    def rows(self) -> int:
        """P: rows in use or free."""
        return len(self._lengths)

    @property
    def slots(self) -> int:
        """S: the longest canvas that fits."""
        return self.keys[0].shape[1]

    @property
    def in_use(self) -> int:
        """Rows that somebody has acquired and not released."""
        return self.rows - self._lengths.count(0)

    def acquire(self, length: int) -> int:
        """A free row for a canvas of `length` positions. The cache grows when it must, keeping what it holds."""
        if 0 not in self._lengths:
            self._grow(max(1, 2 * self.rows), max(length, self.slots))
        elif length > self.slots:
            self._grow(self.rows, length)
        row = self._lengths.index(0)
        self._lengths[row] = length
        return row

    def release(self, row: int) -> None:
        """Give a row back. The last one to go frees the memory."""
        self._lengths[row] = 0
        if not self.in_use:
            self._lengths = []
            self.keys = self._empty
            self.values = self._empty

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """The canvas lengths of some rows; 1 for a free row, so that attention over it is defined."""
        return [max(1, self._lengths[row]) for row in rows]

    def _grow(self, rows: int, slots: int) -> None:
        more = (0, 0, 0, 0, 0, slots - self.slots, 0, rows - self.rows)  # zeros, at the end of slots and rows
        # All or nothing: when memory runs out, the cache is as it was
        keys = [F.pad(layer, more) for layer in self.keys]
        values = [F.pad(layer, more) for layer in self.values]
        self.keys = keys
        self.values = values
        self._lengths += [0] * (rows - self.rows)
