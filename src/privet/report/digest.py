"""The digest of a ledger: what a report and a reader compare, to know whether both speak of the same record."""

from __future__ import annotations

import hashlib
import json

from privet.accounting import LedgerLike
from privet.errors import LedgerError

__all__ = ["ledger_digest"]


def ledger_digest(ledger: LedgerLike) -> str:
    """Returns the SHA-256 of a ledger in a canonical form, as 64 hexadecimal digits.

    The form is the JSON of `state_dict()` in UTF-8, with sorted keys, sorted marks and no spaces; a float is written
    with the digits that read back as the same float. So the record alone matters: a ledger in memory and a file with
    the same runs have the same digest, whatever their budgets and accountants.

    Raises:
        LedgerError: if the ledger holds a value that JSON does not have.
    """
    state = dict(ledger.state_dict())
    marks = state.get("marks")
    if isinstance(marks, list):
        state["marks"] = sorted(marks)
    try:
        text = json.dumps(state, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LedgerError(
            f"The ledger has no canonical form: {error}. Its events must have fields that JSON has."
        ) from error
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
