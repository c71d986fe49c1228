"""A set of inode numbers in little memory: they come in dense runs, so a bit each, in integers of 512."""

from collections.abc import Iterable, Iterator

_BITS = 9
_MASK = (1 << _BITS) - 1


class InodeSet:
    """10 million numbers in a few megabytes if they lie close together, as those of one directory do."""

    def __init__(self) -> None:
        self._words: dict[int, int] = {}

    def add(self, ino: int) -> None:
        key = ino >> _BITS
        self._words[key] = self._words.get(key, 0) | 1 << (ino & _MASK)

    def update(self, numbers: Iterable[int]) -> None:
        for ino in numbers:
            self.add(ino)

    def discard(self, ino: int) -> None:
        key = ino >> _BITS
        word = self._words.get(key, 0) & ~(1 << (ino & _MASK))
        if word:
            self._words[key] = word
        else:
            self._words.pop(key, None)

    def __contains__(self, ino: int) -> bool:
        return bool(self._words.get(ino >> _BITS, 0) >> (ino & _MASK) & 1)

    def __bool__(self) -> bool:
        return bool(self._words)

    def __iter__(self) -> Iterator[int]:
        """The numbers, in any order. The set must not change meanwhile."""
        for key, word in self._words.items():
            left = word
            while left:
                low = left & -left
                yield (key << _BITS) + low.bit_length() - 1
                left ^= low
