"""Random orders that depend on nothing but a key: the same on every machine and with every version of the libraries."""

import hashlib
import math

import numpy as np

ROUNDS = 4


class RandomOrder:
    """A random order of range(length) that is never written down: each element takes a few microseconds and no memory.

    A Feistel network on the smallest rectangle of at least `length` cells; cells beyond it are walked over (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002). Grain's `index_shuffle` does the same on at least 2^16
    cells, which takes milliseconds per element of a short order.
    """

    def __init__(self, length: int, key: str):
        self._length = length
        self._num_columns = math.isqrt(length - 1) + 1
        self._num_rows = -(-length // self._num_columns)
        self._key = hashlib.sha256(key.encode()).digest()

    def __getitem__(self, index: int) -> int:
        """Gives the element at a place in [0, length)."""
        while True:
            index = self._permute_cells(index)
            if index < self._length:
                return index

    def _permute_cells(self, cell: int) -> int:
        row, column = divmod(cell, self._num_columns)
        for i in range(0, ROUNDS, 2):
            column = (column + self._random(i, row)) % self._num_columns
            row = (row + self._random(i + 1, column)) % self._num_rows
        return row * self._num_columns + column

    def _random(self, round_number: int, value: int) -> int:
        message = (value * ROUNDS + round_number).to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(message, digest_size=8, key=self._key).digest(), "little")


def random_order(length: int, key: str) -> np.ndarray:
    """Writes down a random order of range(length): int64 [length]."""
    return np.argsort(np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * length), "<u8"), kind="stable")
