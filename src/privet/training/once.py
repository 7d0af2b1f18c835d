"""What was made private: a module once at a time, a layer of several networks once for each, a copy or an end noted.

    what is made private                                      result
    a module or an optimizer that is private now              refused: gradients would be clipped and noised twice
    a network that shares a layer with another private one    allowed on one ledger, which then bills both
    a copy of a private module, or one that was unpickled     allowed: the ledger gets what the original had spent
    a module that was detached                                allowed: if its weights changed meanwhile, that is billed

Networks that share a layer have a gradient each for it: each sum has that of its own network's loss. So their steps are
two releases, and both are on the ledger.
"""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from privet.accounting.role import LedgerLike, begin_non_private
from privet.errors import ProtocolError
from privet.gradients.capture.hook import Hook
from privet.parallel import bare
from privet.training.riding_ledger import CarriedLedger

__all__ = ["Making", "called_by_user", "ended", "made_private", "refuse_private", "refuse_shared", "take_up"]

_WAY_ON = "End the first one with detach(), and make it private anew: with the same engine or ledger, which goes on."
_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_load_state_dict_post_hooks")
_ASIDE = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


@dataclass(frozen=True, eq=False)
class Making:
    """How a module is made private.

    Attributes:
        ledger: where its steps are written. None where they are billed in another way; then nothing is shared.
        watched: whether the user calls the module, which then has hooks (the paper's door), or a step of ours does.
        shares: whether its layers may be those of another network too: not where gradients are shown, or on ranks.
    """

    ledger: LedgerLike | None
    watched: bool = True
    shares: bool = False


@dataclass(frozen=True)
class _Detached:
    """A module that was private: its weights at the end, and whether only public data will change them."""

    ledger: LedgerLike
    digests: dict[str, bytes]
    public: bool


_MADE: weakref.WeakKeyDictionary[nn.Module, list[Making]] = weakref.WeakKeyDictionary()
_OPTIMIZERS: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_DETACHED: weakref.WeakKeyDictionary[nn.Module, _Detached] = weakref.WeakKeyDictionary()


def made_private(module: nn.Module, optimizer: torch.optim.Optimizer, making: Making) -> None:
    """Takes note of what was made private."""
    _MADE.setdefault(module, []).append(making)
    _OPTIMIZERS.add(optimizer)


def called_by_user(module: nn.Module) -> bool:
    """Returns whether a module is private at the paper's door, where the user calls it: its rows are examples."""
    return any(making.watched for making in _MADE.get(bare(module), ()))


def refuse_private(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    making: Making,
) -> None:
    """Raises if something was made private before, in a way that a second one would not be exact beside."""
    if optimizer in _OPTIMIZERS:
        raise _twice(optimizer)
    refuse_shared(module, parameters, making)


def refuse_shared(module: nn.Module, parameters: Mapping[str, nn.Parameter], making: Making) -> None:
    """Raises if parameters are those of another private module too, and the sums of the two would not be exact."""
    for other, makings in _MADE.items():
        # The modules are asked, for a weak reference to a parameter would keep torch from swapping it for another type.
        theirs = {id(p) for p in other.parameters() if p.requires_grad}
        shared = [name for name, p in parameters.items() if id(p) in theirs]
        for before in (each for each in makings if each is not making):
            _refuse_beside(module, making, other, before, shared)


def _refuse_beside(module: nn.Module, making: Making, other: nn.Module, before: Making, shared: list[str]) -> None:
    """Raises if a module cannot be made private beside another one with which it shares parameters."""
    if making.watched or before.watched:
        if other is module:
            raise _twice(module)
        inside = [name for name, child in module.named_modules() if child is other]
        around = [name for name, child in other.named_modules() if child is module]
        if inside or around:
            raise ProtocolError(
                f"parts of the module were made private before: {', '.join(inside)}. Expected one make_private for a "
                "module with all its parts. Make one of the two private."
                if inside
                else f"the module is a part of one that was made private before: {', '.join(around)}. Expected one "
                "make_private for a module with all its parts. Make one of the two private."
            )
    if not shared:
        return
    why = None
    if not (making.shares and before.shares):
        why = "on several ranks, and in the modes that show per-example gradients, they cannot have a gradient each"
    elif making.ledger is not before.ledger:
        why = "each has a ledger of its own, and neither would say what the shared layer has cost"
    if why is not None:
        raise ProtocolError(
            f"another private module has these parameters too: {', '.join(shared)}; {why}. Expected one ledger, in one "
            "process, in the mode 'auto'. Make both private by one engine (or give both steps one ledger=); or put "
            "both networks into one module, such as a ModuleDict with a forward that runs what is asked for, and make "
            "that private."
        )


