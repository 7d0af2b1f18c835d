"""Which examples are replaced in which run, so that every example is tested against every other one.

Example i is replaced in the runs of its own set. All sets have the same size and no two are equal, so none contains
another (Sperner, "Ein Satz über Untermengen einer endlichen Menge", 1928): for every i and j there is a run in which j
is replaced and i is not. Six runs do for 20 examples, eight for 70.
"""

from __future__ import annotations

import itertools
import math
import random

__all__ = ["replacements", "sources_of"]

_LEAST = 6
"""How many runs there are at least: a threshold need not move in each."""


def replacements(examples: int, *, seed: int = 0) -> list[list[bool]]:  # runs, each (B,)
    """Returns for each run which examples are replaced.

    Args:
        examples: B, at least 2.
        seed: decides which example has which set. It is public.
    """
    runs = next(k for k in itertools.count(2) if math.comb(k, k // 2) >= examples)
    sets = list(itertools.islice(itertools.combinations(range(runs), runs // 2), examples))
    found: list[list[bool]] = []
    draws = random.Random(seed)  # noqa: S311 - no secret
    while len(found) < _LEAST:
        draws.shuffle(sets)
        found += [[run in each for each in sets] for run in range(runs)]
    # With fewer examples than sets, a run may replace all or none, which shows nothing.
    return [replaced for replaced in found if any(replaced) and not all(replaced)]


def sources_of(replaced: list[bool], *, seed: int) -> list[int]:
    """Returns for each example another one of the batch, drawn at random, or itself if it is not replaced."""
    draws = random.Random(seed)  # noqa: S311 - no secret
    count = len(replaced)
    return [(index + draws.randrange(1, count)) % count if gone else index for index, gone in enumerate(replaced)]
