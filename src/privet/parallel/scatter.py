"""Sums that leave as they are formed: each is cut, added up over the ranks, and only the own part of it stays.

W ranks, N elements in a bucket.

    put                  a whole sum of this rank's examples, cut into W rows
    reduce-scatter       of a bucket (W, N / W), while the next sums are formed
    values               the own part of each sum over all ranks

No rank ever holds the sum of all ranks but for its own part. Collectives are begun in one order on every rank, whatever
the order in which sums come: a rank may use other parts of the model than another. They have a process group of their
own, so that they may fall between any two gathers of parameters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor

from privet.parallel.agreement import Agreement
from privet.parallel.layout import Layout
from privet.parallel.reduction import BUCKET_BYTES

__all__ = ["ScatterSink"]

# The newer name of the same function, where torch has it.
_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Sent(NamedTuple):
    """A bucket on its way."""

    names: list[str]
    widths: list[int]
    rows: Tensor | None  # (W, n): read by the collective until it is done
    mine: Tensor  # (n,)
    work: Any


@final
class ScatterSink:
    """Takes the whole sums of one batch, and keeps the own parts of the sums over all ranks.

    Args:
        layouts: of the parameters, by name.
        order: of the names, in which the sums are expected. Every name gets one sum.
        group: of the ranks between which a parameter is cut.
        agreement: of all ranks.
        elsewhere: names whose sums another rank forms, which holds the same parts and sees the same examples.
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        order: Sequence[str],
        group: dist.ProcessGroup,
        agreement: Agreement,
        *,
        elsewhere: Collection[str] = (),
    ) -> None:
        self._elsewhere = elsewhere
        self._device: torch.device | None = None  # of the sums that have come
        self._layouts = layouts
        self._order = deque(order)
        self._group = group
        self._agreement = agreement
        self._early: dict[str, Tensor] = {}  # sums that others have to go before
        self._bucket: dict[str, Tensor] = {}
        self._sent: list[_Sent] = []

    def put(self, name: str, value: Tensor) -> None:
        """Takes the sum of one parameter, of all that is cut."""
        self._device = value.device
        self._early[name] = self._layouts[name].cut(value)
        self._go_on()

    def _go_on(self) -> None:
        """Puts the sums that are due into buckets, as far as they have come."""
        while self._order and (self._order[0] in self._early or self._order[0] in self._elsewhere):
            following = self._order.popleft()
            if following in self._elsewhere:
                p = self._layouts[following].parameter
                zero = torch.zeros(
                    self._layouts[following].shape,
                    dtype=torch.promote_types(p.dtype, torch.float32),
                    device=p.device if self._device is None else self._device,
                )
                self._early[following] = self._layouts[following].cut(zero)
            self._add(following, self._early.pop(following))

    def _add(self, name: str, rows: Tensor) -> None:
        """Puts a sum into the bucket, which is sent before it would be too full."""
        held = list(self._bucket.values())
        size = sum(each.numel() for each in held) + rows.numel()
        if held and (size * rows.element_size() > BUCKET_BYTES or not _alike(held[0], rows)):
            self._send()
        self._bucket[name] = rows

    def _send(self) -> None:
        """Begins to reduce and scatter the bucket."""
        bucket, self._bucket = self._bucket, {}
        rows = torch.cat(list(bucket.values()), dim=1) if len(bucket) > 1 else next(iter(bucket.values()))
        mine = rows.new_empty(rows.shape[1])

        def begin() -> Any:
            return _SCATTER(mine, rows.reshape(-1), group=self._group, async_op=True)

        work = self._agreement.guarded(begin)
        # What is done already needs its rows no longer. Nothing is waited for here: another rank may be behind.
        self._sent = [each._replace(rows=None) if each.work.is_completed() else each for each in self._sent]
        self._sent.append(_Sent(list(bucket), [each.shape[1] for each in bucket.values()], rows, mine, work))

    def values(self) -> Mapping[str, Tensor]:
        """Returns the own parts of all sums, once every rank has given its own; those that did not come are zero."""
        self._elsewhere = {*self._elsewhere, *self._order} - set(self._early)
        self._go_on()
        if self._bucket:
            self._send()
        found = {}
        for sent in self._sent:
            self._agreement.guarded(sent.work.wait)
            for name, row in zip(sent.names, torch.split(sent.mine, sent.widths), strict=True):
                layout = self._layouts[name]
                found[name] = layout.own(row).to(layout.parameter.device)  # which may be the host, for offloading
        return found


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device
