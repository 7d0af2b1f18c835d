"""Whose the rows of a batch are, where a user with several records is the unit of privacy.

The loader draws users, and its ticket tells which user each row belongs to. A sum that clips the rows of two users
together, or those of one user apart, would not be bounded. So it has to be certain which batch a backward is on, and
that its rows are in the order in which they were handed over; else it is refused.
"""

from __future__ import annotations

from typing import final

import numpy as np
import numpy.typing as npt
import torch

from privet.accounting.event import Unit
from privet.accounting.role import LedgerLike
from privet.errors import ConfigurationError, ProtocolError
from privet.gradients.use import Owner
from privet.sampling.physical import PhysicalSize
from privet.sampling.users import Users
from privet.training.update import PrivateUpdate

__all__ = ["ROWS_MARK", "USERS_MARK", "Whose", "mark_users", "refuse_small", "refuse_users"]

USERS_MARK = "users were drawn, and the gradient of each was clipped as a whole"
"""The mark of a ledger with steps of users who have several records."""

ROWS_MARK = "beside users who were drawn, rows were taken for one user each"
"""The mark of a ledger with both kinds of steps: the second rests on what the data set's builder declared."""


def refuse_users(users: Users | None, ledger: LedgerLike, *, without: str | None = None) -> None:
    """Raises if users cannot be the unit of privacy here.

    Args:
        users: whose records are whose, if anybody's.
        ledger: where steps are billed.
        without: an option in force that needs a row for each unit, if there is one.

    Raises:
        ConfigurationError: if the ledger is about another unit, or there is such an option.
    """
    if users is None:
        return
    if ledger.unit not in {Unit.USER, Unit.GROUP}:
        raise ConfigurationError(
            f"users= makes a user the unit of privacy, and the ledger says that one unit is one {ledger.unit.value}. "
            'Expected a ledger of users. Give unit="user" where the engine, the step or the ledger is made.'
        )
    if without is not None:
        raise ConfigurationError(
            f"users= was given with {without}, which needs one row for each unit, and users have several records, each "
            f"another number. Expected training without it. Leave {without} away."
        )


def refuse_small(users: Users | None, size: PhysicalSize) -> None:
    """Raises if physical batches may be smaller than what one user may have in a batch.

    Raises:
        ConfigurationError: if their size is searched for, or below the contribution bound.
    """
    if users is None or (size.most is None and not size.auto) or (size.most is not None and size.most >= users.most):
        return
    found = "'auto', which may come down to one record" if size.auto else f"{size.most} records"
    raise ConfigurationError(
        f"physical batches have a size of {found}, and the records of a user, at most {users.most}, are clipped "
        f"together. Expected a number of at least {users.most}. Give one, or lower most= of Users."
    )


def mark_users(users: Users | None, ledger: LedgerLike) -> None:
    """Writes on the ledger by what its steps are bounded for users, if they are."""
    known = USERS_MARK in ledger.marks
    if users is None:
        if known:
            ledger.mark(ROWS_MARK)
        return
    if ledger.steps and not known:
        ledger.mark(ROWS_MARK)
    ledger.mark(USERS_MARK)


@final
class Whose:
    """The user of each row of the backward at hand, where a row is not a unit by itself.

    Args:
        update: the training.
        examples: the rows that the backward is on.

    Attributes:
        rows: (R,), ascending, or None where each row is a unit.

    Raises:
        ProtocolError: if it is not certain which batch of the loader this is. Nothing was released.
    """

    def __init__(self, update: PrivateUpdate, examples: int) -> None:
        self._users = update.loaders.users
        self._device = next(iter(update.parameters.values())).device
        self.rows: npt.NDArray[np.int64] | None = None
        if self._users is not None:
            self.rows = _rows_of(update, examples) if examples else np.zeros(0, dtype=np.int64)

    def owner(self, start: int, stop: int) -> Owner | None:
        """Returns the owner of some of the rows, which begin with a user's first one and end with a user's last."""
        if self.rows is None or self._users is None:
            return None
        index = torch.from_numpy(self.rows[start:stop] - self.rows[start : start + 1])
        return Owner.of_rows(index, average=self._users.gradient == "mean", device=self._device)


def _rows_of(update: PrivateUpdate, examples: int) -> npt.NDArray[np.int64]:
    ticket, latest = update.known, update.billing.handed_over.latest
    if ticket is not None and ticket.owner is not None and len(ticket.owner) == examples:
        certain = ticket.whole or ticket.parts > 1 or ticket is latest  # declared parts are taken in turn, by others
        if certain:
            return ticket.owner
    raise ProtocolError(
        f"a backward ran on {examples} rows, and it is not certain whose records they are: no tensor that the "
        "model was given is one of the batch that the loader handed over, with its rows in their order. Expected "
        "the loader's own tensors, or copies of the same type on another device. Change records in the dataset or "
        "in collate_fn, and leave their order alone. Nothing was released."
    )