def _twice(thing: object) -> ProtocolError:
    return ProtocolError(
        f"this {type(thing).__name__} was made private before: its gradients would be clipped and noised twice. "
        f"Expected one make_private for each module and optimizer. {_WAY_ON}"
    )


# -- an end, and a new beginning ---------------------------------------------------------------------------------------


def ended(module: nn.Module, optimizer: torch.optim.Optimizer | None, making: Making, *, public: bool) -> None:
    """Takes note that a module is not private any more, and marks its ledger."""
    makings = [other for other in _MADE.pop(module, []) if other is not making]
    if makings:
        _MADE[module] = makings
    _OPTIMIZERS.discard(optimizer)  # type: ignore[arg-type]
    ledger = making.ledger
    assert ledger is not None
    _DETACHED[module] = _Detached(ledger, _digests(module), public)
    ledger.mark(f"{type(module).__name__} was detached: what trained it afterwards is not on this ledger")


def take_up(module: nn.Module, ledger: LedgerLike) -> None:
    """Puts on the ledger what is known of a module that was private before, and takes the hooks of a copy off it.

    Raises:
        LedgerError: if the ledger that a copy carries is of another relation or unit. Nothing is changed then.
    """
    found_hooks = list(_hooks_of_copies(module))
    for _, _, hook in found_hooks:
        if isinstance(hook, CarriedLedger):
            ledger.load_state_dict(hook.state)
    if any(isinstance(hook, CarriedLedger) for _, _, hook in found_hooks):
        _forget_what_was_shown(module)
    for child, key, _ in found_hooks:
        for table in (*_TABLES, *_ASIDE):
            vars(child).get(table, {}).pop(key, None)
    for child in module.modules():
        found = _DETACHED.pop(child, None)
        if found is not None:
            _say_what_happened(child, found, ledger)


def _forget_what_was_shown(module: nn.Module) -> None:
    """Takes off a copy what the modes that show per-example gradients have put on its original."""
    for p in module.parameters():
        for attribute in ("grad_sample", "summed_grad"):
            vars(p).pop(attribute, None)
    function = getattr(vars(module).get("zero_grad"), "__func__", None)
    if function is type(module).zero_grad or getattr(function, "__module__", "") == "privet.training.materialised":
        del module.zero_grad  # a pickle has made it that of the class


def _say_what_happened(module: nn.Module, before: _Detached, ledger: LedgerLike) -> None:
    """Bills a change of weights since a module was detached, and marks a ledger that lacks what it had spent."""
    name, now = type(module).__name__, _digests(module)
    changed = sorted(key for key, digest in before.digests.items() if now.get(key, digest) != digest)
    both = [before.ledger] if before.ledger is ledger else [before.ledger, ledger]
    if changed and before.public:
        for each in both:
            each.mark(f"{name} changed while it was detached, by what was declared to ask no private data")
    elif changed:
        for each in both:
            begin_non_private(each, f"{name} changed while it was detached, without privacy")
        warnings.warn(
            f"this {name} has changed since it was detached ({', '.join(changed)}): it may have been trained on "
            "private data, so epsilon is infinite from now on. If only public data or released weights changed it, "
            "say so when it is detached: detach(..., public=True).",
            stacklevel=4,
        )
    if before.ledger is not ledger and before.ledger.steps and not _holds(ledger, before.ledger):
        ledger.mark(f"{name} was trained privately before, on another ledger: what that cost is not on this one")


def _holds(ledger: LedgerLike, other: LedgerLike) -> bool:
    """Returns whether a ledger has all runs of another one."""
    runs = (each.state_dict().get("runs") for each in (ledger, other))
    mine, theirs = (set(found) if isinstance(found, Mapping) else None for found in runs)
    return mine is not None and theirs is not None and theirs <= mine


def _digests(module: nn.Module) -> dict[str, bytes]:
    """Returns a digest of the values of each parameter, by name."""
    found = {}
    for name, p in module.named_parameters():
        values = p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found[name] = hashlib.blake2b(values.tobytes(), digest_size=16).digest()
    return found


def _hooks_of_copies(module: nn.Module) -> Iterator[tuple[nn.Module, int, Hook]]:
    """Yields the hooks that a copy of a private module carries: the module that has each, and its number there."""
    for child in module.modules():
        for table in _TABLES:
            hooks: dict[int, Any] = vars(child).get(table, {})
            yield from ((child, key, hook) for key, hook in hooks.items() if isinstance(hook, Hook) and hook.of_copy)
