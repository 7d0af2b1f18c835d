"""Process groups of our own, beside those that wrappers use: made once, and used by every module that comes later."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["group_for", "meeting_for"]

_MADE: list[tuple[dist.ProcessGroup, str, tuple[int, ...], dist.ProcessGroup]] = []


def group_for(purpose: str, ranks: Sequence[int], *, like: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    """Returns a group of some ranks that is used for one purpose alone. All of these ranks call it.

    Args:
        purpose: what it is for. Collectives of two purposes may be begun in any order.
        ranks: its members, as numbers in the default group.
        like: a group whose timeout it has.
        backend: moves the data.
    """
    world = dist.group.WORLD
    assert world is not None
    wanted = (f"{purpose} over {backend}", tuple(ranks))
    for its_world, *known, made in _MADE:
        if its_world is world and tuple(known) == wanted:
            return made
    group = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True, timeout=_timeout_of(like))
    _MADE.append((world, *wanted, group))
    return group  # type: ignore[no-any-return]


def meeting_for(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Returns a group of the same ranks that moves numbers between hosts: no device is waited for to read them."""
    ranks = dist.get_process_group_ranks(group)
    return group_for("meetings", ranks, like=group, backend="gloo")


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """Returns the timeout that the user gave to a group, or None if torch does not tell it."""
    for kind in ("cuda", "cpu"):
        try:  # torch has no public way to read what was given to init_process_group
            found: Any = group._get_backend(torch.device(kind)).options._timeout  # noqa: SLF001
        except (AttributeError, RuntimeError):
            continue
        if isinstance(found, timedelta):
            return found
    return None
