"""Parameters that become trainable, or are added, once training is private: taken in, or refused in words.

Gradual unfreezing, an adapter that is added later, a new head: from its next forward on, such a parameter is one of the
private ones. Its gradients are part of each example's norm, its sum gets noise, and the batch that meets it first is
checked. What a step costs does not change, for the sensitivity is that of the whole gradient.

    what                                           result
    it is in the optimizer                         taken in at the next forward
    it is not in the optimizer                     refused, by name
    it came between backward and step              refused: a part of the batch was clipped without it
    its name is that of a parameter that is gone   refused: a layer was replaced
    on several ranks                               refused: the ranks compared their parameters when training began
    clipping names its parameters or layers        refused by the policy, which has no bound for it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from privet.errors import ConfigurationError
from privet.gradients.passes.two_pass import refuse_several_weights
from privet.gradients.weights import groups_of
from privet.parallel.names import canonical_names
from privet.training.once import Making, refuse_shared
from privet.training.update import PrivateUpdate
from privet.validation import require_valid

__all__ = ["admit"]

_ANEW = "end private training with detach(), and make the module private anew with an optimizer that holds it"


def admit(
    module: nn.Module, update: PrivateUpdate, making: Making, found: Mapping[str, nn.Parameter], *, passes: int = 1
) -> None:
    """Makes parameters private ones from now on.

    Args:
        module: the private module.
        update: of that module.
        making: how it was made private.
        found: the parameters, by name.
        passes: how many backwards a step takes.

    Raises:
        ConfigurationError: if they may not train. Nothing is changed then.
        ProtocolError: inside a logical step. Nothing is changed then.
        UnsupportedModelError: if they came with a module that cannot be trained privately.
    """
    names = ", ".join(found)
    if update.ranks.share.ranks > 1:
        raise ConfigurationError(
            f"{_are_trainable(list(found))} and was frozen, or absent, when training became private on several ranks. "
            "Expected the same trainable parameters. Freeze it again; or build a new module on each rank, "
            "load_state_dict() what this one learned, and make that private. If the module was wrapped or sharded "
            "since (fully_shard), do so before make_private or PrivateStep, and build the optimizer between the two."
        )
    optimizer = update.optimizer
    held = {id(p) for group in (optimizer.param_groups if optimizer else []) for p in group["params"]}
    missing = [name for name, p in found.items() if id(p) not in held]
    if missing:
        raise ConfigurationError(
            f"{_are_trainable(missing)} and was frozen, or absent, when training became private, and the optimizer "
            "does not hold it: it would never be moved. Expected every trainable parameter in the optimizer. "
            "Add it: optimizer.add_param_group({'params': [...]}), and it trains with privacy from the next forward "
            "on. Freeze it again if it is not to be trained. If the module was wrapped or sharded since (fully_shard), "
            "do so before make_private or PrivateStep, and build the optimizer between the two."
        )
    gone = [name for name in found if name in update.parameters]
    if gone:
        raise ConfigurationError(
            f"{_are_trainable(gone)}, and another parameter had that name when training became private: a "
            f"layer was replaced. Expected the same parameters, or new ones under new names. To train it, {_ANEW}."
        )
    update.refuse_mid_step(f"{names} became trainable")
    everything = {**update.parameters, **found}
    groups_of(update.mechanism.clipping, list(everything))
    if passes == 2:
        refuse_several_weights(update.mechanism.clipping, list(everything))
    refuse_shared(module, found, making)
    require_valid(module)
    names_of = canonical_names(module, everything)
    place = {id(p): n for n, (_, p) in enumerate(module.named_parameters())}
    ordered = sorted(everything.items(), key=lambda item: place.get(id(item[1]), len(place)))
    update.admit({names_of.get(name, name): p for name, p in ordered})


def _are_trainable(names: Sequence[str]) -> str:
    """Returns that parameters are trainable now, in words."""
    others = f" (so are {', '.join(names[1:])})" if len(names) > 1 else ""
    return f"{names[0]} is trainable now{others}"
