"""The part of every logical batch that one rank takes, when several ranks train together.

Every rank draws the whole batch from one key, and takes a part of it that no other rank takes. So the law of the whole
batch, its ε and its examples are those of one process, whatever the number of ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np

from privet._checks import check_count
from privet.errors import ConfigurationError

__all__ = ["WHOLE", "Share"]


@dataclass(frozen=True)
class Share:
    """Every `ranks`-th example of a batch, from place `rank` on: the sizes of two shares differ by at most one.

    Example:
        >>> Share(rank=1, ranks=3).of([10, 11, 12, 13, 14])
        [11, 14]
    """

    rank: int = 0
    ranks: int = 1
    together: bool = False  # whether all ranks take a batch in equally many parts, since each forward needs all of them

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        if self.rank >= check_count("ranks", self.ranks, 1):
            raise ConfigurationError(f"rank must be below the number of ranks, {self.ranks}, got {self.rank}.")

    def of(self, examples: list[int]) -> list[int]:
        """Returns the examples of this share of a batch."""
        return examples if self.ranks == 1 else examples[self.rank :: self.ranks]

    def largest(self, examples: list[int]) -> int:
        """Returns how many examples the largest share of a batch has. Every rank knows it."""
        return -(-len(examples) // self.ranks)

    @property
    def readable(self) -> int:
        """Returns an example that this rank can read, whether it is in a batch or not."""
        return 0

    def digest(self, examples: list[int]) -> int:
        """Returns a number by which ranks see that they drew the same batch; 0 for a batch of this process alone.

        Two machines with unlike mathematical libraries could draw unlike batches from one key, and then an example
        could be in two shares.
        """
        if self.ranks == 1 and not self.together:
            return 0
        drawn = np.asarray(examples, dtype="<i8").tobytes()
        return int.from_bytes(hashlib.blake2b(drawn, digest_size=8).digest(), "big") >> 1


WHOLE: Final = Share()
"""The share of a process that trains alone."""
