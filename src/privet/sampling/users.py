"""Users with several records each: whose records are whose, and how many of one user's take part in a step.

Where a loader knows users, a sampling draws users in the place of examples, by the same law and at the same price. The
batch holds the records of every user who was drawn, at most `most` of each. Which records those are is drawn anew for
every batch, from the same secret words as the users. All records of a user are one unit: the other users' parts of the
sum do not depend on this choice, so that it costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from privet._checks import check_choice, check_count
from privet.errors import ConfigurationError
from privet.noise.keystream import Keystream

__all__ = ["RecordsOf", "Users", "UsersRecords"]


@dataclass(frozen=True, eq=False)
class Users:
    """Makes a user the unit of privacy, in the place of a record.

    Attributes:
        ids: the user of each record of the dataset, in its order: whole numbers or strings, in a tensor, an array or a
            list. How many different users there are is taken as public.
        most: the contribution bound k: at most so many records of one user take part in a step.
        beyond: what becomes of a user with more records. `"sample"` draws `most` of them anew for every batch;
            `"refuse"` raises when the loader is made.
        gradient: whether the gradient of a user, which is clipped as a whole, is the `"mean"` or the `"sum"` over the
            user's records in the batch.

    Example:
        >>> Users(["ann", "bob", "ann", "ann"], most=2)
        Users(most=2, beyond='sample', gradient='mean')
    """

    ids: Any = field(repr=False)
    most: int
    beyond: Literal["sample", "refuse"] = "sample"
    gradient: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "most", check_count("most", self.most, 1))
        check_choice("beyond", self.beyond, ("sample", "refuse"))
        check_choice("gradient", self.gradient, ("mean", "sum"))


class RecordsOf(NamedTuple):
    """The records of a batch, those of one user next to each other."""

    records: list[int]
    owner: npt.NDArray[np.int64]  # (R,), ascending: which of the users of the batch each record belongs to


@final
class UsersRecords:
    """The records of each user of a dataset.

    Args:
        users: the user of each record, and the contribution bound.
        size: the number of records.

    Raises:
        ConfigurationError: if the ids are not one whole number or string for each record, or if a user has more records
            than the bound, and that is to be refused.
    """

    def __init__(self, users: Users, size: int) -> None:
        self.users = users
        place = _numbered(users.ids, size)
        counts = np.bincount(place)
        self._records = np.argsort(place, kind="stable").astype(np.int64)
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if users.beyond == "refuse" and counts.max() > users.most:
            raise ConfigurationError(
                f"a user has more records than the contribution bound of {users.most}, and beyond='refuse' was given. "
                "Expected a bound that holds for everybody. Leave records away beforehand, raise most=, or let "
                "beyond='sample' draw some of the records for each batch."
            )

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __repr__(self) -> str:
        return repr(self.users)  # it is compared between ranks, and saved: it tells nothing of the records

    def drawn(self, words: Keystream, users: Sequence[int], *, step: int) -> RecordsOf:
        """Returns the records of a batch of these users, at most `most` of each, in the order of the users.

        Of a user with more, a uniformly random choice: those whose words are the smallest.
        """
        chosen = np.asarray(users, dtype=np.int64)
        starts, counts = self._starts[chosen], self._starts[chosen + 1] - self._starts[chosen]
        owner = np.repeat(np.arange(len(chosen)), counts)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # among the user's own records
        if len(counts) and counts.max() > self.users.most:
            order = np.lexsort((words.words(len(owner), step=step, name="records of users"), owner))
            kept = np.sort(order[place < self.users.most])  # the owner of each place of the order is as it was
            owner, place = owner[kept], place[kept]
        records = self._records[starts[owner] + place]
        return RecordsOf(records.tolist(), owner)


def _numbered(ids: Any, size: int) -> npt.NDArray[np.int64]:  # (R,)
    """Returns the users numbered from 0, one number for each record."""
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    try:
        found = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids)
    except (TypeError, ValueError):
        found = np.asarray(None)
    kinds = {str if isinstance(each, str) else int for each in ids} if found.dtype.kind == "U" else {int}
    if found.ndim != 1 or found.dtype.kind not in "iuU" or len(kinds) > 1:
        raise ConfigurationError(
            f"ids of Users must name one user for each record, by whole numbers or strings alone, got "
            f"{type(ids).__name__} that makes an array of {found.dtype} with {found.ndim} axes. Expected shape (R,). "
            "A record that belongs to several users is not covered; a missing id must be a user of its own."
        )
    if len(found) != size:
        raise ConfigurationError(
            f"ids of Users has {len(found)} entries, and the dataset has {size} records. Expected one for each record, "
            "in the order of the dataset."
        )
    return np.unique(found, return_inverse=True)[1].astype(np.int64)
