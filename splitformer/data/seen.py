"""Ids that came before, in a few bytes each."""

from __future__ import annotations

from array import array


class Seen:
    """Strings by their 64-bit hashes, in a table with open addressing: 12 to 24 bytes each, where a set of strings
    would take about 150. Among ten million, that two different ones are taken for the same has a chance of 3 in
    a million (the birthday bound, n ** 2 / 2 ** 65)."""

    def __init__(self) -> None:
        self._table = array("Q", [0]) * 1024
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, name: str) -> bool:
        """Whether `name` is new."""
        if 3 * self._count >= 2 * len(self._table):
            self._grow()
        key = hash(name) & 0xFFFF_FFFF_FFFF_FFFF or 1  # 0 is a free place
        new = _put(self._table, key)
        self._count += new
        return new

    def _grow(self) -> None:
        old, self._table = self._table, array("Q", [0]) * (2 * len(self._table))
        for key in old:
            if key:
                _put(self._table, key)


def _put(table: array[int], key: int) -> bool:
    mask = len(table) - 1  # their number is a power of two
    place = key & mask
    while table[place]:
        if table[place] == key:
            return False
        place = (place + 1) & mask
    table[place] = key
    return True
