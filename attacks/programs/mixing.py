"""Examples that meet inside of the model or the loss, where neither a class nor a sum shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attacks.doors import moved, moved_explicitly, others_moved, rows, squares
from attacks.table import Outcome, attack
from privet import PrivetError

KIND = "mixing"
B = 16


class Mixing(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.first, self.out, self.between = nn.Linear(3, 4), nn.Linear(4, 2), between
        self.calls = 0
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.between(self, self.first(x)))


def mixed(between: Callable[[Any, Tensor], Tensor], **parts: Callable[[], Any]) -> float:
    """Returns what a model moves that does this between its layers, after a few batches at both doors."""

    def make() -> nn.Module:
        return Mixing(between, **{name: part() for name, part in parts.items()})

    before = [rows(B, 3, seed=s) for s in (5, 6)]
    found, stopped = 0.0, None
    for explicit in (False, True):  # what one door stops may get through the other
        try:
            found = max(found, others_moved(make, rows(B, 3), before=before, explicit=explicit))
        except PrivetError as error:
            stopped = error
    if stopped is not None and found <= 1.001:
        raise stopped
    return found


def _shifted(h: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(h[:1]), h[:-1]])


def _last_sees_all(h: Tensor) -> Tensor:
    return torch.cat([h[:-1], h[-1:] + 5.0 * h[:-1].mean(0, keepdim=True)])


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the batch's mean subtracted": lambda m, h: h - h.mean(0),
    "the row before, detached": lambda m, h: h + 5.0 * _shifted(h).detach(),
    "a cumulative mean, detached": lambda m, h: h + 5.0 * (h.cumsum(0) / torch.ones_like(h).cumsum(0)).detach(),
    "the last row sees the others": lambda m, h: _last_sees_all(h),
    "a threshold that is the batch's mean": lambda m, h: h * (h[:, :1] >= h[:, :1].mean()),
    "hard examples chosen inside": lambda m, h: h * (h.norm(dim=1) >= h.norm(dim=1).median())[:, None],
    "a softmax over the batch": lambda m, h: h * h.softmax(0),
    "only where gradients are on": lambda m, h: h - h.mean(0).detach() if torch.is_grad_enabled() else h,
    "only where a gradient is needed": lambda m, h: h - h.mean(0).detach() if h.requires_grad else h,
    "rows rolled by one": lambda m, h: h.roll(1, 0),
}  # fmt: skip
for _name, _form in FORMS.items():
    attack(KIND, _name)(lambda form=_form: mixed(form))


@attack(KIND, "batch normalisation")
def _() -> Outcome:
    return mixed(lambda m, h: m.norm(h), norm=lambda: nn.BatchNorm1d(4))


@attack(KIND, "a frozen LSTM that takes the batch for time")
def _() -> Outcome:
    return mixed(
        lambda m, h: m.frozen(h[:, None].detach())[0][:, -1] + h,
        frozen=lambda: nn.LSTM(4, 4).requires_grad_(False),
    )


@attack(KIND, "frozen causal attention over the batch")
def _() -> Outcome:
    return mixed(
        lambda m, h: (
            h + 5.0 * nn.functional.scaled_dot_product_attention(h[None], h[None], h[None], is_causal=True)[0].detach()
        )
    )


@attack(KIND, "a gate of zero at the start, over a mean of the batch")
def _() -> Outcome:
    return mixed(lambda m, h: h + m.gate * h.mean(0), gate=lambda: nn.Parameter(torch.zeros(1)))


@attack(KIND, "a gate of zero at the start, over attention to the batch")
def _() -> Outcome:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out, self.gate = nn.Linear(3, 4), nn.Linear(4, 2), nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.out(h + self.gate * torch.softmax(h @ h.T, 1) @ h)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        found = squares(model, batch)
        with torch.no_grad():
            model.gate.fill_(1.0)
        return found

    def opened(run: Callable[..., float]) -> float:
        return run(Gated, (rows(B, 3),), before=[(rows(B, 3, seed=9),)], loss=loss)

    return max(opened(moved), opened(moved_explicitly))


class _MixesBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (h,) = ctx.saved_tensors
        return gradient * h.norm(dim=1).mean()


@attack(KIND, "in the backward alone, by a Function")
def _() -> Outcome:
    # Short gradients, so that clipping does not hide what rescales them.
    return others_moved(
        lambda: Mixing(lambda m, h: _MixesBackward.apply(h)), rows(B, 3), factor=1e-4, before=[rows(B, 3)]
    )


@attack(KIND, "in the backward alone, by a hook")
def _() -> Outcome:
    def between(m: Any, h: Tensor) -> Tensor:
        h = h * 1.0
        if h.requires_grad:
            norm = h.detach().norm(dim=1).mean()
            h.register_hook(lambda g: g * norm)
        return h

    return others_moved(lambda: Mixing(between), rows(B, 3), factor=1e-4, before=[rows(B, 3)])


@attack(KIND, "a second head that mixes, first used in the second batch")
def _() -> Outcome:
    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        model.calls += 1  # type: ignore[operator]
        return squares(model, batch)

    return moved(
        lambda: Mixing(lambda m, h: m.second(h - 3.0 * h.mean(0)) if m.calls > 1 else h, second=nn.Linear(4, 4)),
        (rows(B, 3),),
        before=[(rows(B, 3, seed=4),)],
        loss=loss,
    )


@attack(KIND, "explicit door: a loss that looks at the row before")
def _() -> Outcome:
    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        found = squares(model, batch)
        return found + found.roll(1).detach() * found

    return moved_explicitly(lambda: nn.Linear(3, 2), (rows(B, 3),), loss=lambda m, b: 1e-4 * loss(m, b))


@attack(KIND, "explicit door: a loss divided by the size of the batch")
def _() -> Outcome:
    against = torch.tensor([-1.0, *[1.0] * 7])  # the first gradient points the other way, and its absence is felt twice
    return moved_explicitly(
        lambda: nn.Linear(3, 2),
        (torch.ones(8, 3), against),
        loss=lambda m, b: 7.0 / 8.0**0.5 * b[1] * m(b[0]).sum(1) / len(b[0]),
    )
